"""Operations at full size, counted without weights: fewer than the published code needs for the same result."""

import pytest

from benchmarks.inference_cost import SETTINGS, cost


def test_a_step_of_animate_anyone():
    counted = cost(SETTINGS[0], groups=30)
    assert counted.published == pytest.approx(111.1, abs=0.1)
    assert counted.ours <= 92
    assert counted.with_tpc <= 1.15 * counted.ours
    assert counted.calibrated_images == 24


def test_a_step_of_magic_animate():
    counted = cost(SETTINGS[2], groups=30)
    assert counted.published == pytest.approx(347.7, abs=0.1)
    assert counted.ours <= 321
    assert counted.with_tpc <= 1.15 * counted.ours
