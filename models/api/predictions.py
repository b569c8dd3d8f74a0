"""The answers to some images: tensors for programs, plain values for everything else."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from utils.words import counted


@dataclass(frozen=True)
class Predictions:
    """The answers to some images, in their order. All tensors are on the CPU.

    Attributes:
        class_names: what the numbers in ``top`` stand for.
        top: ``(images, k)`` int64, the best classes, best first.
        probabilities: ``(images, k)`` of them: a softmax over all classes' scores.
        features: ``(images, dim)`` what the frozen backbone gave.
        selection: how the module that answers was chosen.
        tasks: how many tasks were learned.
        domains: the domain of each task, of a domain-incremental run; else empty.
        module: ``(images,)`` the module that answered, counted from 0, or None for a method without modules.
        entropy: ``(images,)`` of that module's prediction, in nats, or None.
        entropies: ``(images, modules)`` of every module's prediction, in nats; None where the selection does not look
            at them. They are taken over classifier rows: in domain-incremental runs a class has a row for each of
            its domains.
        task_scores: ``(images, tasks)`` what a selection by statistics of the feature compared: the best score of
            each task, of which the highest is chosen; else None.
    """

    class_names: tuple[str, ...]
    top: Tensor
    probabilities: Tensor
    features: Tensor
    selection: str = "sample"
    tasks: int = 0
    module: Tensor | None = None
    entropy: Tensor | None = None
    entropies: Tensor | None = None
    task_scores: Tensor | None = None
    domains: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.top)

    @property
    def classes(self) -> list[str]:
        """The name of each image's best class."""
        return [self.class_names[number] for number in self.top[:, 0].tolist()]

    @property
    def margin(self) -> Tensor | None:
        """``(images,)`` how far the next module is from the chosen one in what the selection compared.

        That is the next entropy minus the lowest, or the highest task score minus the next; NaN where there is only
        one module, None where the selection compares none.
        """
        if self.entropies is not None:
            compared = -self.entropies
        elif self.task_scores is not None:
            compared = self.task_scores
        else:
            return None
        if compared.shape[1] < 2:
            return torch.full((len(self),), torch.nan)
        best, next_one = compared.topk(2, dim=1).values.unbind(dim=1)
        return best - next_one

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dictionary of plain values for each image, as ``predict.py --json`` prints them, without its file."""
        columns: dict[str, list[Any]] = {
            name: value.tolist()
            for name in ("module", "entropy", "margin", "entropies", "task_scores")
            if (value := getattr(self, name)) is not None
        }
        dicts = []
        for i, (top, shares) in enumerate(zip(self.top.tolist(), self.probabilities.tolist(), strict=True)):
            named = [{"class": self.class_names[n], "probability": p} for n, p in zip(top, shares, strict=True)]
            own = {name: _finite(values[i]) for name, values in columns.items()}
            if self.domains and "module" in own:
                own["domain"] = self.domains[own["module"]] or None
            dicts.append({**named[0], "top": named, "selection": self.selection, **own})
        return dicts

    def __repr__(self) -> str:
        best = zip(self.top[:3, :1], self.probabilities[:3, :1], strict=True)
        first = ", ".join(f"{self.class_names[int(number)]} {float(share):.1%}" for number, share in best)
        more = ", …" if len(self) > 3 else ""
        return f"Predictions({counted(len(self), 'image')}, selection {self.selection}: {first}{more})"

    @staticmethod
    def joined(parts: Sequence["Predictions"]) -> "Predictions":
        """Several as one."""
        first = parts[0]
        columns: dict[str, Any] = {
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            for field in fields(Predictions)
            if isinstance(getattr(first, field.name), Tensor)
        }
        named = {name: getattr(first, name) for name in ("class_names", "selection", "tasks", "domains")}
        return Predictions(**named, **columns)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and value != value else value
