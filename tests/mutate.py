"""Would the tests notice a small mistake? Plants one at a time and counts those that no test sees.

    python -m tests.mutate                          # every file of TARGETS
    python -m tests.mutate backbone/luca.py -n 20   # twenty mutations of one file

What a mutation is, says ``tests.mutations``; none is ever written to disk. The tests that TARGETS names for the chosen
files run once on the unchanged source, where they must pass; which lines of the files each test executes is recorded.
Then each mutation meets, in a forked process, the tests that execute its statement, the quickest first, until one
fails; those that come after BUDGET_S seconds are not run. A mutation is killed if a test fails (or runs into a time
limit), and survives if all pass. What a test does in another process is not seen. What cannot change any behaviour is
listed, with the reason, in tests/equivalent_mutations.txt and does not count.
"""

import argparse
import gc
import importlib.abc
import importlib.util
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import pytest

from tests.mutations import ROOT, Mutation, mutations

BUDGET_S = 20
OWN = {path.stem for path in ROOT.glob("*.py")} | {"tests", "models", "backbone", "utils"}

STREAMING = tuple(f"tests/models/test_{name}.py" for name in ("lda", "ridge", "ridge_pair", "baselines"))
TOSCA = tuple(f"tests/models/test_{name}.py" for name in ("tosca", "selections", "steps"))

# file -> the tests that must notice a mistake in it
TARGETS: dict[str, tuple[str, ...]] = {
    "backbone/luca.py": ("tests/backbone/test_luca.py", "tests/golden", *TOSCA),
    "backbone/classifier.py": ("tests/backbone/test_classifier.py", "tests/golden", *TOSCA),
    "backbone/forward.py": ("tests/backbone/test_half.py", "tests/backbone/test_vit.py", "tests/models/test_cost.py"),
    "backbone/adapters.py": (
        "tests/backbone/test_adapters.py",
        "tests/models/test_first_session.py",
        "tests/golden",
    ),
    "models/tosca.py": ("tests/golden", *TOSCA),
    "models/training.py": ("tests/golden", *TOSCA),
    "models/selection.py": ("tests/golden", *TOSCA),
    "models/fast_step.py": ("tests/golden", *TOSCA),
    "models/evaluation.py": ("tests/golden", "tests/test_domains.py", *TOSCA),
    "models/streaming/lda.py": STREAMING,
    "models/tensors.py": STREAMING,
    "models/streaming/ridge.py": STREAMING,
    "models/streaming/ridge_pair.py": STREAMING,
    "models/streaming/whitening.py": STREAMING,
    "utils/results/metrics.py": ("tests/results/test_metrics.py", "tests/results/test_record.py"),
    "utils/data/tasks.py": ("tests/data/test_tasks.py", "tests/test_domains.py"),
    "utils/data/transforms.py": (
        "tests/data/test_data.py",
        "tests/data/test_images.py",
        "tests/features/test_views.py",
    ),
    "utils/data/fingerprints.py": ("tests/data/test_fingerprints.py",),
    "utils/features/rows.py": ("tests/features/test_rows.py",),
    "utils/runs/manifest.py": ("tests/test_keys.py",),
    "utils/seeds.py": ("tests/data/test_data.py", *TOSCA),
}

EQUIVALENT = set((ROOT / "tests" / "equivalent_mutations.txt").read_text(encoding="utf-8").splitlines())


@dataclass
class Trace:
    """Which statements each test executes, and how long it takes, in seconds."""

    lines: dict[str, set[tuple[str, int]]] = field(default_factory=dict)  # test -> (file, line)
    own: dict[str, float] = field(default_factory=dict)  # without what follows
    shared: dict[str, dict[int, float]] = field(default_factory=dict)  # by fixture that several tests share

    def cost(self, test: str) -> float:
        """Return what the test takes if it runs alone."""
        return self.own[test] + sum(self.shared[test].values())

    def tests(self, file: str, first: int = 0, last: int = sys.maxsize) -> list[str]:
        """Return the tests that execute one of the lines (by default of any), the quickest first, within the budget."""
        found = [t for t, lines in self.lines.items() if any(f == file and first <= n <= last for f, n in lines)]
        if first == 0:  # a test may also look at a constant and call nothing
            found += [test for test, lines in self.lines.items() if not lines]
        chosen: list[str] = []
        ready: dict[int, float] = {}
        for test in sorted(found, key=self.cost):
            ready |= self.shared[test]
            if chosen and sum(self.own[t] for t in [*chosen, test]) + sum(ready.values()) > BUDGET_S:
                break
            chosen.append(test)
        return chosen


