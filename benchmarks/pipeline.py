"""(a) Seconds of filling the bank from image files, against the backbone alone on ready tensors.

    python -m benchmarks.pipeline [--data FOLDER] [--backbone vit_base_patch16_224] [--image-size 224] [--forwards 512]

*Pipeline*: hashing the image files, starting the loaders, reading, decoding, augmenting, the forward passes, and the
features on disk: all that a first run does before it learns, but for importing libraries and loading weights.
*Backbone alone*: the same number of forward passes at the same precision on uint8 tensors that are ready in memory, at
the best of several batch sizes, with all threads inside the products or with one pass a thread, whichever is faster;
once by the backbone's own forward pass, as the pipeline does it, and once by timm's (in bf16 under autocast).
Rounds of all three alternate, and the ratio is of the medians. Without ``--data``: synthetic JPEGs of 500 x 375.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from backbone.forward import PlainFeatures
from backbone.vit import Backbone, load_backbone, resolve_device, resolve_precision
from benchmarks.images import machine, make_jpegs
from utils.config.config import Config, make_config
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.data.splits import Dataset
from utils.features.bank import FeatureBank
from utils.hardware import default_batch_size, forward_threads

BATCHES = (8, 16, 32, 64)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def pipeline_seconds(data: Dataset, backbone: Backbone, image_size: int, forwards: int) -> float:
    """Of filling an empty bank with ``forwards`` augmented images (of all training images, as many views)."""
    with tempfile.TemporaryDirectory() as folder:

        def fill() -> None:
            fingerprints = fingerprint_splits(data, Path(folder))
            bank = FeatureBank(
                data, backbone, image_size=image_size, augment_seed=0, fingerprints=fingerprints, cache_dir=Path(folder)
            )
            bank.fill([("train", view) for view in range(forwards // len(data.train))])

        return seconds_of(fill)


def alone_seconds(backbone: Backbone, images: Tensor, forwards: int, threaded: bool) -> float:
    """Of ``forwards`` passes over batches like ``images``."""
    count = -(-forwards // len(images))
    if not threaded:
        return seconds_of(lambda: [backbone(images) for _ in range(count)])
    threads = forward_threads(backbone.device)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return seconds_of(lambda: list(pool.map(backbone, [images] * count)))


def plain_backbone(config: Config) -> Backbone:
    """The same backbone on timm's own forward pass, in bf16 under autocast."""
    backbone = load_backbone(replace(config, precision="fp32"), resolve_device(config))
    half = resolve_precision(config.precision, backbone.device) == "bf16"
    features = PlainFeatures(backbone.model, normalize=config.normalize, autocast=half).to(backbone.device)
    return replace(backbone, ready=features)


def best_way(backbone: Backbone, image_size: int) -> tuple[Tensor, bool]:
    """The batch and the way of threading that take the least time an image."""
    rates = {}
    sizes = BATCHES if backbone.device.type == "cpu" else tuple(16 * size for size in BATCHES)
    for size in sorted({*sizes, default_batch_size(backbone.device, image_size)}):
        images = torch.randint(0, 256, (size, 3, image_size, image_size), dtype=torch.uint8)
        for threaded in (False, True):
            alone_seconds(backbone, images, size, threaded)  # the first pass of a shape prepares its kernels
            forwards = max(size * forward_threads(backbone.device), 32)
            rates[size, threaded] = alone_seconds(backbone, images, forwards, threaded) / forwards
    size, threaded = min(rates, key=lambda way: rates[way])
    return torch.randint(0, 256, (size, 3, image_size, image_size), dtype=torch.uint8), threaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/ and test/")
    parser.add_argument("--weights", type=Path, help="of the backbone; else random")
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--forwards", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        images = args.data or make_jpegs(Path(folder), classes=1, train=args.forwards, test=1, size=(500, 375))
        values = {
            "dataset": "imagefolder",
            "init_cls": 1,
            "increment": 1,
            "data_path": str(images),
            "backbone_type": args.backbone,
            "backbone_weights": str(args.weights) if args.weights else None,
            "pretrained": False,
            "image_size": args.image_size,
            "precision": args.precision,
        }
        config = make_config(values)
        data, backbone = load_dataset(config), load_backbone(config, resolve_device(config))
        forwards = max(1, args.forwards // len(data.train)) * len(data.train)
        print(f"start: {machine()}; {args.backbone}, {backbone.precision} on {backbone.device}", flush=True)
        ready, threaded = best_way(backbone, args.image_size)
        print(
            f"best alone: batches of {len(ready)}, {'one pass a thread' if threaded else 'threads inside'}", flush=True
        )
        taken: dict[str, list[float]] = {"pipeline": [], "alone": [], "timm's plain forward pass alone": []}
        plain = plain_backbone(config)
        for _ in range(args.rounds):
            taken["pipeline"].append(pipeline_seconds(data, backbone, args.image_size, forwards))
            taken["alone"].append(alone_seconds(backbone, ready, forwards, threaded))
            taken["timm's plain forward pass alone"].append(alone_seconds(plain, ready, forwards, threaded))
    median = {name: statistics.median(seconds) for name, seconds in taken.items()}
    for name, seconds in median.items():
        print(f"{name}: {seconds:.1f} s for {forwards} forwards; pipeline / this: {median['pipeline'] / seconds:.3f}")
    print(f"end: {machine()}")


if __name__ == "__main__":
    main()
