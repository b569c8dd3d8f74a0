"""Runs of the paper's protocols beside the numbers that were published for them, each judged: did it come out?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config.config import Config, make_config
from utils.config.methods import ROOT
from utils.errors import ConfigError, UserError
from utils.files import read_json
from utils.results.metrics import over_seeds, selection_name
from utils.results.read import Run
from utils.results.render import Cell, Table, number_text, signed

PUBLISHED = ROOT / "exps" / "published.json"
# what may differ from the published run: other seeds are averaged, and these leave the protocol as it is
_FREE = ("seed", "data_path", "backbone_weights", "precision", "augment_seed", "train_views")
_JUDGED = (
    "Within: the mean here and the published number are not farther apart than the reading error plus two standard "
    "deviations over the seeds here; a single seed has no spread, so the reading error alone counts then.",
    "sample, which looks at one image at a time, was not published: it stands beside batch and is not judged.",
    "Weights from a file (backbone_weights) are taken for those that backbone_type names.",
)


@dataclass(frozen=True)
class Entry:
    """What was published for a method on a data set, and the runs here that followed the same protocol.

    Attributes:
        curve: top-1 accuracy after each task in percent, or the last one alone.
        error: of reading a point of it, and the first one of several.
        selection: by which it was evaluated.
        runs: one for each seed.
    """

    data_set: str
    method: str
    curve: list[float]
    error: tuple[float, float]
    selection: str
    runs: list[Run]

    @property
    def selections(self) -> list[str]:
        """The published way to answer, then ``sample``."""
        return list(dict.fromkeys((self.selection, "sample")))

    def cells(self, selection: str, measure: str) -> list[str]:
        """Published, here, difference and verdict, of ``average`` or ``last``."""
        curve = self.curve[-1:] if measure == "last" else self.curve
        first, other = self.error if len(curve) > 1 else self.error[:1] * 2
        number = over_seeds([run.values["results"][selection][measure] for run in self.runs])
        here = number_text(number) if number else "not yet"
        if selection != self.selection or (measure == "average" and len(curve) == 1):
            return ["–", here, "–", "–"]
        published = sum(curve) / len(curve)
        texts = [signed(published, 1), here, "–", "–"]
        if number:
            difference, allowed = number.mean - published, first + (other - first) / len(curve) + 2 * number.std
            verdict = "within" if abs(difference) <= allowed else "outside"
            texts[2:] = [signed(difference), f"{verdict} ±{allowed:.2f}"]
        return texts


def read_published(path: Path) -> dict[str, Any]:
    """The published numbers and their protocol, from a file such as ``exps/published.json``."""
    values: dict[str, Any] = read_json(path, "published numbers")
    if "top1_curve" not in values:
        raise UserError(f"{path} is not a file of published numbers; {PUBLISHED} is one")
    return values


def published_table(runs: Sequence[Run], published: Mapping[str, Any]) -> tuple[Table, list[Entry]]:
    """The table of all that was published, and its entries; runs that do not count are named below it."""
    notes = [f"Published: {published['source']}, {published['what']}.", *_JUDGED]
    entries = list(_entries(runs, published, notes))
    rows: list[tuple[Cell, ...]] = []
    for entry in entries:
        for name in entry.selections:
            labels = [entry.data_set, entry.method] if name == entry.selection else ["", ""]
            shown = selection_name(name) if entry.selection != "sample" else "–"
            numbers = [*entry.cells(name, "average"), *entry.cells(name, "last"), str(len(entry.runs))]
            rows.append(tuple(map(Cell, [*labels, shown, *numbers])))
    measured = [f"{name} {of}" for name in ("Ā", "A_T") for of in ("published", "here", "difference", "verdict")]
    header = ("data set", "method", "answer", *measured, "seeds")
    return Table("published", "Published numbers and those here", header, 3, tuple(rows), tuple(notes)), entries


def _entries(runs: Sequence[Run], published: Mapping[str, Any], notes: list[str]) -> Iterator[Entry]:
    """What was published, each with its runs; a line for each run that is left out is added to ``notes``."""
    for data_set in published["data_sets"]:
        for method, curves in published["top1_curve"].items():
            if data_set in curves:
                counted: dict[int, Run] = {}
                for run in runs:
                    if (run.identity["dataset"], run.identity["model_name"]) == (data_set, method):
                        if differences := _differences(run, published):
                            notes.append(f"{run.path} is left out: {'; '.join(differences)}.")
                        else:
                            counted.setdefault(run.seed, run)
                error = published["reading_error"]["point"], published["reading_error"]["first_of_several"]
                selection = published["selection"] if method == "tosca" else "sample"
                yield Entry(data_set, method, curves[data_set], error, selection, list(counted.values()))


def _differences(run: Run, published: Mapping[str, Any]) -> list[str]:
    """In what the run differs from the published protocol, in words; keys that its method ignores do not count."""
    config, method = run.values["config"], run.identity["model_name"]
    facts = published["data_sets"][config["dataset"]]
    protocol = {"dataset": config["dataset"], "model_name": method, **published["protocol"], **facts["split"]}
    protocol |= {**facts.get("first_session", {}), **published["method"].get(method, {})}
    try:
        values, wanted = _counting(make_config(config)), _counting(make_config(protocol))
    except ConfigError as error:
        return [str(error)]
    values |= {"images": [run.values["data"][n] for n in ("train_images", "test_images")], "status": run.status}
    wanted |= {"images": facts["images"], "status": "finished"}
    return [f"{k} {values.get(k)!r}, published {v!r}" for k, v in wanted.items() if values.get(k) != v]


def _counting(config: Config) -> dict[str, Any]:
    """The values of a config that a published number depends on."""
    values, keys = config.as_dict(), config.keys.items()
    counting = [n for n, key in keys if key.changes_the_run and not config.method.ignores(key) and n not in _FREE]
    views = {"views": config.views} if config.method.augmented else {}
    return {**{name: values[name] for name in counting}, **views, "backbone_type": config.backbone_name}
