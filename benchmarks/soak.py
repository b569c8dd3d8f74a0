"""Kill a small real run at random moments, resume it, and compare its end with that of a run that was left alone.

    python -m benchmarks.soak --kills 200

Each life of the run is a process that ``SIGKILL`` ends, either at a moment drawn uniformly from the time that a whole
run takes, or when it has just done something delicate, such as opening a file of a save. Lives follow each other until
the run is finished; then every file that it leaves (modules, classifier, features, results; times excepted) must equal
the uninterrupted run's, and the next run begins. Exit code 1 if anything differs, or if a process outlives its parent.

Lives are forked from a process that has PyTorch loaded already, which saves the seconds that an import takes.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is loaded: a process with OpenMP threads must not be forked
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nor one that holds an accelerator

import timm  # noqa: F401 - loaded here, so that no life has to
import torch
from torchvision import transforms  # noqa: F401

import main
import trainer
from utils.results import record as report
from utils.runs.checkpoint import MANIFEST

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "dataset": "digits",
    "init_cls": 2,
    "increment": 2,
    "backbone_type": "glyphs_vit",
    "device": ["-1"],
    "image_size": 16,
    "epochs": 4,
    "train_views": 1,
    "num_workers": 1,
}
# a file name that appears -> what the process is doing then
AIMS = {
    r"\.task\d+\.pth\.\d+\.partial": "while a module is written",
    r"\.classifier\d+\.pth\.\d+\.partial": "while the classifier is written",
    r"\.evaluation\d+\.manifest\.\d+\.partial": "while the results beside the manifest are written",
    r"\.run\.manifest\.\d+\.partial": "while the manifest is written",
    r"task\d+\.pth": "after a module, before the manifest",
    r"classifier\d+\.pth": "after the classifier, before the manifest",
    r"\..*\.(json|csv)\.\d+\.partial": "while the results are written",
    r".*\.filling\.npy": "when an array of features was laid out",
    r"(test|augmented-\d+-\d+)\.npy": "when an array of features was completed",
}


@dataclass(frozen=True)
class Life:
    """A process that runs ``main.py``, with its loaders in a process group of its own; it writes to ``output``."""

    pid: int
    output: Path

    def ended(self) -> int | None:
        """Its exit code, or None while it lives."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def start(work: Path) -> Life:
    """Fork a process that starts the run in ``work``, or goes on with it."""
    output = work.with_name("output.txt")
    sys.stdout.flush()
    if pid := os.fork():
        return Life(pid, output)
    code = 1
    try:
        os.setpgid(0, 0)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = main.main([f"--config={work.with_name('config.json')}"])
    finally:
        sys.stdout.flush()
        os._exit(code)


