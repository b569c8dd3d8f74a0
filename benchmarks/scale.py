"""How listing, hashing, the task stream and the bank grow with the data, by simulation.

    python -m benchmarks.scale [--images 1000 10000 100000] [--dim 16]

Made folders of empty image files, 1,000 images a class and 10 classes a task, as in 10 million images of 10,000
classes in 1,000 tasks; the extractor costs nothing and features are narrow. For each phase: seconds at each size, and
the growth law, the exponent p of seconds ~ images^p between the two largest sizes (1 is linear). The last column
carries the largest size on to 10 million images by that law.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from benchmarks.images import machine
from utils.config import make_config
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.data.tasks import make_stream
from utils.features.arrays import TEST_VIEW
from utils.features.extraction import Store
from utils.features.rows import FolderRows

GOAL = 10_000_000
Result = TypeVar("Result")


def measure(folder: Path, images: int, dim: int) -> dict[str, float]:
    """Seconds of each phase."""
    seconds: dict[str, float] = {}

    def timed(phase: str, work: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        result = work()
        seconds[phase] = time.perf_counter() - started
        return result

    classes = max(2, images // 1000)
    for split in ("train", "test"):
        for label in range(classes):
            (folder / split / f"{label:05d}").mkdir(parents=True)
            for index in range(images // classes if split == "train" else 1):
                (folder / split / f"{label:05d}" / f"{index:06d}.jpg").touch()
    keys = {"dataset": "imagefolder", "init_cls": min(10, classes), "increment": 10, "backbone_type": "any"}
    config = make_config({**keys, "data_path": str(folder)})
    data = timed("list the folders", lambda: load_dataset(config))
    timed("hash all files, a first start", lambda: fingerprint_splits(data, folder / "cache"))
    timed("look at the files, a later start", lambda: fingerprint_splits(data, folder / "cache"))
    stream = timed("make the task stream", lambda: make_stream(data, config, 1993))
    rows = FolderRows(folder / "cache" / "bank", (len(data.train), dim), {}, 0)
    (folder / "cache" / "bank").mkdir()
    timed("lay out an array", lambda: rows.prepare([TEST_VIEW]))
    feature = np.ones((1, dim), dtype=np.float32)
    writer = rows.writer(TEST_VIEW)
    store = Store({("train", TEST_VIEW): writer})

    def write() -> None:
        for row in range(len(data.train)):
            store.write([("train", TEST_VIEW, row)], feature)

    timed("write every row", write)
    writer.close()
    timed("see which rows are missing", lambda: rows.missing(TEST_VIEW))
    rows.finish([TEST_VIEW])
    timed("read every row, task by task", lambda: [rows.read(TEST_VIEW, task.train).sum() for task in stream.tasks])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--dim", type=int, default=16)
    args = parser.parse_args()
    sizes = sorted(args.images)
    print(f"start: {machine()}", flush=True)
    found = []
    for images in sizes:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(Path(folder), images, args.dim))
    print("| phase | " + " | ".join(f"{size:,}" for size in sizes) + " | exponent | at 10,000,000 |")
    print("|---|" + "---|" * (len(sizes) + 2))
    for phase in found[0]:
        taken = [seconds[phase] for seconds in found]
        power = math.log(taken[-1] / taken[-2]) / math.log(sizes[-1] / sizes[-2]) if len(sizes) > 1 else math.nan
        goal = taken[-1] * (GOAL / sizes[-1]) ** power
        print(f"| {phase} | " + " | ".join(f"{s:.2f} s" for s in taken) + f" | {power:.2f} | {goal:,.0f} s |")
    print(f"end: {machine()}")


if __name__ == "__main__":
    main()
