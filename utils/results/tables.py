"""Runs -> groups of comparable runs -> rows of mean ± std over seeds. ``utils.results.render`` writes them down."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from utils.config.methods import FLOWS, METHODS
from utils.results.cells import Cell, MeanStd, Row, Selections, Table, interval_text, number_text, significant_text
from utils.results.cost import AS_PUBLISHED, COLUMNS, PUBLISHED_COLUMNS
from utils.results.escape import plain_name
from utils.results.metrics import GLOSSARY, SELECTION_NAMES, mean_std, selection_name
from utils.results.read import Run, canonical
from utils.results.statistics import half_width

# shown in the title of a section or in columns of their own
_SHOWN_ELSEWHERE = {
    *("dataset", "scenario", "init_cls", "increment", "model_name", "flow", "status"),
    *("weights_sha256", "images_sha256"),
}
MEASURES = {"average": "Ā", "last": "A_T", "forgetting": "forgetting", "selecting": "selection accuracy"}


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        labels: column -> text, the columns of its section.
    """

    runs: tuple[Run, ...]
    labels: dict[str, str]

    @property
    def seeds(self) -> list[int]:
        return [run.values["seed"] for run in self.runs]

    @property
    def finished(self) -> bool:
        return self.runs[0].finished

    @property
    def name(self) -> str:
        """For legends: ``tosca (tosca_r, l1=0.001)``; a run that is not finished says so."""
        flow = [self.labels["flow"]] if self.labels.get("flow", "–") != "–" else []
        others = [f"{k}={v}" for k, v in self.labels.items() if k not in ("method", "flow", "status") and v != "–"]
        others += [] if self.finished else [self.runs[0].status]
        return self.labels["method"] + (f" ({', '.join(flow + others)})" if flow or others else "")

    @property
    def key(self) -> str:
        """For file names: the method, its flow and a hash of every setting, whatever other runs there are."""
        run = self.runs[0]
        words = [run.identity["model_name"], *([str(run.identity["flow"])] if "flow" in run.identity else [])]
        return f"{plain_name('-'.join(words))}-{_short(comparable_settings(run))}"

    @property
    def selections(self) -> list[str]:
        """The selections that every run has, in the order of ``SELECTION_NAMES``."""
        common = set.intersection(*(set(run.values["results"]) for run in self.runs))
        return [name for name in SELECTION_NAMES if name in common] + sorted(common - SELECTION_NAMES.keys())

    def number(self, selection: str, measure: str) -> MeanStd | None:
        """Return the mean over seeds of one of ``MEASURES`` under one selection; None where a run lacks it."""
        return summarise([_measured(run, selection, measure) for run in self.runs])

    def by_seed(self, selection: str, measure: str) -> dict[int, float]:
        """Return the value of each seed that has one."""
        values = {run.values["seed"]: _measured(run, selection, measure) for run in self.runs}
        return {seed: value for seed, value in values.items() if value is not None}


def _measured(run: Run, selection: str, measure: str) -> float | None:
    """``average``, ``last``, ``forgetting`` or ``selecting`` (after the last task) under one selection."""
    if measure == "selecting":
        chosen: list[float] | None = run.values["selection_accuracy"].get(selection)
        return chosen[-1] if chosen else None
    value: float | None = run.values["results"][selection][measure]
    return value


def summarise(values: Sequence[float | None]) -> MeanStd | None:
    """Return mean, deviation and interval of one value for each seed; None if any is absent."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    return MeanStd(*mean_std(known), len(known), half_width(known))


@dataclass(frozen=True)
class Section:
    """The groups of one data set and split.

    Attributes:
        key: for file names, such as ``cub-10-10``.
        short_title: for the head of a column, such as ``cub 10-10``.
        columns: the label columns: method, flow, and whatever else differs between the groups.
        notes: what a reader must know, a line each.
    """

    key: str
    title: str
    short_title: str
    columns: tuple[str, ...]
    groups: tuple[Group, ...]
    notes: tuple[str, ...]

    def rows(self, selections: Selections = None) -> list[tuple[Group, str, dict[str, MeanStd | None]]]:
        """Return a row for each group and selection (by default all that it has), with its measures."""
        return [
            (group, name, {measure: group.number(name, measure) for measure in MEASURES})
            for group in self.groups
            for name in group.selections
            if selections is None or name in selections
        ]

    def table(self, selections: Selections = None) -> Table:
        """Return what the formats show; a group's labels stand in its first row alone."""
        with_interval = any(len(group.runs) > 1 for group in self.groups)
        rows: list[Row] = []
        before = None
        for group, selection, numbers in self.rows(selections):
            first = group is not before
            texts = [group.labels[column] if first else "" for column in self.columns]
            texts += [selection_name(selection), *map(number_text, numbers.values()), str(len(group.runs))]
            texts += [interval_text(numbers["last"])] if with_interval else []
            rows.append(Row(tuple(map(Cell, texts)), first))
            before = group
        header = (*self.columns, "selection", *MEASURES.values(), "seeds", *(["95 % of A_T"] if with_interval else []))
        return Table(self.key, self.title, header, len(self.columns) + 1, tuple(rows), self.notes)


