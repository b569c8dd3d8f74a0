"""The six protocols of the paper from end to end on made images: the configs as they are, but for data and backbone.

    python -m benchmarks.rehearsal FOLDER                  # all six at toy size, to the table against made numbers
    python -m benchmarks.rehearsal FOLDER --cifar [--jobs 2 --seeds 4]   # CIFAR-100 at full size: 60,000 images

A toy data set has the classes, the tasks and, divided by ``--scale`` but never below one image, the images of each
class of the real one. The second form is what a run of the real size takes apart from the forward passes, which a tiny
ViT with random weights makes here, with one augmented view: time, memory and disk of each start, then of the same runs
on the full bank, one after the other and ``--jobs`` side by side, in turns.
"""

import argparse
import hashlib
import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

import main as command
from benchmarks.images import ROOT, machine
from utils.data import datasets
from utils.files import human_size
from utils.hardware import forget_peak, peak_bytes
from utils.results.published import PUBLISHED

CONFIGS = [ROOT / "exps" / f"tosca_{name}.json" for name in ("cifar", "cub", "inr", "ina", "omni", "vtab")]
BACKBONE = {"backbone_type": "test_vit", "pretrained": False, "image_size": 32}  # 0.4 M parameters, in timm for tests
SIDE = 32


def counts(name: str, scale: int) -> tuple[int, int, int]:
    """Classes, and training and test images of each class."""
    expected = datasets.DATASETS[name].expected
    assert expected is not None
    classes, train, test = expected
    return classes, max(1, round(train / classes / scale)), max(1, round(test / classes / scale))


def pictures(classes: int, each: int, seed: int) -> np.ndarray:
    """``(classes * each, SIDE, SIDE, 3)`` uint8: a pattern for each class under noise."""
    patterns = np.random.default_rng(0).integers(0, 256, (classes, 1, 4, 4, 3))
    draw = np.random.default_rng(seed)
    coarse = (patterns + draw.normal(0, 40, (classes, each, 4, 4, 3))).clip(0, 255).astype(np.uint8)
    return coarse.reshape(-1, 4, 4, 3).repeat(SIDE // 4, axis=1).repeat(SIDE // 4, axis=2)


def make_folders(root: Path, name: str, scale: int) -> None:
    """``root/<name>/train/<class>/*.png`` and the same below ``test``."""
    classes, train, test = counts(name, scale)
    for split, each, seed in (("train", train, 1), ("test", test, 2)):
        for number, pixels in enumerate(pictures(classes, each, seed)):
            path = root / name / split / f"class{number // each:03d}" / f"{number % each:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, compress_level=1)


@contextmanager
def made_cifar(root: Path, scale: int) -> Iterator[None]:
    """``root/cifar224/`` as CIFAR-100 is published, of made images; within, it counts as published."""
    folder = root / "cifar224" / "cifar-100-python"
    folder.mkdir(parents=True)
    classes, train, test = counts("cifar224", scale)
    files: dict[str, Any] = {"meta": {"fine_label_names": [f"class{label:03d}" for label in range(classes)]}}
    for split, each, seed in (("train", train, 1), ("test", test, 2)):
        pixels = pictures(classes, each, seed).transpose(0, 3, 1, 2).reshape(classes * each, -1)
        files[split] = {"data": pixels, "fine_labels": np.arange(classes).repeat(each).tolist()}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in datasets.CIFAR_MD5}
    with mock.patch.dict(datasets.CIFAR_MD5, md5):
        yield


def places(root: Path, name: str = "out") -> list[str]:
    """Overrides: where everything goes, and the backbone."""
    keys = {"log_dir": root / name / "logs", "checkpoint_dir": root / name / "tosca", "cache_dir": root / "bank"}
    values = {**keys, **BACKBONE, "device": "cpu", "num_workers": 0}
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]


def made_published(path: Path, logs: Path, scale: int) -> None:
    """Numbers "published" for the toys: the curves of the runs in ``logs``, those of VTAB 20 points higher."""
    values = json.loads(PUBLISHED.read_text())
    values |= {"source": "made numbers", "top1_curve": {"tosca": {}}}
    values["protocol"] |= BACKBONE
    for name, facts in values["data_sets"].items():
        classes, *each = counts(name, scale)
        facts["images"] = [classes * images for images in each]
    for run in (json.loads(file.read_text()) for file in logs.rglob("*.json")):
        higher, name = 20 * (run["config"]["dataset"] == "vtab"), run["config"]["dataset"]
        curve = [round(value + higher, 1) for value in run["results"]["batch"]["top1_curve"]]
        values["top1_curve"]["tosca"][name] = curve
    path.write_text(json.dumps(values))


def rehearse(root: Path, scale: int, *arguments: str) -> int:
    """Make the six data sets and run the six configs in one start; return its exit code."""
    for path in CONFIGS[1:]:
        make_folders(root / "data", json.loads(path.read_text())["dataset"], scale)
    with made_cifar(root / "data", scale), mock.patch.dict("os.environ", TOSCA_DATA=str(root / "data")):
        code = command.main(["--config", *map(str, CONFIGS), *places(root), *arguments])
    made_published(root / "published.json", root / "out" / "logs", scale)
    return code


def full_cifar(root: Path, seeds: int, jobs: int, rounds: int) -> None:
    """CIFAR-100 at its real size: the first start, then rounds on the full bank."""
    seed = f"seed=1993-{1992 + seeds}"
    if not (root / "data").exists():
        make_folders(root / "data", "cifar224", 1)  # as files: another process would not take made pickles for CIFAR
    given = ["--config", str(CONFIGS[0]), "dataset=imagefolder", f"data_path={root / 'data' / 'cifar224'}"]
    given += [seed, "train_views=1", "augment_seed=1993"]
    tiny = "backbone_type=vit_tiny_patch16_224"  # 192 features

    def timed(name: str, *arguments: str) -> tuple[float, float]:
        """Seconds by the clock, and of the CPU by all processes: what else runs on the machine does not count there."""
        forget_peak()
        started, cpu = time.monotonic(), sum(os.times()[:4])
        if command.main([*given, *places(root, name), tiny, *arguments]):
            sys.exit(f"{name} failed")
        shutil.rmtree(root / name)
        return time.monotonic() - started, sum(os.times()[:4]) - cpu

    first, _ = timed("first")
    size = sum(path.stat().st_size for path in (root / "bank").rglob("*.npy"))
    print(
        f"First start, {seeds} seeds: {first:.0f} s, peak {human_size(peak_bytes())}, bank {human_size(size)}",
        flush=True,
    )
    for number in range(rounds):
        (one, one_cpu), (beside, beside_cpu) = timed("alone"), timed("beside", "--jobs", str(jobs))
        print(
            f"Round {number + 1}: {seeds} runs one after the other {one:.1f} s, {jobs} side by side {beside:.1f} s: "
            f"{one / beside:.2f} times the throughput; of CPU time {one_cpu:.1f} s and {beside_cpu:.1f} s, so at most "
            f"{jobs * one_cpu / beside_cpu:.2f} times on as many free cores; {machine()}",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty folder")
    parser.add_argument("--scale", type=int, default=100)
    parser.add_argument("--cifar", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args(argv)
    if args.cifar:
        full_cifar(args.folder, args.seeds, args.jobs, args.rounds)
        return 0
    code = rehearse(args.folder, args.scale)
    import report

    folder = args.folder
    judged = ["--published", str(folder / "published.json"), "--out", str(folder / "tables")]
    return code or report.main([str(folder / "out" / "logs"), *judged])


if __name__ == "__main__":
    sys.exit(main())
