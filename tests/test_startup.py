"""No command imports what it does not need."""

import json
import subprocess
import sys

import pytest

from benchmarks.startup import LIBRARIES, commands, table
from tests.conftest import ROOT

HEAVY = {"torch", "torchvision", "timm", "scipy", "matplotlib", "pandas"}


def imported_by(*arguments: str) -> set[str]:
    """The packages that a command has imported when it ends, and the modules below numpy."""
    code = f"""
import atexit, runpy, sys
atexit.register(lambda: print("\\n" + " ".join(sys.modules)))
sys.argv = {list(arguments)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2), done.stderr
    names = done.stdout.splitlines()[-1].split()
    return {name for name in names if name.startswith("numpy.")} | {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    "arguments",
    [
        ("main.py", "--help"),
        ("main.py", "epochs=many"),
        ("main.py", "--config=nowhere.json"),
        ("predict.py", "--help"),
        ("report.py", "--help"),
    ],
    ids=" ".join,
)
def test_help_and_mistakes_need_nothing_heavy(arguments):
    assert imported_by(*arguments) & HEAVY == set()


def test_tables_need_no_torch(finished_run, tmp_path):
    arguments = ("report.py", finished_run.config["log_dir"], f"--out={tmp_path}", "--no-pictures")
    assert imported_by(*arguments) & HEAVY == set()
    assert (tmp_path / "tables.md").is_file()


@pytest.mark.slow  # it imports torch and timm in a process of its own
def test_the_summary_of_a_finished_run_needs_no_pictures_and_no_masked_arrays(finished_run):
    config = finished_run.folder / "config.json"
    assert json.loads(config.read_text())["log_dir"] == finished_run.config["log_dir"]
    found = imported_by("main.py", f"--config={config}")
    libraries = subprocess.run(
        [sys.executable, "-c", f"import sys; {LIBRARIES}; print(' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not found & {"timm", "torchvision"}
    assert found & {"matplotlib", "scipy", "numpy.ma"} <= set(libraries.stdout.split())


def test_the_benchmark_runs_commands_that_there_are(tmp_path):
    for name, arguments in commands(tmp_path).items():
        assert arguments[0] == "-c" or (ROOT / arguments[0]).is_file(), name
    lines = table({LIBRARIES: [2.0, 4.0, 3.0], "other": [6.0, 9.0, 5.0]})
    assert "2.00 x import torch, timm" in lines[1] and "6.00 s (fastest 5.00)" in lines[1]
