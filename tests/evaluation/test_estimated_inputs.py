"""Poses and masks as estimators give them, which animators are handed in place of exact ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from evaluation.clips import MASK_OFFSET, MASK_RAGGEDNESS, estimated_mask

FARTHEST = MASK_OFFSET + 2 * MASK_RAGGEDNESS  # that a boundary moves, in sizes of the person


@settings(max_examples=30, deadline=None)
@given(
    box=st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(8, 100), st.integers(8, 100)),
    seed=st.integers(0, 2**32 - 1),
)
def test_only_what_is_near_the_boundary_of_a_mask_changes(box, seed):
    top, left, height, width = box
    mask = np.zeros((96, 128), bool)
    mask[top : top + height, left : left + width] = True
    size = max(np.ptp(indices) + 1 for indices in np.nonzero(mask))
    found = estimated_mask(mask, np.random.default_rng(seed))
    assert found.dtype == bool and found.shape == mask.shape
    if mask.all():
        assert found.all()
        return
    depth = np.where(mask, distance_transform_edt(mask), distance_transform_edt(~mask)) - 0.5
    far = depth > FARTHEST * size
    np.testing.assert_array_equal(found[far], mask[far])
    np.testing.assert_array_equal(found, estimated_mask(mask, np.random.default_rng(seed)))


def test_masks_of_nobody_and_of_nothing_else_stay():
    for mask in (np.zeros((9, 12), bool), np.ones((9, 12), bool)):
        np.testing.assert_array_equal(estimated_mask(mask, np.random.default_rng(0)), mask)


def test_a_straight_boundary_moves_as_far_as_is_said_on_average_and_smoothly():
    """Half of an image, 300 pixels high: where the boundary lies in each row, over 60 masks."""
    mask = np.zeros((300, 60), bool)
    mask[:, :30] = True
    rng = np.random.default_rng(4)
    moved = np.stack([estimated_mask(mask, rng).sum(1) - 30 for _ in range(60)]) / 300
    assert abs(moved.mean()) < 0.001  # neither wider nor narrower
    assert moved.mean(1).std() == pytest.approx(MASK_OFFSET / np.sqrt(3), rel=0.25)
    ragged = moved - moved.mean(1, keepdims=True)
    assert ragged.std() == pytest.approx(MASK_RAGGEDNESS, rel=0.15)
    near, apart = (np.mean(ragged[:, lag:] * ragged[:, :-lag]) / ragged.var() for lag in (1, 45))
    assert near > 0.8 and abs(apart) < 0.1
