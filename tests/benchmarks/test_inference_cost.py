"""Operations at full size, counted without weights: fewer than the published code needs for the same result."""

import pytest

from benchmarks.inference_cost import SETTINGS, cost, drawn_images


def test_a_step_of_animate_anyone():
    counted = cost(SETTINGS[0], groups=30)
    assert counted.published == pytest.approx(111.1, abs=0.1)
    assert counted.ours <= 92
    assert counted.with_tpc <= 1.15 * counted.ours
    assert counted.calibrated_images == 24
    assert counted.reference_net < 0.01 * counted.run and counted.encoding < 0.025 * counted.run


def test_held_members_of_a_long_clip():
    """One image for each of 30 groups, instead of all 96 over the steps of a run."""
    counted = cost(SETTINGS[1], groups=30, propagation="hold")
    assert counted.calibrated_images == 30 and counted.encoding < 0.01 * counted.run
    assert drawn_images(SETTINGS[1], 30, "iterative")[0] > 90


def test_a_step_of_magic_animate():
    counted = cost(SETTINGS[2], groups=30)
    assert counted.published == pytest.approx(347.7, abs=0.1)
    assert counted.ours <= 321
    assert counted.with_tpc <= 1.15 * counted.ours
