"""Work done ahead, by threads and by processes: in order, bounded, and it ends whatever happens."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.data.loader_work import die, fail, never, square, unpicklable
from utils.data.loader import load_ahead
from utils.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
both = pytest.mark.parametrize("processes", [False, True])


def loaders(process: int | None = None) -> set[psutil.Process]:
    return {p for p in psutil.Process(process).children() if "utils.data.loader" in " ".join(p.cmdline())}


@both
def test_results_come_in_order_each_once(processes: bool) -> None:
    found = list(load_ahead(square, range(40), workers=3, ahead=7, processes=processes))
    assert found == [(number, number**2) for number in range(40)]
    assert list(load_ahead(square, [], workers=3, ahead=7, processes=processes)) == []


@both
def test_no_more_is_taken_than_waits_to_be_consumed(processes: bool) -> None:
    taken = []

    def jobs():
        for number in range(50):
            taken.append(number)
            yield number

    found = load_ahead(square, jobs(), workers=2, ahead=4, processes=processes)
    assert [next(found)[0] for _ in range(10)] == list(range(10))
    assert len(taken) <= 14
    found.close()


@both
def test_whoever_stops_early_leaves_nothing_at_work(processes: bool) -> None:
    threads = threading.active_count()
    found = load_ahead(square, range(1000), workers=2, ahead=50, processes=processes)
    next(found)
    found.close()
    assert not loaders()
    end = time.monotonic() + 10
    while threading.active_count() > threads:
        assert time.monotonic() < end
        time.sleep(0.01)


@both
def test_a_stuck_worker_holds_neither_a_stop_nor_the_exit(processes: bool) -> None:
    code = (
        "from tests.data.loader_work import never; from utils.data.loader import load_ahead\n"
        f"found = load_ahead(never, range(9), workers=2, ahead=4, processes={processes}); next(found); found.close()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30, check=True)


@both
def test_an_error_comes_in_its_turn_and_as_it_is(processes: bool) -> None:
    found = load_ahead(fail, range(9), workers=2, ahead=9, processes=processes)
    assert [next(found)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="image 3 is broken"):
        next(found)
    with pytest.raises(ZeroDivisionError, match="our own fault") as caught:
        list(load_ahead(fail, [5], workers=1, ahead=1, processes=processes))
    if processes:
        assert 'raise ZeroDivisionError("our own fault")' in str(caught.value.__cause__)  # where it was, there


@both
def test_an_error_of_time_is_the_works_own(processes: bool) -> None:
    with pytest.raises(TimeoutError, match="a disk's"):
        list(load_ahead(fail, [6], workers=1, ahead=1, processes=processes))


def test_a_result_that_cannot_be_sent_is_no_silence(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="exit code 1"):
        list(load_ahead(unpicklable, [1], workers=1, ahead=1, processes=True))
    assert "Traceback" in capfd.readouterr().err


def test_a_killed_process_is_one_line_and_the_others_end() -> None:
    started = time.monotonic()
    pattern = r"a process that loads images ended \(signal 9\) before it had handed over image [24]; .*num_workers"
    with pytest.raises(DataError, match=pattern):
        list(load_ahead(die, range(9), workers=2, ahead=4, processes=True, name=lambda job: f"image {job}"))
    assert not loaders()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("at_work", [True, False])
def test_a_process_that_is_killed_while_it_works_or_waits_is_noticed_too(at_work: bool) -> None:
    found = load_ahead(never, [0, 0, int(at_work)], workers=1, ahead=2, processes=True)
    next(found)
    (child,) = loaders()
    time.sleep(0.3)
    child.kill()
    with pytest.raises(DataError, match="signal 9"):
        list(found)


def test_workers_that_cannot_be_started_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = subprocess.Popen, []

    def refuse(*args: object, **options: object) -> object:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(start(*args, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(DataError, match=r"cannot be started \(Resource temporarily unavailable\); lower num_workers"):
        list(load_ahead(square, range(3), workers=2, ahead=2, processes=True))
    assert started[0].returncode == -signal.SIGKILL


# -- signals ----------------------------------------------------------------------------------------------------------

AT_WORK = (
    "from tests.data.loader_work import {work}; from utils.data.loader import load_ahead; import time\n"
    "print(flush=True)\n"
    "for _ in load_ahead({work}, range(10**6), workers=2, ahead=4, processes=True): print(flush=True)\n"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("results", [0, 1, 5])
def test_processes_end_with_the_one_that_started_them(number: int, results: int) -> None:
    """At a random moment after that many results; the children's own signals are their owner's to answer."""
    command = [sys.executable, "-c", AT_WORK.format(work="square")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as owner:
        for _ in range(results + 1):
            owner.stdout.readline()
        time.sleep(random.uniform(0, 0.3))
        children = loaders(owner.pid)
        if results:
            assert len(children) == 2
            for child in children:
                child.send_signal(signal.SIGINT)
                child.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            assert all(child.status() != psutil.STATUS_ZOMBIE for child in children)
            owner.stdout.readline()
        owner.send_signal(number)
        owner.stdout.close()
        assert owner.wait(timeout=20) != 0
        errors = owner.stderr.read().decode()
        assert errors.count("Traceback") <= (number == signal.SIGINT), errors
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_a_stuck_process_ends_with_the_one_that_started_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", AT_WORK.format(work="never")], cwd=ROOT, stdout=subprocess.PIPE
    ) as owner:
        owner.stdout.readline()
        owner.stdout.readline()
        children = loaders(owner.pid)
        owner.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert len(children) == 2 and not alive


# -- surroundings -----------------------------------------------------------------------------------------------------


def _loads(
    prefix: list[str] | None = None, prepare: Callable[[], None] | None = None, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """A new process that has 54 MB loaded in pieces of 9, by work that prints."""
    code = (
        "from tests.data.loader_work import pixels; from utils.data.loader import load_ahead\n"
        "print(sum(len(r) for _, r in load_ahead(pixels, [9_000_000] * 6, workers=2, ahead=4, processes=True)))"
    )
    done = subprocess.run(
        [*(prefix or []), sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        preexec_fn=prepare,
    )
    assert done.stdout.endswith("54000000\n"), done.stderr
    return done


def test_what_a_library_prints_is_no_result() -> None:
    assert _loads().stdout == "54000000\n"


def test_what_prints_at_the_start_of_every_python_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('hello' * 9999, flush=True)")
    _loads(PYTHONPATH=str(tmp_path))


def test_a_long_name_of_the_folder_for_temporary_files_is_no_matter(tmp_path: Path) -> None:
    (folder := tmp_path / ("t" * 100)).mkdir()
    _loads(TMPDIR=str(folder))
    assert list(folder.iterdir()) == []


def test_few_open_files_are_enough_or_one_line(tmp_path: Path) -> None:
    _loads(prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, before[1]))
        with pytest.raises(DataError, match=r"cannot be started \(Too many open files\); .*ulimit -n"):
            list(load_ahead(square, range(3), workers=20, ahead=2, processes=True))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _can_mount() -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
    return False


@pytest.mark.skipif(sys.platform != "linux" or not _can_mount(), reason="needs the right to mount")
def test_a_small_shared_memory_disk_is_no_matter() -> None:
    _loads(["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"])
    assert Path("/dev/shm").stat().st_dev  # ours is as it was


def test_windows_loads_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(subprocess, "Popen")
    assert len(list(load_ahead(square, range(4), workers=2, ahead=2, processes=True))) == 4
