"""A run's folder of modules: verified when read, committed in one step after each task, never overwritten.

``task<i>.pth`` is a LuCA alone, under the release's keys. ``classifier<t>.pth`` is what else prediction and further
learning need after task t. ``run.manifest`` names both with their SHA-256, the run's identity, and its results so far,
and ends with a SHA-256 of its own; replacing it is the commit. A process that dies between two commits leaves the
last one whole. ``evaluation<i>.manifest`` holds those results after task i that grow with the tasks; it never changes.
"""

import hashlib
import io
import json
import logging
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import CheckpointError, DamagedRunError
from utils.files import atomic_write, free_name, json_lines, read_regular, remove_partials, sha256_of_file, write_json
from utils.runs.manifest import FORMATS, RunManifest
from utils.runs.tensors import MODULE_PREFIX, first_line, load_tensors, module_from_file

log = logging.getLogger(__name__)

MANIFEST = "run.manifest"  # JSON; not named so, for scripts that collect the JSON files below a log folder
MODULE_FILE, CLASSIFIER_FILE = re.compile(r"task(\d{1,6})\.pth"), re.compile(r"classifier(\d{1,6})\.pth")
# JSON, but not named so, as the manifest: scripts collect the JSON files below a log folder
EVALUATION_FILE = re.compile(r"evaluation(\d{1,6})\.manifest")
OF_A_TASK = (MODULE_FILE, EVALUATION_FILE)  # written once; a manifest names those of all tasks, and one classifier
NAMED_FILES = (*OF_A_TASK, CLASSIFIER_FILE)  # what a manifest may name
RUN_FILES = (*NAMED_FILES, re.compile(re.escape(MANIFEST)))


def module_name(task: int) -> str:
    return f"task{task}.pth"


def classifier_name(task: int) -> str:
    return f"classifier{task}.pth"


def evaluation_name(task: int) -> str:
    return f"evaluation{task}.manifest"


