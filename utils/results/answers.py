"""Answers to images as text: a readable table, JSON lines or CSV; and features as one growing ``.npy``."""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from utils.config.methods import SELECTIONS
from utils.errors import UserError
from utils.files import json_text, output_file, partial_path
from utils.results.escape import csv_cell, terminal
from utils.words import fixed, task_place

# One answer: what Predictions.to_dicts gives for an image, and its "file".
Answer = Mapping[str, Any]


class Form(Protocol):
    """How answers are written."""

    def head(self) -> list[str]:
        """The lines before all answers."""

    def lines(self, answer: Answer) -> list[str]:
        """The lines of one answer."""

    def failed(self, file: str, message: str) -> list[str]:
        """The lines in place of an answer, for an image that cannot be read."""


class Table:
    """Columns for people: file, class, probability, runners-up, task, entropy and margin; tasks count from 1.

    Args:
        class_names: all that there are.
        top_k: classes to name for each image.
        tasks: modules, or 0 for a method without.
        selection: how the module is chosen.
        explain: also show what the selection compared.
        domains: the domain of each task, of a domain-incremental run.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        top_k: int,
        tasks: int,
        selection: str,
        explain: bool,
        domains: Sequence[str] = (),
    ) -> None:
        self.top_k, self.tasks, self.selection, self.explain = top_k, tasks, selection, explain
        self.width = min(24, max(5, *(len(terminal(name)) for name in class_names)))
        self.domains = [terminal(domain) for domain in domains]
        self.task_width = max(len("task"), *(len(self._task(task)) for task in range(tasks)), 0)

    def head(self) -> list[str]:
        """How the module is chosen, then the names of the columns."""
        runners = f"  {'runners-up':{self._runners_width}}" if self.top_k > 1 else ""
        modules = f"  {'task':>{self.task_width}}  {'entropy':>7}  {'margin':>7}" if self.tasks else ""
        columns = f"{'file':40}  {'class':{self.width}}  {'prob':>6}{runners}{modules}".rstrip()
        return [f"selection {self.selection}: {SELECTIONS[self.selection].definition}", columns][not self.tasks :]

    @property
    def _runners_width(self) -> int:
        return (self.top_k - 1) * (self.width + 8) - 2

    def lines(self, answer: Answer) -> list[str]:
        """One line; a second one with what the selection compared."""
        name = terminal(answer["class"])
        line = f"{terminal(answer['file']):40}  {name:{self.width}}  {answer['probability']:6.1%}"
        if self.top_k > 1:
            runners = ", ".join(f"{terminal(o['class'])} {o['probability']:.1%}" for o in answer["top"][1:])
            line += f"  {runners:{self._runners_width}}"
        if self.tasks:
            task = self._task(answer["module"]) if answer.get("module") is not None else "–"
            line += f"  {task:>{self.task_width}}  {_number(answer.get('entropy'))}  {_number(answer.get('margin'))}"
        return [line.rstrip(), *self._compared(answer)] if self.explain else [line.rstrip()]

    def _task(self, task: int) -> str:
        return task_place(task, self.tasks, self.domains)

    def _compared(self, answer: Answer) -> list[str]:
        lines = []
        for key, what in (("entropies", "entropy by task"), ("task_scores", f"{self.selection} score by task")):
            if key in answer:
                names = self.domains or [""] * len(answer[key])
                of_task = enumerate(zip(names, answer[key], strict=True), start=1)
                shown = (f"{name or number}: {fixed(value, 4)}" for number, (name, value) in of_task)
                lines.append(f"    {what}  {'  '.join(shown)}")
        return lines

    def failed(self, file: str, message: str) -> list[str]:
        """Nothing: standard error says it."""
        return []


def _number(value: float | None) -> str:
    return f"{'–' if value is None else fixed(value, 4):>7}"


class JsonLines:
    """One JSON object a line; a file that cannot be read has ``file`` and ``error``. Modules count from 0."""

    def __init__(self, class_names: Sequence[str], *, explain: bool, **_: object) -> None:
        self.left_out = () if explain else ("entropies", "task_scores")

    def head(self) -> list[str]:
        """Nothing."""
        return []

    def lines(self, answer: Answer) -> list[str]:
        """One line."""
        return [json_text({key: value for key, value in answer.items() if key not in self.left_out})]

    def failed(self, file: str, message: str) -> list[str]:
        """One line."""
        return [json_text({"file": file, "error": message})]


class Csv:
    """One line an image, after a line of names. Modules count from 0."""

    def __init__(
        self, class_names: Sequence[str], *, top_k: int, tasks: int, selection: str, explain: bool, **_: object
    ) -> None:
        self.top_k, self.tasks, self.explain = top_k, tasks, explain
        self.compared = "entropies" if selection == "sample" else "task_scores"

    def head(self) -> list[str]:
        """The names of the columns."""
        runners = [f"{what}_{rank}" for rank in range(2, self.top_k + 1) for what in ("class", "probability")]
        chosen = ["module", "entropy", "margin"] if self.tasks else []
        what = "entropy" if self.compared == "entropies" else "score"
        explained = [f"{what}_{module}" for module in range(self.tasks)] if self.explain else []
        return [_csv_line(["file", "class", "probability", *runners, "selection", *chosen, *explained])]

    def lines(self, answer: Answer) -> list[str]:
        """One line."""
        top = [value for other in answer["top"] for value in (other["class"], other["probability"])]
        chosen = [answer.get(key) for key in ("module", "entropy", "margin")] if self.tasks else []
        explained = answer.get(self.compared, [None] * self.tasks) if self.explain and self.tasks else []
        return [_csv_line([answer["file"], *top, answer["selection"], *chosen, *explained])]

    def failed(self, file: str, message: str) -> list[str]:
        """Nothing: standard error says it."""
        return []


FORMATS: dict[str, Callable[..., Form]] = {"table": Table, "json": JsonLines, "csv": Csv}


def _csv_line(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(["" if value is None else csv_cell(value) for value in values])
    return text.getvalue()


class FeatureFile:
    """An ``.npy`` of ``(images, dim)`` float32 that grows row by row and has its name only when it is whole.

    Use it as a context manager. A link is followed; only a regular file is replaced.

    Raises:
        UserError: it cannot be written, or a device, a pipe or a folder has its name.
    """

    def __init__(self, path: Path, dim: int) -> None:
        self.path, self.dim, self.rows = output_file(path, "--features"), dim, 0
        self._partial = partial_path(self.path)

    def __enter__(self) -> "FeatureFile":
        try:
            self._file: BinaryIO = open(self._partial, "wb")
            self._write_header()
        except OSError as error:
            raise self._cannot(error) from error
        return self

    def _write_header(self) -> None:
        # NumPy pads a header so that the number of rows can grow without moving what follows it
        description = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.dim)}
        np.lib.format.write_array_header_1_0(self._file, description)

    def write(self, features: npt.NDArray[np.float32]) -> None:
        """Append ``(images, dim)``."""
        try:
            self._file.write(features.astype("<f4").tobytes())
        except OSError as error:
            raise self._cannot(error) from error
        self.rows += len(features)

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.seek(0)
                self._write_header()
                self._file.close()
                os.replace(self._partial, self.path)
        except OSError as error:
            raise self._cannot(error) from error
        finally:
            with suppress(OSError):  # what it still holds cannot be written either
                self._file.close()
            self._partial.unlink(missing_ok=True)

    def _cannot(self, error: OSError) -> UserError:
        return UserError(f"--features {str(self.path)!r} cannot be written ({error.strerror}); give another file")