def snapshot(work: Path) -> dict[str, Any]:
    """Every file below ``work`` but logs and locks: its SHA-256, or what it says but for times."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in work.rglob("*") if p.is_file()):
        name = str(path.relative_to(work))
        if path.name == MANIFEST or path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_bytes()))
        elif path.suffix not in (".log", ".lock", ".png") and path.name not in ("lock", ".lock"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("seconds", "cost", "sha256")}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def names_below(work: Path) -> Iterator[str]:
    """Names of the files of checkpoint, logs and feature bank. Files may come and go meanwhile."""
    for folder, _, files in os.walk(work):
        for name in files:
            yield f"{folder}/{name}"


def wait_for(life: Life, work: Path, pattern: str, skip: int) -> int | None:
    """Return when file number ``skip + 1`` of those that match is new; the exit code if the life ends before."""
    matching = re.compile(pattern)
    seen = {path for path in names_below(work) if matching.fullmatch(path.rpartition("/")[2])}
    while (code := life.ended()) is None:
        new = {path for path in names_below(work) if matching.fullmatch(path.rpartition("/")[2])} - seen
        if len(new) > skip:
            return None
        seen |= set(sorted(new)[:skip])
        skip -= len(new)
        time.sleep(0.0002)
    return code


def wait(life: Life, seconds: float) -> int | None:
    """Return after so many seconds; the exit code if the life ends before."""
    end = time.monotonic() + seconds
    while (code := life.ended()) is None and time.monotonic() < end:
        time.sleep(min(0.005, max(0.0, end - time.monotonic())))
    return code


def phase_at_death(life: Life, work: Path) -> str:
    """What the process was doing, from what it said and what it left."""
    said = life.output.read_text(errors="replace")
    if any(f".{life.pid}.partial" in name for name in names_below(work)):
        return "inside a write"
    if "Summary" in said:
        return "after the last task"
    if "Task 1 of" in said or "Resuming from" in said:
        return "training, evaluating, saving"
    if "Backbone:" not in said:
        return "starting"
    return "extracting features"


def run_until_killed(work: Path, chance: random.Random, expected_s: float) -> tuple[int | None, str, str]:
    """One life: ``(exit code, or None if killed; the aim; the phase in which it died)``."""
    life = start(work)
    if chance.random() < 0.5:
        aim, code = "at a random moment", wait(life, chance.uniform(0, expected_s))
    else:
        pattern, aim = chance.choice(list(AIMS.items()))
        code = wait_for(life, work, pattern, skip=chance.randrange(3))
        if code is None and chance.random() < 0.5:
            code = wait(life, chance.uniform(0, 0.002))
    if code is not None:
        return code, aim, ""
    life.kill()
    groups.add(life.pid)
    return None, aim, phase_at_death(life, work)


groups: set[int] = set()  # process groups of killed lives: their loaders must follow them


def outlived(patience_s: float = 30.0) -> list[int]:
    """Process groups of killed lives in which something still runs after a while."""
    end = time.monotonic() + patience_s
    left = set(groups)
    while left and time.monotonic() < end:
        left = {group for group in left if _exists(group)}
        time.sleep(0.1)
    return sorted(left)


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def finish(work: Path) -> float:
    """Run to the end, undisturbed; the seconds that it took."""
    began = time.monotonic()
    life = start(work)
    while (code := life.ended()) is None:
        time.sleep(0.01)
    if code:
        raise SystemExit(f"a run that nobody killed failed:\n{life.output.read_text(errors='replace')}")
    return time.monotonic() - began


def soak(kills: int, seed: int, folder: Path) -> int:
    """Kill ``kills`` times; print what happened; the number of runs whose end differed."""
    work = folder / "run"
    work.mkdir()
    paths = {key: str(work / key) for key in ("checkpoint_dir", "log_dir", "cache_dir")}
    work.with_name("config.json").write_text(json.dumps({**SETTINGS, **paths}))
    finish(work)  # the first also fills the file system's caches
    _empty(work)
    expected_s = finish(work)
    expected = snapshot(work)
    print(f"An uninterrupted run takes {expected_s:.1f} s and leaves {len(expected)} files. Seed {seed}.", flush=True)

    chance, began = random.Random(seed), time.monotonic()
    by_aim: collections.Counter[str] = collections.Counter()
    by_phase: collections.Counter[str] = collections.Counter()
    compared = wrong = lives = 0
    _empty(work)
    while sum(by_phase.values()) < kills or lives:
        lives += 1
        if sum(by_phase.values()) < kills:
            code, aim, phase = run_until_killed(work, chance, expected_s)
        else:
            finish(work)
            code = 0
        if code is None:
            by_aim[aim] += 1
            by_phase[phase] += 1
            if sum(by_phase.values()) % 20 == 0:
                print(f"{sum(by_phase.values())} kills, {compared} runs compared, {wrong} differ", flush=True)
            continue
        different = differences(snapshot(work), expected) if code == 0 else [f"exit code {code}"]
        compared, wrong, lives = compared + 1, wrong + bool(different), 0
        if different:
            print(f"DIFFERENT after {sum(by_phase.values())} kills: {', '.join(different)}", flush=True)
            print((folder / "output.txt").read_text(errors="replace")[-2000:])
        _empty(work)

    orphans = outlived()
    print(f"\n{sum(by_phase.values())} kills in {time.monotonic() - began:.0f} s")
    for title, counter in (("by what the process was doing", by_phase), ("by what was waited for", by_aim)):
        print(f"{title}:")
        for name, count in counter.most_common():
            print(f"  {count:4d}  {name}")
    print(f"runs finished and compared: {compared}, different: {wrong}; processes left over: {len(orphans)}")
    return wrong + len(orphans)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="how often to kill (200)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments (0)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse()
    torch.set_num_threads(1)
    assert trainer and report  # loaded before the first fork
    with tempfile.TemporaryDirectory() as name:
        failures = soak(args.kills, args.seed, Path(name).resolve())
    print("The end is the same, bit for bit." if not failures else "The promise does not hold.")
    sys.exit(1 if failures else 0)
