"""Damaged, foreign and hostile files; disks and folders that refuse. One line names each, and nothing is lost."""

import errno
import io
import json
import os
import pickle
import resource
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import main
import predict
from models.tosca import TOSCA
from tests.conftest import fork
from utils import files
from utils.errors import UserError
from utils.features import bank as features
from utils.files import FolderLock, atomic_write
from utils.runs.checkpoint import MANIFEST, RESULTS

# -- atomic writes ----------------------------------------------------------------------------------------------------


def half_then(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """From now on a file that ``utils.files`` opens takes half of what is written, then raises ``error``."""

    class Half(io.FileIO):
        def write(self, content: bytes) -> int:
            super().write(content[: len(content) // 2])
            raise error

    monkeypatch.setattr(files, "open", Half, raising=False)


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt(), TypeError("a bug")], ids=["disk", "Ctrl-C", "bug"])
def test_a_write_that_ends_half_way_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    half_then(monkeypatch, error)
    expected, words = (
        (UserError, r"file cannot be written .*was there is unchanged") if error is NO_SPACE else (type(error), None)
    )
    with pytest.raises(expected, match=words):
        atomic_write(path, b"new, but only half")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_to_flush_or_rename_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise NO_SPACE

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(UserError, match="No space left on device"):
        atomic_write(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda *args: (order.append("fsync"), fsync(*args)))
    monkeypatch.setattr(files.os, "replace", lambda *args: (order.append("replace"), replace(*args)))
    atomic_write(tmp_path / "file", b"new")
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder that holds the name


# -- checkpoint files -------------------------------------------------------------------------------------------------


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "bit-flipped": flip_a_bit,
    "text": lambda path: path.write_text("hello"),
    "malicious": lambda path: path.write_bytes(pickle.dumps(Hostile(path.with_name("hacked")))),
}


@pytest.mark.parametrize("name", ["task0.pth", "classifier1.pth", MANIFEST, RESULTS])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_file_is_named_and_nothing_is_changed(half, tree, name, damage):
    DAMAGE[damage](half.checkpoints / name)
    before = tree(half.checkpoints)
    error = half().error
    assert str(half.checkpoints / name) in error
    assert "--fresh" in error
    assert tree(half.checkpoints) == before
    assert not (half.checkpoints / "hacked").exists()


def test_a_module_of_another_run_is_not_taken_for_ours(half, tmp_path):
    """A LuCA of the same shapes, from a run that differs only in its seed."""
    assert half(seed=5, checkpoint_dir=str(tmp_path / "foreign"), log_dir=str(tmp_path / "elsewhere")).code == 0
    (half.checkpoints / "task0.pth").write_bytes((tmp_path / "foreign" / "task0.pth").read_bytes())
    assert "task0.pth is damaged or from another run" in half().error


def test_a_damaged_file_of_a_finished_run_is_told_too(finished):
    flip_a_bit(finished.checkpoints / "task1.pth")
    assert "task1.pth is damaged" in finished().error


def test_lack_of_memory_while_a_run_is_loaded_is_not_called_damage(half, monkeypatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("can't allocate memory: 9 bytes")

    monkeypatch.setattr(TOSCA, "load_state_dict", refuse)
    error = half().error
    assert "the memory does not suffice" in error and "--fresh" not in error


def test_a_damaged_result_file_is_moved_aside_and_written_again(half, undisturbed):
    (path,) = half.logs.rglob("*.json")
    path.write_text('{"half":')
    assert half().code == 0
    assert json.loads(path.read_bytes())["status"] == "finished"
    assert '{"half":' in {p.read_text() for p in half.logs.rglob("*.json")}


# -- the feature bank -------------------------------------------------------------------------------------------------


@pytest.fixture
def own_bank(run, tmp_path):
    """The run has a bank of its own, filled; returns an array of it."""
    run.keys["cache_dir"] = str(tmp_path / "bank")
    assert run().code == 0
    return next((tmp_path / "bank").rglob("augmented*.npy"))


def test_an_array_with_code_inside_is_not_run(run, own_bank):
    np.save(own_bank, np.array([Hostile(own_bank.with_name("hacked"))], dtype=object), allow_pickle=True)
    assert f"{own_bank} is damaged" in run("--fresh").error
    assert not own_bank.with_name("hacked").exists()


# -- disks and folders ------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk on which no file can grow above ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("size", [2_000, 9_000, 20_000])
def test_a_disk_that_fills_up_ends_the_run_and_the_next_start_ends_alike(run, undisturbed, size):
    with largest_file(size):
        error = run().error
    assert "cannot be written (File too large)" in error
    assert str(run.folder) in error or "the log" in error
    assert not list(run.folder.rglob("*.partial"))
    assert run().code == 0
    assert run.end() == undisturbed


def test_a_disk_that_fills_up_under_the_bank_is_named_and_the_next_start_ends_alike(run, undisturbed, tmp_path):
    run.keys["cache_dir"] = str(tmp_path / "bank")
    with largest_file(8_000):
        error = run().error
    assert "cannot be written (File too large)" in error
    assert "cache_dir" in error
    assert run().code == 0
    assert run.end() == undisturbed


def test_a_bank_larger_than_the_free_space_is_told_before_any_work(run, tmp_path, monkeypatch):
    run.keys["cache_dir"] = str(tmp_path / "bank")
    usage = features.shutil.disk_usage("/")
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage._replace(free=100))
    error = run().error
    assert "100 B are free" in error
    assert not list((tmp_path / "bank").rglob("*.npy"))


