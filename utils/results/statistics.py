"""Paired differences between methods, as pure functions of numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.results.metrics import half_width

MIN_PAIRS = 3  # with two shared seeds a t statistic has one degree of freedom: it tells next to nothing


@dataclass(frozen=True)
class Difference:
    """A paired comparison of two methods over the seeds that both have.

    Differences that do not vary are one observation, however many seeds gave it: nothing is tested then.

    Attributes:
        count: how many seeds both have.
        mean: the mean of (first − second); None without a shared seed.
        half_width: of the 95 % t interval around ``mean``; None where nothing is tested.
        p_t: two-sided p value of the paired t test; None below ``MIN_PAIRS`` seeds, or without variation.
        p_wilcoxon: two-sided p value of Wilcoxon's signed-rank test; None as ``p_t``.
    """

    count: int
    mean: float | None = None
    half_width: float | None = None
    p_t: float | None = None
    p_wilcoxon: float | None = None

    @property
    def constant(self) -> bool:
        """Whether there are seeds enough, but the difference is the same in all of them."""
        return self.count >= MIN_PAIRS and self.p_t is None


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare equally many values of two methods, of the same seeds in the same order."""
    count = len(first)
    if count == 0:
        return Difference(0)
    # figures in percent differ by less than this through rounding alone
    differences = np.round(np.subtract(first, second), 9)
    mean = float(differences.mean())
    if count < MIN_PAIRS or not np.ptp(differences):
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
