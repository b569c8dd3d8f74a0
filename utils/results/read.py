"""The JSON files of runs: found, checked, and of each run the newest alone."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config.config import KEYS
from utils.config.methods import METHODS
from utils.errors import ConfigError, UserError
from utils.files import read_json


@dataclass(frozen=True)
class Run:
    """One run's JSON, checked. ``path`` and ``modified`` (seconds) say where it was found and how new it is."""

    values: dict[str, Any]
    path: str = ""
    modified: float = 0.0

    @property
    def identity(self) -> dict[str, Any]:
        """What the run's numbers depend on: without the keys that its method does not read."""
        identity: dict[str, Any] = self.values["identity"]
        method = METHODS.get(identity["model_name"])
        if method is None:
            return identity
        ignored = {key.identity_name for key in KEYS.values() if method.ignores(key)}
        return {name: value for name, value in identity.items() if name not in ignored}

    @property
    def settings(self) -> dict[str, Any]:
        """The identity without the seed: runs that agree in it, and in it alone, are averaged."""
        settings = {key: value for key, value in self.identity.items() if key != "seed"}
        if "augment_seed" in settings and self.values["config"]["augment_seed"] is None:
            settings["augment_seed"] = "as seed"
        return {**settings, "tasks": len(self.values["task_sizes"]), "status": self.status}

    @property
    def status(self) -> str:
        total = len(self.values["task_sizes"])
        return "finished" if self.finished else f"unfinished, {self.tasks_done} of {total} tasks"

    @property
    def finished(self) -> bool:
        return bool(self.values["status"] == "finished")

    @property
    def tasks_done(self) -> int:
        return max((len(result["top1_curve"]) for result in self.values["results"].values()), default=0)


def read_runs(places: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs in files and, at any depth, folders; and a line for each JSON file that is not one.

    Raises:
        UserError: a place does not exist, or there is no readable run in any.
    """
    runs, skipped = [], []
    for path in _json_files(places):
        try:
            runs.append(_read_run(path))
        except UserError as error:
            skipped.append(f"skipped {path}: {error}")
    if not runs:
        where = ", ".join(map(str, places))
        raise UserError("; ".join([f"no readable JSON of a run in {where}", *skipped]))
    return runs, skipped


def _json_files(places: Sequence[Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for place in places:
        if not place.exists():
            raise UserError(f"{place} does not exist; give the folder or the JSON files of some runs")
        files = sorted(p for p in place.rglob("*.json") if p.is_file()) if place.is_dir() else [place]
        found.update((path.resolve(), path) for path in files if not path.name.startswith("."))
    return list(found.values())


def _read_run(path: Path) -> Run:
    try:
        values = read_json(path, "a run's JSON", "correct that or leave it out")
    except ConfigError as error:
        raise UserError(str(error).removeprefix(f"{path}: ")) from None
    try:
        fault = _fault(values)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        fault = f"not the JSON of a run ({type(error).__name__}: {error})"
    if fault:
        raise UserError(fault)
    return Run(values, str(path), path.stat().st_mtime)


def _fault(run: dict[str, Any]) -> str | None:
    """What keeps a file from being a run's JSON; anything of another shape may also raise."""
    if absent := [k for k in ("format", "status", "identity", "results", "task_sizes", "data") if k not in run]:
        return f"not the JSON of a run: no {absent[0]!r}"
    if run["format"] != 1:
        return f"its format is {run['format']!r}, this code reads 1"
    identity, tasks = run["identity"], len(run["task_sizes"])
    keys = (identity["dataset"], identity["model_name"], identity["weights_sha256"], run["backbone"]["name"])
    if not all(isinstance(value, str) for value in keys):
        return "its identity is damaged"
    steps = () if identity["scenario"] == "domain" else (identity["init_cls"], identity["increment"])
    if not all(isinstance(v, int) for v in (*steps, run["seed"], tasks)):
        return "its identity is damaged"
    data = run["data"]
    if not all(isinstance(data[k], int) for k in ("classes", "train_images", "test_images")):
        return "its data counts are damaged"
    canonical([identity["scenario"], run["continual"], run["config"]["augment_seed"], data["images_sha256"]])
    chosen = run["selection_accuracy"]
    if not all(math.isfinite(number) for number in _numbers(list({**run.get("cost", {})}.values()))):
        return "its cost is not a number"
    lengths = {len(result["top1_curve"]) for result in run["results"].values()}
    if len(lengths) > 1 or max(lengths, default=0) > tasks:
        return "its curves have different lengths"
    for name, result in run["results"].items():
        parts = [result[k] for k in ("top1_curve", "top5_curve", "average", "last", "forgetting", "matrix")]
        pictures = [run["confusion"].get(name), run["entropy"].get(name), run["sparsity"]]
        if not all(math.isfinite(n) for n in _numbers([parts, pictures, chosen.get(name)])):
            return f"a result of {name!r} is not a number"
        left_out = result["matrix"] == [] and run["status"] != "finished"  # of a long run that goes on
        if not left_out and {len(row) for row in [result["matrix"], *result["matrix"]]} != lengths:
            return f"the matrix of {name!r} is not square"
    if run["status"] == "finished" and lengths != {tasks}:
        return "it says finished, but results are missing"
    return None


def _numbers(nested: Any) -> Iterator[float]:
    """The numbers in nested lists and objects; None stands for what is undefined."""
    if isinstance(nested, dict):
        nested = list(nested.values())
    if isinstance(nested, list):
        for item in nested:
            yield from _numbers(item)
    elif nested is not None:
        yield 0.0 + nested


def newest_of_each(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Of runs with the same identity the newest alone, and a line for each that does not count."""
    counted: dict[str, Run] = {}
    notes = []
    for run in sorted(runs, key=lambda run: run.modified, reverse=True):
        kept = counted.setdefault(canonical(run.identity), run)
        if kept is not run:
            notes.append(f"{run.path} is not counted: {kept.path} is a newer run with the same settings and seed")
    return list(counted.values()), notes


def canonical(value: Any) -> str:
    """JSON text that equal values share."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
