"""Loading images: views a second, decoding and transforming apart, against Pillow's own resize.

    python -m benchmarks.loading [--data FOLDER] [--images 64] [--views 4] [--image-size 224] [--seconds 5]

*Parts*, in microseconds of CPU time of one thread: decoding a file, the random numbers of a view, the train and the
test transform, and of these what Pillow's resize alone takes at the same sizes (the rest is crop, flip and copying
into channel order); the second look at a file's content (SHA-256). *Draft*: JPEG's decoding at a reduced size is used
only if no pixel changes, so the count of changed pixels is shown. *Loaders*: views a second of wall time through the
product's loader, by threads and by processes, images decoded once for all their views. Without ``--data``: JPEGs of
500 x 375 made on the fly.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.images import machine, make_jpegs
from utils.config.config import make_config
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.data.images import ImageFiles
from utils.data.loader import load_ahead
from utils.data.splits import Dataset
from utils.data.transforms import Transforms, crop_and_flip, test_pixels, train_pixels
from utils.features.extraction import ViewsJob, load_views, view_jobs
from utils.hardware import available_cpus


def microseconds(work: Callable[[int], object], count: int) -> float:
    """CPU time of this thread for each of ``count`` calls."""
    started = time.thread_time_ns()
    for index in range(count):
        work(index)
    return (time.thread_time_ns() - started) / count / 1000


def parts(split: ImageFiles, transforms: Transforms) -> dict[str, float]:
    """What each step of loading costs: its name -> microseconds."""
    count, size = len(split), transforms.size
    images = [split.load(index) for index in range(count)]
    draws = [transforms.draws(key, 0) for key in split.keys]
    crops = [image.crop(crop_and_flip(d, *image.size)[0]) for image, d in zip(images, draws, strict=True)]
    short = int(256 / 224 * size)

    def resize_shorter(index: int) -> Image.Image:
        width, height = images[index].size
        to = (short, short * height // width) if width <= height else (short * width // height, short)
        return images[index].resize(to, Image.Resampling.BICUBIC)

    return {
        "decode a file": microseconds(split.load, count),
        "random numbers of a view": microseconds(lambda i: transforms.draws(split.keys[i], 1), count),
        "train transform": microseconds(lambda i: train_pixels(images[i], size, draws[i]), count),
        "  of that, Pillow's bilinear resize": microseconds(
            lambda i: crops[i].resize((size, size), Image.Resampling.BILINEAR), count
        ),
        "test transform": microseconds(lambda i: test_pixels(images[i], size), count),
        "  of that, Pillow's bicubic resize": microseconds(resize_shorter, count),
    }


def changed_by_draft(split: ImageFiles, size: int) -> tuple[int, int]:
    """Of the images whose JPEG decoder can be asked for fewer pixels: how many come out otherwise, of how many."""
    changed = tried = 0
    short = int(256 / 224 * size)
    for index in range(len(split)):
        whole = split.load(index)
        with Image.open(split.path(index)) as image:
            if image.draft("RGB", (short, short)) is None or image.size == whole.size:
                continue
            tried += 1
            changed += not np.array_equal(test_pixels(image.convert("RGB"), size), test_pixels(whole, size))
    return changed, tried


def jobs_of(data: Dataset, transforms: Transforms, views: int) -> list[ViewsJob]:
    """What the loaders are asked for so that ``views`` views of every training image come out."""
    missing = {("train", view): np.ones(len(data.train), dtype=bool) for view in range(views)}
    return list(view_jobs(data, transforms, missing, fingerprint_splits(data, None).stats))


def loader_rate(jobs: Sequence[ViewsJob], workers: int, processes: bool, seconds: float) -> float:
    """Views a second of wall time that come out of the product's loader once it has started."""
    loaded = load_ahead(load_views, itertools.cycle(jobs), workers=workers, ahead=3 * workers, processes=processes)
    with closing(loaded):
        for _ in range(2 * workers):
            next(loaded)
        started, done = time.monotonic(), 0
        while time.monotonic() - started < seconds:
            done += len(next(loaded)[1])
        return done / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/ and test/")
    parser.add_argument("--images", type=int, default=64, help="how many are looked at")
    parser.add_argument("--views", type=int, default=4, help="of each image, for the loaders")
    parser.add_argument("--jpeg-size", type=int, nargs=2, default=(500, 375), metavar=("W", "H"), help="when made")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=5, help="for each kind of loader")
    args = parser.parse_args()
    print(f"start: {machine()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root = args.data or make_jpegs(Path(folder), classes=1, train=args.images, test=1, size=tuple(args.jpeg_size))
        keys = {"dataset": "imagefolder", "init_cls": 1, "increment": 1, "backbone_type": "any", "data_path": str(root)}
        data = load_dataset(make_config(keys))
        if not isinstance(data.train, ImageFiles):
            raise SystemExit(f"{root} holds no image files")
        rows = np.linspace(0, len(data.train) - 1, min(args.images, len(data.train))).astype(int)
        split, transforms = data.train.subset(rows), Transforms(args.image_size, 0)
        for name, taken in parts(split, transforms).items():
            print(f"{name:40s} {taken:8.0f} us of CPU time", flush=True)
        changed, tried = changed_by_draft(split, args.image_size)
        print(f"JPEG draft mode would change the test view of {changed} of the {tried} images that it is for: not used")
        jobs = jobs_of(replace(data, train=split), transforms, args.views)
        for workers in dict.fromkeys((1, 2, available_cpus())):
            for processes in (False, True):
                rate = loader_rate(jobs, workers, processes, args.seconds)
                print(f"{workers:3d} {'processes' if processes else 'threads':10s} {rate:8.0f} views/s", flush=True)
    print(f"end: {machine()}")


if __name__ == "__main__":
    main()
