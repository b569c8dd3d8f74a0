"""From a command to its answer, in whole processes, against ``python -c "import torch, timm"``.

    python -m benchmarks.startup [--rounds 9]

*Summary*: ``main.py`` once more on a finished run, the demo, until it ends. *Complete bank*: the demo from its first
task to its end, when all features are in the bank. *Predicting*: ``predict.py`` on one image. *First forward*:
``main.py`` on a fresh folder until its first batch of features is there. The rest are commands that need no PyTorch:
``--help``, a mistake in the config, and ``report.py`` without pictures. Rounds of all of them alternate, and the ratios
are of the medians; the files were read before, so that disks do not count.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from benchmarks.images import ROOT, machine, timed_process

LIBRARIES = "import torch, timm"
# main.py, ended by its first features
UNTIL_FORWARD = """
import os, sys
import main
from backbone.vit import Backbone
call = Backbone.__call__
def stop(self, images):
    call(self, images)
    os._exit(0)
Backbone.__call__ = stop
main.main(sys.argv[1:])
"""


def commands(folder: Path) -> dict[str, list[str]]:
    """What is measured: its name -> the arguments of Python."""

    def below(place: Path) -> list[str]:
        return [f"{name}={place / name}" for name in ("cache_dir", "checkpoint_dir", "log_dir")]

    return {
        LIBRARIES: ["-c", LIBRARIES],
        "a finished run's summary": ["main.py", *below(folder)],
        "a run on a complete bank": ["main.py", "--fresh", *below(folder)],
        "predicting": ["predict.py", f"--checkpoint={folder / 'checkpoint_dir'}", str(folder / "image.png")],
        "first forward": ["-c", UNTIL_FORWARD, "--fresh", *below(folder / "fresh"), "cache_dir=none"],
        "main.py --help": ["main.py", "--help"],
        "main.py, a wrong key": ["main.py", "epoch=1"],
        "report.py, tables": ["report.py", str(folder / "log_dir"), f"--out={folder / 'tables'}", "--no-pictures"],
    }


def seconds_of(arguments: Sequence[str], expected: int) -> float:
    """Of a process that ends with the exit code ``expected``."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != expected:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return seconds


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each command, round after round."""
    what = commands(folder)
    Image.new("RGB", (32, 32)).save(folder / "image.png")
    timed_process(*what["a finished run's summary"])  # which finishes it
    taken: dict[str, list[float]] = {name: [] for name in what}
    for number in range(rounds + 1):
        for name, arguments in what.items():
            seconds = seconds_of(arguments, expected=2 if name == "main.py, a wrong key" else 0)
            if number:  # the first round reads the files
                taken[name].append(seconds)
    return taken


def table(taken: Mapping[str, Sequence[float]]) -> list[str]:
    """A line for each command: its median, its fastest, and the ratio of its median to that of the libraries."""
    base = statistics.median(taken[LIBRARIES])
    return [
        f"{name:26} {statistics.median(seconds):6.2f} s (fastest {min(seconds):.2f}), "
        f"{statistics.median(seconds) / base:.2f} x {LIBRARIES}"
        for name, seconds in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"start: {machine()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(table(measure(Path(folder), args.rounds))))
    print(f"end: {machine()}")


if __name__ == "__main__":
    main()
