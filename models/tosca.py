"""TOSCA: one LuCA a task on the frozen [CLS] feature; the module of lowest entropy answers (paper, section 3).

Beside the paper's selections there are two routers, ``lda`` and ``ridge``: statistics of the *frozen* feature,
streamed without exemplars, name the task of the best class; that task's module answers among its own classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call

from backbone.classifier import CosineClassifier, first_rows
from backbone.luca import LuCA, make_luca
from models.base import Learner, Prediction, TaskData
from models.streaming.lda import StreamingLDA
from models.streaming.ridge import RandomRidge
from models.training import check_finite, shuffled_epochs, train
from utils.config import Config
from utils.errors import NumericError
from utils.methods import Method, Selection
from utils.progress import progress
from utils.seeds import derive_seed

METHOD = Method(
    "tosca",
    "a LuCA module for each task; one is chosen for each image (the paper)",
    selections=(
        Selection(
            "batch",
            "batch (class order)",
            "one module for 48 consecutive test images, by their mean entropy: the release's evaluation; in class "
            "order the order itself tells the task",
            ordered=True,
        ),
        Selection(
            "sample",
            "sample",
            "the module of lowest entropy for each image by itself: no task identity at inference",
        ),
        Selection(
            "lda",
            "lda",
            "for each image by itself, the task of the best class under a linear discriminant analysis of the frozen "
            "feature; its module answers among the task's own classes",
        ),
        Selection("ridge", "ridge", "the same with ridge regression on 1,000 random features of the frozen feature"),
    ),
    views="augmented",
    modular=True,
    reads=("training", "module"),
)
SELECTION_BATCH = 48  # consecutive test samples that share a module under ``batch``: the release's test batch
ROUTER_WIDTH = 1_000  # random features of the ``ridge`` router: RanPAC's 10,000 would cost more than all the rest
EVALUATION_BYTES = 64 << 20  # about what the stacked modules may hold of intermediate values at a time


@contextmanager
def single_thread() -> Iterator[None]:
    """One CPU thread for a while: LuCA's products are so small that handing them out costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class TOSCA(Learner):
    """The learner of the paper, with the release's quirks (README, "How this differs from the release").

    Attributes:
        modules: LuCA's parameters by name, those of all tasks stacked: ``(tasks, ...)``.
        classifier: the cosine classifier over all rows, None before the first task.
        routers: ``lda`` and ``ridge``, which read the frozen feature.
    """

    modules: dict[str, Tensor]

    def __init__(self, config: Config, dim: int, device: torch.device, seed: int) -> None:
        super().__init__(config, dim, device, seed)
        self.modules = {}
        self.classifier: CosineClassifier | None = None
        self.routers = {
            "lda": StreamingLDA(dim, device),
            "ridge": RandomRidge(dim, ROUTER_WIDTH, derive_seed("ridge", seed), device),
        }
        self._luca = self._fresh_luca(first=True, seed=0)  # its forward serves all modules; its weights are unused

    # -- learning --------------------------------------------------------------------------------------------------

    def _fit(self, task: TaskData) -> None:
        luca = self._fresh_luca(first=task.index == 0, seed=derive_seed("luca", self.seed, task.index))
        classifier = self._grown_classifier(task)
        if self.config.new_rows == "prototypes":
            with torch.no_grad():
                _set_rows(classifier, task, luca(task.test_view()))  # of the module as it starts
        try:
            self._train(luca, classifier, task)
            with torch.no_grad():
                _set_rows(classifier, task, luca(task.test_view()))
            check_finite({**dict(luca.named_parameters(prefix="LuCA")), **dict(classifier.named_parameters())})
        except NumericError as error:
            raise NumericError(f"task {task.index}, {error}") from None
        self.classifier = classifier.requires_grad_(False)
        new = {name: p.detach()[None] for name, p in luca.named_parameters()}
        self.modules = {n: torch.cat([self.modules[n], p]) if self.modules else p for n, p in new.items()}
        for router in self.routers.values():
            router.update(task.test_view(), task.labels, task.first_row + task.new_rows)

    def _train(self, luca: LuCA, classifier: CosineClassifier, task: TaskData) -> None:
        config = self.config
        epochs = shuffled_epochs(task, config, self.seed)
        bar = progress(epochs, total=config.epochs, desc=f"Task {task.index}", unit="epoch", leave=False)
        frozen_rows = task.first_row if config.old_rows == "freeze" else 0
        with single_thread():
            train(
                luca,
                classifier,
                bar,
                config,
                frozen_rows=frozen_rows,
                on_epoch=lambda _, stats: bar.set_postfix(loss=f"{stats.loss:.3f}", refresh=False),
            )

    def _fresh_luca(self, *, first: bool, seed: int) -> LuCA:
        c = self.config
        luca = make_luca(self.dim, mlp_ratio=c.mlp_ratio, se_ratio=c.se_ratio, flow=c.flow, first=first, seed=seed)
        return luca.to(self.device)

    def _grown_classifier(self, task: TaskData) -> CosineClassifier:
        """The classifier with rows for the new task: random in the first task, zero in later ones."""
        if self.classifier is not None:
            return self.classifier.grown(torch.zeros(task.new_rows, self.dim, device=self.device))
        generator = torch.Generator().manual_seed(derive_seed("classifier", self.seed))
        sigma = 1.0 if self.config.sigma == "learned" else self.config.sigma
        rows = first_rows(task.new_rows, self.dim, generator)
        return CosineClassifier(rows, torch.tensor(sigma)).to(self.device)

    # -- prediction ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self, features: Tensor, true_task: Tensor | None = None, shuffled: Tensor | None = None
    ) -> dict[str, Prediction]:
        entropies = self.entropies(features)
        chosen = {"batch": choose_by_batch(entropies), "sample": entropies.argmin(dim=1)}
        if shuffled is not None:
            chosen["batch_shuffled"] = choose_by_batch(entropies[shuffled])[shuffled.argsort()]
        if true_task is not None:
            chosen["oracle"] = true_task
        answers = {name: self.answer(features, module) for name, module in chosen.items()}
        for name, router in self.routers.items():
            chosen[name] = self.row_task[router.scores(features).argmax(dim=1)]
            foreign = self.row_task != chosen[name][:, None]  # (samples, rows)
            answers[name] = self.answer(features, chosen[name]).masked_fill(foreign, -torch.inf)
        return {
            name: Prediction(answers[name], module, entropies.gather(1, module[:, None])[:, 0])
            for name, module in chosen.items()
        }

    @torch.no_grad()
    def entropies(self, features: Tensor) -> Tensor:
        """Entropy of every module's prediction, in nats: ``(samples, dim) -> (samples, modules)``."""
        found = [entropy(logits).T for logits in self._all_logits(features)]
        return torch.cat(found) if found else features.new_empty(0, self.tasks)

    def _all_logits(self, features: Tensor) -> Iterator[Tensor]:
        """Logits of all modules together, ``(modules, some samples, rows)`` at a time, so that memory is bounded."""
        rows, tasks = len(self.row_task), self.tasks
        step = max(1, EVALUATION_BYTES // (4 * tasks * (4 * self.dim + 2 * rows)))
        stacked = torch.vmap(self._forward_one, in_dims=(0, None))
        for part in features.split(step):
            if len(part):
                yield self.classifier(stacked(self.modules, part))

    def _forward_one(self, parameters: dict[str, Tensor], h: Tensor) -> Tensor:
        return functional_call(self._luca, parameters, (h,))

    @torch.no_grad()
    def answer_by_sample(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """``sample`` selection in one go: ``(samples, dim) -> (samples, modules), (samples, rows)``.

        The entropies of all modules, and the logits of the one that is least uncertain about each sample.
        """
        entropies, answers = [features.new_empty(0, self.tasks)], [features.new_empty(0, len(self.row_task))]
        for logits in self._all_logits(features):
            entropies.append(entropy(logits).T)
            chosen = entropies[-1].argmin(dim=1)  # (samples,)
            answers.append(logits[chosen, torch.arange(len(chosen), device=chosen.device)])
        return torch.cat(entropies), torch.cat(answers)

    @single_thread()
    @torch.no_grad()
    def answer(self, features: Tensor, module: Tensor) -> Tensor:
        """Logits over all rows by each sample's chosen module: ``(samples, dim), (samples,) -> (samples, rows)``."""
        logits = features.new_empty(len(features), len(self.row_task))
        for index in module.unique().tolist():
            mine = module == index
            parameters = {name: p[index] for name, p in self.modules.items()}
            logits[mine] = self.classifier(self._forward_one(parameters, features[mine]))
        return logits

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        state = {"weight": self.classifier.weight, "sigma": self.classifier.sigma, "row_task": self.row_task}
        routers = {f"{name}.{k}": v for name, router in self.routers.items() for k, v in router.state_dict().items()}
        return state | routers

    def module_state(self, task: int) -> dict[str, Tensor]:
        return {name: p[task] for name, p in self.modules.items()}

    def load_state_dict(self, state: dict[str, Tensor], modules: list[dict[str, Tensor]]) -> None:
        self.row_task = state["row_task"].to(self.device)
        self.classifier = CosineClassifier(state["weight"].clone(), state["sigma"].clone()).to(self.device)
        self.classifier.requires_grad_(False)
        for name, router in self.routers.items():
            router.load_state_dict(
                {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            )
        names = self._luca.state_dict().keys()
        self.modules = {name: torch.stack([m[name] for m in modules]).to(self.device) for name in names}

    def parameter_counts(self) -> dict[str, int]:
        luca = sum(p.numel() for p in self._luca.parameters())
        rows = len(self.row_task)
        trained_rows = rows if self.config.old_rows == "train" else int((self.row_task == self.tasks - 1).sum())
        trained = luca + trained_rows * self.dim + (self.config.sigma == "learned")
        return {"luca_per_task": luca, "classifier": rows * self.dim + 1, "trainable": trained}

    def sparsity(self) -> list[float]:
        """For each task the share of its LuCA's parameters with |θ| < 1e-3."""
        small = sum((p.abs() < 1e-3).flatten(1).sum(dim=1) for p in self.modules.values())
        return (small / sum(p[0].numel() for p in self.modules.values())).tolist()


def _set_rows(classifier: CosineClassifier, task: TaskData, features: Tensor) -> None:
    """Set the task's rows to the means of ``(images, dim)`` features, not normalised."""
    classifier.weight.data[task.first_row : task.first_row + task.new_rows] = class_means(
        features, task.labels - task.first_row, task.new_rows
    )


def class_means(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """Mean feature of each of ``count`` classes: ``(images, dim), (images,) -> (count, dim)``."""
    sums = features.new_zeros(count, features.shape[1]).index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=count)[:, None]


def entropy(logits: Tensor) -> Tensor:
    """−Σ p·log(p + 1e-9) over the last dimension, in nats."""
    p = logits.softmax(dim=-1)
    return -(p * (p + 1e-9).log()).sum(dim=-1)


def choose_by_batch(entropies: Tensor) -> Tensor:
    """One module for every 48 consecutive samples, by their mean entropy: ``(samples, modules) -> (samples,)``."""
    parts = [part.mean(dim=0).argmin().expand(len(part)) for part in entropies.split(SELECTION_BATCH) if len(part)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=entropies.device)
