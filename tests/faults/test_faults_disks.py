"""Disks as the kernel mounts them: one that cannot be written, and one that is full.

Each test works in a mount namespace of its own, in a forked process: nothing outside sees what it mounts. Where the
kernel gives no such namespace the tests are skipped; ``test_faults_bank.py`` and ``test_faults_files.py`` simulate the
same faults everywhere.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import main
import predict
import report
from tests.conftest import fork, handlers_restored

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mount namespaces are Linux's")

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
REFUSED = 77  # the exit code of a process that gets no namespace


def enter_a_mount_namespace() -> None:
    """Whatever this process mounts from now on is its own. Raises OSError where the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWNS) != 0:  # an ordinary user may do it as root of a user namespace
        if libc.unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("--make-rprivate", "/")


def mount(*arguments: object) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"mount: {done.stderr.strip()}")


def read_only(folder: Path) -> None:
    mount("--bind", folder, folder)
    mount("-o", "remount,bind,ro", folder)


def small_disk(folder: Path, size: int) -> None:
    folder.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "none", folder)


@pytest.fixture
def with_mounts(tmp_path):
    """Runs ``act(said)`` in a process with mounts of its own; ``said()`` is what was printed since the last call."""
    output = tmp_path / "said.txt"

    def said() -> str:
        sys.stdout.flush()
        text = output.read_text()
        sys.stdout.truncate(0)
        sys.stdout.seek(0)
        return text

    def start(act: Callable[[Callable[[], str]], None]) -> None:
        if (pid := fork()) == 0:
            code = 1
            sys.stdout = sys.stderr = output.open("w")
            try:
                try:
                    enter_a_mount_namespace()
                except (OSError, FileNotFoundError) as error:
                    print(error)
                    code = REFUSED
                else:
                    act(said)
                    code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == REFUSED:
            pytest.skip(f"the kernel gives no mount namespace: {output.read_text().strip()}")
        assert code == 0, output.read_text()

    return start


def error_line(said: str) -> str:
    (line,) = [line for line in said.splitlines() if ": error: " in line]
    assert "Traceback" not in said
    return line


def call(command, *arguments: object) -> int:
    with handlers_restored():
        return command.main(list(map(str, arguments)))


def test_a_complete_bank_on_a_read_only_disk_is_used_and_an_incomplete_one_named(
    run, tmp_path, undisturbed, with_mounts
):
    run.keys["cache_dir"] = str(bank := tmp_path / "own bank")
    assert run().code == 0
    for left in (run.checkpoints, run.logs):
        shutil.rmtree(left)
    for lock in bank.rglob("lock"):
        lock.unlink()
    config, more = run.write_config(), tmp_path / "more"

    def act(said) -> None:
        read_only(bank)
        read_only(Path(run.keys["data_path"]))
        assert call(main, f"--config={config}") == 0, said()
        assert "0 images through the backbone" in said()
        places = (f"checkpoint_dir={more}", f"log_dir={more / 'logs'}")
        assert call(main, f"--config={config}", "train_views=2", *places) == 2
        line = error_line(said())
        assert str(bank) in line
        assert "key cache_dir" in line
        assert "Read-only file system" in line

    with_mounts(act)
    assert run.end() == undisturbed
    assert not list(more.rglob("*.pth"))


def test_a_finished_run_on_a_read_only_disk_predicts_and_is_reported(finished, tmp_path, with_mounts):
    image = next(Path(finished.keys["data_path"]).rglob("*.png"))
    (writable := tmp_path / "writable").mkdir()

    def act(said) -> None:
        read_only(finished.folder)
        assert call(predict, f"--checkpoint={finished.checkpoints}", "--csv", image) == 0, said()
        assert str(image) in said()
        assert call(predict, f"--checkpoint={finished.checkpoints}", f"--features={finished.logs}/f.npy", image) == 2
        assert "Read-only file system" in error_line(said())
        assert call(report, finished.logs, "--no-pictures", f"--out={finished.logs}/tables") == 2
        assert "Read-only file system" in error_line(said())
        small_disk(writable, 1_000_000)
        assert call(report, finished.logs, "--no-pictures", f"--out={writable}/tables") == 0, said()

    with_mounts(act)


@pytest.mark.parametrize("place", ["checkpoint_dir", "log_dir", "cache_dir"])
def test_a_disk_that_is_really_full_is_one_line_and_with_space_the_run_ends_alike(
    run, tmp_path, undisturbed, with_mounts, place
):
    run.keys["cache_dir"] = str(tmp_path / "own bank")
    config, disk = run.write_config(), Path(run.keys[place])

    def act(said) -> None:
        small_disk(disk, 8192)  # two pages
        assert call(main, f"--config={config}") == 2
        assert "space" in error_line(said())
        assert not list(disk.rglob("*.partial"))
        mount("-o", "remount,size=4000000", disk)
        assert call(main, f"--config={config}") == 0, said()
        found = run.end()
        assert [name for name in undisturbed if found[name] != undisturbed[name]] == []

    with_mounts(act)
