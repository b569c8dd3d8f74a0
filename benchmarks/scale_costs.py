"""What the six paper configs and an ImageNet-21K-sized stream need, worked out from counts: arithmetic, no measurement.

    python -m benchmarks.scale_costs [--write docs/scale.md]

``--write`` replaces the part of the page between its two marks.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.pages import add_write_option, publish
from models.base import SAMPLES
from models.tensors import packed
from models.tosca import ROUTER_WIDTH
from utils.config.config import load_config
from utils.data.datasets import DATASETS

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ("cifar", "cub", "ina", "inr", "omni", "vtab")
COMMAND = "benchmarks.scale_costs"
IMAGES_A_SECOND = 1_000  # assumed, of ViT-B/16 at 224 px on one data-centre card
DIM, BOTTLENECK = 768, 48
LUCA = 2 * DIM + 4 * DIM * BOTTLENECK + BOTTLENECK + DIM  # parameters: LayerNorm, four products, two biases
LUCA_FLOPS = 2 * 4 * DIM * BOTTLENECK
FORWARD_FLOPS = 35.1e9  # of ViT-B/16 at 224 px: 17.6 G multiply-adds
SELECTIONS = 6  # that an evaluation reports
KEPT = 8 * (5 + 1 + 1) + 4 + 4  # bytes kept of an answer: five classes, module and image; probability and entropy


@dataclass(frozen=True)
class Stream:
    """The counts of a data set and of how it is learned."""

    name: str
    classes: int
    train: int
    test: int
    tasks: int
    views: int

    @property
    def forwards(self) -> int:
        """Images through the backbone: each training image under each view and the test transform, each test image."""
        return self.train * (self.views + 1) + self.test

    @property
    def hours(self) -> float:
        return self.forwards / IMAGES_A_SECOND / 3600

    @property
    def bank_gb(self) -> float:
        return self.forwards * 4 * DIM / 1e9  # a row is fp32

    @property
    def modules_gb(self) -> float:
        return self.tasks * LUCA * 4 / 1e9

    @property
    def answer_flops(self) -> float:
        """Of one image: every module, and every module's cosine to every class."""
        return self.tasks * (LUCA_FLOPS + 2.0 * self.classes * DIM)

    @property
    def evaluation_gb(self) -> float:
        """Of the last evaluation: what it keeps of each test image, and the scores of those that are answered now."""
        of_an_image = 4 * DIM + 4 * self.tasks + KEPT * SELECTIONS
        return (self.test * of_an_image + 4 * SAMPLES * self.classes * SELECTIONS) / 1e9

    @property
    def evaluations_of_forwards(self) -> float:
        """Multiplications of the evaluations after each task, against those of all forwards."""
        shares = [(task + 1) / self.tasks for task in range(self.tasks)]  # of images, modules and classes by then
        flops = sum(s * self.test * s * self.tasks * (LUCA_FLOPS + 2.0 * s * self.classes * DIM) for s in shares)
        return flops / (self.forwards * FORWARD_FLOPS)

    @property
    def state_gb(self) -> float:
        """Of the classifier's file, which each task writes anew."""
        return state_bytes(self.classes, DIM) / 1e9


def state_bytes(rows: int, dim: int) -> int:
    """What TOSCA saves beside its modules: classifier, LDA (means, scatter), ridge (Gram matrix, targets, weights)."""
    gram = packed(torch.empty(ROUTER_WIDTH, ROUTER_WIDTH, device="meta")).numel()
    return rows * (4 * dim + 8 * dim + 2 * 8 * ROUTER_WIDTH + 3 * 8) + 8 * (dim**2 + gram)


def paper_stream(name: str) -> Stream:
    """The counts of ``exps/tosca_<name>.json``."""
    config = load_config(ROOT / "exps" / f"tosca_{name}.json")
    expected = DATASETS[config.dataset].expected
    assert expected is not None and config.init_cls is not None and config.increment is not None
    classes, train, test = expected
    tasks = 1 + -(-(classes - config.init_cls) // config.increment)
    return Stream(config.dataset, classes, train, test, tasks, config.views)


def streams() -> list[Stream]:
    """The six, then large ones in 1,000 tasks, with one augmented view and 5 test images a class."""
    large = Stream("ImageNet-21K-sized", 21_841, 14_197_122, 5 * 21_841, 1_000, 1)
    made = Stream("made, 10 million images", 10_000, 10_000_000, 5 * 10_000, 1_000, 1)
    return [*map(paper_stream, CONFIGS), large, made]


def section() -> list[str]:
    """The part of the page, in lines of Markdown."""
    lines = [
        f"Worked out from counts, not measured. Assumed: {IMAGES_A_SECOND:,} images a second through a ViT-B/16 at",
        "224 px on one card (put your own rate in its place: hours scale with it), "
        f"{FORWARD_FLOPS / 1e9:.1f} GFLOP a forward, features of",
        f"width {DIM} in fp32.",
        "*State* is the classifier's file with the statistics of `lda` and `ridge`, written anew after each task.",
        "*Answer* is one image under every module: modules × (LuCA + 2 × classes × width). *Evaluation* is what the",
        f"last evaluation holds at once: its test images × (feature, every module's entropy, {KEPT} bytes under each",
        f"of {SELECTIONS} selections), and the scores of {SAMPLES} images alone. *All evaluations* counts one after",
        "each task, on all test images so far, against all forwards.",
        "",
        "| stream | classes | tasks | views | forwards | GPU-hours | bank | modules | state | answer | of a forward "
        "| evaluation | all evaluations |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for s in streams():
        counts = f"{s.name} | {s.classes:,} | {s.tasks:,} | {s.views} | {s.forwards:,}"
        sizes = f"{s.hours:.2f} | {s.bank_gb:.2f} GB | {s.modules_gb:.3f} GB | {s.state_gb:.3f} GB"
        answer = f"{s.answer_flops / 1e9:.3f} GFLOP | {s.answer_flops / FORWARD_FLOPS:.2%} | {s.evaluation_gb:.2f} GB"
        lines.append(f"| {counts} | {sizes} | {answer} | {s.evaluations_of_forwards:.2%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_write_option(parser)
    publish(parser.parse_args().write, COMMAND, section())


if __name__ == "__main__":
    main()
