"""Runs -> groups of comparable runs -> tables of mean ± std over seeds: results by data set, and cost."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from utils.config.methods import FLOWS, METHODS
from utils.results.escape import plain_name
from utils.results.metrics import BY_RELEASE, COLUMNS, GLOSSARY, SELECTION_NAMES, MeanStd, over_seeds, selection_name
from utils.results.read import Run, canonical
from utils.results.render import Cell, Table, interval_text, number_text, significant_text
from utils.words import counted

Selections = Sequence[str] | None  # the rows to show; None: all
MEASURES = {"average": "Ā", "last": "A_T", "forgetting": "forgetting", "selecting": "selection accuracy"}
# named by the section, or labels under another name
_SHOWN_ELSEWHERE = ("dataset", "scenario", "init_cls", "increment", "model_name", "weights_sha256", "images_sha256")
_COST_NOTES = (
    "Here: spent by the run. Each view of an image passes the backbone once, through the feature bank; what the bank "
    "held already costs nothing, so runs that sent other numbers of images through the backbone stand apart. The "
    "release procedure: the backbone runs in each epoch and for each module (FLOPs from the same counts, the time "
    "from that of one forward pass).",
    "FLOPs count two for a multiply-add. Time and memory are those of the machine of the run; memory is the most while "
    "learning, that of tensors on a GPU, of the whole process on a CPU (MB = 1,048,576 bytes).",
)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed; ``labels`` are the texts in the columns of its section."""

    runs: tuple[Run, ...]
    labels: dict[str, str]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def status(self) -> str:
        return self.runs[0].status

    @property
    def continual(self) -> bool:
        return bool(self.runs[0].values["continual"])

    @property
    def name(self) -> str:
        """For legends: ``tosca (flow tosca_r, l1 0.001)``."""
        others = [f"{k} {v}" for k, v in self.labels.items() if k not in ("method", "status") and v != "–"]
        others += [] if self.status == "finished" else [self.status]
        return self.labels["method"] + (f" ({', '.join(others)})" if others else "")

    @property
    def key(self) -> str:
        """For file names: the method, its flow and a hash of every setting, whatever other runs there are."""
        identity = self.runs[0].identity
        name = "-".join([identity["model_name"], *([identity["flow"]] if "flow" in identity else [])])
        return f"{plain_name(name)}-{_short(_comparable(self.runs[0]))}"

    @property
    def selections(self) -> list[str]:
        """The selections that every run has, in the order of ``SELECTION_NAMES``."""
        common = set.intersection(*(set(run.values["results"]) for run in self.runs))
        return [name for name in SELECTION_NAMES if name in common] + sorted(common - SELECTION_NAMES.keys())

    @property
    def chooses(self) -> bool:
        """Whether there is more than one way to answer: a method without modules has ``sample`` alone."""
        return len(self.selections) > 1

    def by_seed(self, selection: str, measure: str) -> dict[int, float | None]:
        """Return one of ``MEASURES`` under one selection for each seed; None where it is not defined."""
        return {run.seed: _measured(run, selection, measure) for run in self.runs}

    def number(self, selection: str, measure: str) -> MeanStd | None:
        """Return the mean over seeds; None where a run lacks the measure."""
        return over_seeds(list(self.by_seed(selection, measure).values()))


def _measured(run: Run, selection: str, measure: str) -> float | None:
    values = run.values["results"][selection]
    if measure == "selecting":  # after the last task
        values = {measure: (run.values["selection_accuracy"].get(selection) or [None])[-1]}
    value: float | None = values[measure]
    return value


@dataclass(frozen=True)
class Section:
    """The groups of one data set and split.

    Attributes:
        key: for file names, such as ``cub-10-10``.
        title: ``cub: 10 classes, then 10 (20 tasks)``.
        short_title: for the head of a column, such as ``cub 10-10``.
        data: the backbone and the numbers of images, where all groups agree in them.
        columns: the label columns: method, flow, and whatever else differs between the groups.
    """

    key: str
    title: str
    short_title: str
    data: str
    columns: tuple[str, ...]
    groups: tuple[Group, ...]


# -- tables -----------------------------------------------------------------------------------------------------------


