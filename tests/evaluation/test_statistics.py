"""Intervals over clips: closed forms, coverage, and what scipy gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, norm, t, ttest_1samp

from evaluation.statistics import (
    FEWEST,
    RESAMPLES,
    SEED,
    Interval,
    clip_differences,
    deciding_clips,
    half_width,
    mean_interval,
    ratio_interval,
    statistic_interval,
)

NORMAL = np.random.default_rng(1).normal(0.3, 1, 20)


def test_constant_differences_have_an_interval_of_no_width():
    assert mean_interval([0.5] * 8) == Interval(0.5, 0.5, 0.5, 8)
    assert mean_interval([0.5] * 8).excludes_zero
    assert mean_interval([0.0] * 8) == Interval(0.0, 0.0, 0.0, 8)
    assert not mean_interval([0.0] * 8).excludes_zero


def test_symmetric_differences_have_a_symmetric_interval():
    """Ten times -1 and ten times 1: the t interval's half width is 2.093 / sqrt(19)."""
    found = mean_interval([-1.0, 1.0] * 10)
    assert found.value == 0 and not found.excludes_zero
    assert found.low == pytest.approx(-found.high, abs=0.11)  # resampled means are a tenth apart
    assert found.high == pytest.approx(t.ppf(0.975, 19) / np.sqrt(19), abs=0.11)


def test_the_mean_is_bootstrapped_as_by_scipy():
    level = 1 - 2 * norm.cdf(-np.sqrt(20 / 19) * t.ppf(0.975, 19))
    rng = np.random.default_rng(SEED)
    settings_of = {"n_resamples": RESAMPLES, "confidence_level": level, "method": "percentile", "rng": rng}
    expected = bootstrap((NORMAL,), np.mean, **settings_of).confidence_interval
    found = mean_interval(NORMAL)
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-12)
    assert found == mean_interval(NORMAL)


def test_normal_data_have_about_the_interval_of_the_t_test():
    expected, found = ttest_1samp(NORMAL, 0).confidence_interval(), mean_interval(NORMAL)
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.08 * width)


@pytest.mark.parametrize("strata", [(6,), (4, 4)])
def test_intervals_of_few_normal_clips_cover_the_mean_as_often_as_they_say(strata):
    """Of 300 samples; plain percentile intervals of six clips cover 85 %, a deviation of the count is 1.3 %."""
    rng = np.random.default_rng(7)
    found = [mean_interval(*(rng.normal(1, 1, n) for n in strata)) for _ in range(300)]
    assert 0.89 < np.mean([interval.low <= 1 <= interval.high for interval in found]) < 0.985


@pytest.mark.parametrize("count", range(FEWEST))
def test_few_clips_have_no_interval(count):
    found = mean_interval(NORMAL[:count])
    assert (found.low, found.high, found.n, found.excludes_zero) == (None, None, count, False)
    assert found.value == (pytest.approx(NORMAL[:count].mean()) if count else None)


def test_a_stratum_of_one_clip_has_no_interval():
    found = mean_interval(NORMAL, [1.0])
    assert found.value == pytest.approx((NORMAL.mean() + 1) / 2) and found.low is None and found.n == 21


def test_what_is_missing_is_left_out():
    known = mean_interval(NORMAL)
    assert mean_interval([None, *NORMAL, np.nan]) == known and known.n == 20
    assert mean_interval([None] * 8) == Interval(None, None, None, 0)
    assert mean_interval() == Interval(None, None, None, 0)
    halved = ratio_interval([[*NORMAL, 1.0, None]], [[*(2 * NORMAL), None, 1.0]])
    assert halved == Interval(0.5, 0.5, 0.5, 20)


def test_seeds_are_compared_one_by_one():
    first, second = [[1.0, 2.0], [3.0, None], [None, 4.0]], [[0.0, 0.0], [1.0, 7.0], [1.0, None]]
    np.testing.assert_array_equal(clip_differences(first, second), [1.5, 2.0, np.nan])


def test_strata_count_alike_and_are_resampled_each_by_itself():
    """Two kinds of other means: resampled together their spread would be that between the kinds."""
    found = mean_interval([0.0, 0.1] * 10, [10.0, 10.1, 10.0, 10.1])
    assert found.value == pytest.approx(5.05) and found.high - found.low < 0.1


def test_a_ratio_is_that_of_the_means_drawn_jointly():
    costs = np.array([1.0, 2, 3, 4, 5, 6])
    found = ratio_interval([costs / 2 + 0.1], [costs])
    assert found.value == pytest.approx((costs.mean() / 2 + 0.1) / costs.mean())
    assert 0.5 < found.low < found.value < found.high < 0.6  # by themselves the means vary by a half
    assert ratio_interval([costs], [np.zeros(6)]) == Interval(None, None, None, 6)


def test_a_statistic_that_some_resamples_lack_has_no_interval():
    def only_with_the_first(rows: np.ndarray) -> np.ndarray:
        return np.where(rows.min(axis=-2) < 1, rows.max(axis=-2), np.nan)[..., 0]

    found = statistic_interval(only_with_the_first, [[float(k)] for k in range(6)])
    assert found == Interval(5.0, None, None, 6)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=FEWEST, max_size=12), st.floats(0.1, 10))
def test_intervals_turn_with_the_sign_and_grow_with_the_unit(values, factor):
    values = np.round(values, 3)
    found, scaled = mean_interval(values), mean_interval(factor * values)
    assert found.low <= found.high
    assert (scaled.low, scaled.high) == pytest.approx((factor * found.low, factor * found.high), rel=1e-6, abs=1e-6)


def test_the_half_width_is_students_and_falls_with_the_clips():
    found = mean_interval(NORMAL)
    assert half_width(20, NORMAL) == pytest.approx((found.high - found.low) / 2, rel=0.08)
    assert half_width(80, NORMAL) == pytest.approx(t.ppf(0.975, 79) * NORMAL.std(ddof=1) / np.sqrt(80))
    # The mean over four strata that scatter alike scatters half as much.
    assert half_width(1000, *[NORMAL] * 4) == pytest.approx(half_width(1000, NORMAL) / 2, rel=1e-3)
    assert np.isnan(half_width(20, [1.0])) and np.isnan(half_width(1, NORMAL))


def test_so_many_clips_decide_as_the_half_width_needs_to_be_below_the_mean():
    """Of mean and deviation 1: 2.57 / sqrt(6) = 1.05 is not below 1, 2.45 / sqrt(7) = 0.92 is."""
    values = 1 + np.array([-1.0, 1.0, np.nan, -1.0, 1.0]) / np.std([-1, 1, -1, 1], ddof=1)
    assert deciding_clips(values) == deciding_clips(-values) == 7
    assert deciding_clips([0.5] * 8) == FEWEST
    assert deciding_clips(values - 1) is None and deciding_clips([1.0]) is None and deciding_clips([]) is None
