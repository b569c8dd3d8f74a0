"""A run's folder: checked when it is read, committed in one step after each task, never overwritten.

``task<i>.pth`` is a LuCA alone, under the release's keys. ``classifier<t>.pth`` is what else prediction and further
learning need after task t. ``results.jsonl`` has a line for each task, to which nothing but lines are ever added.
``run.manifest`` names these files with their SHA-256 and says how much of the last one counts; it holds the run's
identity, and a SHA-256 of its own; replacing it is the commit. A process that dies between two commits leaves the last
one whole: what lies beyond it in ``results.jsonl`` is not read, and the next commit cuts it off.
"""

import hashlib
import io
import json
import os
import pickle
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import CheckpointError, DamagedRunError, UserError, is_lack_of_memory, remedy_of
from utils.files import (
    atomic_write,
    free_name,
    json_text,
    open_regular,
    read_regular,
    remove_partials,
    sha256_of_file,
    sync_folder,
    write_json,
    writing,
)
from utils.runs.manifest import RunManifest, TaskRecord

FORMAT = 1  # of the manifest and of all that it names
# JSON, but not named so, for scripts that collect the JSON files below a log folder
MANIFEST, RESULTS = "run.manifest", "results.jsonl"
RUN_FILE = re.compile(rf"(task|classifier)\d{{1,6}}\.pth|{re.escape(RESULTS)}|{re.escape(MANIFEST)}")
MODULE_PREFIX = "backbone.tosca."  # in front of LuCA's parameters in the release's files


def module_name(task: int) -> str:
    return f"task{task}.pth"


def classifier_name(task: int) -> str:
    return f"classifier{task}.pth"


