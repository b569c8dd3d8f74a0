"""What bf16 changes: mean accuracies over five seeds against fp32, the same config otherwise.

    python -m benchmarks.precision --config=FILE [key=value ...]

Runs ``main.py`` in fp32, in bf16, and in bf16 by timm's own modules under autocast, for seeds 1993 to 1997, each on a
feature bank and folders of its own. Prints the mean over the seeds of Ā and A_T under each selection, and the
differences to fp32 in percentage points, each with the standard error of its mean over the seeds.

A fourth run, in fp32 on weights of the blocks that were rounded to bf16, says how much of it any bf16 forward shares.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

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
# main.py with the weights that bf16 products have, and fp32 products
ROUNDED_WEIGHTS = """
import sys
import torch
import main
from backbone import vit
from backbone.forward import HALF

make = vit.make_features

def with_rounded_weights(model, **keys):
    for block in model.blocks[:-1]:
        for layer in block.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.data = layer.weight.data.to(HALF).float()
    return make(model, **keys)

vit.make_features = with_rounded_weights
sys.exit(main.main(sys.argv[1:]))
"""
PROGRAMS = {
    "fp32": ("fp32", ["main.py"]),
    "bf16": ("bf16", ["main.py"]),
    "autocast": ("bf16", ["-c", UNDER_AUTOCAST]),
    "rounded weights": ("fp32", ["-c", ROUNDED_WEIGHTS]),
}


def results(args: argparse.Namespace, way: str, folder: Path) -> Figures:
    """What the runs of a way gave."""
    precision, program = PROGRAMS[way]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    args.config = args.config.resolve()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in PROGRAMS:
            found[way] = results(args, way, Path(folder) / way.replace(" ", "_"))
            print(f"{way} is done; {machine()}", flush=True)
    others = [way for way in PROGRAMS if way != "fp32"]
    print(f"{'selection':16}{'measure':10}{'fp32':>8}" + "".join(f"{way + ' - fp32':>24}" for way in others))
    for (selection, measure), exact in found["fp32"].items():
        gaps = "".join(f"{difference(exact, found[way][selection, measure]):>24}" for way in others)
        print(f"{selection:16}{measure:10}{statistics.mean(exact):8.2f}{gaps}")


if __name__ == "__main__":
    main()
