"""What ``tosca_white`` costs: prediction under ``blend`` beside a ViT-B, learning beside TOSCA and RanPAC, bytes.

    python -m benchmarks.white_cost [--tasks 10] [--images 500] [--seconds 20]

Features are random, 768 wide, ten classes a task: their number and size count, not what they say. Prediction: the bare
forward pass of a ViT-B/16 at 224 px, and then the answer, in turns on the same images. Learning: the last task of
``tosca_white`` (two regressions of 5,000 random features) against that of TOSCA without its routers plus that of RanPAC
with as many random features (10,000), and with 5,000.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor

from models.base import Learner
from models.streaming.ridge import RandomRidge
from models.tosca import TOSCA
from models.tosca_white import WhiteTOSCA
from utils.config.config import Config, make_config

DIM, CLASSES = 768, 10
CPU = torch.device("cpu")


@dataclass
class RandomTask:
    """Features around a centre for each class."""

    index: int
    images: int

    def __post_init__(self) -> None:
        self.first_row, self.new_rows = self.index * CLASSES, CLASSES
        self.labels = self.first_row + torch.arange(self.images) % CLASSES
        generator = torch.Generator().manual_seed(self.index)
        centres = torch.randn(CLASSES, DIM, generator=generator)
        noise = torch.randn(self.images, DIM, generator=generator)
        self.features = centres[self.labels - self.first_row] + 2 * noise

    def epoch(self, epoch: int) -> Tensor:
        return self.features

    def test_view(self) -> Tensor:
        return self.features

    def seen(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("no method here reads earlier tasks")


def config_of(method: str) -> Config:
    keys = {"dataset": "digits", "init_cls": CLASSES, "increment": CLASSES, "backbone_type": "vit_base_patch16_224"}
    return make_config({**keys, "model_name": method, "device": ["-1"]})


def seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def learned(learner: Learner, tasks: int, images: int) -> float:
    """Learn all tasks; return the seconds of the last."""
    for index in range(tasks):
        task = RandomTask(index, images)
        seconds = seconds_of(lambda task=task: learner.learn(task))  # type: ignore[misc]
    return seconds


def ridge_seconds(width: int, tasks: int, images: int) -> float:
    """Seconds of the last task's update of one regression."""
    ridge = RandomRidge(DIM, width, 0)
    for index in range(tasks):
        task = RandomTask(index, images)
        seconds = seconds_of(lambda task=task: ridge.update(task.features, task.labels, task.first_row + CLASSES))  # type: ignore[misc]
    return seconds


@torch.inference_mode()
def predict(learner: WhiteTOSCA, batch: int, seconds: float) -> str:
    """The median cost of the answer beside that of the bare forward pass of a batch."""
    model = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    images = torch.rand(batch, 3, 224, 224)
    forward: list[float] = []
    answer: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(forward) < 5:
        started = time.perf_counter()
        features = model(images)
        middle = time.perf_counter()
        learner.answer(features, "blend").scores.softmax(dim=1)
        forward.append(middle - started)
        answer.append(time.perf_counter() - middle)
    bare, added = statistics.median(forward), statistics.median(answer)
    return f"{batch:3} images: forward {1e3 * bare:.1f} ms, blend {1e3 * added:.2f} ms: {100 * added / bare:.2f} % more"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.white_cost", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--images", type=int, default=500, help="training images of a task")
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement of prediction")
    args = parser.parse_args()
    white = WhiteTOSCA(config_of("tosca_white"), DIM, CPU, 0)
    seconds = learned(white, args.tasks, args.images)
    tosca = TOSCA(config_of("tosca"), DIM, CPU, 0)
    tosca.routers = {}
    luca = learned(tosca, args.tasks, args.images)
    print(f"{args.tasks} tasks of {args.images} images and {CLASSES} classes; seconds of the last")
    print(f"learning: tosca_white {seconds:.2f} s, TOSCA's steps {luca:.2f} s")
    for width in (10_000, 5_000):
        ridge = ridge_seconds(width, args.tasks, args.images)
        ratio = seconds / (luca + ridge)
        print(f"  RanPAC of {width:,} random features {ridge:.2f} s: tosca_white / (TOSCA + RanPAC) = {ratio:.2f}")
    for batch in (1, 16):
        print(predict(white, batch, args.seconds))
    module = white.module_state(0)
    whitening = sum(p.nbytes for name, p in module.items() if name.startswith("whitening."))
    print(f"a module: {sum(p.nbytes for p in module.values()) - whitening:,} bytes of LuCA, {whitening:,} of whitening")
    print(f"all else: {sum(p.nbytes for p in white.state_dict().values()):,} bytes")
    products = args.tasks * (DIM * DIM + 4 * DIM * (DIM // 16) + DIM * len(white.row_task))
    ridges = 2 * 5_000 * (DIM + len(white.row_task)) + DIM * DIM
    print(f"multiplications of an answer: modules {products / 1e6:.1f} M, regressions {ridges / 1e6:.1f} M")
    return 0


if __name__ == "__main__":
    sys.exit(main())
