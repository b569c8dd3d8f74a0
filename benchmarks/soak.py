"""Kill small real runs at random moments, resume them, and compare their end with that of runs that were left alone.

    python -m benchmarks.soak --kills 200

Single runs, runs of two seeds, sweeps, and runs that continue a saved one take turns.
Each life of a run is a process that ``SIGKILL`` ends, either at a moment drawn uniformly from the time that a whole
run takes, or when it has just done something delicate, such as opening a file of a save. Lives follow each other until
the run is finished; then every file that it leaves (modules, classifier, results, features, JSON, picture; but times)
must equal the uninterrupted run's, and the next run begins. Exit code 1 if anything differs, or if a process outlives
its parent.

Lives are forked from a process that has PyTorch loaded already, which saves the seconds that an import takes.
"""

import argparse
import collections
import itertools
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is loaded: a process with OpenMP threads must not be forked
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nor one that holds an accelerator

import timm  # noqa: F401 - loaded here, so that no life has to
import torch
from matplotlib.backends import backend_agg  # noqa: F401
from torchvision import transforms  # noqa: F401

import main
import trainer
from benchmarks.soak_runs import PLANS, Plan, differences, empty, make_data, snapshot, write_config
from utils.results import figures, record

# a file name that appears -> what the process is doing then
AIMS = {
    r"\.task\d+\.pth\.\d+\.partial": "while a module is written",
    r"\.classifier\d+\.pth\.\d+\.partial": "while the classifier is written",
    r"results\.jsonl": "while the first results are added",
    r"\.run\.manifest\.\d+\.partial": "while the manifest is written",
    r"task\d+\.pth": "after a module, before the manifest",
    r"classifier\d+\.pth": "after the classifier, before the manifest",
    r"\..*\.json\.\d+\.partial": "while the report is written",
    r"[^.].*\.png": "when a picture was drawn: after a run, or between two",
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


@dataclass(frozen=True)
class Race:
    """A plan in its folder, and the end that it must come to however often it is killed."""

    plan: Plan
    folder: Path
    arguments: list[str]
    expected_s: float
    expected: dict[str, Any]

    @property
    def work(self) -> Path:
        return self.folder / "run"

    def begin(self) -> None:
        """Write the config again, which all plans share, and start from nothing."""
        write_config(self.plan, self.folder)
        empty(self.folder)


def start(work: Path, arguments: Sequence[str]) -> Life:
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
        code = main.main(list(arguments))
    finally:
        sys.stdout.flush()
        os._exit(code)


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
    _, summary, said = said.rpartition("Summary")
    if any(f".{life.pid}.partial" in name for name in names_below(work)):
        return "inside a write"
    if "Task 1 of" in said or "Resuming from" in said:
        return "training, evaluating, saving"
    if "Backbone:" in said:
        return "extracting features"
    return "after a run, or between two" if summary else "starting"


def run_until_killed(race: Race, chance: random.Random) -> tuple[int | None, str, str]:
    """One life: ``(exit code, or None if killed; the aim; the phase in which it died)``."""
    life = start(race.work, race.arguments)
    if chance.random() < 0.5:
        aim, code = "at a random moment", wait(life, chance.uniform(0, race.expected_s))
    else:
        pattern, aim = chance.choice(list(AIMS.items()))
        code = wait_for(life, race.work, pattern, skip=chance.randrange(3 * race.plan.runs))
        if code is None and chance.random() < 0.5:
            code = wait(life, chance.uniform(0, 0.002))
    if code is not None:
        return code, aim, ""
    life.kill()
    groups.add(life.pid)
    return None, aim, phase_at_death(life, race.work)


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


def finish(work: Path, arguments: Sequence[str]) -> float:
    """Run to the end, undisturbed; the seconds that it took."""
    began = time.monotonic()
    life = start(work, arguments)
    while (code := life.ended()) is None:
        time.sleep(0.01)
    if code:
        raise SystemExit(f"a run that nobody killed failed:\n{life.output.read_text(errors='replace')}")
    return time.monotonic() - began


def undisturbed(plan: Plan, folder: Path) -> Race:
    """Run ``plan`` to its end, twice (the first also fills the file system's caches), and keep what it leaves."""
    arguments = write_config(plan, folder)
    for _ in range(2):
        empty(folder)
        expected_s = finish(folder / "run", arguments)
    race = Race(plan, folder, arguments, expected_s, snapshot(folder / "run"))
    print(f"{plan.name}, uninterrupted: {race.expected_s:.1f} s, {len(race.expected)} files", flush=True)
    return race


@dataclass
class Tally:
    """What happened so far: kills by aim and by phase, and how the runs ended, by plan."""

    by_aim: collections.Counter[str] = field(default_factory=collections.Counter)
    by_phase: collections.Counter[str] = field(default_factory=collections.Counter)
    killed: collections.Counter[str] = field(default_factory=collections.Counter)
    compared: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: int = 0

    @property
    def kills(self) -> int:
        return self.killed.total()

    def say(self, seconds: float) -> None:
        print(f"\n{self.kills} kills in {seconds:.0f} s")
        for title, counter in (("what the process was doing", self.by_phase), ("what was waited for", self.by_aim)):
            print(f"by {title}:")
            for name, count in counter.most_common():
                print(f"  {count:4d}  {name}")
        print("by kind of run (kills, runs finished and compared):")
        for name, count in self.killed.most_common():
            print(f"  {count:4d} {self.compared[name]:4d}  {name}")


def soak(kills: int, seed: int, folder: Path) -> int:
    """Kill ``kills`` times; print what happened; the number of runs whose end differed."""
    make_data(folder / "data")
    undisturbed(PLANS[0], folder)
    (folder / "run").rename(folder / "saved")
    races = [undisturbed(plan, folder) for plan in PLANS]
    print(f"Seed {seed}.", flush=True)
    chance, began, tally = random.Random(seed), time.monotonic(), Tally()
    for race in itertools.cycle(races):
        if tally.kills >= kills:
            break
        race.begin()
        code = race_to_its_end(race, kills, chance, tally)
        tally.compared[race.plan.name] += 1
        different = differences(snapshot(race.work), race.expected) if code == 0 else [f"exit code {code}"]
        if different:
            tally.wrong += 1
            print(f"DIFFERENT: {race.plan.name}, after {tally.kills} kills: {', '.join(different)}", flush=True)
            print((folder / "output.txt").read_text(errors="replace")[-2000:])

    orphans = outlived()
    tally.say(time.monotonic() - began)
    runs = tally.compared.total()
    print(f"runs finished and compared: {runs}, different: {tally.wrong}; processes left over: {len(orphans)}")
    return tally.wrong + len(orphans)


def race_to_its_end(race: Race, kills: int, chance: random.Random, tally: Tally) -> int:
    """Start the run again and again until it ends by itself, undisturbed once ``kills`` are done; its exit code."""
    while tally.kills < kills:
        code, aim, phase = run_until_killed(race, chance)
        if code is not None:
            return code
        tally.by_aim[aim] += 1
        tally.by_phase[phase] += 1
        tally.killed[race.plan.name] += 1
        if tally.kills % 20 == 0:
            print(f"{tally.kills} kills, {tally.compared.total()} runs compared, {tally.wrong} differ", flush=True)
    finish(race.work, race.arguments)
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="how often to kill (200)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments (0)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse()
    torch.set_num_threads(1)
    assert trainer and record and figures  # loaded before the first fork
    with tempfile.TemporaryDirectory() as name:
        failures = soak(args.kills, args.seed, Path(name).resolve())
    print("The end is the same, bit for bit." if not failures else "The promise does not hold.")
    sys.exit(1 if failures else 0)
