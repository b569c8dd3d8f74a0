"""Methods against each other on all data sets: what is best, and what is not significantly worse.

In each column the method of the highest mean is compared with every other one over the seeds that both have: a paired
t test, Wilcoxon's signed-rank test beside it, and Holm's correction over all comparisons of the same measure.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from utils.results.cells import Cell, Mark, MeanStd, Row, Selections, Table, number_text, p_text
from utils.results.metrics import selection_name
from utils.results.read import canonical
from utils.results.statistics import MIN_PAIRS, Difference, holm, paired, smallest_wilcoxon_p
from utils.results.tables import Group, Section, label_of
from utils.words import fixed

COMPARED = {"average": "Ā", "last": "A_T"}
ALPHA = 0.05
BATCH = "batch"  # depends on the order of the test set: another claim, never beside the others
_NOT_COMPARED = ("batch_shuffled", "oracle")  # a check and a bound, no method's answer


@dataclass(frozen=True)
class Entry:
    """One method under one selection in one column.

    Attributes:
        row: the words of its row: method, flow, what else differs, selection.
        column: data set and split, as in the head.
        candidate: whether it can be the best: False for a method that sees the data of all tasks at once.
    """

    row: tuple[str, ...]
    column: str
    group: Group
    selection: str
    candidate: bool

    def number(self, measure: str) -> MeanStd | None:
        return self.group.number(self.selection, measure)


@dataclass(frozen=True)
class Pair:
    """The best of a column and another entry of it; ``p_holm`` is the corrected p value of the t test."""

    measure: str
    best: Entry
    other: Entry
    difference: Difference
    p_holm: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A table of methods × data sets.

    Attributes:
        labels: the heads of the label columns.
        pairs: every comparison that was made.
        left_out: how many groups of unfinished runs are not in it.
    """

    key: str
    title: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    entries: tuple[Entry, ...]
    pairs: tuple[Pair, ...]
    left_out: int = 0

    def table(self, selections: Selections = None) -> Table:
        """Return the table; ``selections`` have been chosen before it was made."""
        marks = self._marks()
        places = {(entry.row, entry.column): entry for entry in self.entries}
        rows = []
        for row in dict.fromkeys(entry.row for entry in self.entries):
            cells = [Cell(word) for word in row]
            for column in self.columns:
                entry = places.get((row, column))
                for measure in COMPARED:
                    number = entry.number(measure) if entry else None
                    cells.append(Cell(number_text(number), marks.get((row, column, measure), "")))
            rows.append(Row(tuple(cells)))
        header = (*self.labels, *(f"{column} {name}" for column in self.columns for name in COMPARED.values()))
        return Table(self.key, self.title, header, len(self.labels), tuple(rows), tuple(self._notes()))

    def _marks(self) -> dict[tuple[tuple[str, ...], str, str], Mark]:
        marks: dict[tuple[tuple[str, ...], str, str], Mark] = {}
        for pair in self.pairs:
            marks[pair.best.row, pair.best.column, pair.measure] = "best"
            if pair.p_holm is not None and pair.p_holm >= ALPHA:
                marks[pair.other.row, pair.other.column, pair.measure] = "close"
        return marks

    def _notes(self) -> Iterator[str]:
        yield (
            "Bold: the best of its column. Underlined: not significantly worse (paired t test over shared seeds, "
            f"Holm's correction over all comparisons of the measure, p ≥ {ALPHA})."
        )
        few = sum(pair.difference.count < MIN_PAIRS for pair in self.pairs)
        if few:
            yield (
                f"Too few seeds: {few} of {len(self.pairs)} comparisons have fewer than {MIN_PAIRS} shared seeds; "
                "nothing is said about them."
            )
        if alike := sum(pair.difference.p_t is None for pair in self.pairs) - few:
            yield f"Not testable: {alike} of {len(self.pairs)} differences are the same for every seed."
        tested = [pair.difference.count for pair in self.pairs if pair.difference.p_t is not None]
        if tested and smallest_wilcoxon_p(max(tested)) >= ALPHA:
            yield (
                f"With {max(tested)} shared seeds Wilcoxon's p cannot be below {smallest_wilcoxon_p(max(tested)):g}: "
                "it can show a difference from 6 seeds on."
            )
        if any(not entry.candidate for entry in self.entries):
            yield "Not continual: never the best, and not compared."
        if self.left_out:
            yield f"Unfinished runs are left out ({self.left_out})."


@dataclass(frozen=True)
class Differences:
    """The comparisons behind the marks, a line each."""

    comparison: Comparison

    def table(self, selections: Selections = None) -> Table:
        """Return the table; ``selections`` have been chosen before it was made."""
        labels = ("data set", "measure", "best", "against")  # few columns: a phone shows the first numbers too
        numbers = ("shared seeds", "best − this", "95 % interval", "p (t)", "p (Wilcoxon)", "p (t, Holm)")
        rows = []
        before = None
        for pair in self.comparison.pairs:
            d = pair.difference
            place = (pair.best.column, pair.measure)
            words = [pair.best.column, COMPARED[pair.measure], _words(pair.best)]
            texts = [*(words if place != before else [""] * 3), _words(pair.other), str(d.count)]
            texts += ["–" if d.mean is None else fixed(d.mean, 2), _interval(d), *map(p_text, (d.p_t, d.p_wilcoxon))]
            rows.append(Row(tuple(map(Cell, [*texts, p_text(pair.p_holm)])), place != before))
            before = place
        title = "Differences to the best, over shared seeds, in percentage points"
        return Table(f"{self.comparison.key}-differences", title, (*labels, *numbers), len(labels), tuple(rows))


