"""How is the module to be chosen, and what should answer? The study behind benchmarks/selection.md.

    python -m benchmarks.selection --config=exps/tosca_demo.json seed=1993,1994,1995,1996,1997
    python -m benchmarks.selection --config=exps/tosca_demo.json --repairs seed=1993,1994,1995,1996,1997

Prints a Markdown table: Ā, A_T and selection accuracy, mean ± sample standard deviation over the seeds. Every answer
but ``batch`` treats each test image by itself. Nothing is chosen on test data.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.answers import all_answers
from models.base import make_learner
from models.evaluation import BankTask
from models.preparation import prepare, wanted_features
from models.streaming.lda import StreamingLDA
from models.tosca import TOSCA
from utils.cli import run_command
from utils.config.config import Config, load_config
from utils.data.tasks import Task, make_stream
from utils.features.rows import TEST_VIEW
from utils.ranks import Ranks
from utils.results.metrics import mean_std
from utils.runs.setup import Setup
from utils.seeds import derive_seed

FIXED_SIGMA = 16.0  # of the repaired logits, and of the softmax within a task


class TaskDiscriminants:
    """For each module an LDA on *its own* LuCA feature over its own classes."""

    def __init__(self) -> None:
        self.of_task: list[StreamingLDA] = []

    def add(self, learner: TOSCA, task: BankTask) -> None:
        discriminant = StreamingLDA(learner.dim)
        features = luca_features(learner, task.index, task.test_view())
        discriminant.update(features, task.labels - task.first_row, task.new_rows)
        self.of_task.append(discriminant)

    def log_probabilities(self, learner: TOSCA, features: Tensor) -> Tensor:
        """log p(row | its task): ``(samples, dim) -> (samples, rows)``."""
        parts = [lda.scores(luca_features(learner, t, features)) for t, lda in enumerate(self.of_task)]
        return torch.cat([part.log_softmax(dim=1) for part in parts], dim=1)


@torch.no_grad()
def luca_features(learner: TOSCA, task: int, features: Tensor) -> Tensor:
    """LuCA(h) of one module: ``(samples, dim) -> (samples, dim)``."""
    return learner.forward_modules({name: p[task : task + 1] for name, p in learner.modules.items()}, features)[0]


def cosine_log_probabilities(learner: TOSCA, features: Tensor) -> Tensor:
    """log p(row | its task) from cosines to the prototypes at a fixed σ: ``(samples, dim) -> (samples, rows)``."""
    rows, parts = learner.weight, []
    for task in range(learner.tasks):
        mine = rows[learner.row_task == task]
        cosine = F.normalize(luca_features(learner, task, features), dim=1) @ F.normalize(mine, dim=1).T
        parts.append((FIXED_SIGMA * cosine).log_softmax(dim=1))
    return torch.cat(parts, dim=1)


def answers(
    learner: TOSCA, within: TaskDiscriminants, features: Tensor, true_task: Tensor, seed: int
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(name, row scores, chosen task or None) of every answer under study."""
    generator = torch.Generator().manual_seed(derive_seed("shuffled test set", seed, learner.tasks - 1))
    shuffled = torch.randperm(len(features), generator=generator)
    for name, prediction in all_answers(learner, features, true_task, shuffled).items():
        yield name, prediction.scores, prediction.module
    lda, ridge = (learner.routers[name].scores(features) for name in ("lda", "ridge"))
    routed = learner.row_task[lda.argmax(dim=1)]
    own = learner.row_task == routed[:, None]
    inside, cosine = within.log_probabilities(learner, features), cosine_log_probabilities(learner, features)
    joint = lda.log_softmax(dim=1)
    yield "task by LDA, then LDA on its LuCA feature", inside.masked_fill(~own, -torch.inf), routed
    yield "log p of LDA + log p of the cosine within the task", joint + cosine, None
    yield "log p of LDA + log p of the LDA on LuCA within the task", joint + inside, None
    yield "no module: LDA on the frozen feature", lda, None
    yield "no module: ridge on 1,000 random features", ridge, None


def study(setup: Setup, config: Config, seed: int) -> dict[str, dict[str, list[float]]]:
    """Answer -> {accuracy after each task, selection accuracy after each task}."""
    setup = dataclasses.replace(setup, config=config)
    bank, stream = setup.bank(seed), make_stream(setup.data, config, seed)
    bank.fill(wanted_features(config))
    learner = make_learner(config, setup.backbone.feature_dim, setup.backbone.device, seed)
    assert isinstance(learner, TOSCA)
    within = TaskDiscriminants()
    curves: dict[str, dict[str, list[float]]] = {}
    for task in stream.tasks:
        data = BankTask(bank, stream, task, config.views, setup.backbone.device)
        learner.learn(data)
        within.add(learner, data)
        seen: tuple[Task, ...] = stream.tasks[: task.index + 1]
        features = torch.from_numpy(bank.read("test", TEST_VIEW, np.concatenate([t.test for t in seen])))
        true = torch.from_numpy(np.concatenate([t.test_classes for t in seen]))
        true_task = learner.row_task[true]
        for name, scores, module in answers(learner, within, features, true_task, seed):
            curve = curves.setdefault(name, {"accuracy": [], "selection": []})
            curve["accuracy"].append((scores.argmax(dim=1) == true).double().mean().item() * 100)
            if module is not None:
                curve["selection"].append((module == true_task).double().mean().item() * 100)
    return curves


def table(runs: list[dict[str, dict[str, list[float]]]], keep: tuple[str, ...] = ()) -> Iterator[str]:
    """Rows of the Markdown table for the answers ``keep`` (all by default)."""
    for name in keep or runs[0]:
        accuracy = [run[name]["accuracy"] for run in runs]
        numbers = [[float(np.mean(a)) for a in accuracy], [a[-1] for a in accuracy]]
        if runs[0][name]["selection"]:
            numbers.append([run[name]["selection"][-1] for run in runs])
        cells = ["{:.1f} ± {:.1f}".format(*mean_std(values)) for values in numbers]
        yield f"| {name} | {' | '.join(cells + ['–'] * (3 - len(cells)))} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--repairs", action="store_true", help="every combination of new_rows, old_rows and sigma")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    return run_command(parser.prog, lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    setup = prepare(config, Ranks())
    head = "| {} | Ā | A_T | selection accuracy after the last task |\n|---|---|---|---|"
    if not args.repairs:
        print(head.format("answer"))
        print(*table([study(setup, config, seed) for seed in config.seed]), sep="\n")
        return 0
    print(head.format("repair and selection"))
    sigmas: tuple[str | float, ...] = ("learned", FIXED_SIGMA)
    for rows, old, sigma in itertools.product(("zeros", "prototypes"), ("train", "freeze"), sigmas):
        repaired = dataclasses.replace(config, new_rows=rows, old_rows=old, sigma=sigma)
        runs = [study(setup, repaired, seed) for seed in config.seed]
        for line in table(runs, ("batch", "sample", "lda", "oracle")):
            print(f"| new_rows={rows} old_rows={old} sigma={sigma}:{line[1:]}")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