# -- grouping ---------------------------------------------------------------------------------------------------------


def make_sections(runs: Sequence[Run]) -> tuple[list[Section], list[str]]:
    """One section for each data set and split; and a line for each run without any result yet."""
    notes = [f"{run.path} is unfinished, no task is done yet" for run in runs if not run.tasks_done]
    ordered = sorted((run for run in runs if run.tasks_done), key=_place)
    return [_section(list(members)) for _, members in groupby(ordered, key=lambda run: _place(run)[:4])], notes


def _place(run: Run) -> tuple[Any, ...]:
    """Where a run stands: by data set, split, method, flow, then everything else, then seed."""
    i = run.identity
    method = list(METHODS).index(i["model_name"]) if i["model_name"] in METHODS else len(METHODS)
    flow = FLOWS.index(i["flow"]) if i.get("flow") in FLOWS else len(FLOWS)
    others = tuple((key, _order(run.settings[key])) for key in sorted(run.settings))
    split = i["dataset"], i["scenario"], i["init_cls"], i["increment"]
    return *split, method, i["model_name"], flow, others, run.values["seed"]


def _order(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (0, float(value), "") if number else (1, 0.0, canonical(value))


def _section(runs: list[Run]) -> Section:
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        by_settings.setdefault(comparable_settings(run), []).append(run)
    members = [sorted(group, key=lambda run: run.values["seed"]) for group in by_settings.values()]
    columns = _columns([group[0] for group in members])
    groups = tuple(Group(tuple(g), {c: label_of(c, g[0]) for c in columns}) for g in members)
    first = runs[0]
    i, data = first.identity, first.values["data"]
    sizes = {len(run.values["task_sizes"]) for run in runs}
    steps = "one domain at a time" if i["scenario"] == "domain" else f"{i['init_cls']} classes, then {i['increment']}"
    title = f"{i['dataset']}: {steps}" + (f" ({sizes.pop()} tasks)" if len(sizes) == 1 else "")
    if "weights" not in columns:
        title += f"; {first.values['backbone']['name']}"
    if "images" not in columns:
        title += f"; {data['train_images']} training and {data['test_images']} test images"
    split = "domains" if i["scenario"] == "domain" else f"{i['init_cls']}-{i['increment']}"
    key = plain_name(f"{i['dataset']}-{split}")
    return Section(key, title, f"{i['dataset']} {split}", columns, groups, tuple(_notes(groups, columns)))


def comparable_settings(run: Run) -> str:
    """Return all that runs of different seeds must share to be averaged, as text."""
    return canonical([run.settings, run.values["data"]])


def _columns(runs: Sequence[Run]) -> tuple[str, ...]:
    """Method, flow where any has one, and every setting in which runs that have it differ."""
    columns = ["method"]
    if any("flow" in run.identity for run in runs):
        columns.append("flow")
    if len({run.identity["weights_sha256"] for run in runs}) > 1:
        columns.append("weights")
    if len({canonical(run.values["data"]) for run in runs}) > 1:
        columns.append("images")
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        values = {canonical(run.settings[key]) for run in runs if key in run.settings}
        if key not in _SHOWN_ELSEWHERE and len(values) > 1:
            columns.append(key)
    if not all(run.finished for run in runs):
        columns.append("status")
    return tuple(columns)


def label_of(column: str, run: Run) -> str:
    """Return what ``run`` shows in a label column."""
    if column == "method":
        name = str(run.identity["model_name"])
        if name in METHODS and METHODS[name].exemplars:
            return f"{name} (keeps all images)"
        return name if run.values["continual"] else f"{name} (not continual)"
    if column == "weights":
        return _weights(run)
    if column == "images":
        data = run.values["data"]
        return f"{data['train_images']}/{data['test_images']} {_short(canonical(data['images_sha256']))}"
    if column == "status":
        return run.status
    value = run.settings.get(column, "–")
    text = value if isinstance(value, str) else canonical(value)
    if isinstance(value, float):
        text = text.removesuffix(".0")
    return text if len(text) <= 40 else _short(text)


def _weights(run: Run) -> str:
    return f"{run.values['backbone']['name']} {run.identity['weights_sha256'][:8]}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _notes(groups: Sequence[Group], columns: Sequence[str]) -> list[str]:
    notes = []
    for column, what in (("weights", "other backbone weights"), ("images", "other images")):
        if column in columns:
            values = list(dict.fromkeys(group.labels[column] for group in groups))
            notes.append(
                f"Not comparable, never averaged together: rows with {what} (column {column}: {', '.join(values)})."
            )
    if any(not group.finished for group in groups):
        notes.append("Unfinished runs: their numbers are those of the tasks done so far, in rows of their own.")
    if any(not group.runs[0].values["continual"] for group in groups):
        notes.append("Not continual: sees the images of all tasks at once, an upper bound.")
    if len({tuple(group.seeds) for group in groups}) > 1:
        notes.append("Not all rows have the same seeds (the CSV lists them).")
    return notes


# -- words ------------------------------------------------------------------------------------------------------------


def glossary_markdown() -> str:
    """The definitions as a Markdown list: the README and ``tables.md`` hold it word for word."""
    return "\n".join(f"- **{term}**: {definition}" for term, definition in GLOSSARY.items()) + "\n"


# -- cost --------------------------------------------------------------------------------------------------------------

_COST_NOTES = (
    "As spent here: each image passes the backbone once, through the feature bank; what the bank held already costs "
    "nothing. As published: the backbone runs in each epoch and for each module (FLOPs from the same counts, the time "
    "from that of one forward pass).",
    "FLOPs count two for a multiply-add. Time and memory are those of the machine of the run; memory is the "
    "most while learning, that of tensors on a GPU, of the whole process on a CPU (MB = 2²⁰ bytes).",
)


@dataclass(frozen=True)
class CostTable:
    """What the groups of a section cost."""

    section: Section

    def rows(self) -> list[tuple[Group, dict[str, MeanStd | None]]]:
        """Return a row for each group of finished runs that measured it."""
        return [
            (group, {name: _cost_of_seeds(group, name) for name in (*COLUMNS, *PUBLISHED_COLUMNS)})
            for group in self.section.groups
            if group.finished and all(run.values.get("cost") for run in group.runs)
        ]

    def table(self, selections: Selections = None) -> Table:
        """Return the table; it is the same for all selections."""
        columns = [column for column in self.section.columns if column != "status"]
        rows = []
        for group, numbers in self.rows():
            labels, seeds = [group.labels[column] for column in columns], str(len(group.runs))
            spent = [significant_text(numbers[name]) for name in COLUMNS]
            published = [significant_text(numbers.get(name + AS_PUBLISHED)) for name in COLUMNS]
            rows.append(Row(tuple(map(Cell, [*labels, "as spent here", *spent, seeds])), first=True))
            rows.append(Row(tuple(map(Cell, [*[""] * len(labels), "as published", *published, seeds]))))
        header = (*columns, "account", *COLUMNS, "seeds")
        title = f"Cost: {self.section.title}"
        return Table(f"{self.section.key}-cost", title, header, len(columns) + 1, tuple(rows), _COST_NOTES)


def _cost_of_seeds(group: Group, name: str) -> MeanStd | None:
    return summarise([run.values["cost"].get(name) for run in group.runs])


def make_cost_tables(sections: Sequence[Section]) -> list[CostTable]:
    """Return a table for each section in which any run measured its cost."""
    return [table for table in map(CostTable, sections) if table.rows()]
