"""What a first session changes: the same seeds with and without it, as paired differences.

    python -m benchmarks.first_session_gain FOLDER      # logs of a sweep over first_session (and first_session_lr)

Prints a Markdown table: for each data set, method and selection Ā and A_T without a first session (mean ± sample
standard deviation over the seeds), and for each rate the mean difference to it over the seeds that both have, with its
95 % t interval. ``aper``, which is never without one, is compared with ``simplecil``.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import stats

from utils.results.metrics import selection_name
from utils.results.read import Run, newest_of_each, read_runs

MEASURES = {"average": "Ā", "last": "A_T"}
BATCHES = ("batch", "batch_shuffled", "oracle")  # look at many images, or at the true task
Numbers = dict[int, np.ndarray]  # by seed: Ā and A_T


def numbers(runs: list[Run]) -> dict[tuple[str, str, str, float], Numbers]:
    """By data set, method, selection and rate (0: no first session)."""
    found: dict[tuple[str, str, str, float], Numbers] = {}
    for run in runs:
        config = run.values["config"]
        rate = 0.0 if config["first_session"] == "none" else config["first_session_lr"]
        for selection, result in run.values["results"].items():
            if selection not in BATCHES:
                key = config["dataset"], config["model_name"], selection, rate
                found.setdefault(key, {})[run.seed] = np.array([result[measure] for measure in MEASURES])
    return found


def difference(plain: Numbers, adapted: Numbers) -> list[str]:
    """Of Ā and of A_T the mean of ``adapted - plain`` over the seeds that both have, and half its 95 % t interval."""
    gaps = np.array([adapted[seed] - plain[seed] for seed in sorted(plain.keys() & adapted.keys())])
    if len(gaps) < 2:
        return ["–"] * len(MEASURES)
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(axis=0, ddof=1) / len(gaps) ** 0.5
    return [f"{mean:+.1f} ± {width:.1f}" for mean, width in zip(gaps.mean(axis=0), half, strict=True)]


def rows(runs: list[Run]) -> Iterator[list[str]]:
    """The table, its head first."""
    found = numbers(runs)
    rates = sorted({rate for *_, rate in found} - {0.0})
    yield ["data", "method", "answer", *MEASURES.values(), *(f"{m} at {r:g}" for r in rates for m in MEASURES.values())]
    for data, method, selection in dict.fromkeys(key[:3] for key in sorted(found)):
        plain = found.get((data, "simplecil" if method == "aper" else method, selection, 0.0), {})
        values = np.array(list(plain.values()))
        means = [f"{v.mean():.1f} ± {v.std(ddof=1):.1f}" for v in values.T] if len(plain) > 1 else ["–"] * len(MEASURES)
        gains = [text for rate in rates for text in difference(plain, found.get((data, method, selection, rate), {}))]
        alone = len({key[2] for key in found if key[:2] == (data, method)}) == 1
        yield [data, method, "–" if alone else selection_name(selection), *means, *gains]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    runs, _ = newest_of_each(read_runs(parser.parse_args().folders)[0])
    head, *table = rows([run for run in runs if run.status == "finished"])
    for row in (head, ["---"] * len(head), *table):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
