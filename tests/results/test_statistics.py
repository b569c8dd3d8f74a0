"""Intervals and paired tests against values worked by hand, tables of quantiles and SciPy's own paired tests."""

import math

import pytest

from utils.results.metrics import half_width
from utils.results.statistics import holm, paired


def test_the_interval_is_the_t_quantile_times_the_standard_error():
    # 60, 62, 67: mean 63, s = sqrt(13); t(0.975, 2) = 4.30265 in every table
    assert half_width([60.0, 62.0, 67.0]) == pytest.approx(4.30265 * math.sqrt(13) / math.sqrt(3), rel=1e-5)


@pytest.mark.parametrize("values", [[60.0], [60.0] * 5, [0.1 + 0.2, 0.3]])
def test_values_that_do_not_vary_have_no_interval(values):
    assert half_width(values) is None


def test_paired_is_the_t_test_of_the_differences_worked_by_hand():
    # differences 1, 2, 3: mean 2, s = 1, t = 2 / (1/√3) = 3.4641, two-sided p with 2 degrees of freedom 0.07418
    difference = paired([61.0, 64.0, 70.0], [60.0, 62.0, 67.0])
    assert (difference.count, difference.mean) == (3, 2.0)
    assert difference.p_t == pytest.approx(0.07418, abs=1e-5)
    assert difference.half_width == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert difference.p_wilcoxon == pytest.approx(0.25)  # all of one sign: 2 / 2³


def test_both_tests_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    first = [81.2, 80.1, 79.9, 83.4, 82.0, 80.7]
    second = [80.0, 80.6, 77.1, 81.5, 81.1, 79.2]
    difference = paired(first, second)
    assert difference.p_t == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-6)
    assert difference.p_wilcoxon == pytest.approx(stats.wilcoxon(first, second).pvalue)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_with_too_few_shared_seeds_nothing_is_tested(count):
    difference = paired([61.0] * count, [60.0] * count)
    assert (difference.count, difference.p_t, difference.p_wilcoxon, difference.half_width) == (count, None, None, None)


@pytest.mark.parametrize("first", [[60.0, 61.0, 62.0], [60.3, 61.3, 62.3]])
def test_differences_that_do_not_vary_are_one_observation_and_not_testable(first):
    difference = paired(first, [60.0, 61.0, 62.0])
    assert (difference.count, difference.p_t, difference.p_wilcoxon, difference.half_width) == (3, None, None, None)
    assert difference.constant
    assert difference.mean == pytest.approx(first[0] - 60)


def test_holm_worked_by_hand():
    # sorted: 0.01·4, 0.02·3, 0.03·2, 0.5·1, and none below the one before it
    assert holm([0.03, 0.01, None, 0.5, 0.02]) == pytest.approx([0.06, 0.04, None, 0.5, 0.06])
    assert holm([0.4, 0.9]) == [0.8, 0.9]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([None]) == [None]


def test_below_six_pairs_wilcoxon_can_show_nothing():
    six = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert paired(six, [0.0] * 6).p_wilcoxon == pytest.approx(2.0**-5)
    assert paired(six[:5], [0.0] * 5).p_wilcoxon == pytest.approx(2.0**-4)