@contextmanager
def nobody() -> Iterator[None]:
    """The rights of an ordinary user, also where tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everyone may enter, also while ``nobody``."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
        os.chmod(name, 0o755)


def test_a_read_only_folder_is_named(open_folder):
    folder = open_folder / "read-only"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
    with nobody(), pytest.raises(UserError, match=r"read-only.*cannot be written \(Permission denied\)"):
        FolderLock(folder / "deeper" / ".lock", "a folder").__enter__()
    with nobody(), pytest.raises(UserError, match="file cannot be written"):
        atomic_write(folder / "file", b"new")


@pytest.mark.parametrize("key", ["checkpoint_dir", "log_dir", "cache_dir"])
def test_a_file_where_a_folder_should_be_is_named(run, tmp_path, key):
    file = tmp_path / "in the way"
    file.write_bytes(b"precious")
    assert str(file) in run(**{key: str(file)}).error
    assert file.read_bytes() == b"precious"


@pytest.mark.parametrize("key", ["checkpoint_dir", "log_dir", "cache_dir", "data_path", "prefix"])
def test_an_over_long_path_is_named(run, tmp_path, key):
    name = "long" * 80
    error = run(**{key: name if key == "prefix" else str(tmp_path / name)}).error
    assert "longlong" in error
    assert "File name too long" in error


def test_an_input_output_error_that_nothing_foresaw_is_one_line(run, monkeypatch):
    def broken(_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "/dev/disk")

    monkeypatch.setattr("models.preparation.load_dataset", broken)
    assert run().error.endswith("/dev/disk: Input/output error; correct that, then start again")


def test_a_lock_ends_with_its_process_even_if_a_loader_outlives_it(tmp_path):
    reader, writer = os.pipe()
    holder = fork()
    if holder == 0:
        with FolderLock(tmp_path / ".lock", "folder"):
            child = fork()  # as a loader is: it has all files open that its parent has
            if child:
                os.write(writer, child.to_bytes(4, "little"))
            time.sleep(60)
        os._exit(0)
    child = int.from_bytes(os.read(reader, 4), "little")
    try:
        with pytest.raises(UserError, match=f"in use by process {holder} on "):
            FolderLock(tmp_path / ".lock", "folder").__enter__()
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.kill(child, 0)  # still there
        with FolderLock(tmp_path / ".lock", "folder"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


# -- what is no regular file ------------------------------------------------------------------------------------------


@pytest.fixture
def never_ending(tmp_path) -> dict[str, Path]:
    """Places from which reading never ends: a pipe that nobody writes to, and a device."""
    os.mkfifo(pipe := tmp_path / "pipe")
    return {"pipe": pipe, "device": Path("/dev/zero")}


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_manifest_that_is_a_pipe_or_a_device_is_one_line(finished, never_ending, kind):
    manifest = finished.checkpoints / MANIFEST
    manifest.unlink()
    manifest.symlink_to(never_ending[kind])
    with limited_memory():
        assert "it is a device, pipe or socket" in finished().error


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_config_that_is_a_pipe_without_a_writer_or_a_device_is_one_line(never_ending, kind, capsys):
    with limited_memory():
        assert main.main([f"--config={never_ending[kind]}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(never_ending[kind]) in line


@contextmanager
def limited_memory() -> Iterator[None]:
    """A fault of the product must not fill the machine's memory."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2**30, before[1]))
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.parametrize(("number", "limit"), [(errno.EMFILE, "ulimit -n"), (errno.EFBIG, "ulimit -f")])
def test_a_limit_of_the_process_is_named(tmp_path, monkeypatch, number, limit):
    half_then(monkeypatch, OSError(number, os.strerror(number)))
    with pytest.raises(UserError, match=limit):
        atomic_write(tmp_path / "file", b"new")


@pytest.mark.parametrize("size", [100, 2_000])
def test_features_that_outgrow_their_disk_are_named_and_leave_no_litter(finished, tmp_path, capsys, size):
    (folder := tmp_path / "features").mkdir()
    file = folder / "features.npy"
    images = Path(finished.keys["data_path"]) / "test"
    capsys.readouterr()
    with largest_file(size):
        assert predict.main([f"--checkpoint={finished.checkpoints}", f"--features={file}", str(images)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert f"--features '{file}' cannot be written (File too large)" in line
    assert list(folder.iterdir()) == []
