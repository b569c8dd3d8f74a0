"""The kinds of runs that ``benchmarks.soak`` kills, the data that they learn, and what of their files is compared."""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.runs.checkpoint import MANIFEST

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, Any] = {
    "dataset": "imagefolder",
    "init_cls": 2,
    "increment": 2,
    "backbone_type": "glyphs_vit",
    "device": ["-1"],
    "image_size": 16,
    "epochs": 2,
    "batch_size": 8,
    "train_views": 1,
    "num_workers": 1,
    "feature_batch_size": 16,
}
PLACES = ("checkpoint_dir", "log_dir", "cache_dir")
CLASSES_BEFORE, CLASSES_NEW = "0123", "4567"  # of the saved run, and of those that continue it
TRAIN_IMAGES, TEST_IMAGES = 10, 5  # a class
_TIMES = ("seconds", "cost", "sha256")
_STAMP = re.compile(r"\d{8}-\d{6}(-\d+)?")  # in the name of a folder or file that was set aside


@dataclass(frozen=True)
class Plan:
    """A kind of run: what is added to ``main.py --config=...``, the data it learns, and how many runs it holds."""

    name: str
    arguments: tuple[str, ...] = ()
    data: str = "before"
    runs: int = 1
    continues: bool = False  # whether it learns on top of the saved run


PLANS = (
    Plan("one run"),
    Plan("two seeds", ("seed=1993-1994",), runs=2),
    Plan("a sweep", ("--sweep", "flow=tosca,calibrator", "l1=0,0.001"), runs=4),
    Plan("a continued run", data="new", continues=True),
)


def make_data(folder: Path) -> None:
    """Write ``before`` and ``new`` below ``folder``: handwritten digits in class folders, to train and to test."""
    with np.load(ROOT / "assets" / "digits.npz") as archive:
        images, labels = archive["images"], archive["labels"]
    for name, classes in (("before", CLASSES_BEFORE), ("new", CLASSES_NEW)):
        for digit in classes:
            of_class = images[labels == int(digit)][: TRAIN_IMAGES + TEST_IMAGES]
            for index, values in enumerate(of_class):
                split = "train" if index < TRAIN_IMAGES else "test"
                path = folder / name / split / digit / f"{index:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((values.astype(np.float64) * 255 / 16).astype(np.uint8)).save(path)


def write_config(plan: Plan, folder: Path) -> list[str]:
    """Write the config of ``plan`` in ``folder``, its files to go to ``run``; return the arguments of ``main.py``."""
    work = folder / "run"
    keys = {**SETTINGS, **{key: str(work / key) for key in PLACES}, "data_path": str(folder / "data" / plan.data)}
    if plan.continues:
        keys["continue_from"] = str(folder / "saved" / "checkpoint_dir")
    path = folder / "config.json"
    path.write_text(json.dumps(keys))
    return [f"--config={path}", *plan.arguments]


def empty(folder: Path) -> None:
    """Remove what a run left in ``folder``/run, so that the next one begins."""
    work = folder / "run"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()


def snapshot(work: Path) -> dict[str, Any]:
    """Every file below ``work`` but logs, locks and measured times: its SHA-256, or what it says but for times."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in work.rglob("*") if p.is_file() and p.parent.name != "backbones"):
        name = _STAMP.sub("DATE", str(path.relative_to(work)))
        if path.name == MANIFEST or path.suffix == ".json":
            found[name] = _timeless(json.loads(_STAMP.sub("DATE", path.read_text(encoding="utf-8"))))
        elif path.suffix not in (".log", ".lock") and path.name not in ("lock", ".lock"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _TIMES}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
