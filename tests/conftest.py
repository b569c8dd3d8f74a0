"""Shared by all tests: tiny real images, a tiny config, a tiny frozen extractor. Nothing is ever downloaded."""

import copy
import hashlib
import json
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

import main
from backbone import create
from backbone.forward import TimmModel
from utils.config.config import Config, make_config
from utils.hardware import available_cpus
from utils.results import record, run_log

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job: tests' runs would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent

TINY: dict[str, Any] = {
    "dataset": "imagefolder",
    "init_cls": 2,
    "increment": 2,
    "backbone_type": "vit_tiny_patch16_224",
    "pretrained": False,
    "device": ["-1"],
    "image_size": 32,
    "epochs": 2,
    "batch_size": 4,
    "train_views": 1,
    "precision": "fp32",
    "num_workers": 0,
    "feature_batch_size": 8,
    "cache_dir": "none",
}


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite runs in one process more than there are CPUs, at most four, since many tests wait for others.

    Tests chosen by place or -k run in this process.
    """
    chosen = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.keyword
    return 0 if chosen else min(4, available_cpus() + 1)


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No test reads the user's data or writes into the user's folders, and log handlers end with their test."""
    for name in ("TOSCA_DATA", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with handlers_restored():
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


_draw_curves, _build = record.draw_curves, create._build


@pytest.fixture(autouse=True, scope="session")
def quick_runs() -> Iterator[None]:
    """What every run would do again for no test's sake is done once or not at all.

    A random ViT, the same one in every run, is built once and copied; the picture beside a run's JSON is drawn where a
    test asks for ``pictures``. Together they were two fifths of the time of a tiny run.
    """
    built = cache(lambda options, image_size: _build(dict(options), image_size))

    def build(options: dict[str, Any], image_size: int) -> TimmModel:
        # a test may build without memory, and weights that are loaded are not drawn before
        plain = torch.empty(0).device.type == "cpu" and _get_current_dispatch_mode() is None
        if not plain or options["pretrained"] or options["model_name"] != TINY["backbone_type"]:
            return _build(options, image_size)
        return copy.deepcopy(built(tuple(options.items()), image_size))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(create, "_build", build)
        patch.setattr(record, "draw_curves", lambda *_: None)
        yield


@contextmanager
def curves_drawn() -> Iterator[None]:
    """Runs draw their curves, as they do for users who have matplotlib."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "draw_curves", _draw_curves)
        yield


@pytest.fixture
def pictures() -> Iterator[None]:
    with curves_drawn():
        yield


def fork() -> int:
    """``os.fork`` for tests that need a copy of this process; the product itself never forks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process may have threads; the copies use none
        return os.fork()


@contextmanager
def handlers_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def tiny_config(**keys: Any) -> Config:
    """A config of three tiny tasks on the CPU; ``keys`` replace its values."""
    return make_config({**TINY, **keys})


@pytest.fixture(scope="session")
def digit_images() -> dict[str, list[np.ndarray]]:
    """Real handwritten digits, ``(8, 8)`` uint8, by class name."""
    with np.load(ROOT / "assets" / "digits.npz") as archive:
        images, labels = archive["images"], archive["labels"]
    pixels = (images.astype(np.float64) * 255 / 16).astype(np.uint8)
    return {str(digit): list(pixels[labels == digit]) for digit in range(10)}


FolderMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def make_folder(digit_images: dict[str, list[np.ndarray]]) -> FolderMaker:
    """Writes ``train/<class>/*.png`` and ``test/<class>/*.png`` of real digits below a folder and returns it.

    The number of images is one for all classes, or one for each.
    """

    def make(root: Path, *, classes: int = 6, train: int | Sequence[int] = 4, test: int | Sequence[int] = 3) -> Path:
        names = [str(digit) for digit in range(classes)]
        n_train, n_test = ([n] * classes if isinstance(n, int) else list(n) for n in (train, test))
        for name, count, extra in zip(names, n_train, n_test, strict=True):
            for index, pixels in enumerate(digit_images[name][: count + extra]):
                path = root / ("train" if index < count else "test") / name / f"{index:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC).save(path)
        return root

    return make


@dataclass
class TinyExtractor:
    """A frozen random projection of an image's pixels: what ``utils.features`` needs of a backbone."""

    feature_dim: int = 32
    image_size: int = 8
    name: str = "tiny"
    weights_sha256: str = "0" * 64
    precision: str = "fp32"
    normalize: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pooling: str = "token"
    variant: dict[str, str] = field(default_factory=dict)
    images_seen: int = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.images_seen += len(images)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(3 * self.image_size**2, self.feature_dim, generator=generator) / self.image_size
        return (images.float() / 255 - 0.5).flatten(1) @ weight


@pytest.fixture
def tiny_extractor() -> TinyExtractor:
    return TinyExtractor()


@dataclass(frozen=True)
class Outcome:
    """What one start of ``main.py`` left behind."""

    code: int
    config: dict[str, Any]
    folder: Path

    @property
    def checkpoints(self) -> Path:
        return Path(self.config["checkpoint_dir"])

    def log_file(self, seed: int | None = None) -> Path:
        return self._beside(seed, ".log")

    def log(self, seed: int | None = None) -> str:
        return self.log_file(seed).read_text(encoding="utf-8")

    def json(self, seed: int | None = None) -> dict[str, Any]:
        return json.loads(self._beside(seed, ".json").read_text(encoding="utf-8"))

    def _beside(self, seed: int | None, suffix: str) -> Path:
        c = self.config
        seed = c.get("seed", [1993])[0] if seed is None else seed
        first = 0 if c["init_cls"] == c["increment"] else c["init_cls"]
        folder = Path(c["log_dir"]) / c.get("model_name", "tosca") / c["dataset"] / str(first) / str(c["increment"])
        return folder / f"{seed}_{c['backbone_type']}{suffix}"


@pytest.fixture(scope="session")
def run_main() -> Callable[..., Outcome]:
    """Starts ``main.py`` in this process with a tiny config whose files go below ``folder``."""

    def run(folder: Path, *arguments: str, **keys: Any) -> Outcome:
        own = {"checkpoint_dir": str(folder / "tosca"), "log_dir": str(folder / "logs")}
        config = {**TINY, **own, **keys}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.json"
        path.write_text(json.dumps(config))
        with handlers_restored():
            code = main.main([f"--config={path}", *arguments])
        return Outcome(code, config, folder)

    return run


# what the shared run below learns: six classes, not equally many test images of each
TRAIN_IMAGES, TEST_IMAGES = 6 * 4, (3, 2, 3, 1, 2, 4)


@dataclass(frozen=True)
class FinishedRun(Outcome):
    """The run that several tests look at, and what was on disk when each task had been saved."""

    json_after_task: list[dict[str, Any]]
    modules_after_task: list[dict[str, str]]  # file name -> SHA-256


@pytest.fixture(scope="session")
def digit_folder(make_folder: FolderMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("digits"), classes=6, train=4, test=TEST_IMAGES)


@pytest.fixture(scope="session")
def finished_run(
    digit_folder: Path, run_main: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """Three tasks of two classes, learned once for all tests. Its feature bank lies in ``cache``: leave it as it is."""
    folder = tmp_path_factory.mktemp("run")
    jsons, modules = [], []
    log_task = run_log.log_task

    def look(*arguments: Any) -> None:
        (path,) = (folder / "logs").rglob("*.json")
        jsons.append(json.loads(path.read_text(encoding="utf-8")))
        files = sorted((folder / "tosca").glob("task*.pth"))
        modules.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
        log_task(*arguments)

    with curves_drawn(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log, "log_task", look)
        outcome = run_main(folder, data_path=str(digit_folder), cache_dir=str(folder / "cache"))
    return FinishedRun(outcome.code, outcome.config, outcome.folder, jsons, modules)
