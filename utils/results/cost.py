"""The names of what a run costs (``models.cost`` measures it), and its table over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from utils.results.cells import Cell, MeanStd, Row, Selections, Table, significant_text
from utils.results.tables import Group, Section, summarise

TRAIN_MINUTES = "Train Time (min)"
EVAL_MS = "Eval (ms/smp)"
INFERENCE = "Inference (GFLOPs)"
TRAIN = "Train (GFLOPs)"
PEAK_MB = "Peak Train Mem. (MB)"
PARAMS = "Params (M)"
TRAINABLE = "Trainable Params (M)"
COLUMNS = (TRAIN_MINUTES, EVAL_MS, INFERENCE, TRAIN, PEAK_MB, PARAMS, TRAINABLE)
AS_PUBLISHED = " as published"
PUBLISHED_COLUMNS = tuple(name + AS_PUBLISHED for name in (EVAL_MS, INFERENCE, TRAIN))
LEARNER = "Learner (GFLOPs)"  # of training, without the backbone

_NOTES = (
    "As spent here: each image passes the backbone once, through the feature bank; what the bank held already costs "
    "nothing. As published: the backbone runs in each epoch and for each module (FLOPs from the same counts, the time "
    "from that of one forward pass).",
    "FLOPs count two for a multiply-add. Time and memory are those of the machine of the run; memory is the "
    "most while learning, that of tensors on a GPU, of the whole process on a CPU (MB = 2²⁰ bytes).",
)


def cost_summary(cost: Mapping[str, float]) -> dict[str, float]:
    """Return the columns in their order, rounded to four significant digits, for the log's ``Cost summary`` line."""
    return {name: float(f"{cost[name]:.4g}") for name in (*COLUMNS, *PUBLISHED_COLUMNS) if name in cost}


@dataclass(frozen=True)
class CostTable:
    """What the groups of a section cost."""

    section: Section

    def rows(self) -> list[tuple[Group, dict[str, MeanStd | None]]]:
        """Return a row for each group of finished runs that measured it."""
        return [
            (group, {name: _of_seeds(group, name) for name in (*COLUMNS, *PUBLISHED_COLUMNS)})
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
        return Table(f"{self.section.key}-cost", title, header, len(columns) + 1, tuple(rows), _NOTES)


def _of_seeds(group: Group, name: str) -> MeanStd | None:
    return summarise([run.values["cost"].get(name) for run in group.runs])


def make_cost_tables(sections: Sequence[Section]) -> list[CostTable]:
    """Return a table for each section in which any run measured its cost."""
    return [table for table in map(CostTable, sections) if table.rows()]
