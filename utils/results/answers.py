"""Answers to images as text: a readable table, JSON lines or CSV; and features as one growing ``.npy``."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from utils.config.methods import SELECTIONS
from utils.errors import UserError
from utils.files import json_text, output_file, partial_path, replacing
from utils.results.escape import csv_cell, terminal
from utils.words import fixed, task_place

# One answer: what Predictions.to_dicts gives for an image, and its "file".
Answer = Mapping[str, Any]


class Form:
    """How answers are written.

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
        self.domains = [terminal(domain) for domain in domains]
        self.width = min(24, max(5, *(len(terminal(name)) for name in class_names)))

    def head(self) -> list[str]:
        """The lines before all answers."""
        return []

    def lines(self, answer: Answer) -> list[str]:
        """The lines of one answer."""
        raise NotImplementedError

    def failed(self, file: str, message: str) -> list[str]:
        """The lines in place of an answer, for an image that cannot be read; standard error says it in any case."""
        return []


class AnswerTable(Form):
    """Columns for people: file, class, probability, runners-up, task, entropy and margin; tasks count from 1."""

    def head(self) -> list[str]:
        titles = {"file": "file", "class": "class", "probability": "prob", "top": "runners-up"}
        columns = self._line({**titles, "module": "task", "entropy": "entropy", "margin": "margin"})
        return [f"selection {self.selection}: {SELECTIONS[self.selection].definition}", columns][not self.tasks :]

    def lines(self, answer: Answer) -> list[str]:
        """One line; a second one with what the selection compared."""
        runners = ", ".join(f"{terminal(o['class'])} {o['probability']:.1%}" for o in answer["top"][1:])
        module = answer.get("module")
        texts = {
            "file": terminal(answer["file"]),
            "class": terminal(answer["class"]),
            "probability": f"{answer['probability']:.1%}",
            "top": runners,
            "module": "–" if module is None else self._task(module),
            **{name: _number(answer.get(name)) for name in ("entropy", "margin")},
        }
        return [self._line(texts), *(self._compared(answer) if self.explain else ())]

    def _line(self, texts: Mapping[str, str]) -> str:
        task = max(len("task"), *(len(self._task(task)) for task in range(self.tasks)), 0)
        widths = {"file": -40, "class": -self.width, "probability": 6}
        widths |= {"top": -((self.top_k - 1) * (self.width + 8) - 2)} if self.top_k > 1 else {}
        widths |= {"module": task, "entropy": 7, "margin": 7} if self.tasks else {}
        cells = (texts[name].ljust(-width) if width < 0 else texts[name].rjust(width) for name, width in widths.items())
        return "  ".join(cells).rstrip()

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


def _number(value: float | None) -> str:
    return "–" if value is None else fixed(value, 4)


class JsonLines(Form):
    """One JSON object a line; a file that cannot be read has ``file`` and ``error``. Modules count from 0."""

    def lines(self, answer: Answer) -> list[str]:
        left_out = () if self.explain else ("entropies", "task_scores")
        return [json_text({key: value for key, value in answer.items() if key not in left_out})]

    def failed(self, file: str, message: str) -> list[str]:
        return [json_text({"file": file, "error": message})]


class Csv(Form):
    """One line an image, after a line of names. Modules count from 0."""

    def head(self) -> list[str]:
        runners = [f"{what}_{rank}" for rank in range(2, self.top_k + 1) for what in ("class", "probability")]
        chosen = ["module", "entropy", "margin"] if self.tasks else []
        what = "entropy" if self.selection == "sample" else "score"
        explained = [f"{what}_{module}" for module in range(self.tasks)] if self.explain else []
        return [_csv_line(["file", "class", "probability", *runners, "selection", *chosen, *explained])]

    def lines(self, answer: Answer) -> list[str]:
        top = [value for other in answer["top"] for value in (other["class"], other["probability"])]
        chosen = [answer.get(key) for key in ("module", "entropy", "margin")] if self.tasks else []
        compared = answer.get("entropies" if self.selection == "sample" else "task_scores", [None] * self.tasks)
        return [_csv_line([answer["file"], *top, answer["selection"], *chosen, *(compared if self.explain else ())])]


FORMATS: dict[str, type[Form]] = {"table": AnswerTable, "json": JsonLines, "csv": Csv}


def _csv_line(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(["" if value is None else csv_cell(value) for value in values])
    return text.getvalue()


class FeatureFile:
    """An ``.npy`` of ``(images, dim)`` float32 that grows row by row and has its name only when it is whole.

    Use it as a context manager. A link is followed; only a regular file is replaced.
    """

    def __init__(self, path: Path, dim: int) -> None:
        self.path, self.dim, self.rows = output_file(path, "--features", ".npy"), dim, 0
        self.shown = str(path) if path.absolute() == self.path else f"{path} (a link to {self.path})"
        self._writing = ExitStack()

    def __enter__(self) -> "FeatureFile":
        with self._said():
            self._file: BinaryIO = self._writing.enter_context(replacing(self.path, partial_path(self.path)))
            self._write_header()
        return self

    def _write_header(self) -> None:
        # NumPy pads a header so that the number of rows can grow without moving what follows it
        description = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.dim)}
        np.lib.format.write_array_header_1_0(self._file, description)

    def write(self, features: npt.NDArray[np.float32] | None, there: Sequence[bool]) -> None:
        """Append a row for each of ``there``: the next one of ``features`` where it is true, else NaN."""
        rows = np.full((len(there), self.dim), np.nan, dtype="<f4")
        if features is not None:
            rows[np.asarray(there)] = features
        with self._said():
            self._file.write(rows.tobytes())
        self.rows += len(rows)

    def __exit__(self, *error: Any) -> None:
        with self._said():
            if error[0] is None:
                self._file.seek(0)
                self._write_header()
            self._writing.__exit__(*error)

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--features {self.shown!r} cannot be written ({error.strerror}); give another file"
            ) from error
