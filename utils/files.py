"""Writing files so that a reader sees the old or the new one, and holding a folder for one process."""

import errno
import hashlib
import io
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import ConfigError, UserError, remedy_of


def atomic_write(path: Path, content: bytes | memoryview, *, flush: bool = True) -> None:
    """Write ``content`` to a hidden neighbour of ``path``, flush it to disk, then move it into place in one step.

    Args:
        flush: False leaves the time of writing to the system, for what can be made again: after a loss of power the
            file may be empty.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, partial_path(path), flush=flush) as file:
            file.write(content)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever refuses to let ``path`` be written becomes one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); what was there is unchanged: {remedy_of(error)}, then start "
            "again"
        ) from error


def hint_of_limits(error: OSError) -> str:
    """What to do about an error that is a limit's of the process; empty for any other."""
    return remedy_of(error) if error.errno in (errno.EMFILE, errno.EFBIG) else ""


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


def output_file(path: Path, option: str, *suffixes: str) -> Path:
    """Return the file that output to ``path`` goes to: links are followed, and nothing but a regular file is replaced.

    What killed processes left of writing it is removed.

    Args:
        option: what the user calls it.
        suffixes: in one of which its name ends, if any: images, the results and the files of a run have other names.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "a device, pipe or socket"
        raise UserError(f"{option} {str(path)!r} is {kind}; give the name of a regular file")
    if suffixes and target.suffix not in suffixes:
        raise UserError(f"{option} {str(path)!r}: give a name that ends in {' or '.join(suffixes)}")
    with suppress(OSError):  # what cannot be removed is in nobody's way
        remove_partials(target.parent, re.escape(target.name), locked=False)
    return target


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file to read it; raise ``OSError`` for a device or a pipe, whose content may never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.ENXIO, "it is a device, pipe or socket, no regular file", str(path))
    return open(path, "rb")


def read_regular(path: Path) -> bytes:
    """The content of a regular file."""
    with open_regular(path) as file:
        return file.read()


def expanded(path: str | Path) -> Path:
    """The path with a ``~`` at its start replaced by the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # as in a container with a user id of its own
        raise UserError(f"{path}: the home folder at its start is not known; give the whole path") from None


def remove_partials(folder: Path, name: str, *, locked: bool = True) -> None:
    """Remove what killed processes left of unfinished writes of files whose name matches the pattern ``name``.

    Args:
        folder: where the files are.
        name: a regular expression.
        locked: whether the lock of those files is held: a partial file may else be another process's, at work. False
            leaves the files of processes that live on this machine.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        partial = re.fullmatch(rf"\.{name}\.(\d+)\.partial", path.name)
        if partial and (locked or not _lives(int(partial.groups()[-1]))):
            path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    """Whether a process of this number may be there, on this machine."""
    if os.name != "posix":  # elsewhere asking might end it
        return True
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically. NaN is not JSON: callers pass None for what is undefined."""
    atomic_write(path, json_lines(values).encode() + b"\n")


def json_lines(values: Any) -> str:
    """JSON with a line for each item."""
    return json_text(values, indent=1)


def json_text(values: Any, indent: int | None = None) -> str:
    """JSON that every encoding of Unicode can write: bytes of names that are not UTF-8 stand there escaped."""
    text = json.dumps(values, indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace").decode()


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
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
        on_wait: is told who holds it before the wait begins.
    """

    def __init__(
        self, path: Path, what: str, *, wait: bool = False, on_wait: Callable[[str], None] | None = None
    ) -> None:
        self.path, self.what, self.wait, self.on_wait = path, what, wait, on_wait

    def __enter__(self) -> "FolderLock":
        act = "written"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)
            act = "locked"
            self._take()
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            refused = f"{error.filename or self.path} cannot be {act} ({error.strerror})"
            raise UserError(f"{refused}, so {self.what} cannot be used; {remedy_of(error)}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # gives the lock back; the file stays, for removing it would race with another process

    def check(self) -> None:
        """Check that the lock's file is still the one that was locked, and its folder not removed or exchanged."""
        try:
            same = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"{self.what} was removed or exchanged while this process was at work in it; put it back, or start the "
                "same command again to do what is missing there"
            )

    def _take(self) -> None:
        """Lock the file, waiting for whoever holds it if that is wanted."""
        while not self._taken():
            self._file.seek(0)
            holder = self._file.read(200).decode(errors="replace").strip() or "another process"
            if not self.wait:
                raise UserError(f"{self.what} is in use by {holder}; wait for it or give another folder")
            if self.on_wait:
                self.on_wait(holder)
            self.on_wait = None  # told once
            time.sleep(0.2)

    def _taken(self) -> bool:
        """Take the lock if nobody has it. It belongs to this process alone: loader processes do not inherit it."""
        try:
            if sys.platform == "win32":
                import msvcrt

                self._file.seek(1 << 20)  # beyond the text that names the holder
                msvcrt.locking(self._file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # such as: no locks on this file system
                raise
            return False
        return True


def human_size(count: int) -> str:
    """``count`` bytes in words, such as ``1.5 MB``."""
    power = min(3, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB')[power]}"


def free_name(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3`` … that does not exist."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object, of which no two may have one key; for ``object_pairs_hook``."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ConfigError(f"key {key!r} stands twice")
        values[key] = value
    return values


def read_json(path: Path, kind: str = "a config", hint: str = "give --config=<file>.json, see exps/") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        kind: what the file should be, for messages.
        hint: what to do if it cannot be read.
    """
    try:
        values = json.loads(read_regular(path).decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {hint}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; keep one") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, nested too deeply, a number of too many digits
        raise ConfigError(f"{path}: this is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {kind} is one JSON object {{...}}, got {type(values).__name__}")
    return values
