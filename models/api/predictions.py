"""The answers to some images: tensors for programs, a table for a notebook, plain values for everything else."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from models.api.pickling import maker
from utils.words import counted, task_place

SHOWN_IMAGES = 20  # rows of the table in a notebook
SHOWN_CLASSES = 3  # classes in each of its rows


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

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row an image: class, probability, the runners-up, and the module's columns.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas  # type: ignore[import-untyped,unused-ignore]
        except ImportError:
            raise ImportError("to_dataframe needs pandas: pip install pandas (to_dicts needs nothing)") from None
        rows = []
        for answer in self.to_dicts():
            row = {"class": answer["class"], "probability": answer["probability"]}
            for rank, other in enumerate(answer["top"][1:], start=2):
                row |= {f"class_{rank}": other["class"], f"probability_{rank}": other["probability"]}
            row["selection"] = answer["selection"]
            row |= {name: answer[name] for name in ("module", "entropy", "margin") if name in answer}
            rows.append(row)
        return pandas.DataFrame(rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return maker(Predictions, "predictions"), tuple(getattr(self, field.name) for field in fields(self))

    def __repr__(self) -> str:
        first = ", ".join(f"{name} {share:.1%}" for name, share in self._best()[:3])
        more = ", …" if len(self) > 3 else ""
        return f"Predictions({counted(len(self), 'image')}, selection {self.selection}: {first}{more})"

    def _best(self) -> list[tuple[str, float]]:
        return list(zip(self.classes, self.probabilities[:, 0].tolist(), strict=True)) if len(self) else []

    def _repr_html_(self) -> str:
        """A table for a notebook; tasks are counted from 1."""
        runners = min(SHOWN_CLASSES, self.top.shape[1]) - 1
        titles = ["", "class", "probability"]
        titles += ["runners-up"] if runners > 0 else []
        titles += ["task"] if self.module is not None else []
        rows = []
        for number, answer in enumerate(self.to_dicts()[:SHOWN_IMAGES]):
            cells = [str(number), answer["class"], f"{answer['probability']:.1%}"]
            if runners > 0:
                others = answer["top"][1 : 1 + runners]
                cells.append(", ".join(f"{other['class']} {other['probability']:.1%}" for other in others))
            if self.module is not None:
                cells.append(task_place(answer["module"], self.tasks, self.domains))
            rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
        head = "".join(f"<th>{title}</th>" for title in titles)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        rest = len(self) - len(rows)
        caption = f"{counted(len(self), 'image')}, selection {html.escape(self.selection)}" + (
            f"; {rest} not shown" if rest else ""
        )
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

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
