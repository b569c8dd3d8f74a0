"""What the six paper configs and an ImageNet-21K-sized stream need, worked out from counts: arithmetic, no measurement.

    python -m benchmarks.scale_costs [--write docs/scale.md]

``--write`` replaces the part of the page between its two marks.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from utils.config import load_config
from utils.data.datasets import DATASETS
from utils.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ("cifar", "cub", "ina", "inr", "omni", "vtab")
BEGIN, END = "<!-- made by benchmarks.scale_costs: begin -->", "<!-- made by benchmarks.scale_costs: end -->"
IMAGES_A_SECOND = 1_000  # assumed, of ViT-B/16 at 224 px on one data-centre card
DIM, BOTTLENECK = 768, 48
LUCA = 2 * DIM + 4 * DIM * BOTTLENECK + BOTTLENECK + DIM  # parameters: LayerNorm, four products, two biases
LUCA_FLOPS = 2 * 4 * DIM * BOTTLENECK
FORWARD_FLOPS = 35.1e9  # of ViT-B/16 at 224 px: 17.6 G multiply-adds
SELECTIONS = 6  # that an evaluation reports, each with scores of its own


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
        """A row is fp32 and has a checksum of four bytes."""
        return self.forwards * (4 * DIM + 4) / 1e9

    @property
    def modules_gb(self) -> float:
        return self.tasks * LUCA * 4 / 1e9

    @property
    def answer_flops(self) -> float:
        """Of one image: every module, and every module's cosine to every class."""
        return self.tasks * (LUCA_FLOPS + 2.0 * self.classes * DIM)

    @property
    def scores_gb(self) -> float:
        """Of the last evaluation, which holds the scores of every test image under every selection."""
        return self.test * self.classes * 4 * SELECTIONS / 1e9


def paper_stream(name: str) -> Stream:
    """The counts of ``exps/tosca_<name>.json``."""
    config = load_config(ROOT / "exps" / f"tosca_{name}.json")
    expected = DATASETS[config.dataset].expected
    assert expected is not None and config.init_cls is not None and config.increment is not None
    classes, train, test = expected
    tasks = 1 + -(-(classes - config.init_cls) // config.increment)
    return Stream(config.dataset, classes, train, test, tasks, config.views)


def streams() -> list[Stream]:
    """The six, then 14,197,122 images of 21,841 classes in 1,000 tasks, with one augmented view and 5 tests a class."""
    large = Stream("ImageNet-21K-sized", 21_841, 14_197_122, 5 * 21_841, 1_000, 1)
    return [*map(paper_stream, CONFIGS), large]


def section() -> str:
    """The part of the page, in Markdown."""
    lines = [
        BEGIN,
        f"Worked out from counts, not measured. Assumed: {IMAGES_A_SECOND:,} images a second through a ViT-B/16 at",
        "224 px on one card (put your own rate in its place: hours scale with it), "
        f"{FORWARD_FLOPS / 1e9:.1f} GFLOP a forward, features of",
        f"width {DIM} in fp32.",
        "*Answer* is one image under every module: modules × (LuCA + 2 × classes × width). *Scores* is what the last",
        f"evaluation holds at once: test images × classes × {SELECTIONS} selections × 4 bytes.",
        "",
        "| stream | classes | tasks | views | forwards | GPU-hours | bank | modules | answer | of a forward | scores |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for s in streams():
        counts = f"{s.name} | {s.classes:,} | {s.tasks:,} | {s.views} | {s.forwards:,}"
        sizes = f"{s.hours:.2f} | {s.bank_gb:.2f} GB | {s.modules_gb:.3f} GB"
        answer = f"{s.answer_flops / 1e9:.3f} GFLOP | {s.answer_flops / FORWARD_FLOPS:.2%} | {s.scores_gb:.2f} GB"
        lines.append(f"| {counts} | {sizes} | {answer} |")
    return "\n".join([*lines, END])


def write(page: Path) -> None:
    """Replace the part of ``page`` between the two marks."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    atomic_write(page, (before + section() + rest.split(END)[1]).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the part of this page")
    args = parser.parse_args()
    if args.write:
        write(args.write)
    else:
        print(section())


if __name__ == "__main__":
    main()
