"""What bf16 changes: mean accuracies over five seeds against fp32, the same config otherwise.

    python -m benchmarks.precision --config=FILE [key=value ...]

Runs ``main.py`` in fp32, in bf16, and in bf16 by timm's own modules under autocast, for seeds 1993 to 1997, each on a
feature bank and folders of its own. Prints the mean over the seeds of Ā and A_T under each selection, and the
differences to fp32 in percentage points, each with the standard error of its mean over the seeds.
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
WAYS = {"fp32": ["main.py"], "bf16": ["main.py"], "autocast": ["-c", UNDER_AUTOCAST]}


def results(args: argparse.Namespace, way: str, folder: Path) -> Figures:
    """What the runs of a way gave."""
    own = [f"{key}={folder / key}" for key in ("cache_dir", "checkpoint_dir", "log_dir")]
    precision = "fp32" if way == "fp32" else "bf16"
    keys = [f"precision={precision}", f"seed={SEEDS}", *own, *args.overrides]
    timed_process(*WAYS[way], f"--config={args.config}", *keys)
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
        for way in WAYS:
            found[way] = results(args, way, Path(folder) / way)
            print(f"{way} is done; {machine()}", flush=True)
    print(f"{'selection':16}{'measure':10}{'fp32':>8}{'bf16 - fp32':>16}{'autocast - fp32':>18}")
    for (selection, measure), exact in found["fp32"].items():
        gaps = [difference(exact, found[way][selection, measure]) for way in ("bf16", "autocast")]
        print(f"{selection:16}{measure:10}{statistics.mean(exact):8.2f}{gaps[0]:>16}{gaps[1]:>18}")


if __name__ == "__main__":
    main()
