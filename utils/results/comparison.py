"""Methods against each other on all data sets: what is best, and what is not significantly worse.

In each column the row of the highest mean is compared with every other one over the seeds that both have: a paired t
test, Wilcoxon's signed-rank test beside it, and Holm's correction over all comparisons of the same measure.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from utils.results.metrics import selection_name
from utils.results.render import Cell, Mark, Table, interval_text, number_text, signed
from utils.results.statistics import MIN_PAIRS, Difference, holm, paired
from utils.results.tables import Group, Section, Selections, labels_of
from utils.words import counted

COMPARED = {"average": "Ā", "last": "A_T"}
ALPHA = 0.05
BATCH = "batch"  # depends on the order of the test set: another claim, never beside the others
NOT_COMPARED = (BATCH, "batch_shuffled", "oracle")  # nor are a check and a bound any method's answer
_OTHER_SEEDS = " †"


@dataclass(frozen=True, eq=False)
class Contender:
    """One method under one selection on one data set; ``row`` is its words, ``column`` the data set's."""

    row: tuple[str, ...]
    column: str
    group: Group
    selection: str

    def mean(self, measure: str) -> float | None:
        number = self.group.number(self.selection, measure)
        return None if number is None else number.mean

    def compared(self, other: "Contender", measure: str) -> Difference:
        first, second = (e.group.by_seed(e.selection, measure) for e in (self, other))
        pairs = [(a, b) for seed, a in first.items() if a is not None and (b := second.get(seed)) is not None]
        return paired([a for a, _ in pairs], [b for _, b in pairs])


@dataclass(frozen=True)
class Pair:
    """The best of a column and another entry of it; ``p_holm`` is the corrected p value of the t test."""

    measure: str
    best: Contender
    other: Contender
    difference: Difference
    p_holm: float | None = None


def make_comparisons(sections: Sequence[Section], selections: Selections = None) -> list[tuple[Table, Table]]:
    """Compare the selections that answer each image by itself, and apart from them, if it is asked for, ``batch``.

    Returns:
        For each comparison of more than one row the table of methods and the table of the differences behind its marks.
    """
    kinds = [("comparison", "Methods and data sets, each image by itself (%)", False)]
    if selections is not None and BATCH in selections:
        title = "Methods and data sets, selection by batches in class order: the order tells the task (%)"
        kinds.append(("comparison-batch", title, True))
    found = []
    for key, title, by_batch in kinds:
        labels, entries = _contenders(sections, selections, by_batch)
        if len({entry.row for entry in entries}) > 1:
            found.append(_comparison(key, title, labels, entries, sections))
    return found


def single_image(group: Group, selections: Selections = None) -> list[str]:
    """The selections of a group that look at one image at a time; a method without modules has ``sample`` alone."""
    return [n for n in group.selections if n not in NOT_COMPARED and (selections is None or n in selections)]


def by_batches(group: Group) -> list[str]:
    """``batch``, or for a method without modules its one answer."""
    return [name for name in group.selections if name == BATCH or not group.chooses]


def _contenders(
    sections: Sequence[Section], selections: Selections, by_batch: bool
) -> tuple[tuple[str, ...], list[Contender]]:
    """The finished rows that make the same claim, without label columns that say the same in every row."""
    varied = list(dict.fromkeys(c for s in sections for c in s.columns if c not in ("status", "weights", "images")))
    labels = (*varied, "selection")
    entries = []
    for section in sections:
        for group in (group for group in section.groups if group.status == "finished"):
            kind = ", ".join(group.labels[name] for name in ("weights", "images") if name in group.labels)
            column, words = section.short_title + (f" ({kind})" if kind else ""), labels_of(group.runs[0])
            for name in by_batches(group) if by_batch else single_image(group, selections):
                row = (*(words.get(c, "–") for c in varied), selection_name(name) if group.chooses else "–")
                entries.append(Contender(row, column, group, name))
    kept = [i for i, name in enumerate(labels) if name == "method" or len({entry.row[i] for entry in entries}) > 1]
    shorter = [replace(entry, row=tuple(entry.row[i] for i in kept)) for entry in entries]
    return tuple(labels[i] for i in kept), shorter


