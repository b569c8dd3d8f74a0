"""What bf16 changes: mean accuracies over five seeds against fp32, the same config otherwise.

    python -m benchmarks.precision --config=FILE [key=value ...]

Runs ``main.py`` at both precisions, for seeds 1993 to 1997, on a feature bank and folders of its own, and prints the
mean over the seeds of Ā and A_T under each selection, and the difference in percentage points.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.images import machine, timed_process

SEEDS = "[1993, 1994, 1995, 1996, 1997]"


def results(args: argparse.Namespace, precision: str, folder: Path) -> dict[tuple[str, str], float]:
    """Mean over the seeds, by selection and measure."""
    own = [f"{key}={folder / key}" for key in ("cache_dir", "checkpoint_dir", "log_dir")]
    timed_process(
        "main.py", f"--config={args.config}", f"precision={precision}", f"seed={SEEDS}", *own, *args.overrides
    )
    runs = [json.loads(path.read_text())["results"] for path in sorted((folder / "log_dir").rglob("*.json"))]
    return {
        (selection, measure): statistics.mean(run[selection][measure] for run in runs)
        for selection in runs[0]
        for measure in ("average", "last")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    args.config = args.config.resolve()
    with tempfile.TemporaryDirectory() as folder:
        exact, half = (results(args, precision, Path(folder) / precision) for precision in ("fp32", "bf16"))
    print(f"{'selection':16}{'measure':10}{'fp32':>8}{'bf16':>8}{'difference':>12}")
    for (selection, measure), value in exact.items():
        other = half[selection, measure]
        print(f"{selection:16}{measure:10}{value:8.2f}{other:8.2f}{other - value:12.2f}")
    print(machine())


if __name__ == "__main__":
    main()