def _words(entry: Entry) -> str:
    return ", ".join(word for word in entry.row if word != "–")


def _interval(difference: Difference) -> str:
    if difference.mean is None or difference.half_width is None:
        return "–"
    return f"[{fixed(difference.mean - difference.half_width, 2)}, {fixed(difference.mean + difference.half_width, 2)}]"


# -- which is compared with which -------------------------------------------------------------------------------------


def make_comparisons(sections: Sequence[Section], selections: Selections = None) -> list[Comparison]:
    """Compare the selections that answer each image by itself, and apart from them, if it is asked for, ``batch``.

    A table of one row has nothing to compare and is left out.
    """
    found = [_comparison("comparison", "Methods and data sets, each image by itself (%)", sections, selections, False)]
    if selections is not None and BATCH in selections:
        title = "Methods and data sets, selection by batches in class order: the order tells the task (%)"
        found.append(_comparison("comparison-batch", title, sections, selections, True))
    return [comparison for comparison in found if len({entry.row for entry in comparison.entries}) > 1]


def _comparison(
    key: str, title: str, sections: Sequence[Section], selections: Selections, by_batch: bool
) -> Comparison:
    varied = list(dict.fromkeys(c for s in sections for c in s.columns if c not in ("status", "weights", "images")))
    entries, left_out = [], 0
    for section in sections:
        kinds = list(dict.fromkeys(map(_comparable, section.groups)))
        for group in section.groups:
            if not group.finished:
                left_out += 1
                continue
            column = section.short_title + (f" ({_kind(group)})" if len(kinds) > 1 else "")
            words = tuple(label_of(name, group.runs[0]) for name in varied)
            for name in _answers(group, selections, by_batch):
                row = (*words, selection_name(name))
                entries.append(Entry(row, column, group, name, group.runs[0].values["continual"]))
    labels, entries = _without_constant_words((*varied, "selection"), entries)
    columns = tuple(dict.fromkeys(entry.column for entry in entries))
    return Comparison(key, title, labels, columns, tuple(entries), tuple(_pairs(entries, columns)), left_out)


def _comparable(group: Group) -> str:
    """Groups of other weights or images are never compared: they stand in columns of their own."""
    return canonical([group.runs[0].identity["weights_sha256"], group.runs[0].values["data"]])


def _kind(group: Group) -> str:
    return ", ".join(group.labels[name] for name in ("weights", "images") if name in group.labels)


def _answers(group: Group, selections: Selections, by_batch: bool) -> list[str]:
    """The selections of a group that make the same claim; a method without modules has ``sample`` alone."""
    if by_batch:
        return [BATCH] if BATCH in group.selections else [name for name in group.selections if name == "sample"]
    names = [name for name in group.selections if name != BATCH and name not in _NOT_COMPARED]
    return [name for name in names if selections is None or name in selections]


def _without_constant_words(labels: tuple[str, ...], entries: list[Entry]) -> tuple[tuple[str, ...], list[Entry]]:
    """Leave out the label columns, all but the method's, that say the same in every row."""
    kept = [i for i, name in enumerate(labels) if name == "method" or len({entry.row[i] for entry in entries}) > 1]
    shorter = [Entry(tuple(e.row[i] for i in kept), e.column, e.group, e.selection, e.candidate) for e in entries]
    return tuple(labels[i] for i in kept), shorter


def _pairs(entries: Sequence[Entry], columns: Sequence[str]) -> list[Pair]:
    corrected = []
    for measure in COMPARED:
        pairs = [pair for column in columns for pair in _column_pairs(entries, column, measure)]
        p_values = holm([pair.difference.p_t for pair in pairs])
        corrected += [
            Pair(p.measure, p.best, p.other, p.difference, p_holm) for p, p_holm in zip(pairs, p_values, strict=True)
        ]
    return corrected


def _column_pairs(entries: Sequence[Entry], column: str, measure: str) -> Iterator[Pair]:
    """Compare the best entry of a column with each other candidate."""
    ranked = []
    for entry in entries:
        number = entry.number(measure) if entry.candidate and entry.column == column else None
        if number is not None:
            ranked.append((number.mean, entry))
    if len(ranked) < 2:
        return
    best = max(ranked, key=lambda pair: pair[0])[1]  # of equal ones the first
    of_best = best.group.by_seed(best.selection, measure)
    for _, other in ranked:
        if other is not best:
            of_other = other.group.by_seed(other.selection, measure)
            seeds = sorted(of_best.keys() & of_other.keys())
            difference = paired([of_best[s] for s in seeds], [of_other[s] for s in seeds])
            yield Pair(measure, best, other, difference)
