"""Writing files so that a reader sees the old or the new one, and holding a folder for one process."""

import errno
import hashlib
import io
import json
import os
import re
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import ConfigError, UserError
from utils.hardware import process_lives


def atomic_write(path: Path, content: bytes | memoryview, *, flush: bool = True) -> None:
    """Write ``content`` to a hidden neighbour of ``path``, flush it to disk, then move it into place in one step.

    Args:
        flush: False leaves the time of writing to the system, for what can be made again: after a loss of power the
            file may be empty.

    Raises:
        UserError: the disk is full, the folder cannot be written, or the name is too long; ``path`` is as before.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, partial_path(path), flush=flush) as file:
            file.write(content)
    except OSError as error:
        hint = hint_of_limits(error) or "free space, correct the permissions or set another folder"
        raise UserError(
            f"{path} cannot be written ({error.strerror}); what was there is unchanged: {hint}, then start again"
        ) from error


def hint_of_limits(error: OSError) -> str:
    """What to do about an error that is a limit's of the process; empty for any other."""
    hints = {
        errno.EMFILE: "raise the number of open files (ulimit -n)",
        errno.EFBIG: "raise the size of files (ulimit -f)",
    }
    return hints.get(error.errno or 0, "")


def partial_path(path: Path) -> Path:
    """The hidden neighbour under which this process writes ``path``; ``remove_partials`` knows this form."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def replacing(path: Path, partial: Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Give the file ``partial`` to write; at the end flush it to disk and move it to ``path`` in one step.

    After any error ``path`` is as before, and ``partial`` is gone. An ``OSError`` is the disk's and passes through.
    """
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if flush:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush to the disk which names a folder holds."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(handle)


def output_file(path: Path, option: str) -> Path:
    """Return the file that output to ``path`` goes to: links are followed, and nothing but a regular file is replaced.

    What killed processes left of writing it is removed.

    Raises:
        UserError: a folder, device, pipe or socket is there; ``option`` is what the user calls it.
    """
    target = Path(os.path.realpath(path))
    with suppress(OSError):  # what cannot be removed is in nobody's way
        remove_partials(target.parent, re.escape(target.name), locked=False)
    try:
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return target
    except OSError as error:
        raise UserError(f"{option} {str(path)!r} cannot be used ({error.strerror}); give another file") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise UserError(f"{option} {str(path)!r} is {kind}; give the name of a regular file")
    return target


