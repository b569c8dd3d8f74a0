"""What answers best without exemplars or order, and what each ingredient of ``tosca_white`` brings?

    python -m benchmarks.white --config=exps/tosca_demo.json seed=1993-1997
    python -m benchmarks.white --config=exps/tosca_demo.json seed=1993-1997 --figure selection_digits.png

Prints two Markdown tables. The first has the answers: Ā and A_T, mean ± sample standard deviation over the seeds, the
paired difference to RanPAC with its 95 % interval, and the calibration error. The second has the modules with one
ingredient changed at a time: their accuracy inside the true task and in the blend. The two ridge regressions do not
depend on the modules and are learned once for each seed. Nothing is chosen on test data.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backbone.luca import LuCA, make_luca
from benchmarks.answers import all_answers
from models.base import Learner, TaskData
from models.evaluation import BankTask
from models.ncm_lda import NcmLda
from models.preparation import prepare, wanted_features
from models.ranpac import RanPAC
from models.streaming.lda import StreamingLDA
from models.streaming.whitening import Whitening
from models.tosca_white import WhiteTOSCA
from models.training import Epoch, shuffled_epochs
from utils.cli import run_command
from utils.config.config import Config, load_config
from utils.data.tasks import Task
from utils.features.rows import TEST_VIEW
from utils.ranks import Ranks
from utils.results import metrics
from utils.results.statistics import paired
from utils.runs.setup import Setup
from utils.seeds import derive_seed

BASELINE = "RanPAC"


@dataclass(frozen=True)
class Ingredients:
    """How a module is made; the defaults are those of ``tosca_white``."""

    whitened: bool = True
    first_whitening: bool = False  # that of the first task for all modules
    identity: bool = True
    trained: bool = True
    noise: bool = True


VARIANTS = {
    "raw input, identity start": Ingredients(whitened=False, noise=False),
    "whitened, random start, no noise": Ingredients(identity=False, noise=False),
    "whitened, identity start, untrained": Ingredients(trained=False),
    "whitened, identity start, trained": Ingredients(noise=False),
    "all: with feature noise": Ingredients(),
    "all, but one whitening for all tasks": Ingredients(first_whitening=True),
}
FULL = "all: with feature noise"


class SharedRidges:
    """The regressions of another learner, which learns them."""

    def __init__(self, owner: WhiteTOSCA) -> None:
        self.owner = owner

    def update(self, features: Tensor, rows: Tensor, total_rows: int) -> None:
        """Do nothing."""

    def scores(self, features: Tensor) -> Tensor:
        return self.owner.routers["ridges"].scores(features)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing."""


class Variant(WhiteTOSCA):
    """``tosca_white`` with some ingredients changed."""

    def __init__(self, owner: WhiteTOSCA, ingredients: Ingredients) -> None:
        small = replace(owner.config, own={"white_features": 1})
        super().__init__(small, owner.dim, owner.device, owner.seed)
        self.routers = {"ridges": SharedRidges(owner)}
        self.ingredients = ingredients

    def task_whitening(self, statistics: StreamingLDA) -> Whitening:
        if not self.ingredients.whitened:
            return Whitening(torch.eye(self.dim), torch.ones(self.dim), torch.zeros(self.dim))
        if self.ingredients.first_whitening and self.modules:
            return Whitening(*(self.modules[f"whitening.{name}"][0] for name in Whitening._fields))
        return super().task_whitening(statistics)

    def fresh_luca(self, task: TaskData) -> LuCA:
        if self.ingredients.identity:
            return super().fresh_luca(task)
        c, seed = self.config, derive_seed("luca", self.seed, task.index)
        first = task.index == 0
        return make_luca(self.dim, mlp_ratio=c.mlp_ratio, se_ratio=c.se_ratio, flow="tosca", first=first, seed=seed)

    def noisy_epochs(self, task: TaskData, whitening: Whitening) -> Iterator[Epoch]:
        if not self.ingredients.trained:
            return
        if self.ingredients.noise:
            yield from super().noisy_epochs(task, whitening)
            return
        for steps in shuffled_epochs(task, self.config, self.seed):
            yield ((whitening(h), rows - task.first_row) for h, rows in steps)


@dataclass
class Curve:
    """Top-1 accuracy (%) and calibration error (points) of one answer after each task."""

    accuracy: list[float] = field(default_factory=list)
    ece: list[float] = field(default_factory=list)

    def add(self, scores: Tensor, true: Tensor) -> None:
        probability, answer = scores.softmax(dim=1).max(dim=1)
        hits = (answer == true).numpy()
        self.accuracy.append(float(hits.mean() * 100))
        self.ece.append(metrics.expected_calibration_error(probability.numpy(), hits) or 0.0)

    @property
    def average(self) -> float:
        return float(np.mean(self.accuracy))

    @property
    def last(self) -> float:
        return self.accuracy[-1]


Curves = dict[str, Curve]