class CheckpointFolder:
    """The files of one run.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def manifest_path(self) -> Path:
        return self.folder / MANIFEST

    def read_manifest(self) -> RunManifest | None:
        """``run.manifest``, or None if there is none.

        Raises:
            CheckpointError: it cannot be read, is damaged, was edited, or is of another format.
        """
        path = self.manifest_path
        try:
            values = json.loads(read_regular(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); correct that, start again") from error
        except (ValueError, RecursionError) as error:
            raise DamagedRunError(f"{path} is damaged ({first_line(error)})") from error
        if not isinstance(values, dict) or "identity" not in values:
            raise DamagedRunError(f"{path} is damaged (it is not a run's manifest)")
        if values.get("format") not in FORMATS:
            raise CheckpointError(
                f"{path} has format {values.get('format')!r}, this version reads {', '.join(map(str, FORMATS))}; use "
                "the version that wrote it, or another checkpoint_dir"
            )
        if (recorded := values.pop("sha256", None)) != (found := _sha256_of_values(values)):
            raise DamagedRunError(
                f"{path} is damaged or was edited: its SHA-256 is {found[:12]}…, it says {str(recorded)[:12]}…"
            )
        try:
            manifest = RunManifest.from_json(values)
            _check_files(manifest.files)
        except CheckpointError as error:
            raise DamagedRunError(f"{path} is damaged ({error})") from None
        return self._with_evaluations(manifest)

    def _with_evaluations(self, manifest: RunManifest) -> RunManifest:
        """The manifest with the results in the files beside it."""
        for task in _evaluated(manifest.files):
            name = evaluation_name(task)
            path = self._verified(name, manifest.files[name])
            try:
                manifest = manifest.with_evaluation(task, json.loads(path.read_bytes()))
            except (ValueError, RecursionError, CheckpointError) as error:
                raise DamagedRunError(f"{path} is damaged ({first_line(error)})") from error
        if (lacking := manifest.without_row()) is not None:
            raise DamagedRunError(f"{self.manifest_path} names no {evaluation_name(lacking)}")
        return manifest

    def write_manifest(self, manifest: RunManifest) -> None:
        """Replace ``run.manifest``: from here on a start of the same run goes on from ``manifest``."""
        values = manifest.to_json(whole=not _evaluated(manifest.files))
        write_json(self.manifest_path, {**values, "sha256": _sha256_of_values(values)})

    def _verified(self, name: str, sha256: str) -> Path:
        """The path of a file that the manifest names: a file of this folder with that SHA-256.

        Raises:
            CheckpointError: it is missing, a link to elsewhere, no regular file, or another one.
        """
        path = self.folder / name
        try:
            if path.resolve(strict=True).parent != self.folder.resolve() or not path.is_file():
                raise DamagedRunError(f"{path} is a link to elsewhere or no regular file")
            found = sha256_of_file(path)
        except FileNotFoundError:
            raise DamagedRunError(f"{path} is missing though {MANIFEST} names it") from None
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
            reason = getattr(error, "strerror", None) or error
            raise DamagedRunError(f"{path} cannot be read ({reason})") from error
        if found != sha256:
            raise DamagedRunError(
                f"{path} is damaged or from another run: its SHA-256 is {found[:12]}…, {MANIFEST} says {sha256[:12]}…"
            )
        return path

    def run_files(self) -> list[Path]:
        """The files here that belong to some run, ours or the release's; the manifest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if any(form.fullmatch(path.name) for form in RUN_FILES)]
        return sorted(found, key=lambda path: (path.name != MANIFEST, path.name))

    def move_aside(self) -> Path | None:
        """Move a run's files to a new folder beside this one and return it; None if there are none.

        Where this folder is a disk of its own, or its parent cannot be written, the new folder lies inside.

        They are gathered in a hidden folder, the manifest first, which is then named. Killed half-way, the next call
        gathers the rest, so that a run is never split.
        """
        folder = self.folder.resolve()
        gathered = moving_folder(folder)
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

    def remove_partials(self) -> None:
        """Remove what killed writes left; only for the holder of the folder's lock."""
        remove_partials(self.folder, f"({'|'.join(form.pattern for form in RUN_FILES)})")

    def commit(
        self, manifest: RunManifest, state: dict[str, Tensor], module: dict[str, Tensor] | None, task: int
    ) -> RunManifest:
        """Save what task ``task`` changed, then the manifest that names it; return that manifest.

        Raises:
            CheckpointError: a module of an earlier task is not there any more.
        """
        self._check_modules(manifest)
        files = {n: sha for n, sha in manifest.files.items() if any(form.fullmatch(n) for form in OF_A_TASK)}
        before = max((index for index in _evaluated(files) if index < task), default=-1)
        for new in range(before + 1, len(manifest.tasks)):
            content = json_lines(manifest.evaluation(new)).encode()
            files[evaluation_name(new)] = self._write(evaluation_name(new), content)
        files |= self._save_module(task, module)
        files[classifier_name(task)] = self._save(classifier_name(task), state)
        manifest = replace(manifest, files=files)
        self.write_manifest(manifest)
        self.remove_old_files(manifest)
        return manifest

    def _check_modules(self, manifest: RunManifest) -> None:
        for name in manifest.files:
            if MODULE_FILE.fullmatch(name) and not (self.folder / name).is_file():
                raise DamagedRunError(f"{self.folder / name} was removed while the run was at work")

    def verify(self, manifest: RunManifest) -> None:
        """Read every file that ``manifest`` names once more, and the manifest too.

        Raises:
            CheckpointError: one is missing or not what was saved.
        """
        for name, sha256 in manifest.files.items():
            self._verified(name, sha256)
        found = self.read_manifest()
        if found is None or found.files != manifest.files:
            raise DamagedRunError(f"{self.manifest_path} was changed while the run was at work")

    def remove_old_files(self, manifest: RunManifest) -> None:
        """Remove every classifier and evaluation but those that ``manifest``, which is on disk, names."""
        for path in self.run_files():
            form = CLASSIFIER_FILE.fullmatch(path.name) or EVALUATION_FILE.fullmatch(path.name)
            if form and path.name not in manifest.files:
                path.unlink(missing_ok=True)

    def commit_all(
        self, manifest: RunManifest, state: dict[str, Tensor], modules: list[dict[str, Tensor] | None]
    ) -> RunManifest:
        """``commit`` for all tasks at once: a run that grew in memory, not here."""
        files: dict[str, str] = {}
        for task, module in enumerate(modules):
            files |= self._save_module(task, module)
        return self.commit(replace(manifest, files=files), state, None, len(modules) - 1)

    def copy_aside(self, manifest: RunManifest) -> Path:
        """Copy the run of ``manifest`` to a new folder beside this one, which has its name once it is whole."""
        folder = self.folder.resolve()
        copy = CheckpointFolder(_outside(folder) / f".{folder.name}.copying")  # a killed copy is written over
        copy.remove_partials()
        copy.copy_files(self, manifest)
        copy.write_manifest(manifest)
        return copy.folder.rename(_name_aside(folder))

    def copy_files(self, source: "CheckpointFolder", manifest: RunManifest) -> None:
        """Copy the files that ``source``'s manifest names to here, byte for byte; ``source`` is only read."""
        for name, sha256 in manifest.files.items():
            path = source._verified(name, sha256)
            try:
                content = path.read_bytes()
            except OSError as error:
                raise DamagedRunError(f"{path} cannot be read ({error.strerror})") from error
            atomic_write(self.folder / name, content)

    def _save_module(self, task: int, module: dict[str, Tensor] | None) -> dict[str, str]:
        """Write ``task<i>.pth`` under the release's keys; return its name with its SHA-256, nothing for no module."""
        if module is None:
            return {}
        name = module_name(task)
        return {name: self._save(name, {MODULE_PREFIX + key: tensor for key, tensor in module.items()})}

    def _save(self, name: str, state: dict[str, Tensor]) -> str:
        buffer = io.BytesIO()
        torch.save({key: tensor.detach().cpu().clone() for key, tensor in state.items()}, buffer)
        return self._write(name, buffer.getbuffer())

    def _write(self, name: str, content: bytes | memoryview) -> str:
        """Write a file of the run; return the SHA-256 of what was meant, not of what the disk made of it."""
        with ThreadPoolExecutor(1) as beside:  # hashing takes as long as the disk does, and waits for nothing of it
            sha256 = beside.submit(hashlib.sha256, content)
            atomic_write(self.folder / name, content)
            return sha256.result().hexdigest()

    def load(self, manifest: RunManifest) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """The last ``classifier<t>.pth`` and every ``task<i>.pth``, each checked against its SHA-256.

        Raises:
            CheckpointError: a file is missing, damaged or another run's, or holds a number that is not finite.
        """
        modules = []
        state: dict[str, Tensor] = {}
        for name, sha256 in manifest.files.items():
            if EVALUATION_FILE.fullmatch(name):
                continue
            path = self._verified(name, sha256)
            tensors = module_from_file(path) if MODULE_FILE.fullmatch(name) else load_tensors(path)
            if bad := [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
                raise DamagedRunError(f"{path} holds numbers in {bad[0]!r} that are not finite")
            if task := MODULE_FILE.fullmatch(name):
                modules.append((int(task[1]), tensors))
            else:
                state = tensors
        return state, [module for _, module in sorted(modules, key=lambda numbered: numbered[0])]


def _check_files(files: dict[str, Any]) -> None:
    """Check that ``files`` are plain names of the forms that a run writes, each with a SHA-256.

    Raises:
        CheckpointError: the first that is not.
    """
    for name, sha256 in files.items():
        if not any(form.fullmatch(name) for form in NAMED_FILES):
            raise CheckpointError(f"it names {name!r}, which is no file of a run")
        if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise CheckpointError(f"its SHA-256 of {name!r} is none")
    if len(named := [name for name in files if CLASSIFIER_FILE.fullmatch(name)]) > 1:
        raise CheckpointError(f"it names both {named[0]!r} and {named[1]!r}")


def _evaluated(files: dict[str, str]) -> list[int]:
    """The tasks, counted from 0, with an evaluation among ``files``; none where the manifest holds all (format 1)."""
    return sorted(int(found[1]) for name in files if (found := EVALUATION_FILE.fullmatch(name)))


def _outside(folder: Path) -> Path:
    """Where a folder's files can be moved to by renaming them: its parent; itself, if that is on another disk."""
    own_disk = folder.is_dir() and (os.path.ismount(folder) or os.stat(folder).st_dev != os.stat(folder.parent).st_dev)
    return folder if own_disk or not os.access(folder.parent, os.W_OK | os.X_OK) else folder.parent


def moving_folder(folder: Path) -> Path:
    return _outside(folder) / f".{folder.name}.moving"


def _name_aside(folder: Path) -> Path:
    """A new folder beside ``folder``, named by the time."""
    return free_name(_outside(folder) / f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")


def _sha256_of_values(values: dict[str, Any]) -> str:
    """Of JSON values, whatever their order and layout in the file; all keys are strings."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