def section_table(section: Section, selections: Selections = None) -> Table:
    """Return a row for each group and selection."""
    intervals = any(len(group.runs) > 1 for group in section.groups)
    rows: list[tuple[Cell, ...]] = []
    for group in section.groups:
        labels = [group.labels[column] for column in section.columns]
        for name in group.selections:
            if selections is None or name in selections:
                numbers = [group.number(name, measure) for measure in MEASURES]
                shown = selection_name(name) if group.chooses else "–"
                texts = [*labels, shown, *map(number_text, numbers), str(len(group.runs))]
                if intervals:
                    last = numbers[1]
                    texts.append(interval_text(last.mean, last.half_width, (0, 100)) if last else "–")
                rows.append(tuple(map(Cell, texts)))
    header = (*section.columns, "selection", *MEASURES.values(), "seeds", *(["95 % of A_T"] if intervals else []))
    title, notes = section.title + section.data, tuple(_notes(section))
    return Table(section.key, title, header, len(section.columns) + 1, tuple(rows), notes)


def _notes(section: Section) -> Iterator[str]:
    groups = section.groups
    for column, what in (("weights", "other backbone weights"), ("images", "other images")):
        if column in section.columns:
            values = ", ".join(dict.fromkeys(group.labels[column] for group in groups))
            yield f"Not comparable, never averaged together: rows with {what} (column {column}: {values})."
    if any(group.status.startswith("unfinished") for group in groups):
        yield "Unfinished runs: their numbers are those of the tasks done so far, in rows of their own."
    if any(group.status == "new classes alone" for group in groups):
        yield "New classes alone: a continued run whose data did not test the classes learned before."
    if not all(group.continual for group in groups):
        yield "Not continual: sees the images of all tasks at once, an upper bound."
    if len({group.seeds for group in groups}) > 1:
        seeds = "; ".join(f"{group.name}: {', '.join(map(str, group.seeds))}" for group in groups)
        yield f"Not all rows have the same seeds. {seeds}."


def cost_tables(sections: Sequence[Section]) -> list[Table]:
    """Return what the groups of finished runs cost, a table for each section in which any run measured it."""
    return [table for table in map(_cost_table, sections) if table.rows]


def _cost_table(section: Section) -> Table:
    columns = [column for column in section.columns if column != "status"]
    rows: list[tuple[Cell, ...]] = []
    for group in section.groups:
        runs = [run for run in group.runs if not run.status.startswith("unfinished") and run.values.get("cost")]
        accounts = []
        for images in sorted({run.values["backbone_forwards"] for run in runs}, reverse=True):
            alike = [run for run in runs if run.values["backbone_forwards"] == images]
            accounts.append((f"here, {counted(images, 'image')}", alike, ""))
        if any(name.endswith(BY_RELEASE) for run in runs for name in run.values["cost"]):
            accounts.append(("release procedure", runs, BY_RELEASE))
        labels = [group.labels[column] for column in columns]
        for account, alike, suffix in accounts:
            numbers = [over_seeds([run.values["cost"].get(name + suffix) for run in alike]) for name in COLUMNS]
            rows.append(tuple(map(Cell, [*labels, account, *map(significant_text, numbers), str(len(alike))])))
    header = (*columns, "account", *COLUMNS, "seeds")
    return Table(f"{section.key}-cost", f"Cost: {section.title}", header, len(columns) + 1, tuple(rows), _COST_NOTES)


# -- grouping ---------------------------------------------------------------------------------------------------------


def make_sections(runs: Sequence[Run]) -> tuple[list[Section], list[str]]:
    """One section for each data set and split; and a line for each run without any result yet."""
    notes = [f"{run.path} is unfinished, no task is done yet" for run in runs if not run.tasks_done]
    ordered = sorted((run for run in runs if run.tasks_done), key=_place)
    return [_section(list(members)) for _, members in groupby(ordered, key=lambda run: _place(run)[:3])], notes


