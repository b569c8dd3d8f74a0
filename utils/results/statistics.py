"""Intervals over seeds and paired differences between methods, as pure functions of numbers.

SciPy is imported where it is needed: a run that only trains does not wait for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
MIN_PAIRS = 3  # with two shared seeds a t statistic has one degree of freedom: it tells next to nothing


@dataclass(frozen=True)
class Difference:
    """A paired comparison of two methods over the seeds that both have.

    Attributes:
        count: how many seeds both have.
        mean: the mean of (first − second); None without a shared seed.
        half_width: of the 95 % t interval around ``mean``; None below ``MIN_PAIRS`` seeds or if no difference varies.
        p_t: two-sided p value of the paired t test; None below ``MIN_PAIRS`` seeds or if no difference varies.
        p_wilcoxon: two-sided p value of Wilcoxon's signed-rank test; None where ``p_t`` is.
    """

    count: int
    mean: float | None = None
    half_width: float | None = None
    p_t: float | None = None
    p_wilcoxon: float | None = None


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % t interval of the mean: ``t · s / √n``; None for fewer than two values."""
    count = len(values)
    if count < 2:
        return None
    from scipy import stats

    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(count)


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare values of two methods, of the same seeds in the same order.

    Raises:
        ValueError: there are not equally many of both.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values cannot be paired")
    count = len(first)
    if count == 0:
        return Difference(0)
    # figures in percent differ by less than this through rounding alone
    differences = np.round(np.asarray(first, dtype=float) - np.asarray(second, dtype=float), 9)
    mean = float(differences.mean())
    if count < MIN_PAIRS:
        return Difference(count, mean)
    if not np.ptp(differences):  # seeds that cannot differ are one observation, however many they are: not testable
        return Difference(count, mean)
    from scipy import stats

    p_t, p_wilcoxon = stats.ttest_1samp(differences, 0.0).pvalue, stats.wilcoxon(differences).pvalue
    return Difference(count, mean, half_width(differences.tolist()), float(p_t), float(p_wilcoxon))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p values after Holm's step-down correction, in the order given; None stays None and does not count.

    The smallest of m is multiplied by m, the next by m − 1 and so on; none is below one before it, none above 1.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[place] = largest
    return corrected


def smallest_wilcoxon_p(count: int) -> float:
    """Return the smallest two-sided p that Wilcoxon's test can give: all ``count`` differences have one sign."""
    return float(2.0 ** (1 - count))