def open_regular(path: Path, *, pipes: bool = False) -> io.BufferedReader:
    """Open a regular file to read it. A device may never end, and a pipe that nobody writes to makes ``open`` wait.

    Args:
        pipes: a pipe is read too, such as a shell's ``<(command)``; one that nobody writes to is empty.

    Raises:
        OSError: as ``open``, or there is something else.
    """
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 - closed by the caller
    mode = os.fstat(file.fileno()).st_mode
    if stat.S_ISREG(mode) or (pipes and stat.S_ISFIFO(mode)):
        if os.name == "posix":
            os.set_blocking(file.fileno(), True)
        return file
    file.close()
    raise OSError(errno.ENXIO, "it is a device, pipe or socket, no regular file", str(path))


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_regular(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: as ``open_regular``.
    """
    with open_regular(path) as file:
        return file.read()


def expanded(path: str | Path) -> Path:
    """The path with a ``~`` at its start replaced by the home folder.

    Raises:
        UserError: the home folder is not known, as in a container with a user id of its own.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: the home folder at its start is not known; give the whole path") from None


def remove_partials(folder: Path, name: str, *, locked: bool = True) -> None:
    """Remove what killed processes left of unfinished writes of files whose name matches the pattern ``name``.

    Args:
        folder: where the files are.
        name: a regular expression.
        locked: whether the lock of those files is held: a partial file may else be another process's, at work. False
            leaves the files of processes that live on this machine.
    """
    if folder.is_dir():
        for path in folder.iterdir():
            partial = re.fullmatch(rf"\.{name}\.(\d+)\.partial", path.name)
            if partial and (locked or not process_lives(int(partial.groups()[-1]))):
                path.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically, laid out by ``json_lines``. NaN is not JSON: callers pass None for what is undefined."""
    atomic_write(path, json_lines(values).encode("utf-8") + b"\n")


def json_lines(values: Any, levels: int = 3) -> str:
    """JSON whose first ``levels`` levels have a line for each item: readable, and fast to write where it is long."""
    return _without_halves(_lines(values, levels, ""))


_encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode  # json.dumps would make an encoder at each call


def _lines(values: Any, levels: int, indent: str) -> str:
    if not levels or not values or not isinstance(values, (dict, list, tuple)):
        return _encode(values)
    inside = indent + " "
    if isinstance(values, dict):
        opening, closing = "{}"
        items = [f"{_encode(str(key))}: {_lines(value, levels - 1, inside)}" for key, value in values.items()]
    else:
        opening, closing = "[]"
        items = [_lines(value, levels - 1, inside) for value in values]
    return opening + "\n" + ",\n".join(inside + item for item in items) + "\n" + indent + closing


def json_text(values: Any) -> str:
    """JSON that every encoding of Unicode can write; what names that are not UTF-8 hold stands there escaped."""
    return _without_halves(_encode(values))


def _without_halves(text: str) -> str:
    """Escape the halves of surrogate pairs, which stand for bytes that are not UTF-8."""
    return re.sub(r"[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


class FolderLock:
    """Held by one process at a time; the operating system gives it back when the process ends, however it ends.

    Use it as a context manager. The file names its holder.

    Args:
        path: the lock file.
        what: for the message, what is locked.
        wait: True waits for the holder; False raises at once.

    Raises:
        UserError: another process holds it; process and machine are named.
    """

    def __init__(
        self, path: Path, what: str, *, wait: bool = False, on_wait: Callable[[str], None] | None = None
    ) -> None:
        self.path, self.what, self.wait, self.on_wait = path, what, wait, on_wait

    def __enter__(self) -> "FolderLock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            refused = f"{error.filename or self.path} cannot be written ({error.strerror})"
            hint = hint_of_limits(error) or "correct that or set another folder"
            raise UserError(f"{self.what} cannot be used: {refused}; {hint}") from error
        if not self._lock(wait=False):
            holder = os.pread(self._handle, 200, 0).decode(errors="replace").strip() if os.name == "posix" else ""
            holder = holder or "another process"
            if not self.wait:
                os.close(self._handle)
                raise UserError(f"{self.what} is in use by {holder}; wait for it or give another folder")
            if self.on_wait:
                self.on_wait(holder)
            self._lock(wait=True)
        try:
            os.ftruncate(self._handle, 0)
            os.lseek(self._handle, 0, os.SEEK_SET)
            os.write(self._handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            os.close(self._handle)
            raise UserError(f"{self.path} cannot be written ({error.strerror}); free space, start again") from error
        return self

    def check(self) -> None:
        """Check that the lock's file is still the one that was locked.

        Raises:
            UserError: the file, or the folder that it lies in, was removed or exchanged.
        """
        held = os.fstat(self._handle)
        try:
            found = os.stat(self.path)
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino):
            raise UserError(
                f"{self.what} was removed or exchanged while this process was at work in it; put it back, or start the "
                "same command again to do what is missing there"
            )

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)  # gives the lock back; the file stays, for removing it would race with another process

    def _lock(self, *, wait: bool) -> bool:
        """Take an exclusive lock; False if another process has it and ``wait`` is False.

        It belongs to this process alone: loader processes do not inherit it, so it ends with the process that holds it
        even if they outlive it for a moment.
        """
        try:
            if sys.platform == "win32":
                import msvcrt

                os.lseek(self._handle, 1 << 20, os.SEEK_SET)  # beyond the text that names the holder
                msvcrt.locking(self._handle, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.lockf(self._handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # such as: no locks on this file system
                os.close(self._handle)
                raise UserError(
                    f"{self.path} cannot be locked ({error.strerror}), so {self.what} is not safe from others; "
                    "set a folder on another disk"
                ) from error
            return False
        return True


def human_size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def free_name(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3`` … that does not exist."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dictionary; for ``object_pairs_hook``.

    Raises:
        ConfigError: a key stands twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in {name for name, _ in pairs[:i]})
        raise ConfigError(f"key {twice!r} stands twice")
    return values


def read_json(path: Path, kind: str = "a config", hint: str = "give --config=<file>.json, see exps/") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file, or a pipe such as a shell's ``<(command)``.
        kind: what the file should be, for messages.
        hint: what to do if it cannot be read.

    Raises:
        ConfigError: not readable, not JSON (line and column are named), not an object, or a key given twice.
    """
    try:
        with open_regular(path, pipes=True) as file:
            values = json.loads(file.read().decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; this is not JSON") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text; {kind} is a JSON text file") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply for {kind}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {hint}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; keep one") from None
    except ValueError as error:  # a number with more digits than Python converts
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {kind} is one JSON object {{...}}, got {type(values).__name__}")
    return values
