"""A run's folder of modules: verified when read, committed in one step after each task, never overwritten.

``task<i>.pth`` is a LuCA alone, under the release's keys. ``classifier<t>.pth`` is what else prediction and further
learning need after task t. ``run.manifest`` names both with their SHA-256, the run's identity, and its results so far,
and ends with a SHA-256 of its own; replacing it is the commit. A process that dies between two commits leaves the
last one whole.
"""

import hashlib
import io
import json
import logging
import os
import re
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import CheckpointError
from utils.files import atomic_write, free_name, remove_partials, sha256_of_file, write_json
from utils.runs.manifest import FORMAT, RunManifest

log = logging.getLogger(__name__)

MANIFEST = "run.manifest"  # JSON; not named so, for scripts that collect the JSON files below a log folder
MODULE_FILE, CLASSIFIER_FILE = re.compile(r"task(\d{1,6})\.pth"), re.compile(r"classifier(\d{1,6})\.pth")
MODULE_PREFIX = "backbone.tosca."  # in front of LuCA's parameters in the release's files


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
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); mend that, then start again") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged ({_first_line(error)}); {HINT_RESTORE}") from error
        if not isinstance(values, dict) or "identity" not in values:
            raise CheckpointError(f"{path} is damaged (it is not a run's manifest); {HINT_RESTORE}")
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} has format {values.get('format')!r}, this version reads {FORMAT}; use the version that "
                "wrote it, or another checkpoint_dir"
            )
        if (recorded := values.pop("sha256", None)) != (found := _sha256_of_values(values)):
            raise CheckpointError(
                f"{path} is damaged or was edited: its SHA-256 is {found[:12]}…, it says {str(recorded)[:12]}…; "
                f"{HINT_RESTORE}"
            )
        try:
            return RunManifest.from_json(values)
        except CheckpointError as error:
            raise CheckpointError(f"{path} is damaged ({error}); {HINT_RESTORE}") from None

    def write_manifest(self, manifest: RunManifest) -> None:
        """Replace ``run.manifest``: from here on a start of the same run goes on from ``manifest``."""
        values = manifest.to_json()
        write_json(self.manifest_path, {**values, "sha256": _sha256_of_values(values)})

    def run_files(self) -> list[Path]:
        """The files here that belong to some run, ours or the release's; the manifest first."""
        if not self.folder.is_dir():
            return []
        names = (MODULE_FILE, CLASSIFIER_FILE, re.compile(re.escape(MANIFEST)))
        found = [path for path in self.folder.iterdir() if any(name.fullmatch(path.name) for name in names)]
        return sorted(found, key=lambda path: (path.name != MANIFEST, path.name))

    def move_aside(self) -> Path | None:
        """Move a run's files to a new folder beside this one and return it; None if there are none.

        They are gathered in a hidden folder, the manifest first, which is then named. Killed half-way, the next call
        gathers the rest, so that a run is never split.
        """
        folder = self.folder.resolve()
        gathered = folder.parent / f".{folder.name}.moving"
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
                f"the run in {self.folder} cannot be moved aside to {aside} ({error.strerror}); mend that or set "
                "another checkpoint_dir"
            ) from error
        return aside

    def remove_partials(self) -> None:
        """Remove what killed writes left; only for the holder of the folder's lock."""
        remove_partials(self.folder, rf"(task\d+\.pth|classifier\d+\.pth|{re.escape(MANIFEST)})")

    def commit(
        self, manifest: RunManifest, state: dict[str, Tensor], module: dict[str, Tensor] | None, task: int
    ) -> RunManifest:
        """Save what task ``task`` changed, then the manifest that names it; return that manifest."""
        files = {name: sha for name, sha in manifest.files.items() if not name.startswith("classifier")}
        files |= self._save_module(task, module)
        files[f"classifier{task}.pth"] = self._save(f"classifier{task}.pth", state)
        manifest = replace(manifest, files=files)
        self.write_manifest(manifest)
        self.remove_old_classifiers(manifest)
        return manifest

    def remove_old_classifiers(self, manifest: RunManifest) -> None:
        """Remove every classifier but the one that ``manifest``, which is on disk, names."""
        for path in self.run_files():
            if CLASSIFIER_FILE.fullmatch(path.name) and path.name not in manifest.files:
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
        aside = _name_aside(folder)
        copy = CheckpointFolder(folder.parent / f".{folder.name}.copying")  # a killed copy is written over
        copy.copy_files(self, manifest)
        copy.write_manifest(manifest)
        os.replace(copy.folder, aside)
        return aside

    def copy_files(self, source: "CheckpointFolder", manifest: RunManifest) -> None:
        """Copy the files that ``source``'s manifest names to here, byte for byte; ``source`` is only read."""
        for name in manifest.files:
            try:
                content = (source.folder / name).read_bytes()
            except OSError as error:
                path = source.folder / name
                raise CheckpointError(f"{path} cannot be read ({error.strerror}); {HINT_RESTORE}") from error
            atomic_write(self.folder / name, content)

    def _save_module(self, task: int, module: dict[str, Tensor] | None) -> dict[str, str]:
        """Write ``task<i>.pth`` under the release's keys; return its name with its SHA-256, nothing for no module."""
        if module is None:
            return {}
        name = f"task{task}.pth"
        return {name: self._save(name, {MODULE_PREFIX + key: tensor for key, tensor in module.items()})}

    def _save(self, name: str, state: dict[str, Tensor]) -> str:
        buffer = io.BytesIO()
        torch.save({key: tensor.detach().cpu().clone() for key, tensor in state.items()}, buffer)
        atomic_write(self.folder / name, buffer.getbuffer())
        return hashlib.sha256(buffer.getbuffer()).hexdigest()  # of what was meant, not of what the disk made of it

    def load(self, manifest: RunManifest) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """The last ``classifier<t>.pth`` and every ``task<i>.pth``, each checked against its SHA-256."""
        modules = []
        state: dict[str, Tensor] = {}
        for name, expected in manifest.files.items():
            path = self.folder / name
            try:
                found = sha256_of_file(path)
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing though {MANIFEST} names it; {HINT_RESTORE}") from None
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read ({error.strerror}); {HINT_RESTORE}") from error
            if found != expected:
                raise CheckpointError(
                    f"{path} is damaged or from another run: its SHA-256 is {found[:12]}…, "
                    f"{MANIFEST} says {expected[:12]}…; {HINT_RESTORE}"
                )
            if task := MODULE_FILE.fullmatch(name):
                modules.append((int(task[1]), module_from_file(path)))
            else:
                state = load_tensors(path)
        return state, [module for _, module in sorted(modules, key=lambda numbered: numbered[0])]


HINT_RESTORE = "restore it from a copy, or start over with --fresh (which moves this folder's files aside)"


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A plain state dict. No code in the file is ever run.

    Raises:
        CheckpointError: truncated, empty, not a state dict, or a pickle that wants to run code.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged and cannot be read ({_first_line(error)}); {HINT_RESTORE}") from error
    except Exception as error:  # pickle.UnpicklingError and what a hostile file may provoke
        raise CheckpointError(
            f"{path} is not a plain state dict of tensors and was not loaded ({_first_line(error)}); {HINT_RESTORE}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} is not a plain state dict of tensors; {HINT_RESTORE}")
    return state


def module_from_file(path: Path) -> dict[str, Tensor]:
    """LuCA's parameters from a ``task<i>.pth``, the release's or ours."""
    return {name.removeprefix(MODULE_PREFIX): tensor for name, tensor in load_tensors(path).items()}


def _name_aside(folder: Path) -> Path:
    """A new folder beside ``folder``, named by the time."""
    return free_name(folder.parent / f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")


def _sha256_of_values(values: dict[str, Any]) -> str:
    """Of JSON values, whatever their order and layout in the file."""
    as_read = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
