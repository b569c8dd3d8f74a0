"""What bf16 changes: mean accuracies over five seeds against fp32, the same config otherwise.

    python -m benchmarks.precision --config=FILE [--draws 8] [key=value ...]

Runs ``main.py`` in fp32, in bf16, and in bf16 by timm's own modules under autocast, for seeds 1993 to 1997, each on a
feature bank and folders of its own. Prints the mean over the seeds of Ā and A_T under each selection, and the
differences to fp32 in percentage points, each with the standard error of its mean over the seeds.

All seeds see the same images with the same rounding, so that error does not say how much of a difference is luck.
``--draws`` does: it repeats the fp32 runs so often with a random error on each feature, as long as that of bf16 is on
the mean image, and prints mean and standard deviation of the differences that these make.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.images import machine, timed_process

SEEDS = "[1993, 1994, 1995, 1996, 1997]"


Figures = dict[tuple[str, str], list[float]]  # by selection and measure, one for each seed

# main.py, with timm's modules under autocast in the place of this project's forward pass
UNDER_AUTOCAST = """
import sys
import main
from backbone import vit
from backbone.forward import PlainFeatures
vit.make_features = lambda model, **keys: PlainFeatures(model, normalize=keys["normalize"], autocast=True)
sys.exit(main.main(sys.argv[1:]))
"""
# main.py with a random error on each feature: its length against the feature's, and the number of the draw, come first
WITH_ERRORS = """
import sys
import torch
import main
from backbone import vit
from backbone.forward import Features

length, draw = float(sys.argv[1]), int(sys.argv[2])
make = vit.make_features

class WithErrors(Features):
    def __init__(self, exact):
        super().__init__()
        self.exact = exact

    def forward(self, images):
        rows = self.exact(images)
        drawn = torch.Generator().manual_seed(draw + int(images.sum()))
        errors = torch.nn.functional.normalize(torch.randn(rows.shape, generator=drawn), dim=1)
        return rows + length * rows.norm(dim=1, keepdim=True) * errors.to(rows.device)

vit.make_features = lambda model, **keys: WithErrors(make(model, **keys))
sys.exit(main.main(sys.argv[3:]))
"""
WAYS = {"fp32": ["main.py"], "bf16": ["main.py"], "autocast": ["-c", UNDER_AUTOCAST]}


def results(args: argparse.Namespace, program: Sequence[str], precision: str, folder: Path) -> Figures:
    """What the runs of a way gave."""
    own = [f"{key}={folder / key}" for key in ("cache_dir", "checkpoint_dir", "log_dir")]
    keys = [f"precision={precision}", f"seed={SEEDS}", *own, *args.overrides]
    timed_process(*program, f"--config={args.config}", *keys)
    runs = [json.loads(path.read_text())["results"] for path in sorted((folder / "log_dir").rglob("*.json"))]
    return {
        (selection, measure): [run[selection][measure] for run in runs]
        for selection in runs[0]
        for measure in ("average", "last")
    }


def difference(exact: list[float], other: list[float]) -> str:
    """The mean of the seeds' differences with its standard error."""
    gaps = [b - a for a, b in zip(exact, other, strict=True)]
    return f"{statistics.mean(gaps):+.2f} ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.2f}"


def error_of_bf16(folder: Path) -> float:
    """The mean length of what bf16 changes in a feature, against the feature's own."""
    exact, half = (
        {(rows := np.load(path)).shape: rows for path in (folder / way / "cache_dir").rglob("test.npy")}
        for way in ("fp32", "bf16")
    )
    lengths = [
        np.linalg.norm(half[shape] - rows, axis=1) / np.linalg.norm(rows, axis=1) for shape, rows in exact.items()
    ]
    return float(np.concatenate(lengths).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=0, help="of random errors; 0: none")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    args.config = args.config.resolve()
    found, draws = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for way, program in WAYS.items():
            found[way] = results(args, program, "fp32" if way == "fp32" else "bf16", folder / way)
            print(f"{way} is done; {machine()}", flush=True)
        length = error_of_bf16(folder)
        print(f"bf16 moves a feature by {length:.2%} of its length")
        for draw in range(args.draws):
            program = ["-c", WITH_ERRORS, str(length), str(draw)]
            draws.append(results(args, program, "fp32", folder / f"draw{draw}"))
    print(f"{'selection':16}{'measure':10}{'fp32':>8}{'bf16 - fp32':>16}{'autocast - fp32':>18}{'random - fp32':>18}")
    for (selection, measure), exact in found["fp32"].items():
        gaps = [difference(exact, found[way][selection, measure]) for way in ("bf16", "autocast")]
        luck = [statistics.mean(draw[selection, measure]) - statistics.mean(exact) for draw in draws]
        last = f"{statistics.mean(luck):+.2f}, s.d. {statistics.stdev(luck):.2f}" if len(luck) > 1 else ""
        print(f"{selection:16}{measure:10}{statistics.mean(exact):8.2f}{gaps[0]:>16}{gaps[1]:>18}{last:>18}")


if __name__ == "__main__":
    main()
