"""(d) Time and memory of a prediction as modules grow 1, 10, 100, 1000.

    python -m benchmarks.modules [--rows 1000]

Every module brings ten classes, so that the work is modules × classes; with ``--rows`` all modules together have so
many classes, whatever their number, and time should grow as they do. A prediction is what ``predict.py`` does with a
feature: the entropy of every module for every sample, then the answer of the least uncertain one. "with the backbone"
sets the extra time against a ViT-B/16 forward pass of the same samples at 224 px. Each count runs in a process of its
own, and times are CPU time; its memory is the peak during predictions beyond what the process held when learner and
features were ready.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from backbone.luca import make_luca
from backbone.vit import load_backbone, resolve_device
from benchmarks.images import ROOT, machine, resident_bytes
from models.tosca import TOSCA
from utils.config.config import make_config
from utils.hardware import forget_peak, peak_bytes

SAMPLES, CLASSES_EACH, DIM = 256, 10, 768
CONFIG = {
    "dataset": "imagefolder",
    "init_cls": CLASSES_EACH,
    "increment": CLASSES_EACH,
    "backbone_type": "vit_base_patch16_224",
    "pretrained": False,
}


def learner_with(modules: int, rows: int) -> TOSCA:
    """A learner with that many random modules and rows."""
    learner = TOSCA(make_config(CONFIG), DIM, torch.device("cpu"), seed=0)
    generator = torch.Generator().manual_seed(0)
    start = make_luca(DIM, mlp_ratio=16, se_ratio=16, flow=learner.config.flow, first=True, seed=0).state_dict()
    learner.modules = {n: p + 0.02 * torch.randn(modules, *p.shape, generator=generator) for n, p in start.items()}
    state = {"weight": torch.randn(rows, DIM, generator=generator), "row_task": torch.arange(rows) * modules // rows}
    learner.load_state_dict({**learner.state_dict(), **state}, [learner.module_state(task) for task in range(modules)])
    return learner


def best_seconds(work: Callable[[], object], repeats: int) -> float:
    """The least CPU time of some calls, of all threads: what else runs on the machine only ever adds time."""
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)


def measure(modules: int, rows: int) -> dict[str, float]:
    learner, features = learner_with(modules, rows), torch.randn(SAMPLES, DIM)
    learner.answer(features[:1])  # what is imported and laid out once
    forget_peak()
    before = resident_bytes()
    seconds = best_seconds(lambda: learner.answer(features), 5 if modules < 1000 else 3)
    return {"seconds": seconds, "bytes": max(0, peak_bytes() - before)}


def backbone_seconds() -> float:
    """A forward pass of ``SAMPLES`` images."""
    backbone = load_backbone(make_config(CONFIG), resolve_device(make_config(CONFIG)))
    images = torch.zeros(8, 3, 224, 224, dtype=torch.uint8)
    return best_seconds(lambda: backbone(images), 5) * SAMPLES / 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, help=argparse.SUPPRESS)  # this process measures one count
    parser.add_argument("--rows", type=int, help="classes of all modules together, at least 1000; by default ten each")
    args = parser.parse_args()
    if args.modules:
        print(json.dumps(measure(args.modules, args.rows or args.modules * CLASSES_EACH)))
        return
    print(f"start: {machine()}")
    forward = backbone_seconds()
    print(f"ViT-B/16 forward pass of {SAMPLES} images: {forward:.2f} s")
    one = before = None
    for modules in (1, 10, 100, 1000):
        command = [sys.executable, "-m", "benchmarks.modules", f"--modules={modules}"]
        command += [f"--rows={args.rows}"] if args.rows else []
        found = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
        one = one or found["seconds"]
        more = 100 * (found["seconds"] - one) / (forward + one)
        print(
            f"{modules:5d} modules: {1000 * found['seconds']:8.1f} ms, {found['bytes'] / 1e6:6.0f} MB; "
            f"with the backbone {more:+.2f} % against one module"
            + (f"; {found['seconds'] / before:.1f} x the line above" if before else ""),
            flush=True,
        )
        before = found["seconds"]
    print(f"end: {machine()}")


if __name__ == "__main__":
    main()
