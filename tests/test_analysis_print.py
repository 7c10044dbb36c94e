"""The page on paper and on a phone, in a real browser: complete, readable, nothing cut off."""

import re
import unicodedata

import pytest

from analysis.reading import HOW
from analysis.report import build, text_files
from analysis_records import dbp, ldb, run_line, search_lines, synthetic, write
from browser import CHROMIUM, DRIVER, browser
from pdf_text import pdf_text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no chromium or no chromedriver on this machine"),
]
PAPER = 702  # CSS pixels between the margins of A4


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two tasks; on the first a combination and two settings of one method, memory, and a long name."""
    lines = synthetic(5) + search_lines(4)
    for seed in range(5):
        for arm, method, seconds in (("both", dbp() | {"inner": ldb()}, 6.6), ("ldb", ldb(0.9), 6.9)):
            lines.append(
                run_line(arm=arm, role="method", method=method, seed=seed, train_seconds=seconds + 0.01 * seed)
            )
    for line in lines:
        if line["kind"] == "run":
            line["peak_memory_bytes"] = 2**30 + 2**24 * (len(line["arm"]) + line["seed"])
    other = [line | {"run_key": f"{line['run_key']}x"} for line in synthetic(5) if "run_key" in line]
    task = {"data": "folder:a-folder-with-a-rather-long-name", "model": "timm:vit_small_patch16_224"}
    other = [line | {"task": task} if "task" in line else line for line in other]
    folder = tmp_path_factory.mktemp("page")
    contents = dict(text_files(build([write(folder / "records.jsonl", lines + other)])))
    path = folder / "report.html"
    path.write_bytes(contents["report.html"])
    return path


def squeezed(text):
    return re.sub(r"\s", "", unicodedata.normalize("NFKC", text))


# --- paper -------------------------------------------------------------------------------------------------------


def test_the_printed_page_is_complete(window, page):
    window.open(page, 1200)
    window.run("document.querySelector('.legend button[data-arm=\"1\"]').click()")
    assert window.run("return document.querySelectorAll('.mark.off').length") > 0
    hidden = window.run(
        "return [...document.querySelectorAll('details:not([open]) td:first-child')].map(c => c.textContent.trim())"
    )
    names = window.run("return [...document.querySelectorAll('.legend button')].map(b => b.textContent.trim())")
    headers = window.run("return [...document.querySelectorAll('th, h2, h3, summary')].map(h => h.textContent.trim())")
    text = pdf_text(window.pdf())
    assert hidden, "there is no closed table on the page to print"
    missing = [t for t in (*hidden, *names, *headers, *HOW) if squeezed(t) not in text]
    assert not missing, f"not on paper: {missing}"
    assert "Scrollthetablesideways" not in text
    assert window.run("return document.querySelectorAll('details[open]').length") == 0, "printing left tables open"


VISIBLE = """
const seen = e => { const b = e.getBoundingClientRect(); return b.width > 0 && b.height > 0; };
const marks = [...document.querySelectorAll("figure.wide .mark, figure.panel .mark[data-arm]")];
return {
  off: marks.filter(m => !seen(m.querySelector(".dot"))).length,
  unnamed: marks.filter(m => ![...m.querySelectorAll(".name, .number")].some(seen)).length,
  legends: [...document.querySelectorAll(".legend")].filter(l => !seen(l)).length,
  numbers: [...document.querySelectorAll(".legend button")].map(b => b.innerText.replace(/\\s+/g, " ")),
  struck: [...document.querySelectorAll(".legend button")]
    .filter(b => getComputedStyle(b).textDecorationLine !== "none" || getComputedStyle(b).opacity !== "1").length,
  closed: [...document.querySelectorAll("details td")].filter(c => !c.checkVisibility()).length,
  tables: [...document.querySelectorAll("table")].filter(t => t.scrollWidth > document.body.clientWidth + 1)
    .map(t => t.closest("section").id),
  page: document.documentElement.scrollWidth - innerWidth,
};
"""


def test_on_paper_every_mark_has_its_number_or_name(window, page):
    """Printed from a dark screen with an arm toggled off."""
    window.open(page, PAPER, theme="dark", media="print")
    window.run("document.querySelector('.legend button[data-arm=\"1\"]').click()")
    found = window.run(VISIBLE)
    assert found["off"] == 0, f"{found['off']} marks are hidden on paper"
    assert found["unnamed"] == 0, f"{found['unnamed']} marks have neither name nor number"
    assert found["legends"] == 0
    assert found["struck"] == 0, "an arm that was toggled off is struck out on paper"
    assert found["closed"] == 0, "cells of a closed table"
    assert found["numbers"][:3] == ["1 bp", "2 ldb(drop_rate=0.5)", "3 ldb(drop_rate=0.9)"], found["numbers"]
    assert not found["tables"], f"tables wider than the paper: {found['tables']}"
    assert found["page"] <= 0
    assert window.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_on_the_screen_there_are_no_numbers(window, page):
    window.open(page, 1200)
    found = window.run(VISIBLE)
    assert found["numbers"][0] == "bp"
    assert found["unnamed"] > 0


# --- a phone -----------------------------------------------------------------------------------------------------

CUT = """
const out = [];
const clipped = e => {  // whether an ancestor that scrolls by itself holds it
  for (let p = e.parentElement; p; p = p.parentElement) if (p.classList.contains("scroll")) return true;
  return false;
};
for (const e of document.querySelectorAll("h1, h2, h3, p, li, summary, a, button, .badge, figcaption")) {
  const box = e.getBoundingClientRect();
  if (!box.width || clipped(e)) continue;
  if (box.left < -1 || box.right > innerWidth + 1 || e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)
    out.push(e.tagName + ": " + e.textContent.trim().slice(0, 60));
}
for (const text of document.querySelectorAll("figure text")) {
  const box = text.getBoundingClientRect(), frame = text.closest("svg").getBoundingClientRect();
  if (box.width && (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1))
    out.push("drawn: " + text.textContent);
}
return out;
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_all_text_and_scrolls_only_down(window, page, theme):
    window.open(page, 375, 812, theme=theme)
    assert window.run("return innerWidth") == 375
    assert window.run("return document.documentElement.scrollWidth") <= 375, "the page scrolls sideways"
    window.run("for (const d of document.querySelectorAll('details')) d.open = true")
    assert window.run("return document.documentElement.scrollWidth") <= 375, "an opened table widens the page"
    cut = window.run(CUT)
    assert not cut, f"cut off at 375 px: {cut}"
    smallest = window.run(
        "return Math.min(...[...document.querySelectorAll('p, li, td, button, figure.narrow text')]"
        ".filter(e => e.getBoundingClientRect().width && !e.closest('.number'))"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 11, f"text of {smallest} px"
    ground = window.run("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(20, 23, 28)") == (theme == "dark"), f"{theme} theme on {ground}"
    assert len(window.picture()) > 20_000
