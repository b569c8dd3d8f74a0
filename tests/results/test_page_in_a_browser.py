"""The HTML page in a real browser, where one is installed: nothing is cut off, and a hint says what scrolls."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import report
from tests.results.test_report_tables import run_values, write
from utils.results.cost import COLUMNS, PUBLISHED_COLUMNS

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser is installed")

_MEASURE = """<script>addEventListener("load", () => setTimeout(() => {
  const tables = [...document.querySelectorAll(".box")].filter(box => box.querySelector("table")).map(box => ({
    title: box.getAttribute("aria-label"), scrolls: box.scrollWidth > box.clientWidth,
    hint: getComputedStyle(box.previousElementSibling).display, right: box.getBoundingClientRect().right,
    number: Math.min(...[...box.querySelectorAll("td.n")].map(cell => cell.getBoundingClientRect().right)),
  }));
  parent.postMessage(JSON.stringify({tables, page: document.documentElement.scrollWidth, width: innerWidth}), "*");
}, 100))</script>"""
# a frame, since the browser's own windows are never narrower than 500 px
_FRAME = """<!DOCTYPE html><title></title><script>addEventListener("message", e => document.title = e.data)</script>
<iframe src="{}" style="width: {}px; height: 900px; border: 0"></iframe>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Two methods over five seeds, with costs, so that there are narrow tables and wide ones."""
    folder = tmp_path_factory.mktemp("page")
    cost = dict.fromkeys((*COLUMNS, *PUBLISHED_COLUMNS), 0.0123456)
    (folder / "logs").mkdir()
    for seed in range(1, 6):
        both = (run_values(seed, last=60.0 + seed), run_values(seed, model="simplecil"))
        write(folder / "logs", *(values | {"cost": cost} for values in both))
    path = folder / "page.html"
    options = ["--out", str(folder / "out"), "--html", str(path), "--no-pictures"]
    assert report.main([str(folder / "logs"), *options]) == 0
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", f"{_MEASURE}</body>"), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [390, 500, 1280])
def test_first_numbers_are_seen_and_a_hint_stands_where_a_table_scrolls(page, width, tmp_path):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    frame = tmp_path / "frame.html"
    frame.write_text(_FRAME.format(page.as_uri(), width))
    command += ["--virtual-time-budget=2000", "--dump-dom", frame.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r"<title>(.*?)</title>", shown.stdout)[1].replace("&amp;", "&"))
    assert found["width"] == width and found["page"] <= width  # the page itself never scrolls sideways
    tables = found["tables"]
    assert len(tables) == 4 and any(table["scrolls"] for table in tables)
    for table in tables:
        assert (table["hint"] == "block") == table["scrolls"], table
        assert table["number"] <= table["right"] <= width, table
