"""Every command of docs/tutorial.md, run literally in a copy of the project, prints what the page shows."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
LEFT_OUT = "..."  # stands in the page for lines that are not shown
NUMBER = re.compile(r"(?<![\w.])\d+\.\d+")


def blocks(kind: str) -> list[str]:
    """What stands between fences of that kind."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [text for found, text in fenced if found == kind]


def assert_shown(printed: str, page: str) -> None:
    """The page's lines stand in ``printed`` in order; numbers may differ between versions of PyTorch."""
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line).rstrip() for line in printed.splitlines()]
    may_skip, place = False, 0
    for expected in page.splitlines():
        if expected == LEFT_OUT:
            may_skip = True
            continue
        form = NUMBER.sub("#", expected)
        while may_skip and place < len(lines) and NUMBER.sub("#", lines[place]) != form:
            place += 1
        assert place < len(lines), f"not printed: {expected}"
        assert NUMBER.sub("#", lines[place]) == form
        shown, found = (list(map(float, NUMBER.findall(text))) for text in (expected, lines[place]))
        assert found == pytest.approx(shown, abs=1.0)
        place, may_skip = place + 1, False
    assert may_skip or place == len(lines), f"not in the page: {lines[place]}"


def test_the_comparison_sees_a_difference():
    assert_shown("12:00:00 a\nb 1.0\nc", "...\nb 1.2\n...")
    for page in ("a\nb 1.0", "a\nc", "...\nb 9.0\nc", "...\nd"):
        with pytest.raises(AssertionError):
            assert_shown("a\nb 1.0\nc", page)


@pytest.mark.slow
def test_every_command_prints_what_the_page_shows(tmp_path):
    copy, cache = tmp_path / "copy", tmp_path / "cache"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "logs"))
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "XDG_CACHE_HOME": str(cache)}

    def run(command: str | list[str]) -> str:
        done = subprocess.run(
            command, shell=isinstance(command, str), cwd=copy, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    (config,) = blocks("json")
    (copy / "digits.json").write_text(json.dumps(json.loads(config)))
    shells = [block for block in blocks("") if block.startswith("$ ")]
    assert len(shells) == 6
    for block in shells:
        for command, _, page in (part.partition("\n") for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]):
            assert_shown(run(command), page)
    program, (shown,) = blocks("python")[0], [block for block in blocks("") if block.endswith("cpu)\n")]
    assert_shown(run([sys.executable, "-c", program]), shown)
    hub = blocks("python")[1].replace("<this folder>", str(copy)).replace("<a run's folder>", str(copy / "tosca"))
    assert run([sys.executable, "-c", hub.replace("image.png", str(copy / "digits/test/3/000003.png"))]) == "['3']\n"
