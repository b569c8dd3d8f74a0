"""What predicting costs beside the bare backbone, and how long a first answer takes.

    python benchmarks/predict.py [--modules 100] [--backbone glyphs_vit ...]

Modules are random: their number and size count, not what they know. The bare backbone and the whole prediction take
turns on the same batch, so that a busy machine slows both; each line gives medians.
"""

import argparse
import dataclasses
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script: the project is one folder up

from backbone.luca import make_luca  # noqa: E402
from backbone.vit import load_backbone, resolve_device  # noqa: E402
from models.api.classifier import ContinualClassifier  # noqa: E402
from models.api.predictor import Known  # noqa: E402
from models.tosca import TOSCA  # noqa: E402
from utils.config.config import Config, make_config  # noqa: E402
from utils.config.grid import SweepCell  # noqa: E402
from utils.hardware import default_batch_size  # noqa: E402
from utils.runs.manifest import RunManifest, TaskRecord  # noqa: E402

IMAGE_SIZE = {"glyphs_vit": 32}
CLASSES_PER_TASK = 2


def model_with_modules(config: Config, modules: int) -> ContinualClassifier:
    """A classifier with ``modules`` random modules of two classes each."""
    backbone = load_backbone(config, resolve_device(config))
    learner = TOSCA(config, backbone.feature_dim, backbone.device, seed=0)
    rows = modules * CLASSES_PER_TASK
    state = {
        **learner.state_dict(),
        "weight": torch.randn(rows, backbone.feature_dim, generator=torch.Generator().manual_seed(0)),
        "sigma": torch.tensor(10.0),
        "row_task": torch.arange(rows) // CLASSES_PER_TASK,
    }
    make = partial(make_luca, mlp_ratio=config.mlp_ratio, se_ratio=config.se_ratio, flow=config.flow, first=False)
    lucas = [make(backbone.feature_dim, seed=task) for task in range(modules)]
    learner.load_state_dict(state, [luca.state_dict() for luca in lucas])
    manifest = RunManifest(
        identity={},
        config={},
        seed=0,
        backbone={},
        data={},
        versions={},
        tasks=(TaskRecord(),) * modules,
        task_sizes=(CLASSES_PER_TASK,) * modules,
        row_class=tuple(range(rows)),
        class_order=tuple(str(number) for number in range(rows)),
    )
    return ContinualClassifier(config, backbone, Known.after(learner, manifest))


def alternate(first: Callable[[], object], second: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Median seconds of each; they take turns for ``seconds`` in all, after a warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        first(), second()
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times[0]) < 5:
        for call, spent in zip((first, second), times, strict=True):
            started = time.perf_counter()
            call()
            spent.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def compare(name: str, modules: int, device: str, seconds: float) -> None:
    """Print the cost of a whole prediction beside the bare backbone."""
    size = IMAGE_SIZE.get(name, 224)
    keys = {"dataset": "digits", "init_cls": 2, "increment": 2, "backbone_type": name, "image_size": size}
    config = make_config({**keys, "device": [device], "pretrained": name in IMAGE_SIZE})
    model = model_with_modules(config, modules)
    batch = default_batch_size(model.backbone.device, size)
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    bare, whole = alternate(
        lambda: model.backbone(pixels).cpu(),
        lambda: model.classify_features(model.extract_features(pixels)),
        seconds,
    )
    print(
        f"{name}, {model.backbone.precision} on {model.backbone.device}, {batch} images of {size} px, "
        f"{modules} modules: "
        f"backbone {1000 * bare:.1f} ms, prediction {1000 * whole:.1f} ms ({100 * (whole / bare - 1):+.1f} %)",
        flush=True,
    )


def first_answer(repeats: int) -> None:
    """Print the time from the start of predict.py to its end for one image, with the shipped backbone."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, image = Path(folder) / "tosca", Path(folder) / "image.png"
        keys = {"dataset": "digits", "init_cls": 2, "increment": 2, "backbone_type": "glyphs_vit", "image_size": 32}
        Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(image)
        config = make_config({**keys, "device": ["-1"], "epochs": 1, "train_views": 0})
        _save_demo(config, checkpoint)
        times, before = [], resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in range(repeats):
            started = time.perf_counter()
            command = [sys.executable, str(ROOT / "predict.py"), "--checkpoint", str(checkpoint), str(image)]
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - started)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = (used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime) / repeats
    print(
        f"start of predict.py to its first answer and end, glyphs_vit: {min(times):.1f} to {max(times):.1f} s, "
        f"{cpu:.1f} s of CPU time"
    )


def _save_demo(config: Config, checkpoint: Path) -> None:
    import trainer

    folder = checkpoint.parent
    here = dataclasses.replace(config, checkpoint_dir=str(checkpoint), log_dir=str(folder / "logs"), cache_dir="none")
    trainer.run([SweepCell("", here)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of predicting beside the bare backbone; time to a first answer.")
    parser.add_argument("--modules", type=int, default=100)
    parser.add_argument(
        "--backbone", nargs="+", default=["vit_base_patch16_224", "vit_small_patch16_224", "glyphs_vit"]
    )
    parser.add_argument("--device", default="0", help='"cpu", or the number of an accelerator')
    parser.add_argument("--seconds", type=float, default=20, help="of measuring for each backbone")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as predict.py computes: batches beside each other, each on one thread
    for name in args.backbone:
        compare(name, args.modules, args.device, args.seconds)
    first_answer(repeats=3)


if __name__ == "__main__":
    main()
