"""What methods with a module for each task share: the stacked modules, their entropies, and how one is chosen.

Every answer streams over samples and modules, so that memory stays bounded however many there are, and all shapes
follow from the shapes of the arguments. Nothing is changed by answering: threads may share a learner.
"""

import copy
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.classifier import CosineClassifier, cosine_logits
from backbone.flops import count_flops, counted_otherwise
from backbone.luca import LuCA, make_luca
from models.base import SAMPLES, Learner, OnEpoch, Prediction, TaskData, joined
from models.selection import SELECTION_BATCH, choose_by_batch, choose_by_sample, entropy
from models.tensors import host_values
from models.training import Epoch, Step, train
from utils.config.config import Config
from utils.hardware import single_thread
from utils.seeds import derive_seed

EVALUATION_BYTES = 64 << 20  # about what the modules may hold of intermediate values at a time


class Router(Protocol):
    """Statistics of the frozen feature that name the task of the best row."""

    def update(self, features: Tensor, rows: Tensor, total_rows: int) -> None: ...

    def scores(self, features: Tensor) -> Tensor: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class ModularLearner(Learner):
    """A method that keeps a module for each task and one cosine classifier over all rows.

    ``sample`` and ``batch`` choose the module whose prediction is least uncertain, a router the task of its best row.

    Attributes:
        modules: the modules' parameters by name, those of all tasks stacked: ``(tasks, ...)``.
        weight: ``(rows, dim)`` the classifier's rows.
        sigma: the classifier's scale, a scalar.
        routers: by the name of the selection that they are.
    """

    state_names: ClassVar[tuple[str, ...]] = ("weight", "sigma", "routers")

    def __init__(self, config: Config, dim: int, device: torch.device, seed: int) -> None:
        super().__init__(config, dim, device, seed)
        self.modules: dict[str, Tensor] = {}
        self.weight, self.sigma = torch.zeros(0, dim, device=device), torch.ones((), device=device)
        self.routers: dict[str, Router] = {}

    @property
    def module_count(self) -> int:
        """How many modules are kept."""
        return len(next(iter(self.modules.values()))) if self.modules else 0

    @abstractmethod
    def forward_modules(self, parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """What some modules make of features, as a function of the arguments.

        Args:
            parameters: the modules' parameters by name, stacked: ``(modules, ...)``.
            features: ``(samples, dim)`` for all of them, or ``(modules, samples, dim)``, each module's own.

        Returns:
            ``(modules, samples, dim)``.
        """

    # -- one image by itself ---------------------------------------------------------------------------------------

    def scores(self, features: Tensor) -> Tensor:
        return self.answer(features).scores

    @torch.no_grad()
    def answer(self, features: Tensor, selection: str = "sample") -> Prediction:
        self.check_selection(selection)
        parts = [features] if torch.compiler.is_compiling() else features.split(SAMPLES)
        return joined([self._answer_part(part, selection) for part in parts])

    def _answer_part(self, features: Tensor, selection: str) -> Prediction:
        if selection == "sample":
            return self._least_uncertain(features, {})["sample"]
        by_task = self._task_scores(features, selection)
        found = self._least_uncertain(features, {selection: by_task.argmax(dim=1)})[selection]
        module = cast(Tensor, found.module)
        return Prediction(self.own_rows(found.scores, module), module, found.entropy, task_scores=by_task)

    def _least_uncertain(self, features: Tensor, chosen: Mapping[str, Tensor]) -> dict[str, Prediction]:
        """Answer under ``sample`` and with modules that are ``chosen`` already, ``(samples,)`` for each name."""
        samples, device = features.shape[0], features.device
        chosen = {"sample": torch.zeros(samples, dtype=torch.long, device=device), **chosen}
        lowest = features.new_full((samples,), torch.inf)
        # All that outlives a step is laid out first and written in place: a small result that is kept between the large
        # ones that are not would keep the allocator from using their room again, and memory would grow by the module.
        entropies = features.new_empty(samples, self.module_count)
        scores = {name: features.new_empty(samples, len(self.weight)) for name in chosen}
        for first, logits in self.all_logits(features):
            last = first + len(logits)
            entropies[:, first:last] = entropy(logits).T
            among = torch.cat([lowest[:, None], entropies[:, first:last]], dim=1)  # the best so far, and the new ones
            choice = choose_by_sample(among)
            torch.where(choice > 0, first + choice - 1, chosen["sample"], out=chosen["sample"])
            lowest.copy_(among.gather(1, choice[:, None])[:, 0])
            for name, module in chosen.items():
                inside = (module >= first) & (module < last)
                place = (module - first).clamp(0, len(logits) - 1)
                own = logits.gather(0, place[None, :, None].expand(1, -1, logits.shape[2]))[0]
                torch.where(inside[:, None], own, scores[name], out=scores[name])
        return {
            name: Prediction(scores[name], module, entropies.gather(1, module[:, None])[:, 0], entropies)
            for name, module in chosen.items()
        }

    def _task_scores(self, features: Tensor, router: str) -> Tensor:
        """Each task's best score under a router: ``(samples, dim) -> (samples, tasks)``."""
        scores = self.routers[router].scores(features)
        best = scores.new_full((scores.shape[0], self.tasks), -torch.inf)
        return best.scatter_reduce(1, self.row_task.expand_as(scores), scores, "amax")

    def own_rows(self, logits: Tensor, module: Tensor) -> Tensor:
        """Rule out the rows of other tasks: ``(samples, rows), (samples,) -> (samples, rows)``."""
        return logits.masked_fill(self.row_task != module[:, None], -torch.inf)

    # -- evaluation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_pieces(
        self, features: Tensor, true_task: Tensor | None = None, shuffled: Tensor | None = None
    ) -> Iterator[tuple[Tensor, dict[str, Prediction]]]:
        in_order = torch.arange(len(features), device=features.device)
        entropies = features.new_empty(len(features), self.module_count)
        for samples in in_order.split(SAMPLES):
            part = features[samples]
            routed = {name: self._task_scores(part, name).argmax(dim=1) for name in self.routers}
            known = {} if true_task is None else {"oracle": true_task[samples]}
            answers = self._least_uncertain(part, {**known, **routed})
            for name, module in routed.items():
                answers[name] = replace(answers[name], scores=self.own_rows(answers[name].scores, module))
            entropies[samples] = cast(Tensor, answers["sample"].entropies)
            yield samples, answers
        yield from self._by_batch("batch", features, entropies, in_order)
        if shuffled is not None:
            yield from self._by_batch("batch_shuffled", features, entropies, shuffled)

    def _by_batch(
        self, name: str, features: Tensor, entropies: Tensor, order: Tensor
    ) -> Iterator[tuple[Tensor, dict[str, Prediction]]]:
        """Answer with one module for every 48 samples that are consecutive in ``order``."""
        step = self._at_a_time(SELECTION_BATCH, sum(p[0].numel() for p in self.modules.values()))
        directions = F.normalize(self.weight, dim=1)
        for samples in order.split(step * SELECTION_BATCH):
            batches = choose_by_batch(entropies[samples])
            padded = F.pad(features[samples], (0, 0, 0, len(batches) * SELECTION_BATCH - len(samples)))
            own = {key: p[batches] for key, p in self.modules.items()}
            z = self.forward_modules(own, padded.unflatten(0, (len(batches), SELECTION_BATCH)))
            scores = cosine_logits(z, directions, self.sigma).flatten(0, 1)[: len(samples)]
            module = batches.repeat_interleave(SELECTION_BATCH)[: len(samples)]
            chosen = entropies[samples].gather(1, module[:, None])[:, 0]
            yield samples, {name: Prediction(scores, module, chosen, entropies[samples])}

    # -- logits, in bounded memory -----------------------------------------------------------------------------------

    def all_logits(self, features: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Logits of all modules, some modules at a time: the first one's number, ``(modules, samples, rows)``."""
        directions = F.normalize(self.weight, dim=1)
        step = self.module_count if torch.compiler.is_compiling() else self._at_a_time(features.shape[0], 0)
        for first in range(0, self.module_count, step):
            part = {name: p[first : first + step] for name, p in self.modules.items()}
            yield first, cosine_logits(self.forward_modules(part, features), directions, self.sigma)

    def _at_a_time(self, samples: int, copied: int) -> int:
        """Modules that fit into ``EVALUATION_BYTES`` with ``samples`` each and ``copied`` numbers of parameters."""
        numbers = samples * (4 * self.dim + 2 * len(self.weight)) + copied
        return max(1, EVALUATION_BYTES // (4 * max(1, numbers)))

    # -- modules ---------------------------------------------------------------------------------------------------

    def train_module(
        self,
        luca: LuCA,
        classifier: CosineClassifier,
        task: TaskData,
        epochs: Iterable[Epoch],
        on_epoch: OnEpoch | None,
        *,
        frozen_rows: int = 0,
        input_flops: int = 0,
    ) -> None:
        """Train a task's module and the classifier in place; ``input_flops`` is what one image's feature costs before.

        FLOPs are linear in images: one step of one image tells what all of them cost.
        """
        image = (torch.ones(1, self.dim, device=self.device), torch.zeros(1, dtype=torch.long, device=self.device))
        with counted_otherwise() as add_flops, single_thread():
            if add_flops is not None:
                step = Step(*copy.deepcopy((luca, classifier)), self.config)
                add_flops((count_flops(lambda: step(*image)) + input_flops) * len(task.labels) * self.config.epochs)
            train(luca, classifier, epochs, self.config, frozen_rows=frozen_rows, on_epoch=on_epoch)

    def fresh_luca(self, task: TaskData) -> LuCA:
        """The module before training: the first task's from PyTorch's default initialisation, later ones' Xavier."""
        seed = derive_seed("luca", self.seed, task.index)
        return self._made_luca(first=task.index == 0, seed=seed).to(self.device)

    def luca_parameters(self) -> int:
        """Return how many parameters a task's LuCA has."""
        return sum(p.numel() for p in self._made_luca(first=True, seed=0).parameters())

    def _made_luca(self, *, first: bool, seed: int) -> LuCA:
        c = self.config
        return make_luca(self.dim, mlp_ratio=c.mlp_ratio, se_ratio=c.se_ratio, flow=c.flow, first=first, seed=seed)

    def parameter_counts(self) -> dict[str, int]:
        luca, set_by_method = self.luca_parameters(), dict(self.config.method.fixed)
        settings = {name: set_by_method.get(name, getattr(self.config, name)) for name in ("old_rows", "sigma")}
        newest = int(host_values((self.row_task == self.tasks - 1).sum()))
        trained_rows = newest if settings["old_rows"] == "freeze" else len(self.row_task)
        trained = luca + trained_rows * self.dim + (settings["sigma"] == "learned")
        return {"luca_per_task": luca, "classifier": self.weight.numel() + 1, "trainable": trained}

    def luca_state(self, task: int) -> dict[str, Tensor]:
        """The parameters of a task's LuCA: all of the module, unless a method keeps more with it."""
        return self.module_state(task)

    def add_module(self, parameters: Mapping[str, Tensor]) -> None:
        """Keep a new task's module."""
        new, known = {name: p.detach() for name, p in parameters.items()}, self.modules
        self.modules = {n: torch.cat([known[n], p[None]]) if known else p[None].clone() for n, p in new.items()}

    def module_state(self, task: int) -> dict[str, Tensor]:
        """The tensors that belong to one task alone and never change again."""
        return {name: p[task] for name, p in self.modules.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], modules: Sequence[Mapping[str, Tensor]] = ()) -> None:
        super().load_state_dict(state, modules)
        names = modules[0] if modules else ()
        self.modules = {name: torch.stack([m[name] for m in modules]).to(self.device) for name in names}

    def sparsity(self, task: int) -> float:
        """The share of the LuCA's parameters with |θ| < 1e-3."""
        flat = torch.cat([p.flatten() for p in self.luca_state(task).values()])
        return float(host_values((flat.abs() < 1e-3).sum() / len(flat)))
