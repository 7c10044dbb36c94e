"""The page in a real browser: it must draw, answer the pointer and sort, without one error."""

import html
import json
import re
import subprocess
from dataclasses import replace

import pytest

from analysis.links import Origin, run_url
from analysis.report import build, text_files
from analysis_records import search_lines, synthetic, write
from browser import CHROMIUM

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]

PROBE = """
<script>
addEventListener("error", event => document.body.dataset.error = event.message);
addEventListener("load", () => {
  const out = {};
  const tip = document.getElementById("tip");
  const figure = innerWidth > 640 ? "wide" : "narrow";
  const mark = [...document.querySelectorAll(`figure.${figure} .mark`)].find(m => m.dataset.tip.startsWith("ldb ·"));
  mark.dispatchEvent(new PointerEvent("pointermove", {clientX: 300, clientY: 300}));
  out.tip = tip.hidden ? "hidden" : tip.textContent;
  mark.dispatchEvent(new PointerEvent("pointerleave"));
  out.after = tip.hidden;
  mark.dispatchEvent(new MouseEvent("click", {clientX: 300, clientY: 300, bubbles: true}));
  mark.dispatchEvent(new PointerEvent("pointerleave"));
  out.pinned = tip.hidden ? "hidden" : tip.innerText;
  out.reachable = getComputedStyle(tip).pointerEvents;
  document.body.click();
  out.unpinned = tip.hidden;
  mark.focus();
  mark.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
  out.focused = tip.contains(document.activeElement);
  out.links = [...tip.querySelectorAll("a")].map(a => a.href);
  dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
  out.escaped = tip.hidden && document.activeElement === mark;
  mark.blur();
  out.scripts = document.querySelectorAll("#tip script, template script").length;
  out.hints = [...document.querySelectorAll(".hint")].filter(h => h.getBoundingClientRect().height > 0)
    .map(h => h.closest("section").id);
  const table = document.querySelector("#pareto table");
  const sort = name => [...table.querySelectorAll("th button")].find(b => b.textContent.includes(name)).click();
  const order = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent.trim());
  sort("speed-up");
  out.up = order();
  sort("speed-up");
  out.down = order();
  sort("training time");
  out.numbers = order();
  sort("arm");
  out.names = order();
  document.querySelector('.legend button[data-arm="1"]').click();
  out.hidden = document.querySelectorAll("figure.wide .mark.off").length;
  out.wide = document.documentElement.scrollWidth - innerWidth;
  out.shown = [...document.querySelectorAll("figure:not(.panel)")].filter(f => f.getBoundingClientRect().height > 0)
    .map(f => f.className);
  document.body.dataset.probe = JSON.stringify(out);
});
</script>
"""


def chromium(tmp_path, *arguments):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--hide-scrollbars", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()[-500:]
    return done.stdout.decode()


def probed(tmp_path, page, width):
    """What the page's probe found at a width."""
    dom = chromium(tmp_path, f"--window-size={width},1000", "--dump-dom", page.as_uri())
    assert "data-error" not in dom, re.findall('data-error="([^"]*)"', dom)
    found = re.search('data-probe="([^"]*)"', dom)
    assert found, "the script of the page did not run to its end"
    return json.loads(html.unescape(found[1]))


@pytest.fixture
def page(tmp_path):
    lines = synthetic(3) + search_lines()
    contents = dict(text_files(build([write(tmp_path / "records.jsonl", lines)])))
    path = tmp_path / "report.html"
    path.write_bytes(contents["report.html"].replace(b"</head>", PROBE.encode() + b"</head>"))
    return path


def test_links_of_runs_can_be_reached_and_are_escaped(tmp_path):
    """A point of runs tracked on a server: a press keeps the card open and its links are the server's pages."""
    path = write(tmp_path / "records.jsonl", synthetic(3) + search_lines())
    made = build([path])
    for key in made.results.origins:
        url = run_url("https://ann:pw@host.example/ml", "7", f'{key}"><script>alert(1)</script>')
        made.results.origins[key] = Origin(key, "<script>x</script>.jsonl", f"<script>{key}</script>", url)
    runs = [[(seed, made.results.origins[o.run_key]) for seed, o in arm] for arm in made.sections[0].runs]
    made = replace(made, sections=[replace(made.sections[0], runs=runs)])
    contents = dict(text_files(made))
    page = tmp_path / "report.html"
    page.write_bytes(contents["report.html"].replace(b"</head>", PROBE.encode() + b"</head>"))
    probe = probed(tmp_path, page, 1280)
    assert len(probe["links"]) == 3, probe["links"]
    assert all(re.fullmatch(r"https://host\.example/ml/#/experiments/7/runs/[\w%()/]+", a) for a in probe["links"])
    assert probe["focused"] is True, "Enter on a point moves the focus into its card"
    assert probe["scripts"] == 0, "a name of a run became a script"


@pytest.mark.parametrize(("width", "figure"), [(1280, "wide"), (500, "narrow")])
def test_the_page_works(tmp_path, page, width, figure):
    probe = probed(tmp_path, page, width)
    assert probe["tip"].startswith("ldb · method\nldb(drop_rate=0.5)\ntest accuracy "), probe["tip"]
    assert "seeds 0, 1, 2" in probe["tip"]
    assert probe["after"] is True, "the tip stays when the pointer leaves"
    assert probe["pinned"].startswith("close\n\nldb · method\n"), "a press keeps the card"
    assert re.search(r"seed 0: run [0-9a-f]{16}\n.*in records\.jsonl", probe["pinned"], re.DOTALL), probe["pinned"]
    assert probe["reachable"] == "auto", "the pointer cannot reach what is in the card"
    assert probe["unpinned"] is True, "a press elsewhere closes it"
    assert probe["focused"] is True, "Enter moves the focus into the card"
    assert probe["links"] == [], "records have no page to link to"
    assert probe["escaped"] is True, "Escape closes the card and gives the focus back"
    assert bool(probe["hints"]) == (width < 1000), f"tables that say that they scroll: {probe['hints']}"
    assert probe["up"] == ["dbp", "dbp (control)", "ldb (control)", "ldb", "bp"], "speed-up upwards, unknown last"
    assert probe["down"] == ["ldb", "ldb (control)", "dbp (control)", "dbp", "bp"]
    assert probe["numbers"] == ["ldb", "ldb (control)", "bp", "dbp (control)", "dbp"], "7 s are fewer than 10 s"
    assert probe["names"] == ["bp", "dbp", "dbp (control)", "ldb", "ldb (control)"]
    assert probe["hidden"] == 2, "hiding an arm hides its point and its curve"
    assert probe["wide"] <= 0, f"the page is {probe['wide']} px wider than the window"
    assert set(probe["shown"]) == {figure}, f"figures shown at {width} px: {probe['shown']}"


def test_light_and_dark_differ_and_are_drawn(tmp_path, page):
    shots = []
    for theme in ([], ["--force-dark-mode"]):
        out = tmp_path / f"shot{len(shots)}.png"
        chromium(tmp_path, *theme, "--window-size=1000,900", f"--screenshot={out}", page.as_uri())
        shots.append(out.read_bytes())
    assert all(len(shot) > 20_000 for shot in shots), f"blank pages of {[len(s) for s in shots]} bytes"
    assert shots[0] != shots[1], "the dark theme looks like the light one"
