"""Runs of the paper's protocols beside the numbers that were published for them, each judged: did it come out?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.config.config import Config, make_config
from utils.config.keys import BACKBONE_ALIASES
from utils.config.methods import ROOT
from utils.errors import ConfigError, UserError
from utils.files import read_json
from utils.results.metrics import MeanStd, over_seeds, selection_name
from utils.results.read import Run
from utils.results.render import Cell, Table, number_text, signed

PUBLISHED = ROOT / "exps" / "published.json"
# what may differ from the published run: other seeds are averaged, and these leave the protocol as it is
_FREE = ("seed", "data_path", "backbone_weights", "precision", "augment_seed", "train_views")
_JUDGED = (
    "Within: the mean here and the published number are not farther apart than the reading error plus two standard "
    "deviations over the seeds here; a single seed has no spread, so the reading error alone counts then.",
    "sample, which looks at one image at a time, was not published: it stands beside batch and is not judged.",
)


@dataclass(frozen=True)
class Entry:
    """What was published for a method on a data set, and the runs here that followed the same protocol.

    Attributes:
        curve: top-1 accuracy after each task in percent, or the last one alone.
        errors: of reading each point of it.
        runs: one for each seed.
    """

    data_set: str
    method: str
    curve: np.ndarray
    errors: np.ndarray
    selection: str
    runs: tuple[Run, ...]

    @property
    def selections(self) -> list[str]:
        """The published way to answer and ``sample``; a method without modules has ``sample`` alone."""
        names = set.intersection(*(set(run.values["results"]) for run in self.runs)) if self.runs else {self.selection}
        return [name for name in dict.fromkeys((self.selection, "sample")) if name in names]

    def here(self, selection: str, measure: str) -> MeanStd | None:
        """``average`` or ``last`` over the seeds here."""
        return over_seeds([run.values["results"][selection][measure] for run in self.runs])

    def cells(self, selection: str, measure: str) -> Iterator[str]:
        """Published, here, difference, verdict."""
        known = selection == self.selection and (measure == "last" or len(self.curve) > 1)
        place = slice(-1, None) if measure == "last" else slice(None)
        published, error = float(self.curve[place].mean()), float(self.errors[place].mean())
        here = self.here(selection, measure) if self.runs else None
        yield signed(published, 1) if known else "–"
        yield number_text(here) if here else "not yet"
        if not known or here is None:
            yield from ("–", "–")
            return
        difference, allowed = here.mean - published, error + 2 * here.std
        yield signed(difference)
        yield f"{'within' if abs(difference) <= allowed else 'outside'} ±{allowed:.2f}"

    def rows(self) -> Iterator[tuple[Cell, ...]]:
        """One for each selection."""
        labels = [self.data_set, self.method]
        for name in self.selections:
            shown = selection_name(name) if self.method == "tosca" else "–"
            numbers = [text for measure in ("average", "last") for text in self.cells(name, measure)]
            yield tuple(map(Cell, [*labels, shown, *numbers, str(len(self.runs))]))
            labels = ["", ""]


def read_published(path: Path) -> dict[str, Any]:
    """The published numbers and their protocol, from a file such as ``exps/published.json``."""
    values: dict[str, Any] = read_json(path, "published numbers")
    if absent := {"source", "what", "reading_error", "selection", "protocol", "data_sets", "top1_curve"} - {*values}:
        raise UserError(f"{path} is not a file of published numbers: no {sorted(absent)[0]!r}; see {PUBLISHED}")
    return values


def published_table(runs: Sequence[Run], published: Mapping[str, Any]) -> tuple[Table, list[Entry]]:
    """The table of all that was published, and its entries; runs that do not count are named below it."""
    notes = [f"Published: {published['source']}, {published['what']}.", *_JUDGED]
    entries = list(_entries(runs, published, notes))
    measured = [f"{name} {of}" for name in ("Ā", "A_T") for of in ("published", "here", "difference", "verdict")]
    rows = tuple(row for entry in entries for row in entry.rows())
    header = ("data set", "method", "answer", *measured, "seeds")
    return Table("published", "Published numbers and those here", header, 3, rows, tuple(notes)), entries


def _entries(runs: Sequence[Run], published: Mapping[str, Any], notes: list[str]) -> Iterator[Entry]:
    """What was published, each with its runs; a line for each run that is left out is added to ``notes``."""
    first, others = (published["reading_error"][name] for name in ("first_point", "other_points"))
    last = {method: {data: [value] for data, value in of.items()} for method, of in published["last_accuracy"].items()}
    for data_set, facts in published["data_sets"].items():
        for method, curves in {**published["top1_curve"], **last}.items():
            if data_set not in curves:
                continue
            curve = np.array(curves[data_set], dtype=float)
            errors = np.full(len(curve), float(others))
            errors[0] = first if len(curve) > 1 else others
            counted: dict[int, Run] = {}
            for run in runs:
                if (run.identity["dataset"], run.identity["model_name"]) == (data_set, method):
                    if differences := _differences(run, method, data_set, facts, published):
                        notes.append(f"{run.path} is left out: {'; '.join(differences)}.")
                    else:
                        counted.setdefault(run.seed, run)
                        if weights := run.values["config"]["backbone_weights"]:
                            notes.append(f"{run.path}: its weights are those of {weights}, whatever that file holds.")
            selection = published["selection"] if method == "tosca" else "sample"
            of_seeds = tuple(counted[seed] for seed in sorted(counted))
            yield Entry(data_set, method, curve, errors, selection, of_seeds)


def _differences(
    run: Run, method: str, data_set: str, facts: Mapping[str, Any], published: Mapping[str, Any]
) -> list[str]:
    """In what the run differs from the published protocol, in words; keys that its method ignores do not count."""
    if run.status != "finished":
        return [run.status]
    required = published.get("requires", {}).get(method)
    steps = {name: facts[name] for name in ("init_cls", "increment")}
    try:
        here = make_config(run.values["config"])
        there = make_config({"dataset": data_set, "model_name": method, **steps, **published["protocol"]})
    except ConfigError as error:
        return [str(error)]
    values, wanted = _counting(here, required), _counting(there, required)
    values["images"] = [run.values["data"][name] for name in ("train_images", "test_images")]
    wanted["images"] = facts["images"]
    found = [f"{k} {values[k]!r}, published {wanted[k]!r}" for k in values if values[k] != wanted[k]]
    if required and not run.values["config"].get(required):
        found.append(f"the published {method} adapts the backbone first ({required}), this one does not")
    return found


def _counting(config: Config, required: str | None) -> dict[str, Any]:
    """The values of a config that a published number depends on."""
    values, keys = config.as_dict(), config.keys.items()
    counting = [n for n, key in keys if key.changes_the_run and not config.method.ignores(key) and n not in _FREE]
    found = {name: values[name] for name in counting if name != required}
    if config.method.augmented:
        found["train_views"] = config.views
    return {**found, "backbone_type": BACKBONE_ALIASES.get(config.backbone_type, config.backbone_type)}