class CheckpointFolder:
    """The files of one run, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def manifest_path(self) -> Path:
        return self.folder / MANIFEST

    # -- reading ---------------------------------------------------------------------------------------------------

    def read_manifest(self) -> RunManifest | None:
        """The run that was last committed, with its results; None if there is none."""
        path = self.manifest_path
        with reading(path):
            try:
                values = json.loads(read_regular(path))
            except FileNotFoundError:
                return None
            if (said := values.pop("sha256")) != (found := _sha256_of_values(values)):
                raise ValueError(f"its SHA-256 is {found[:12]}…, it says {said[:12]}…")
            if (form := values.pop("format")) != FORMAT:
                raise CheckpointError(
                    f"{path} has format {form!r}, this version reads {FORMAT}; use the version that wrote it, or "
                    "another checkpoint_dir"
                )
            manifest = RunManifest.from_json(values)
            for name in manifest.files:
                if not RUN_FILE.fullmatch(name) or name == MANIFEST:
                    raise ValueError(f"it names {name!r}, which is no file of a run")
            records = map(json.loads, self._lines(manifest) if RESULTS in manifest.files else ())
            return replace(manifest, tasks=tuple(map(TaskRecord.from_json, records)))

    def _lines(self, manifest: RunManifest) -> list[bytes]:
        """The lines of ``results.jsonl`` that ``manifest`` names."""
        path = self.folder / RESULTS
        with reading(path):
            lines = read_regular(path)[: manifest.results_bytes].splitlines(keepends=True)
        _check_sha256(path, _chained("", lines), manifest)
        return lines

    def check(self, manifest: RunManifest, name: str) -> Path:
        """Check that a file is the one that ``manifest`` names; return its path."""
        path = self.folder / name
        if name == RESULTS:
            self._lines(manifest)
        else:
            with reading(path):
                found = sha256_of_file(path)
            _check_sha256(path, found, manifest)
        return path

    def verify(self, manifest: RunManifest) -> None:
        """Read every file that ``manifest`` names once more."""
        for name in manifest.files:
            self.check(manifest, name)

    def load(self, manifest: RunManifest) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """The last ``classifier<t>.pth`` and every ``task<i>.pth``, each checked against its SHA-256."""
        found = {name: load_tensors(self.check(manifest, name)) for name in manifest.files if name != RESULTS}
        numbers = sorted(int(name[len("task") : -len(".pth")]) for name in found if name.startswith("task"))
        modules = [found.pop(module_name(number)) for number in numbers]
        return next(iter(found.values()), {}), modules

    # -- writing ---------------------------------------------------------------------------------------------------

    def commit(
        self, manifest: RunManifest, state: dict[str, Tensor], modules: Mapping[int, dict[str, Tensor] | None]
    ) -> RunManifest:
        """Save what the newest tasks changed, then the manifest that names it; return that manifest.

        Args:
            manifest: with the results of these tasks.
            state: of the classifier, after the last of them.
            modules: by task, from 0; None where the method has none. Task 0 among them begins the folder anew.
        """
        first, last = min(modules), max(modules)
        if first == 0:
            manifest = replace(manifest, files={}, results_bytes=0)
        files = {name: sha256 for name, sha256 in manifest.files.items() if not name.startswith("classifier")}
        for task, module in modules.items():
            if module is not None:
                named = {MODULE_PREFIX + key: tensor for key, tensor in module.items()}
                files[module_name(task)] = self._save(module_name(task), named)
        files[classifier_name(last)] = self._save(classifier_name(last), state)
        manifest = self._with_lines(replace(manifest, files=files), manifest.tasks[first:])
        self.write_manifest(manifest)
        self.remove_old_files(manifest)
        return manifest

    def _save(self, name: str, state: dict[str, Tensor]) -> str:
        """Write a file of tensors; return the SHA-256 of what was meant, not of what the disk made of it."""
        buffer = io.BytesIO()
        torch.save({key: tensor.detach().cpu().clone() for key, tensor in state.items()}, buffer)
        atomic_write(self.folder / name, buffer.getbuffer())
        return hashlib.sha256(buffer.getbuffer()).hexdigest()

    def _with_lines(self, manifest: RunManifest, records: Sequence[TaskRecord]) -> RunManifest:
        """Add lines to ``results.jsonl`` behind those that ``manifest`` names; return the manifest that names them."""
        path, size = self.folder / RESULTS, manifest.results_bytes
        lines = [json_text(record.to_json()).encode() + b"\n" for record in records]
        with writing(path):
            if not size:
                path.unlink(missing_ok=True)  # it may be a link
            with open(path, "ab") as file:
                file.truncate(size)  # what a process added that died before it could commit
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.folder)
        sha256 = _chained(manifest.files.get(RESULTS, ""), lines)
        size += sum(map(len, lines))
        return replace(manifest, files={**manifest.files, RESULTS: sha256}, results_bytes=size)

    def write_manifest(self, manifest: RunManifest) -> None:
        """Replace ``run.manifest``: from here on a start of the same run goes on from ``manifest``."""
        values = {"format": FORMAT, **replace(manifest, tasks=()).to_json()}
        write_json(self.manifest_path, {**values, "sha256": _sha256_of_values(values)})

    def remove_partials(self) -> None:
        """Remove what killed writes left; only for the holder of the folder's lock."""
        remove_partials(self.folder, f"({RUN_FILE.pattern})")

    def remove_old_files(self, manifest: RunManifest) -> None:
        """Remove every classifier but the one that ``manifest``, which is on disk, names."""
        for path in self.run_files():
            if path.name.startswith("classifier") and path.name not in manifest.files:
                path.unlink(missing_ok=True)

    # -- moving ----------------------------------------------------------------------------------------------------

    def run_files(self) -> list[Path]:
        """The files here that belong to some run, ours or the release's; the manifest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if RUN_FILE.fullmatch(path.name)]
        return sorted(found, key=lambda path: (path.name != MANIFEST, path.name))

    def move_aside(self) -> Path | None:
        """Move a run's files to a new folder beside this one and return it; None if there are none.

        Where this folder is a disk of its own, or its parent cannot be written, the new folder lies inside.

        They are gathered in a hidden folder, the manifest first, which is then named. Killed half-way, the next call
        gathers the rest, so that a run is never split.
        """
        folder = self.folder.resolve()
        gathered = _outside(folder) / f".{folder.name}.moving"
        aside = _name_aside(folder)
        try:
            files = self.run_files()
            if not files and not gathered.is_dir():
                return None
            gathered.mkdir(exist_ok=True)
            for path in files:
                if (gathered / path.name).exists():
                    raise CheckpointError(f"{gathered} and {folder} both hold {path.name}; move one of them elsewhere")
                os.replace(path, gathered / path.name)
            os.replace(gathered, aside)
        except OSError as error:
            raise CheckpointError(
                f"the run in {self.folder} cannot be moved aside to {aside} ({error.strerror}); correct that or set "
                "another checkpoint_dir"
            ) from error
        return aside


def _outside(folder: Path) -> Path:
    """Where a folder's files can be moved to by renaming them: its parent; itself, if that is on another disk."""
    own_disk = folder.is_dir() and (os.path.ismount(folder) or os.stat(folder).st_dev != os.stat(folder.parent).st_dev)
    return folder if own_disk or not os.access(folder.parent, os.W_OK | os.X_OK) else folder.parent