def study(setup: Setup, seed: int) -> tuple[Curves, Curves]:
    """The answers, and the variants under ``oracle`` and ``blend``, of one class order."""
    config, backbone = setup.config, setup.backbone
    bank, stream = setup.bank(seed), setup.stream(seed)
    bank.fill(wanted_features(config))
    learners: dict[str, Learner] = {
        BASELINE: RanPAC(_of(config, "ranpac"), backbone.feature_dim, backbone.device, seed),
        "LDA": NcmLda(_of(config, "ncm_lda"), backbone.feature_dim, backbone.device, seed),
    }
    white = WhiteTOSCA(config, backbone.feature_dim, backbone.device, seed)
    variants = {name: Variant(white, what) for name, what in VARIANTS.items()}
    answers: Curves = {}
    parts: Curves = {}
    for task in stream.tasks:
        data = BankTask(bank, stream, task, config.views, backbone.device)
        for learner in (*learners.values(), white, *variants.values()):
            learner.learn(data)
        seen: tuple[Task, ...] = stream.tasks[: task.index + 1]
        features = torch.from_numpy(bank.read("test", TEST_VIEW, np.concatenate([t.test for t in seen])))
        true = torch.from_numpy(np.concatenate([t.test_classes for t in seen]))
        for name, learner in learners.items():
            answers.setdefault(name, Curve()).add(learner.scores(features), true)
        answers.setdefault("two ridges, no modules", Curve()).add(white.routers["ridges"].scores(features), true)
        for name, prediction in all_answers(white, features, white.row_task[true]).items():
            answers.setdefault(f"`{name}`", Curve()).add(prediction.scores, true)
        for name, variant in variants.items():
            for selection in ("oracle", "blend"):
                found = all_answers(variant, features, white.row_task[true])[selection]
                parts.setdefault(f"{name}/{selection}", Curve()).add(found.scores, true)
    return answers, parts


def _of(config: Config, method: str) -> Config:
    return replace(config, model_name=method, own={})


# -- what is printed --------------------------------------------------------------------------------------------------


def values_of(runs: Sequence[Curves], name: str, of: Callable[[Curve], float]) -> list[float]:
    """One number of each seed."""
    return [of(run[name]) for run in runs]


def mean_std(values: Sequence[float]) -> str:
    return "{:.1f} ± {:.1f}".format(*metrics.mean_std(values))


def difference(values: Sequence[float], baseline: Sequence[float]) -> str:
    """The paired mean difference with its 95 % interval."""
    found = paired(values, baseline)
    if found.mean is None or found.half_width is None:
        return "–"
    return f"{found.mean:+.2f} ± {found.half_width:.2f}"


def answer_table(runs: Sequence[Curves]) -> Iterator[str]:
    """The answers, in Markdown."""
    yield f"| answer | Ā | A_T | Ā − {BASELINE} | A_T − {BASELINE} | ECE |"
    yield "|---|---|---|---|---|---|"
    for name in runs[0]:
        average, last = (values_of(runs, name, of) for of in (lambda c: c.average, lambda c: c.last))
        base_average, base_last = (values_of(runs, BASELINE, of) for of in (lambda c: c.average, lambda c: c.last))
        same = name == BASELINE
        cells = [
            mean_std(average),
            mean_std(last),
            "–" if same else difference(average, base_average),
            "–" if same else difference(last, base_last),
            mean_std(values_of(runs, name, lambda c: c.ece[-1])),
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def variant_table(runs: Sequence[Curves]) -> Iterator[str]:
    """The ingredients, in Markdown."""
    yield "| modules | A_T oracle | A_T `blend` | `blend` − `blend` of all ingredients |"
    yield "|---|---|---|---|"
    full = values_of(runs, f"{FULL}/blend", lambda c: c.last)
    for name in VARIANTS:
        oracle, blend = (values_of(runs, f"{name}/{s}", lambda c: c.last) for s in ("oracle", "blend"))
        apart = "–" if name == FULL else difference(blend, full)
        yield f"| {name} | {mean_std(oracle)} | {mean_std(blend)} | {apart} |"


def draw(answers: Sequence[Curves], parts: Sequence[Curves], path: Path) -> None:
    """A dot for each seed and a bar for the mean: A_T by answer, and inside the true task by ingredients."""
    from matplotlib.figure import Figure

    from utils.results.figures import save

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    inside = [{name: run[f"{name}/oracle"] for name in VARIANTS} for run in parts]
    titles = ("Last accuracy by answer", "Inside the true task, by ingredient")
    for axes, runs, title in zip(panels, (answers, inside), titles, strict=True):
        names = list(runs[0])
        for place, name in enumerate(reversed(names)):
            last = values_of(runs, name, lambda c: c.last)
            axes.plot([np.mean(last)] * 2, [place - 0.35, place + 0.35], color="black", linewidth=2)
            axes.plot(last, [place] * len(last), "o", color="0.45", markersize=4, alpha=0.8)
        axes.set_yticks(range(len(names)), [name.replace("`", "") for name in reversed(names)])
        axes.set_xlabel("A_T (%), a dot for each seed, the line is the mean")
        axes.set_title(title)
        axes.grid(axis="x", color="0.9")
    save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.white", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--figure", type=Path, help="also draw the tables into this PNG (needs matplotlib)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    return run_command(parser.prog, lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    config = load_config(args.config, [*args.overrides, "model_name=tosca_white"])
    setup = prepare(config, Ranks())
    answers, parts = zip(*(study(setup, seed) for seed in config.seed), strict=True)
    print(*answer_table(answers), "", *variant_table(parts), sep="\n")
    if args.figure:
        draw(answers, parts, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