class Tracer:
    """A pytest plugin that runs the collected tests once and fills a ``Trace``."""

    def __init__(self, files: Sequence[str]) -> None:
        self.names = {str(ROOT / file): file for file in files}
        self.trace = Trace()
        self.failed: list[str] = []
        self.lines: set[tuple[str, int]] = set()
        self.apart = 0.0  # seconds of the test that went into the fixtures below
        self.shared: dict[int, tuple[set[tuple[str, int]], float]] = {}  # of fixtures wider than a test, by identity

    def run(self, items: Sequence[pytest.Item]) -> None:
        """Run the tests, with the caches of functions emptied before each, so that none leans on an earlier one."""
        caches = [found for found in gc.get_objects() if type(found).__name__ == "_lru_cache_wrapper"]
        ours = [cache for cache in caches if str(getattr(cache, "__module__", "")).split(".")[0] in OWN]
        threading.settrace(self._enter)
        sys.settrace(self._enter)
        for item, following in zip(items, [*items[1:], None], strict=True):
            for cache in ours:
                cache.cache_clear()
            self.lines, self.apart, start = set(), 0.0, time.monotonic()
            passed = run_test(item, following)
            own = time.monotonic() - start - self.apart
            fixtures = [fixture for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found]
            used = {id(fixture): self.shared[id(fixture)] for fixture in fixtures if id(fixture) in self.shared}
            if passed:
                self.trace.lines[item.nodeid] = self.lines.union(*(lines for lines, _ in used.values()))
                self.trace.own[item.nodeid] = own
                self.trace.shared[item.nodeid] = {fixture: seconds for fixture, (_, seconds) in used.items()}
            else:
                self.failed.append(item.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        if fixturedef.scope == "function":
            return (yield)
        outer, self.lines, start, apart = self.lines, set(), time.monotonic(), self.apart
        try:
            return (yield)
        finally:
            seconds = time.monotonic() - start - (self.apart - apart)
            self.shared[id(fixturedef)] = (self.lines, seconds)
            self.lines, self.apart = outer | self.lines, self.apart + seconds

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        file = self.names.get(frame.f_code.co_filename)
        if file is None:
            return None
        self.lines.add((file, frame.f_lineno))

        def line(frame: FrameType, event: str, argument: object) -> Any:
            self.lines.add((file, frame.f_lineno))
            return line

        return line


def run_test(item: pytest.Item, following: pytest.Item | None) -> bool:
    """Run one test with its fixtures; return whether it passed or was skipped."""
    from _pytest.runner import runtestprotocol

    return not any(report.failed for report in runtestprotocol(item, nextitem=following, log=False))


def run_until_failure(items: Sequence[pytest.Item], trace: Trace, report: Callable[[str], None]) -> None:
    """Run tests in this order and report the first that fails, or that takes ten times as long as it should."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        report(item.nodeid)
        signal.alarm(10 + int(10 * trace.cost(item.nodeid)))  # which ends this process
        if not run_test(item, following):
            return
    report("")


class Failure(Exception):
    """A forked process failed by itself, in no test."""


def in_fork(work: Callable[[Callable[[Any], None]], None]) -> Any:
    """Call ``work`` in a silent forked process and return what it reported last.

    Raises:
        Failure: it reported nothing, or failed otherwise than in a test.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        reported, output = Path(folder, "reported"), Path(folder, "output")

        def report(value: Any) -> None:
            Path(folder, "next").write_bytes(pickle.dumps(value))
            os.replace(Path(folder, "next"), reported)

        if pid := os.fork():
            os.waitpid(pid, 0)
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what a test left behind
            if not reported.exists():
                raise Failure(output.read_text(errors="replace"))
            found = pickle.loads(reported.read_bytes())
            if isinstance(found, Failure):
                raise found
            return found
        try:
            os.setpgid(0, 0)
            os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.tempdir = folder
            for stream in (1, 2):
                os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            work(report)
        except BaseException:
            report(Failure(traceback.format_exc()))
        finally:
            os._exit(0)


def patch(mutation: Mutation) -> None:
    """Give the live functions of the file their changed code."""
    path = str(ROOT / mutation.file)
    new: dict[tuple[str, int], CodeType] = {}
    codes = [mutation.code()]
    while codes:
        inside = [constant for constant in codes.pop().co_consts if isinstance(constant, CodeType)]
        new.update({(code.co_name, code.co_firstlineno): code for code in inside})
        codes += inside
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and function.__code__.co_filename == path:
            function.__code__ = new[function.__code__.co_name, function.__code__.co_firstlineno]


class Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves the changed source in place of the module's file."""

    def __init__(self, mutation: Mutation) -> None:
        self.mutation = mutation
        self.name = mutation.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, ROOT / self.mutation.file, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(self.mutation.code(), module.__dict__)


class Loop:
    """A pytest plugin that hands all collected tests to ``work`` instead of running them."""

    def __init__(self, work: Callable[[dict[str, pytest.Item]], None]) -> None:
        self.work = work
        self.error: Exception | None = None  # that pytest would swallow

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("errors while collecting")
        try:
            self.work({item.nodeid: item for item in session.items})
        except Exception as error:
            self.error = error
        return True


def collect(paths: Sequence[str], loop: Loop, *others: object) -> None:
    """Collect tests in this process and hand them to the plugins."""
    pytest.main(["-q", "-s", "-n0", "-p", "no:cacheprovider", "-W", "ignore", *paths], plugins=[loop, *others])
    if loop.error:
        raise loop.error


def files_of(tests: Sequence[str]) -> list[str]:
    """The files that the tests stand in."""
    return sorted({test.split("::")[0] for test in tests})


def measure(chosen: Sequence[Mutation], say: Callable[[Mutation, str], None]) -> None:
    """Meet every mutation with its tests and say which test killed it; an empty name says that none did.

    Nearly all are planted in one process that has everything imported, function by function. What is executed when a
    module is imported (constants, defaults) needs a process that imports it anew.
    """
    files = list(dict.fromkeys(mutation.file for mutation in chosen))
    paths = list(dict.fromkeys(path for file in files for path in TARGETS[file]))

    def quick(report: Callable[[Any], None]) -> None:
        tracer = Tracer(files)

        def run_all(items: dict[str, pytest.Item]) -> None:
            tracer.run(list(items.values()))
            report((tracer.trace, tracer.failed))

        collect(paths, Loop(run_all), tracer)

    trace, failed = in_fork(quick)
    print(f"{len(trace.lines)} tests in {sum(trace.own.values()):.0f} s; {len(failed)} failed", *failed, flush=True)
    tests = {m: trace.tests(m.file, *m.lines) if m.function else [] for m in chosen}

    def plant(items: dict[str, pytest.Item]) -> None:
        for mutation in [m for m in chosen if tests[m]]:

            def work(report: Callable[[Any], None], mutation: Mutation = mutation) -> None:
                patch(mutation)
                run_until_failure([items[test] for test in tests[mutation]], trace, report)

            say(mutation, in_fork(work))

    def plant_all(report: Callable[[Any], None]) -> None:
        report(None)
        collect(files_of([test for some in tests.values() for test in some]), Loop(plant))

    if any(tests.values()):
        in_fork(plant_all)
    for mutation in [m for m in chosen if not tests[m]]:
        names = trace.tests(mutation.file)

        def import_anew(report: Callable[[Any], None], mutation: Mutation = mutation, names: list[str] = names) -> None:
            sys.meta_path.insert(0, Loader(mutation))
            report("an import")
            signal.alarm(120)
            collect(
                files_of(names),
                Loop(lambda items: run_until_failure([items[n] for n in names if n in items], trace, report)),
            )

        say(mutation, in_fork(import_anew))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(TARGETS)}; by default all")
    parser.add_argument(
        "-n", type=int, metavar="N", help="mutations of each file, drawn with a fixed seed; all by default"
    )
    parser.add_argument("--list", action="store_true", help="print the mutations, run nothing")
    args = parser.parse_args(argv)
    if unknown := [file for file in args.files if file not in TARGETS]:
        parser.error(f"{unknown[0]} is not among the files: {', '.join(TARGETS)}")
    chosen: list[Mutation] = []
    for file in args.files or TARGETS:
        every = [m for m in mutations(file) if m.key not in EQUIVALENT]
        drawn = every if args.n is None else random.Random(0).sample(every, min(args.n, len(every)))
        chosen += sorted(drawn, key=lambda m: m.line)
    if args.list:
        print(*chosen, sep="\n")
        return 0
    os.chdir(ROOT)
    import numpy  # noqa: F401 - what is heavy is imported once, before the forks
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    with os.fdopen(os.dup(1), "w") as out, tempfile.NamedTemporaryFile("w+", encoding="utf-8") as results:

        def say(mutation: Mutation, killer: str) -> None:
            verdict = f"killed by {killer}" if killer else "SURVIVED"
            print(f"{mutation}\n    {verdict}", file=out, flush=True)
            results.write(f"{mutation.file}\t{bool(killer)}\n")
            results.flush()

        measure(chosen, say)
        results.seek(0)
        lines = [line.rstrip("\n").split("\t") for line in results]
    total, killed = Counter(file for file, _ in lines), Counter(file for file, dead in lines if dead == "True")
    for file in total:
        print(f"{file}: {killed[file]} of {total[file]} killed")
    print(f"{killed.total()} of {total.total()} killed ({100 * killed.total() / max(1, total.total()):.1f} %)")
    return 1 if killed.total() < len(chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
