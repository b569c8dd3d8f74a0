"""Which rate for the first session, or none: told by the first task's training images alone.

    python -m benchmarks.first_session_rate --config=FILE [--rates 0.01 0.1 0.5] [key=value ...]

What must not get worse is the class that comes later, so classes are held out, and images of all of them. Half of the
first task's classes are learned first, with a first session of each rate and without one, then the other half as a
second task; a fifth of each class's images is tested. Then the halves change places. No test image is read. Prints, for
the method of the config (``model_name=…``), the accuracy on the later classes, which names the rate, and on all of
them, both among all classes of the first task, in percent, with the standard error of that many images.

Each rate takes the time of one first session. Few images make a rough choice: of 70 an accuracy is known to within 6
points, though all rates are tested on the same ones.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.images import machine
from models import ContinualClassifier
from models.first_session import first_task
from models.preparation import prepare
from utils.config.config import Config, load_config
from utils.data.given import Images
from utils.ranks import ONE_RANK
from utils.seeds import derive_seed

HELD_OUT = 0.2  # of a class's images
Figures = dict[str, np.ndarray]  # by rate, (later, all) x (right, tested) images


def compare(config: Config, rates: Sequence[float]) -> Figures:
    """How many held-out images are answered rightly with a session of each rate, and without one."""
    setup, seed = prepare(config, ONE_RANK), config.seed[0]
    split, rows, _ = first_task(setup, seed)
    if rows.max() < 3:
        raise SystemExit(f"the first task has {rows.max() + 1} classes; four are needed: two to train on, two later")
    images = [split.load(index) for index in range(len(rows))]
    drawn = np.random.default_rng(derive_seed("held out", seed))
    order = drawn.permutation(int(rows.max()) + 1)
    tested = np.zeros(len(rows), dtype=bool)
    for row in order:
        mine = drawn.permutation(np.flatnonzero(rows == row))
        tested[mine[: max(1, round(HELD_OUT * len(mine)))]] = True
    ways = {f"{rate:g}": {"first_session": "adapter", "first_session_lr": rate} for rate in rates}
    if "first_session" not in dict(config.method.fixed):
        ways = {"none": {"first_session": "none"}, **ways}
    found = {way: np.zeros((2, 2)) for way in ways}
    for way, keys in ways.items():
        for halves in (np.array_split(order, 2), np.array_split(order, 2)[::-1]):
            model = ContinualClassifier.start(**{**config.as_dict(), "seed": [seed], **keys})
            for half in halves:
                model.learn(*_of(images, rows, np.isin(rows, half) & ~tested))
            for place, counted in enumerate((np.isin(rows, halves[1]), np.full(len(rows), True))):
                shown = counted & tested
                top1 = model.evaluate(*_of(images, rows, shown))["sample"]["top1"]
                found[way][place] += round(top1 * shown.sum() / 100), shown.sum()
    return found


def _of(images: Sequence[Any], rows: np.ndarray, wanted: np.ndarray) -> tuple[Images, list[str]]:
    """The wanted images and the names of their classes."""
    chosen = np.flatnonzero(wanted).tolist()
    return [images[index] for index in chosen], [f"class {rows[index]}" for index in chosen]


def best(figures: Figures) -> str:
    """The rate with the most right answers on the classes that came later, of equal ones the smallest."""
    return max(figures, key=lambda way: figures[way][0, 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.01, 0.1, 0.5], metavar="RATE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    config = load_config(Path(args.config), args.overrides)
    figures = compare(config, sorted(args.rates))
    print(f"{machine()}\n{config.model_name}, seed {config.seed[0]}: first_session_lr, classes that came later, all")
    for way, counts in figures.items():
        shares = counts[:, 0] / counts[:, 1]
        errors = np.sqrt(shares * (1 - shares) / counts[:, 1])
        print(f"{way:>6}  " + "  ".join(f"{100 * s:5.1f} ± {100 * e:.1f}" for s, e in zip(shares, errors, strict=True)))
    rate = best(figures)
    print(f"choose first_session={'none' if rate == 'none' else f'adapter first_session_lr={rate}'}")


if __name__ == "__main__":
    main()
