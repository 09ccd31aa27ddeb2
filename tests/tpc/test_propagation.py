"""The propagation schedule: groups, draws, and what they depend on."""

import numpy as np
import pytest

from tpc.trajectory import Schedule, group_of_frames


def schedule(available: np.ndarray, groups: int = 0, mode: str = "iterative", seed: int = 0) -> Schedule:
    return Schedule(available, groups, mode, seed)


def test_groups_are_consecutive_and_even():
    np.testing.assert_array_equal(group_of_frames(10, 3), [0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    np.testing.assert_array_equal(group_of_frames(10, 0), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    for frames in (1, 7, 93, 120):
        sizes = np.bincount(group_of_frames(frames, 30))
        assert len(sizes) == min(frames, 30) and sizes.max() - sizes.min() <= 1
    assert len(group_of_frames(0, 5)) == 0


def test_a_group_shares_one_of_its_own_members_and_all_are_heard():
    plan = schedule(np.ones((12, 2), bool))
    draws = np.stack([plan.source_frame(step) for step in range(60)])
    for start in range(0, 12, 4):
        block = draws[:, start : start + 4]
        assert (block == block[:, :1]).all()
        for person in range(2):
            assert set(block[..., person].ravel()) == set(range(start, start + 4))
    assert (draws[:, 0, 0] != draws[:, 0, 1]).any()  # persons are drawn apart


def test_draws_are_uniform():
    plan = schedule(np.ones((4, 1), bool))
    counts = np.bincount([plan.source_frame(step)[0, 0] for step in range(2000)], minlength=4)
    assert np.abs(counts - 500).max() < 100  # five standard deviations


def test_a_draw_depends_on_seed_step_group_and_person_only():
    everything = schedule(np.ones((40, 3), bool), seed=7)
    np.testing.assert_array_equal(everything.source_frame(5), schedule(np.ones((40, 3), bool), seed=7).source_frame(5))
    # Another clip length, and what happens to other persons and groups, change nothing.
    shorter = np.ones((20, 3), bool)
    shorter[8:12, 1] = False
    np.testing.assert_array_equal(everything.source_frame(5)[:8], schedule(shorter, seed=7).source_frame(5)[:8])
    np.testing.assert_array_equal(everything.source_frame(5)[12:20], schedule(shorter, seed=7).source_frame(5)[12:20])
    other = schedule(np.ones((40, 3), bool), seed=8)
    assert any((everything.source_frame(step) != other.source_frame(step)).any() for step in range(3))
    assert schedule(np.ones((40, 3), bool), seed=-1).source_frame(0).shape == (40, 3)


@pytest.mark.parametrize("groups", [9, 30])
def test_groups_of_one_are_the_identity(groups):
    plan = schedule(np.ones((9, 1), bool), groups)
    for step in range(5):
        np.testing.assert_array_equal(plan.source_frame(step)[:, 0], np.arange(9))
    np.testing.assert_array_equal(schedule(np.ones((9, 1), bool), 2, "off").source_frame(3), plan.source_frame(3))


def test_hold_takes_the_first_available_member_at_every_step():
    available = np.ones((10, 1), bool)
    available[[0, 4, 5, 6, 7], 0] = False
    plan = schedule(available, mode="hold")
    for step in range(3):
        np.testing.assert_array_equal(plan.source_frame(step)[:, 0], [-1, 1, 1, 1, -1, -1, -1, -1, 8, 8])


def test_unavailable_frames_are_never_drawn_and_stay_without():
    available = np.random.default_rng(0).random((50, 2)) < 0.6
    plan = schedule(available)
    for step in range(20):
        source = plan.source_frame(step)
        np.testing.assert_array_equal(source >= 0, available)
        for person in range(2):
            drawn = source[available[:, person], person]
            assert available[drawn, person].all()