def _place(run: Run) -> tuple[Any, ...]:
    """Where a run stands: by data set, sizes of the tasks, method, flow, then everything else, then seed."""
    i = run.identity
    method = list(METHODS).index(i["model_name"]) if i["model_name"] in METHODS else len(METHODS)
    flow = FLOWS.index(i["flow"]) if i.get("flow") in FLOWS else len(FLOWS)
    others = tuple((key, _order(run.settings[key])) for key in sorted(run.settings))
    sizes = () if i["scenario"] == "domain" else tuple(run.values["all_task_sizes"])
    return i["dataset"], i["scenario"], sizes, method, i["model_name"], flow, others, run.seed


def _order(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (0, float(value), "") if number else (1, 0.0, canonical(value))


def _comparable(run: Run) -> str:
    """Return all that runs of different seeds must share to be averaged, as text."""
    return canonical([run.settings, run.values["data"]])


def _section(runs: list[Run]) -> Section:
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        by_settings.setdefault(_comparable(run), []).append(run)
    members = [sorted(group, key=lambda run: run.seed) for group in by_settings.values()]
    labels = [labels_of(group[0]) for group in members]
    columns = dict.fromkeys(c for of_group in labels for c in of_group)
    shown = tuple(column for column in columns if column == "method" or _differs(column, labels))
    groups = tuple(Group(tuple(g), {c: of.get(c, "–") for c in shown}) for g, of in zip(members, labels, strict=True))
    first, dataset = runs[0].values, runs[0].identity["dataset"]
    steps, split = _split(runs[0])
    tasks = {len(run.values["all_task_sizes"]) for run in runs}
    title = f"{dataset}: {steps}" + (f" ({counted(tasks.pop(), 'task')})" if len(tasks) == 1 else "")
    data = "" if "weights" in shown else f"; {first['backbone']['name']}"
    if "images" not in shown:
        data += f"; {first['data']['train_images']} training and {first['data']['test_images']} test images"
    return Section(plain_name(f"{dataset}-{split}"), title, f"{dataset} {split}", data, shown, groups)


def _differs(column: str, labels: Sequence[dict[str, str]]) -> bool:
    """Whether rows need a column: a key that a method does not read is no difference; to continue no run is one."""
    if column == "flow":
        return True
    values = {of_group.get(column) for of_group in labels if column in of_group or column == "base"}
    return len(values) > 1 or (column == "status" and values != {"finished"})


def labels_of(run: Run) -> dict[str, str]:
    """Return all words that may tell a run from others on the same data set, by column."""
    identity, data = run.identity, run.values["data"]
    name = str(identity["model_name"])
    if name in METHODS and METHODS[name].exemplars:
        name += " (keeps all images)"
    elif not run.values["continual"]:
        name += " (not continual)"
    return {
        "method": name,
        **({"flow": str(identity["flow"])} if "flow" in identity else {}),
        "weights": f"{run.values['backbone']['name']} {identity['weights_sha256'][:8]}",
        "images": f"{data['train_images']}/{data['test_images']} {_short(canonical(data))}",
        **{k: _value_text(v) for k, v in run.settings.items() if k not in (*_SHOWN_ELSEWHERE, "flow", "status")},
        "status": run.status,
    }


def _value_text(value: Any) -> str:
    text = value if isinstance(value, str) else canonical(value)
    if isinstance(value, float):
        text = text.removesuffix(".0")
    return text if len(text) <= 40 else _short(text)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _split(run: Run) -> tuple[str, str]:
    """How the classes come, in words and in short: from the sizes of all tasks, which a continued run has too."""
    if run.identity["scenario"] == "domain":
        return "one domain at a time", "domains"
    first, *later = sizes = run.values["all_task_sizes"]
    if not later:
        return counted(first, "class"), f"{first}-{first}"
    if all(size == later[0] for size in later[:-1]) and later[-1] <= later[0]:
        return f"{counted(first, 'class')}, then {later[0]}", f"{first}-{later[0]}"
    if len(sizes) <= 8:
        return f"{' + '.join(map(str, sizes))} classes", "-".join(map(str, sizes))
    return f"{min(sizes)} to {max(sizes)} classes a task", f"{min(sizes)}-to-{max(sizes)}-{_short(canonical(sizes))}"


def glossary_markdown() -> str:
    """The definitions as a Markdown list, as the documentation holds it word for word."""
    return "\n".join(f"- **{term}**: {definition}" for term, definition in GLOSSARY.items()) + "\n"
