"""From ``main()`` to the first task's line of the demo: how many files a reader has to enter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

MOST_FILES = 55  # may fall, never rise

WALK = """
import json, os, sys, threading
root, entered = sys.argv.pop(1), set()

def profile(frame, event, _):
    if event == "call" and frame.f_code.co_filename.startswith(root):
        entered.add(os.path.relpath(frame.f_code.co_filename, root))

threading.setprofile(profile)
sys.setprofile(profile)
import logging
import main

def record(*args, **keys):
    made = logging.LogRecord(*args, **keys)
    if made.getMessage().startswith("Task 1 of"):
        sys.setprofile(None)
        print(json.dumps(sorted(entered)), flush=True)
        os._exit(0)
    return made

logging.setLogRecordFactory(record)
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> list[str]:
    """The files of the product that a demo enters until its first task is learned and tested, imports included."""
    folder = tmp_path_factory.mktemp("walk")
    places = [f"{key}={folder / key}" for key in ("cache_dir", "checkpoint_dir", "log_dir")]
    command = [sys.executable, "-c", WALK, str(ROOT), "epochs=1", "train_views=0", "num_workers=0", *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [name for name in json.loads(done.stdout.splitlines()[-1]) if not name.startswith(("tests", ".venv"))]


def test_the_walk_is_short(walk):
    assert len(walk) <= MOST_FILES, " ".join(walk)


def test_the_chosen_method_alone_is_imported(walk):
    methods = {
        path.name for path in (ROOT / "models").glob("*.py") if "\nMETHOD = " in path.read_text(encoding="utf-8")
    }
    assert {Path(name).name for name in walk if name.startswith("models/")} & methods == {"tosca.py"}
