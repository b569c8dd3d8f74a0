"""What methods with a module for each task share: the stacked modules, their entropies, and how one is chosen.

Every answer streams over samples and modules, so that memory stays bounded however many there are, and all shapes
follow from the shapes of the arguments. Nothing is changed by answering: threads may share a learner.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.classifier import cosine_logits
from backbone.luca import LuCA, make_luca
from models.base import Learner, Prediction, TaskData
from models.host_values import host_values
from utils.config import Config
from utils.seeds import derive_seed

SELECTION_BATCH = 48  # consecutive test samples that share a module under ``batch``: the release's test batch
SAMPLES = 5 * SELECTION_BATCH  # samples that are answered at a time
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
        if selection == "sample":
            return joined([self._least_uncertain(part, {})["sample"] for part in parts])
        return joined([self._routed(part, selection) for part in parts])

    def _least_uncertain(self, features: Tensor, chosen: Mapping[str, Tensor]) -> dict[str, Prediction]:
        """Answer under ``sample`` and with modules that are ``chosen`` already, ``(samples,)`` for each name."""
        entropies, best = [], features.new_full((features.shape[0],), torch.inf)
        chosen = {"sample": torch.zeros(features.shape[0], dtype=torch.long, device=features.device), **chosen}
        scores: dict[str, Tensor] = {}
        for first, logits in self.all_logits(features):
            found = entropy(logits)  # (some modules, samples)
            entropies.append(found)
            lowest, index = found.min(dim=0)
            better = lowest < best
            best = torch.where(better, lowest, best)
            chosen["sample"] = torch.where(better, first + index, chosen["sample"])
            for name, module in chosen.items():
                inside = (module >= first) & (module < first + len(logits))
                place = (module - first).clamp(0, len(logits) - 1)
                own = logits.gather(0, place[None, :, None].expand(1, -1, logits.shape[2]))[0]
                scores[name] = torch.where(inside[:, None], own, scores[name]) if first else own
        of_all = torch.cat(entropies).T
        return {
            name: Prediction(scores[name], module, of_all.gather(1, module[:, None])[:, 0], of_all)
            for name, module in chosen.items()
        }

    def _routed(self, features: Tensor, router: str) -> Prediction:
        by_task = self._task_scores(features, router)
        module = by_task.argmax(dim=1)
        logits = self._logits_by_group(features, module, 1)
        return Prediction(self.own_rows(logits, module), module, entropy(logits), task_scores=by_task)

    def _route(self, features: Tensor, router: str) -> Tensor:
        """The task of the best row: ``(samples, dim) -> (samples,)``."""
        return self._task_scores(features, router).argmax(dim=1)

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
    def predict(
        self, features: Tensor, true_task: Tensor | None = None, shuffled: Tensor | None = None
    ) -> dict[str, Prediction]:
        chosen = {} if true_task is None else {"oracle": true_task}
        chosen |= {name: self._route(features, name) for name in self.routers}
        parts = [
            self._least_uncertain(
                part, {name: module[SAMPLES * number :][: len(part)] for name, module in chosen.items()}
            )
            for number, part in enumerate(features.split(SAMPLES))
        ]
        answers = {name: joined([part[name] for part in parts]) for name in parts[0]}
        entropies = answers["sample"].entropies
        assert entropies is not None
        result = {"batch": self._by_batch(features, entropies), "sample": answers["sample"]}
        if shuffled is not None:
            result["batch_shuffled"] = self._by_batch(features, entropies, shuffled)
        for name, module in chosen.items():
            scores = self.own_rows(answers[name].scores, module) if name in self.routers else answers[name].scores
            result[name] = Prediction(scores, module, answers[name].entropy, entropies)
        return result

    @torch.no_grad()
    def entropies(self, features: Tensor) -> Tensor:
        """Entropy of every module's prediction, in nats: ``(samples, dim) -> (samples, modules)``."""
        parts = [torch.cat([entropy(logits) for _, logits in self.all_logits(p)]).T for p in features.split(SAMPLES)]
        return torch.cat(parts)

    def _by_batch(self, features: Tensor, entropies: Tensor, order: Tensor | None = None) -> Prediction:
        """Answer with one module for every 48 consecutive samples, in ``order`` if that is given."""
        if order is not None:
            features, entropies = features[order], entropies[order]
        groups = choose_by_batch(entropies)
        module = groups.repeat_interleave(SELECTION_BATCH)[: len(features)]
        scores = self._logits_by_group(features, groups, SELECTION_BATCH)
        if order is not None:
            back = order.argsort()
            scores, module, entropies = scores[back], module[back], entropies[back]
        return Prediction(scores, module, entropies.gather(1, module[:, None])[:, 0], entropies)

    # -- logits, in bounded memory -----------------------------------------------------------------------------------

    def all_logits(self, features: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Logits of all modules, some modules at a time: the first one's number, ``(modules, samples, rows)``."""
        directions = F.normalize(self.weight, dim=1)
        count = len(next(iter(self.modules.values())))
        step = count if torch.compiler.is_compiling() else self._at_a_time(features.shape[0], 0)
        for first in range(0, count, step):
            part = {name: p[first : first + step] for name, p in self.modules.items()}
            yield first, cosine_logits(self.forward_modules(part, features), directions, self.sigma)

    def _logits_by_group(self, features: Tensor, module: Tensor, size: int) -> Tensor:
        """Logits by the module of each group of ``size`` consecutive samples, the last group perhaps smaller.

        Shape: ``(samples, dim), (groups,) -> (samples, rows)``.
        """
        directions = F.normalize(self.weight, dim=1)
        padded = F.pad(features, (0, 0, 0, module.shape[0] * size - features.shape[0]))
        grouped = padded.unflatten(0, (module.shape[0], size))
        parameters = sum(p[0].numel() for p in self.modules.values())
        step = self._at_a_time(size, parameters)
        split = [(grouped, module)]  # in one piece where the number of samples is a symbol
        if not torch.compiler.is_compiling():
            split = list(zip(grouped.split(step), module.split(step), strict=True))
        parts = []
        for h, part in split:
            own = {name: p[part] for name, p in self.modules.items()}
            parts.append(cosine_logits(self.forward_modules(own, h), directions, self.sigma).flatten(0, 1))
        return torch.cat(parts)[: features.shape[0]]

    def _at_a_time(self, samples: int, copied: int) -> int:
        """Modules that fit into ``EVALUATION_BYTES`` with ``samples`` each and ``copied`` numbers of parameters."""
        numbers = samples * (4 * self.dim + 2 * len(self.weight)) + copied
        return max(1, EVALUATION_BYTES // (4 * max(1, numbers)))

    # -- modules ---------------------------------------------------------------------------------------------------

    def fresh_luca(self, task: TaskData) -> LuCA:
        """The module before training: the first task's from PyTorch's default initialisation, later ones' Xavier."""
        c, seed = self.config, derive_seed("luca", self.seed, task.index)
        shape = {"mlp_ratio": c.mlp_ratio, "se_ratio": c.se_ratio}
        return make_luca(self.dim, **shape, flow=c.flow, first=task.index == 0, seed=seed).to(self.device)

    def luca_parameters(self) -> int:
        """Return how many parameters a task's LuCA has."""
        c = self.config
        luca = make_luca(self.dim, mlp_ratio=c.mlp_ratio, se_ratio=c.se_ratio, flow=c.flow, first=True, seed=0)
        return sum(p.numel() for p in luca.parameters())

    def newest_rows(self, coming: TaskData | None = None) -> int:
        """Return how many rows the last task brought, or those that ``coming`` brings."""
        if coming is not None:
            return coming.new_rows
        return int(host_values((self.row_task == self.tasks - 1).sum()))

    def luca_state(self, task: int) -> dict[str, Tensor]:
        """The parameters of a task's LuCA: all of the module, unless a method keeps more with it."""
        return self.module_state(task)

    def add_module(self, parameters: Mapping[str, Tensor]) -> None:
        """Keep a new task's module."""
        new = {name: p.detach()[None] for name, p in parameters.items()}
        self.modules = {n: torch.cat([self.modules[n], p]) if self.modules else p for n, p in new.items()}

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


def joined(parts: Sequence[Prediction]) -> Prediction:
    """Several predictions, of samples in this order, as one."""

    def column(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    names = ("module", "entropy", "entropies", "task_scores")
    return Prediction(torch.cat([p.scores for p in parts]), **{name: column(name) for name in names})


def entropy(logits: Tensor) -> Tensor:
    """−Σ p·log(p + 1e-9) over the last dimension, in nats."""
    p = logits.softmax(dim=-1)
    return -(p * (p + 1e-9).log()).sum(dim=-1)


def choose_by_batch(entropies: Tensor) -> Tensor:
    """One module for every 48 consecutive samples, by their mean entropy: ``(samples, modules) -> (batches,)``."""
    parts = [part.mean(dim=0).argmin() for part in entropies.split(SELECTION_BATCH) if len(part)]
    return torch.stack(parts) if parts else torch.empty(0, dtype=torch.long, device=entropies.device)
