"""TOSCA on a whitened feature, answered together with two ridge regressions. An extension of this project.

On general features the modules of TOSCA are weak inside their own task. Here a module reads the whitened feature
``z = diag(w_t)^-1/2 V_tᵀ(h − μ_t)``, starts as the identity, and is trained on ``z + N(0, I)`` to tell the classes of
its own task apart. ``V_t·diag(w_t)·V_tᵀ`` is the shrunk covariance within the classes so far when task t is learned,
``μ_t`` the mean of their means; both are kept with the module and never change.

Three answers treat each image by itself: ``sample`` as in TOSCA; ``ridges``, where two ridge regressions on random
features name the task; and ``blend``, where nothing is routed: the mean of what the regressions and the modules say,
``½ · Σ_k log softmax(τ_k·s_k(h)) + ½ · log p(class | its task, module of that task)``. docs/selection.md has the study.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from backbone.classifier import CosineClassifier
from backbone.luca import LuCA, luca_stacked
from models.base import SAMPLES, OnEpoch, Prediction, TaskData, joined
from models.modular import ModularLearner
from models.selection import choose_by_sample, entropy
from models.streaming.lda import StreamingLDA
from models.streaming.ridge_pair import RidgePair
from models.streaming.whitening import Whitening, make_whitening
from models.tosca import class_means
from models.training import Epoch, check_finite, shuffled_epochs
from utils.config.config import Config
from utils.config.methods import Key, Method, Selection
from utils.errors import NumericError
from utils.seeds import derive_seed

METHOD = Method(
    "tosca_white",
    "a LuCA module for each task on the whitened feature, blended with two ridge regressions",
    keys=(
        Key(
            "white_features",
            int,
            5_000,
            "random features of each of the two ridge regressions",
            affects="module",
            low=1,
            high=100_000,
        ),
    ),
    selections=(
        "sample",
        Selection(
            "ridges",
            "ridges",
            "for each image by itself, the task of the best class under two ridge regressions on random features, of "
            "the feature and of the whitened feature; its module answers among the task's own classes",
        ),
        Selection(
            "blend",
            "blend",
            "for each image by itself, the mean of the log-probabilities of the same two regressions plus half the "
            "log-probability that the module of a class's task gives it within the task; no module is chosen",
        ),
    ),
    views="augmented",
    modular=True,
    reads=("training", "module"),
    fixed=(("flow", "tosca"), ("sigma", 16.0), ("new_rows", "prototypes"), ("old_rows", "freeze")),
)
SIGMA = float(dict(METHOD.fixed)["sigma"])  # scale of the cosine logits
WHITENING = "whitening."  # in front of the names of a module's whitening, beside those of its LuCA
DIRECTIONS = WHITENING + "directions"


class WhiteTOSCA(ModularLearner):
    """A module for each task on its own whitened feature, and two ridge regressions.

    Attributes:
        statistics: of the frozen feature, for the next task's whitening.
    """

    state_names: ClassVar[tuple[str, ...]] = (*ModularLearner.state_names, "statistics")

    def __init__(self, config: Config, dim: int, device: torch.device, seed: int) -> None:
        super().__init__(config, dim, device, seed)
        self.sigma = torch.tensor(SIGMA, device=device)
        self.statistics = StreamingLDA(dim, device)
        self.routers = {"ridges": RidgePair(dim, config.own["white_features"], derive_seed("ridges", seed), device)}

    # -- learning --------------------------------------------------------------------------------------------------

    def fit(self, task: TaskData, on_epoch: OnEpoch | None) -> None:
        total_rows = task.first_row + task.new_rows
        statistics = copy.copy(self.statistics)  # updates replace its tensors
        statistics.update(task.test_view(), task.labels, total_rows)
        whitening = self.task_whitening(statistics)
        luca = self.fresh_luca(task)
        classifier = CosineClassifier(own_means(luca, whitening, task), self.sigma)
        classifier.sigma.requires_grad_(False)
        try:
            epochs = self.noisy_epochs(task, whitening)
            self.train_module(luca, classifier, task, epochs, on_epoch, input_flops=2 * self.dim**2)
            check_finite(dict(luca.named_parameters(prefix="LuCA")))
            rows = own_means(luca, whitening, task)
        except NumericError as error:
            raise NumericError(f"task {task.index + 1}, {error}") from None
        self.statistics, self.weight = statistics, torch.cat([self.weight, rows])
        kept = {WHITENING + name: part for name, part in whitening._asdict().items()}
        self.add_module({**dict(luca.named_parameters()), **kept})
        self.routers["ridges"].update(task.test_view(), task.labels, total_rows)

    def task_whitening(self, statistics: StreamingLDA) -> Whitening:
        """The newest task's whitening as it will be saved, so that a loaded learner is the same to the last bit."""
        directions, scales, mean = (part.to(self.device) for part in make_whitening(statistics))
        return Whitening(directions.half().float(), scales, mean)

    def fresh_luca(self, task: TaskData) -> LuCA:
        """The module before training, as TOSCA starts it, but for the last layers of adapter and calibrator: zero.

        So it starts as the identity: LayerNorm(z) times the gate's ½.
        """
        luca = super().fresh_luca(task)
        with torch.no_grad():
            for parameter in (*luca.mlp[2].parameters(), *luca.se[2].parameters()):
                parameter.zero_()
        return luca

    def noisy_epochs(self, task: TaskData, whitening: Whitening) -> Iterator[Epoch]:
        """The batches of each epoch: whitened features with fresh noise, rows counted from the task's first."""
        for epoch, steps in enumerate(shuffled_epochs(task, self.config, self.seed)):
            generator = torch.Generator().manual_seed(derive_seed("noise", self.seed, task.index, epoch))
            yield (
                (whitening(h) + torch.randn(h.shape, generator=generator).to(h.device), rows - task.first_row)
                for h, rows in steps
            )

    # -- prediction ------------------------------------------------------------------------------------------------

    def forward_modules(self, parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
        directions, scales, mean = (parameters[WHITENING + name] for name in Whitening._fields)
        each = features.expand(len(mean), *features.shape[-2:])  # (modules, samples, dim)
        white = torch.bmm(each - mean[:, None], directions) * scales[:, None]
        return luca_stacked(parameters, white, "tosca")

    @torch.no_grad()
    def answer(self, features: Tensor, selection: str = "sample") -> Prediction:
        """Answer each image by itself: under ``blend`` among all rows, else among those of the chosen module's task."""
        self.check_selection(selection)
        parts = [features] if torch.compiler.is_compiling() else features.split(SAMPLES)
        return joined([self._answers(part, (selection,))[selection] for part in parts])

    @torch.no_grad()
    def predict_pieces(
        self, features: Tensor, true_task: Tensor | None = None, shuffled: Tensor | None = None
    ) -> Iterator[tuple[Tensor, dict[str, Prediction]]]:
        """Answer under every selection; none depends on the order, so nothing is added for ``shuffled``."""
        names = self.selections if true_task is None else (*self.selections, "oracle")
        for samples in torch.arange(len(features), device=features.device).split(SAMPLES):
            yield samples, self._answers(features[samples], names, None if true_task is None else true_task[samples])

    def _answers(
        self, features: Tensor, selections: Sequence[str], true_task: Tensor | None = None
    ) -> dict[str, Prediction]:
        entropies, own = self._inside_tasks(features)
        answers = {}
        pair = self.routers["ridges"].scores(features) if {"ridges", "blend"} & set(selections) else own
        for name in selections:
            if name == "blend":
                answers[name] = Prediction(pair + 0.5 * own)
                continue
            if name == "sample":
                module = choose_by_sample(entropies)
            elif name == "oracle" and true_task is not None:
                module = true_task
            else:
                module = self.row_task[pair.argmax(dim=1)]
            chosen = entropies.gather(1, module[:, None])[:, 0]
            answers[name] = Prediction(self.own_rows(own, module), module, chosen, entropies)
        return answers

    def _inside_tasks(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What every module says: its entropy over all rows, and log p of each row of its own task.

        Shape: ``(samples, dim) -> (samples, modules), (samples, rows)``.
        """
        samples, rows = features.shape[0], len(self.row_task)
        entropies, own = features.new_empty(samples, self.module_count), features.new_zeros(samples, rows)
        for first, logits in self.all_logits(features):  # (some modules, samples, rows)
            entropies[:, first : first + len(logits)] = entropy(logits).T
            numbers = torch.arange(first, first + len(logits), device=logits.device)
            mine = (self.row_task == numbers[:, None])[:, None]  # (some modules, 1, rows)
            inside = logits.masked_fill(~mine, -torch.inf).log_softmax(dim=2)
            own += inside.masked_fill(~mine, 0.0).sum(dim=0)
        return entropies, own

    # -- state -----------------------------------------------------------------------------------------------------

    def module_state(self, task: int) -> dict[str, Tensor]:
        """The module and its whitening, the directions in the half precision to which they were rounded."""
        state = super().module_state(task)
        return {**state, DIRECTIONS: state[DIRECTIONS].half()}

    def load_state_dict(self, state: Mapping[str, Tensor], modules: Sequence[Mapping[str, Tensor]] = ()) -> None:
        super().load_state_dict(state, modules)
        if self.modules:
            self.modules[DIRECTIONS] = self.modules[DIRECTIONS].float()

    def luca_state(self, task: int) -> dict[str, Tensor]:
        """The parameters of a task's LuCA, without its whitening."""
        return {name: p[task] for name, p in self.modules.items() if not name.startswith(WHITENING)}


@torch.no_grad()
def own_means(luca: LuCA, whitening: Whitening, task: TaskData) -> Tensor:
    """Class means of ``luca`` under the test view: ``(new rows, dim)``."""
    return class_means(luca(whitening(task.test_view())), task.labels - task.first_row, task.new_rows)
