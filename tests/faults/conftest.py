"""A tiny real run, its end when nothing goes wrong, and ways to stop it."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import main
from models.tosca import TOSCA
from tests.conftest import TINY, fork, handlers_restored
from utils.runs.checkpoint import MANIFEST

KEYS: dict[str, Any] = {**TINY, "backbone_type": "glyphs_vit", "pretrained": True, "image_size": 16}
# times, a sum over times, and what depends on whether another run has filled the bank
_NOT_THE_END = ("seconds", "cost", "sha256", "backbone_forwards")
_WHERE = ("checkpoint_dir", "log_dir", "cache_dir", "data_path", "num_workers")


@dataclass(frozen=True)
class Ending:
    """How one start of ``main.py`` ended: its exit code, and what it said."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that answers a fault."""
        lines = [line for line in self.err.splitlines() if ": error: " in line]
        assert self.code == 2, (self.code, self.out, self.err)
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err + self.out
        return lines[0]


class TinyRun:
    """The run whose files are below ``folder``; each call starts it."""

    def __init__(self, folder: Path, data: Path, bank: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.checkpoints, self.logs, self.capture = folder, folder / "tosca", folder / "logs", capture
        self.keys = {
            **KEYS,
            "data_path": str(data),
            "checkpoint_dir": str(self.checkpoints),
            "log_dir": str(self.logs),
            "cache_dir": str(bank),
        }

    def __call__(self, *arguments: str, **keys: Any) -> Ending:
        config = self.write_config(**keys)
        self.capture.readouterr()
        with handlers_restored():
            code = main.main([f"--config={config}", *arguments])
        said = self.capture.readouterr()
        return Ending(code, said.out, said.err)

    def write_config(self, **keys: Any) -> Path:
        path = self.folder / "config.json"
        path.write_text(json.dumps({**self.keys, **keys}))
        return path

    def in_a_process(self, prepare: Callable[[], object] = lambda: None, **keys: Any) -> int:
        """Start it in a forked process, after ``prepare`` there; return the process id. Its group is its own."""
        config = self.write_config(**keys)
        if pid := fork():
            return pid
        code = 99
        try:
            os.setpgid(0, 0)
            prepare()
            code = main.main([f"--config={config}"])
        finally:
            os._exit(code)

    def end(self) -> dict[str, Any]:
        """Modules, classifier, manifest and results by name, but for times and for where they are."""
        found: dict[str, Any] = {}
        for path in [*self.checkpoints.rglob("*"), *self.logs.rglob("*")]:
            if path.name == MANIFEST or (path.suffix == ".json" and path.is_relative_to(self.logs)):
                values = json.loads(path.read_bytes())
                found[path.name] = {key: value for key, value in values.items() if key not in _NOT_THE_END}
                config = values["config"].items()
                found[path.name]["config"] = {k: v for k, v in config if k not in _WHERE}
            elif path.is_file() and path.suffix in (".pth", ".jsonl", ".json"):
                found[str(path.relative_to(self.folder))] = path.read_bytes()
        return found


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """The content of every file below a folder; locks are no content."""

    def read(folder: Path) -> dict[str, bytes]:
        found = [p for p in folder.rglob("*") if p.is_file() and "lock" not in p.name]
        return {str(p.relative_to(folder)): p.read_bytes() for p in found}

    return read


@pytest.fixture(scope="session")
def wait_for_end() -> Callable[[int], int]:
    """The exit code of a forked process, negative for the signal that ended it."""
    return lambda pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, make_folder: Callable[..., Path]) -> Path:
    """Six classes of real digits: three tasks. Read only."""
    return make_folder(tmp_path_factory.mktemp("data"), classes=6, train=3, test=2)


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature bank that tests share, so that only the first one fills it."""
    return tmp_path_factory.mktemp("bank")


@pytest.fixture
def run(tmp_path: Path, data: Path, bank: Path, capsys: pytest.CaptureFixture[str]) -> TinyRun:
    """A run that was not started yet."""
    return TinyRun(tmp_path, data, bank, capsys)


def stop_at_task(patch: pytest.MonkeyPatch, task: int) -> None:
    """Ctrl-C when task number ``task`` begins."""
    learn = TOSCA.fit

    def fit(self: TOSCA, data: Any, on_epoch: Any) -> None:
        if data.index == task:
            raise KeyboardInterrupt
        learn(self, data, on_epoch)

    patch.setattr(TOSCA, "fit", fit)


@pytest.fixture(scope="session")
def starts(tmp_path_factory: pytest.TempPathFactory, data: Path, bank: Path) -> Callable[..., TinyRun]:
    """Makes a run that was started before and stopped at a task, or finished: computed once."""
    made: dict[int | None, TinyRun] = {}

    def started(stop_at: int | None, capture: pytest.CaptureFixture[str]) -> TinyRun:
        if stop_at not in made:
            run = TinyRun(tmp_path_factory.mktemp("start"), data, bank, capture)
            with pytest.MonkeyPatch.context() as patch:
                if stop_at is not None:
                    stop_at_task(patch, stop_at)
                assert run().code == (0 if stop_at is None else 130)
            made[stop_at] = run
        return made[stop_at]

    return started


def _copy(source: TinyRun, target: TinyRun) -> TinyRun:
    for part in ("tosca", "logs"):
        shutil.copytree(source.folder / part, target.folder / part)
    return target


@pytest.fixture
def finished(run: TinyRun, starts: Callable[..., TinyRun], capsys: pytest.CaptureFixture[str]) -> TinyRun:
    """A run that was finished."""
    return _copy(starts(None, capsys), run)


@pytest.fixture
def half(run: TinyRun, starts: Callable[..., TinyRun], capsys: pytest.CaptureFixture[str]) -> TinyRun:
    """A run that was stopped after two of its three tasks."""
    return _copy(starts(2, capsys), run)


@pytest.fixture
def undisturbed(starts: Callable[..., TinyRun], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The end of the run when nothing goes wrong."""
    return starts(None, capsys).end()
