"""Answers to images as text: a readable table, JSON lines or CSV; and features as one growing ``.npy``."""

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from utils.errors import UserError

# One answer: file, class, probability, top [(class, probability)], module, entropy, margin, entropies. The last four
# are None for a method without modules.
Answer = dict[str, Any]


class Table:
    """Columns for people: file, class, probability, runners-up, module, entropy and margin in nats."""

    def __init__(self, class_names: Sequence[str], *, top_k: int, modules: int, explain: bool) -> None:
        self.top_k, self.modules, self.explain = top_k, modules, explain
        self.width = min(24, max(5, *(len(name) for name in class_names)))

    def head(self) -> list[str]:
        runners = f"  {'runners-up':{self._runners_width}}" if self.top_k > 1 else ""
        modules = f"  {'module':>6}  {'entropy':>7}  {'margin':>7}" if self.modules else ""
        return [f"{'file':40}  {'class':{self.width}}  {'prob':>6}{runners}{modules}".rstrip()]

    @property
    def _runners_width(self) -> int:
        return (self.top_k - 1) * (self.width + 8) - 2

    def lines(self, answer: Answer) -> list[str]:
        line = f"{_printable(answer['file']):40}  {answer['class']:{self.width}}  {answer['probability']:6.1%}"
        if self.top_k > 1:
            runners = ", ".join(f"{name} {share:.1%}" for name, share in answer["top"][1:])
            line += f"  {runners:{self._runners_width}}"
        if self.modules:
            margin = "–" if answer["margin"] is None else f"{answer['margin']:.4f}"
            line += f"  {answer['module']:6d}  {answer['entropy']:7.4f}  {margin:>7}"
        lines = [line.rstrip()]
        if self.explain and self.modules:
            shown = (f"{module}: {value:.4f}" for module, value in enumerate(answer["entropies"]))
            lines.append(f"    entropy by module  {'  '.join(shown)}")
        return lines

    def failed(self, file: str, message: str) -> list[str]:
        return []


class JsonLines:
    """One JSON object a line; a file that cannot be read has ``file`` and ``error``."""

    def __init__(self, class_names: Sequence[str], *, top_k: int, modules: int, explain: bool) -> None:
        self.modules, self.explain = modules, explain

    def head(self) -> list[str]:
        return []

    def lines(self, answer: Answer) -> list[str]:
        top = [{"class": name, "probability": share} for name, share in answer["top"]]
        values = {k: answer[k] for k in ("file", "class", "probability")} | {"top": top}
        if self.modules:
            values |= {k: answer[k] for k in ("module", "entropy", "margin")}
            if self.explain:
                values["entropies"] = answer["entropies"]
        return [json.dumps(values, ensure_ascii=False)]

    def failed(self, file: str, message: str) -> list[str]:
        return [json.dumps({"file": file, "error": message}, ensure_ascii=False)]


class Csv:
    """One line an image, after a line of names."""

    def __init__(self, class_names: Sequence[str], *, top_k: int, modules: int, explain: bool) -> None:
        self.top_k, self.modules, self.explain = top_k, modules, explain

    def head(self) -> list[str]:
        runners = [f"{what}_{rank}" for rank in range(2, self.top_k + 1) for what in ("class", "probability")]
        chosen = ["module", "entropy", "margin"] if self.modules else []
        explained = [f"entropy_{module}" for module in range(self.modules)] if self.explain else []
        return [_csv_line(["file", "class", "probability", *runners, *chosen, *explained])]

    def lines(self, answer: Answer) -> list[str]:
        top = [value for name, share in answer["top"] for value in (name, share)]
        chosen = [answer[k] for k in ("module", "entropy", "margin")] if self.modules else []
        explained = answer["entropies"] if self.explain and self.modules else []
        return [_csv_line([answer["file"], *top, *chosen, *explained])]

    def failed(self, file: str, message: str) -> list[str]:
        return []


FORMATS = {"table": Table, "json": JsonLines, "csv": Csv}


def _csv_line(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(["" if value is None else value for value in values])
    return text.getvalue()


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


class FeatureFile:
    """An ``.npy`` of ``(images, dim)`` float32 that grows row by row and has its name only when it is whole.

    Use it as a context manager.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, path: Path, dim: int) -> None:
        self.path, self.dim, self.rows = path, dim, 0
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")

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

    def write(self, features: np.ndarray) -> None:
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
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def _cannot(self, error: OSError) -> UserError:
        return UserError(f"--features {str(self.path)!r} cannot be written ({error.strerror}); give another file")
