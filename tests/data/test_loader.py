"""Work done ahead, by threads and by processes: in order, bounded, and it ends whatever happens."""

import contextlib
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest

from tests.data.loader_work import die, fail, never, pixels, square, unpicklable
from utils.data import loader
from utils.data.loader import load_ahead
from utils.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
both = pytest.mark.parametrize("processes", [False, True])


@both
def test_results_come_in_order_each_once(processes: bool) -> None:
    found = list(load_ahead(square, range(40), workers=3, ahead=7, processes=processes))
    assert found == [(number, number**2) for number in range(40)]


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


def test_results_of_many_megabytes_pass_and_what_libraries_print_does_not() -> None:
    found = list(load_ahead(pixels, [1, 30_000_000, 5], workers=2, ahead=3, processes=True))
    assert [len(result) for _, result in found] == [1, 30_000_000, 5]
    assert all((result == 7).all() for _, result in found)


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


def test_a_result_that_cannot_be_sent_is_no_silence() -> None:
    with pytest.raises((DataError, RuntimeError)):
        list(load_ahead(unpicklable, [1], workers=1, ahead=1, processes=True))


@both
def test_what_makes_no_progress_ends_in_one_line(processes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "STALL_SECONDS", 5)
    before = set(psutil.Process().children())
    found = load_ahead(never, range(9), workers=2, ahead=4, processes=processes, name=lambda job: f"image {job}")
    assert next(found) == (0, 0)
    with pytest.raises(DataError, match=r"nothing was loaded for 5 s; the next in turn is image 1: see"):
        next(found)
    assert set(psutil.Process().children()) <= before


def test_a_killed_process_is_one_line_and_the_others_end() -> None:
    before = set(psutil.Process().children())
    with pytest.raises(DataError, match=r"a process that loads images was killed \(process \d+, signal 9\)"):
        list(load_ahead(die, range(9), workers=2, ahead=4, processes=True))
    assert set(psutil.Process().children()) <= before


def test_an_idle_process_that_is_killed_is_noticed_too() -> None:
    found = load_ahead(never, [0, 0, 1], workers=1, ahead=3, processes=True)
    next(found)
    (child,) = (p for p in psutil.Process().children() if "utils.data.loader" in " ".join(p.cmdline()))
    child.kill()
    with pytest.raises(DataError, match="was killed"):
        list(found)


@both
def test_workers_that_cannot_be_started_are_one_line(processes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    def refuse_thread(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr("threading.Thread.start", refuse_thread)
    with pytest.raises(DataError, match=r"2 (processes|threads) that load images cannot be started .* num_workers"):
        list(load_ahead(square, range(3), workers=2, ahead=2, processes=processes))


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_processes_end_with_the_one_that_started_them() -> None:
    code = (
        "from tests.data.loader_work import never; from utils.data.loader import load_ahead; import time\n"
        "found = load_ahead(never, range(9), workers=2, ahead=4, processes=True); next(found)\n"
        "print(flush=True); time.sleep(3600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as owner:
        owner.stdout.readline()
        children = psutil.Process(owner.pid).children()
        assert len(children) == 2
        for child in children:
            child.send_signal(signal.SIGINT)  # Ctrl-C is for the owner to answer
        time.sleep(0.2)
        assert all(child.is_running() for child in children)
        owner.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_starting_processes_forks_nothing() -> None:
    """Python 3.12 and later warn of a fork beside threads, which may hang; the suite makes that an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(load_ahead(square, range(4), workers=2, ahead=2, processes=True))) == 4


def _can_mount() -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
    return False


@pytest.mark.skipif(sys.platform != "linux" or not _can_mount(), reason="needs the right to mount")
def test_a_small_shared_memory_disk_is_no_matter() -> None:
    code = (
        "from tests.data.loader_work import pixels; from utils.data.loader import load_ahead\n"
        "print(sum(len(r) for _, r in load_ahead(pixels, [9_000_000] * 6, workers=2, ahead=4, processes=True)))"
    )
    script = f'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "{sys.executable}" -c "$0"'
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script, code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.stdout.decode().endswith("54000000\n"), done.stderr
    assert Path("/dev/shm").stat().st_dev  # ours is as it was