def _comparison(
    key: str, title: str, labels: tuple[str, ...], entries: Sequence[Contender], sections: Sequence[Section]
) -> tuple[Table, Table]:
    columns = list(dict.fromkeys(entry.column for entry in entries))
    common = {column: _common_seeds([e for e in entries if e.column == column]) for column in columns}
    apart = [entry for entry in entries if entry.group.seeds != common[entry.column]]
    marks: dict[tuple[Contender, str], Mark] = {}
    pairs: list[Pair] = []
    for measure in COMPARED:
        of_measure: list[Pair] = []
        for column in columns:
            judged = [e for e in entries if e.column == column and e.group.continual and e.mean(measure) is not None]
            ranked = sorted((e for e in judged if e not in apart), key=lambda entry: -(entry.mean(measure) or 0))
            if len(judged) > 1 and ranked:
                best = ranked[0]
                highest = signed(best.mean(measure))
                marks |= {(entry, measure): "best" for entry in ranked if signed(entry.mean(measure)) == highest}
                others = [entry for entry in judged if entry is not best]
                of_measure += [Pair(measure, best, other, best.compared(other, measure)) for other in others]
        corrected = holm([pair.difference.p_t for pair in of_measure])
        pairs += [replace(pair, p_holm=p) for pair, p in zip(of_measure, corrected, strict=True)]
    for pair in pairs:
        if pair.p_holm is not None and pair.p_holm >= ALPHA:
            marks.setdefault((pair.other, pair.measure), "close")
    places = {(entry.row, entry.column): entry for entry in entries}
    rows = []
    for row in dict.fromkeys(entry.row for entry in entries):
        cells = [Cell(word) for word in row]
        for entry, measure in ((places.get((row, column)), measure) for column in columns for measure in COMPARED):
            text = number_text(entry.group.number(entry.selection, measure)) if entry else "–"
            text += _OTHER_SEEDS if entry in apart else ""
            cells.append(Cell(text, marks.get((entry, measure), "") if entry else ""))
        rows.append(tuple(cells))
    header = (*labels, *(f"{column} {name}" for column in columns for name in COMPARED.values()))
    left_out = sum(group.status != "finished" for section in sections for group in section.groups)
    notes = tuple(_notes(pairs, entries, apart, left_out))
    return Table(key, title, header, len(labels), tuple(rows), notes), _differences(key, pairs)


def _common_seeds(entries: Sequence[Contender]) -> tuple[int, ...]:
    """The seeds that most methods of a column have; of two such sets the larger one."""
    methods = {id(entry.group): entry.group.seeds for entry in entries if entry.group.continual}
    counts = Counter(methods.values())
    return max(counts, key=lambda seeds: (counts[seeds], len(seeds)), default=())


def _notes(
    pairs: Sequence[Pair], entries: Sequence[Contender], apart: Sequence[Contender], left_out: int
) -> Iterator[str]:
    yield (
        "Best of its column: bold, or between asterisks. Not significantly worse: underlined, or between underscores "
        f"(paired t test over shared seeds, Holm's correction over all comparisons of the measure, p ≥ {ALPHA})."
    )
    differences = [pair.difference for pair in pairs]
    if few := sum(d.count < MIN_PAIRS for d in differences):
        yield f"Too few seeds: {few} of {len(pairs)} comparisons have fewer than {MIN_PAIRS} shared seeds, untested."
    if constant := sum(d.constant for d in differences):
        yield f"Not testable: {constant} of {len(pairs)} differences are the same for every seed: one observation."
    tested = max((d.count for d in differences if d.p_t is not None), default=0)
    if tested and (smallest := 2.0 ** (1 - tested)) >= ALPHA:  # all differences have one sign
        yield f"With {tested} shared seeds Wilcoxon's p cannot be below {smallest:g}: it needs 6 to show a difference."
    if apart:
        yield f"{_OTHER_SEEDS.strip()} Other seeds than most rows of the column: never the best by its own mean."
    if not all(entry.group.continual for entry in entries):
        yield "Not continual: never the best, and not compared."
    if left_out:
        yield f"Left out: unfinished runs, and runs that tested new classes alone ({counted(left_out, 'row')})."


def _differences(key: str, pairs: Sequence[Pair]) -> Table:
    """The comparisons behind the marks, a line each."""
    labels = ("data set", "measure", "best", "against")
    numbers = ("shared seeds", "best − this", "95 % interval", "p (t)", "p (Wilcoxon)", "p (t, Holm)")
    rows = []
    for pair in pairs:
        d = pair.difference
        best, other = (", ".join(word for word in entry.row if word != "–") for entry in (pair.best, pair.other))
        texts = [pair.best.column, COMPARED[pair.measure], best, other, str(d.count), signed(d.mean)]
        p_values = ["not testable", "–", "–"] if d.constant else map(_p_text, (d.p_t, d.p_wilcoxon, pair.p_holm))
        rows.append(tuple(map(Cell, [*texts, interval_text(d.mean, d.half_width), *p_values])))
    title = "Differences to the best, over shared seeds, in percentage points"
    return Table(f"{key}-differences", title, (*labels, *numbers), len(labels), tuple(rows))


def _p_text(p: float | None) -> str:
    return "–" if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"
