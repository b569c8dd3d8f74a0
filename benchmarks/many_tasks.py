"""What many tasks of one class cost: bookkeeping (checkpoint, results, log, pictures) against learning.

    python -m benchmarks.many_tasks [--tasks 75 150 300] [--images 100] [--write docs/scale.md]

Whole runs on small made images with a tiny random ViT (32 px, width 192), a bank that is filled first, and the keys'
defaults: 20 epochs, batches of 48. *Learning* and *evaluation* are the run's own seconds; *bookkeeping* is all else
from the first task to the end, the summary and the picture included. *Written* counts the bytes of every file that is
new, replaced or longer at the middle task and at the last but one, tensors left out.
"""

import argparse
import contextlib
import io
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import trainer
from benchmarks.images import machine
from benchmarks.pages import add_write_option, exponent, publish
from models.preparation import prepare, wanted_features
from utils.config.config import make_config
from utils.hardware import single_thread
from utils.ranks import ONE_RANK
from utils.results import record
from utils.runs.manifest import RunManifest
from utils.runs.setup import RunPaths

COMMAND = "benchmarks.many_tasks"
PHASES = ("learning", "evaluation", "bookkeeping")
TEST = 5  # test images of each class


def make_classes(root: Path, classes: int, train: int) -> Path:
    """``train/<class>/*.png`` and ``test/<class>/*.png``, 16 px: noise around a colour of its own for each class."""
    draw = np.random.default_rng(0)
    for label in range(classes):
        colour = draw.integers(30, 226, 3)
        for index in range(train + TEST):
            path = root / ("train" if index < train else "test") / f"{label:04d}" / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((colour + draw.integers(-30, 30, (16, 16, 3))).astype(np.uint8)).save(path)
    return root


def measure(folder: Path, tasks: int, train: int) -> dict[str, float]:
    """Seconds of learning, evaluation and bookkeeping of a whole run, and bytes that two of its tasks write."""
    keys: dict[str, Any] = {
        **{"dataset": "imagefolder", "data_path": str(make_classes(folder / "data", tasks, train))},
        **{"init_cls": 1, "increment": 1, "backbone_type": "vit_tiny_patch16_224", "pretrained": False},
        **{"device": ["-1"], "image_size": 32, "train_views": 1, "precision": "fp32", "num_workers": 0},
        **{name: str(folder / name) for name in ("cache_dir", "checkpoint_dir", "log_dir")},
    }
    config = make_config(keys)
    setup, seed = prepare(config, ONE_RANK), config.seed[0]
    setup.bank(seed).fill(wanted_features(config))
    written: dict[int, int] = {}
    known: dict[Path, tuple[int, int]] = {}
    looking = 0.0
    report = record.write_run_json

    def looked(paths: RunPaths, manifest: RunManifest) -> dict[str, Any]:
        nonlocal looking
        values = report(paths, manifest)
        started, done = time.perf_counter(), len(manifest.tasks)
        if done in (tasks // 2 - 1, tasks // 2, tasks - 2, tasks - 1):
            places = (folder / place for place in ("checkpoint_dir", "log_dir"))
            found = {path: path.stat() for place in places for path in place.rglob("*") if path.is_file()}
            files = {p: (f.st_mtime_ns, f.st_size) for p, f in found.items() if p.suffix != ".pth"}
            new = {path: facts[1] for path, facts in files.items() if known.get(path) != facts}
            before = {p: known[p][1] for p in new if p in known and p.suffix in (".log", ".jsonl")}  # these only grow
            written[done] = sum(new.values()) - sum(before.values())
            known.clear()
            known.update(files)
        looking += time.perf_counter() - started
        return values

    record.write_run_json = looked
    started = time.perf_counter()
    try:
        run = trainer.run_seed(setup, seed)
    finally:
        record.write_run_json = report
    total = time.perf_counter() - started - looking
    assert run is not None and run["status"] == "finished"
    seconds = run["seconds"]
    book = total - seconds["total"]
    return {
        **{"learning": seconds["train"], "evaluation": seconds["evaluate"], "bookkeeping": book},
        **{"middle": written[tasks // 2], "last": written[tasks - 1]},
    }


def section(tasks: list[int], found: list[dict[str, float]], images: int, load: str) -> list[str]:
    """The part of the page, in lines of Markdown."""
    columns = ("tasks", *PHASES, "bookkeeping of a task", "middle task writes", "last but one writes")
    lines = [
        f"Whole runs of a tiny ViT (width 192), {images} training and {TEST} test images a class, 20 epochs, one",
        f"thread. {load}",
        "(a load above the number of CPUs is other work, which inflates seconds).",
        "*Bookkeeping* is all but learning and evaluation: checkpoint, results, log, the summary and the picture.",
        "*Writes* leaves tensors out. *Exponent* is the p of tasks^p between the two largest counts.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for count, of in zip(tasks, found, strict=True):
        times = " | ".join(f"{of[name]:.1f} s" for name in PHASES)
        written = " | ".join(f"{of[name] / 1024:.0f} KB" for name in ("middle", "last"))
        lines.append(f"| {count} | {times} | {of['bookkeeping'] / count * 1000:.0f} ms | {written} |")
    powers = [exponent(tasks, [of[name] for of in found]) for name in (*PHASES, "middle", "last")]
    powers.insert(len(PHASES), powers[len(PHASES) - 1] - 1)
    lines.append("| exponent | " + " | ".join(f"{power:.2f}" for power in powers) + " |")
    share = found[-1]["bookkeeping"] / found[-1]["learning"]
    return [*lines, "", f"Bookkeeping took {share:.2f} of the time of learning at {tasks[-1]} tasks."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[75, 150, 300])
    parser.add_argument("--images", type=int, default=100, help="training images of each class")
    add_write_option(parser)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    tasks, found, start = sorted(args.tasks), [], machine()
    for count in tasks:
        with tempfile.TemporaryDirectory() as folder, single_thread(), contextlib.redirect_stderr(io.StringIO()):
            found.append(measure(Path(folder), count, args.images))
        print(f"{count} tasks: {found[-1]}", flush=True)
    load = f"{start} at the start and {machine().split('average ')[1]} at the end"
    publish(args.write, COMMAND, section(tasks, found, args.images, load))


if __name__ == "__main__":
    main()
