"""The page in a real browser: it must draw, answer the pointer and sort, without one error."""

import html
import json
import re
import shutil
import subprocess

import pytest

from analysis.report import build, text_files
from analysis_records import search_lines, synthetic, write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]

PROBE = """
<script>
addEventListener("error", event => document.body.dataset.error = event.message);
addEventListener("load", () => {
  const out = {};
  const tip = document.getElementById("tip");
  const mark = [...document.querySelectorAll("figure.wide .mark")].find(m => m.dataset.tip.startsWith("ldb ·"));
  mark.dispatchEvent(new PointerEvent("pointermove", {clientX: 300, clientY: 300}));
  out.tip = tip.hidden ? "hidden" : tip.textContent;
  mark.dispatchEvent(new PointerEvent("pointerleave"));
  out.after = tip.hidden;
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


@pytest.fixture
def page(tmp_path):
    lines = synthetic(3) + search_lines()
    contents = dict(text_files(build([write(tmp_path / "records.jsonl", lines)])))
    path = tmp_path / "report.html"
    path.write_bytes(contents["report.html"].replace(b"</head>", PROBE.encode() + b"</head>"))
    return path


@pytest.mark.parametrize(("width", "figure"), [(1280, "wide"), (500, "narrow")])
def test_the_page_works(tmp_path, page, width, figure):
    dom = chromium(tmp_path, f"--window-size={width},1000", "--dump-dom", page.as_uri())
    assert "data-error" not in dom, re.findall('data-error="([^"]*)"', dom)
    found = re.search('data-probe="([^"]*)"', dom)
    assert found, "the script of the page did not run to its end"
    probe = json.loads(html.unescape(found[1]))
    assert probe["tip"].startswith("ldb · method\nldb(drop_rate=0.5)\ntest accuracy "), probe["tip"]
    assert "seeds 0, 1, 2" in probe["tip"]
    assert probe["after"] is True, "the tip stays when the pointer leaves"
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
