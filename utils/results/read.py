"""The JSON files of runs: found, checked, and of each run the newest alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.config.config import KEYS
from utils.config.methods import METHODS
from utils.errors import ConfigError, UserError
from utils.files import read_json
from utils.results.metrics import new_classes_alone


@dataclass(frozen=True)
class Run:
    """One run's JSON, checked. ``path`` and ``modified`` (seconds) say where it was found and how new it is."""

    values: dict[str, Any]
    path: str = ""
    modified: float = 0.0

    @property
    def seed(self) -> int:
        seed: int = self.values["seed"]
        return seed

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
        if self.values["status"] != "finished":
            return f"unfinished, {self.tasks_done} of {len(self.values['task_sizes'])} tasks"
        return "new classes alone" if new_classes_alone(self.values) else "finished"

    @property
    def tasks_done(self) -> int:
        return max((len(result["top1_curve"]) for result in self.values["results"].values()), default=0)


def read_runs(places: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs in files and, at any depth, folders; and a line for each JSON file that is not one."""
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
        run = Run(read_json(path, "a run's JSON", "correct that or leave it out"), str(path), path.stat().st_mtime)
        _check(run)
    except ConfigError as error:
        raise UserError(str(error).removeprefix(f"{path}: ")) from None
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"not the JSON of a run, or a damaged one ({type(error).__name__}: {error})") from None
    return run


def _check(run: Run) -> None:
    """Look up what reports look up; what is absent, or of another kind, raises one of many errors."""
    values, tasks = run.values, len(run.values["task_sizes"])
    if values["format"] != 1:
        raise ValueError(f"its format is {values['format']!r}, this code reads 1")
    json.dumps([values, run.settings], allow_nan=False)
    sum([*values["task_sizes"], *values["all_task_sizes"], values["seed"], *values.get("cost", {}).values()])
    lengths = {tasks} if values["status"] == "finished" else {run.tasks_done}
    for name, result in values["results"].items():
        curves = np.array([result["top1_curve"], result["top5_curve"]], dtype=float)
        matrix = np.array(result["matrix"], dtype=float)  # None becomes NaN; empty in a long run that goes on
        lengths |= {curves.shape[1], *(matrix.shape if len(matrix) else ())}
        sum([result["average"], result["last"], result["forgetting"] or 0, *values["selection_accuracy"].get(name, [])])
        np.array(values["confusion"].get(name, []), dtype=float)
    if len(lengths) > 1 or max(lengths) > tasks:
        raise ValueError("its curves and matrices do not fit its tasks")


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