def _name_aside(folder: Path) -> Path:
    """A new folder beside ``folder``, named by the time."""
    return free_name(_outside(folder) / f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")


def read_run(checkpoint: CheckpointFolder) -> RunManifest:
    """The manifest of a run that has learned something; where there is none, a fault says what is there instead."""
    manifest, folder = checkpoint.read_manifest(), checkpoint.folder
    if manifest is not None and manifest.tasks:
        return manifest
    if manifest is not None:
        raise CheckpointError(f"the run in {str(folder)!r} has not finished its first task")
    if seeds := sorted(path.parent.name for path in folder.glob(f"seed*/{MANIFEST}")):
        raise CheckpointError(f"{str(folder)!r} holds the runs of several seeds; choose one: {folder / seeds[0]}")
    if checkpoint.run_files():
        raise CheckpointError(
            f"{str(folder)!r} holds modules but no {MANIFEST}: the release's files come without a classifier, so they "
            "cannot predict; train with this project"
        )
    raise CheckpointError(f"{str(folder)!r} holds no run (no {MANIFEST}); give a run's checkpoint_dir")


# -- single files -----------------------------------------------------------------------------------------------------


def _chained(sha256: str, lines: Sequence[bytes]) -> str:
    """The SHA-256 of lines behind others whose SHA-256 is given, so that another line costs itself alone."""
    for line in lines:
        sha256 = hashlib.sha256(sha256.encode() + line).hexdigest()
    return sha256


def _check_sha256(path: Path, found: str, manifest: RunManifest) -> None:
    if found != (named := manifest.files.get(path.name, "")):
        raise DamagedRunError(
            f"{path} is damaged or from another run: its SHA-256 is {found[:12]}…, {MANIFEST} says {named[:12]}…"
        )


def _sha256_of_values(values: dict[str, Any]) -> str:
    """Of JSON values, whatever their order and layout in the file; all keys are strings."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A plain state dict, a LuCA's without the release's prefix; no code in the file, which may be anyone's, is run."""
    with reading(path), open_regular(path) as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # what torch says about it advises to trust the file
            state = None
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it is not a plain state dict of tensors")
        return {name.removeprefix(MODULE_PREFIX): tensor for name, tensor in state.items()}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A fault while ``path`` is read is told as what it is: missing, refused by the machine, or else damaged."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise DamagedRunError(f"{path} is missing") from None
    except OSError as error:
        said = f"{path} cannot be read ({error.strerror or error})"
        raise CheckpointError(f"{said}; {remedy_of(error)}, then start again") from error
    except Exception as error:
        if is_lack_of_memory(error):
            raise
        raise DamagedRunError(f"{path} is damaged ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """The first line of what an error says, short enough for a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
