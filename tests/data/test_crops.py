"""Crops: where they lie, that nobody is cut, and what happens when somebody must be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.poses.person import Box, joint_box, mask_box
from data.poses.poses import Poses
from data.transforms import crop_matrix, fit_matrix, frame_size, map_points

sizes = st.tuples(st.integers(16, 400), st.integers(16, 400))
parts = st.tuples(*[st.floats(0, 1)] * 4)


def box_in(size: tuple[int, int], part: tuple[float, ...]) -> Box:
    ends = [sorted((part[axis], part[axis + 2])) for axis in range(2)]
    return Box(*(ends[axis][end] * size[axis] - 0.5 for end in range(2) for axis in range(2)))


@settings(deadline=None, max_examples=150)
@given(source=sizes, target=sizes, part=parts, mode=st.sampled_from(["person", "pad"]))
def test_the_box_is_inside_the_frame_or_there_is_no_crop(source, target, part, mode):
    box = box_in(source, part)
    matrix = crop_matrix(source, target, box, mode)
    cover = max(target[0] / source[0], target[1] / source[1])
    if matrix is None:
        assert mode == "person"
        assert box.width * cover > target[0] or box.height * cover > target[1]
        return
    corners = map_points(np.array([box[:2], box[2:]]), matrix)
    # A box may be half a source pixel larger than the window.
    slack = np.maximum(np.array([box.width, box.height]) * matrix[0, 0] - target, 0) + 1e-6
    assert (slack <= 0.5 * matrix[0, 0] + 1e-5).all()
    assert (corners >= -0.5 - slack).all() and (corners <= np.array(target) - 0.5 + slack).all()
    assert matrix[0, 0] == matrix[1, 1] and matrix[0, 1] == matrix[1, 0] == 0
    if mode == "person":
        assert matrix[0, 0] == pytest.approx(cover)


@settings(deadline=None, max_examples=100)
@given(source=sizes, target=sizes, part=parts)
def test_without_black_borders_the_frame_lies_inside_the_image(source, target, part):
    matrix = crop_matrix(source, target, box_in(source, part), "person")
    if matrix is not None:
        corners = map_points(np.array([(-0.5, -0.5), np.array(target) - 0.5]), np.linalg.inv(matrix))
        slack = 0.5 + 1e-6  # a box may be half a pixel larger than the window
        assert (corners >= -0.5 - slack).all() and (corners <= np.array(source) - 0.5 + slack).all()


@settings(deadline=None, max_examples=50)
@given(source=sizes, target=sizes)
def test_with_nobody_to_mind_the_crop_is_central(source, target):
    expected = fit_matrix(source, target, "cover")
    for mode in ("person", "pad", "centre"):
        np.testing.assert_allclose(crop_matrix(source, target, None, mode), expected, atol=1e-9)
    away = Box(0, 0, 3, 3)
    np.testing.assert_allclose(crop_matrix(source, target, away, "centre"), expected, atol=1e-9)


def test_the_crop_moves_no_further_than_it_must():
    """100 x 200 to a square: the window is 100 high; the central one covers rows 50 to 149."""
    low = crop_matrix((100, 200), (100, 100), Box(40, 20.5, 60, 90), "person")
    np.testing.assert_allclose(low[:2, 2], (0, -21), atol=1e-9)
    inside = crop_matrix((100, 200), (100, 100), Box(40, 60, 60, 140), "person")
    np.testing.assert_allclose(inside[:2, 2], (0, -50), atol=1e-9)


def test_people_too_tall_are_shown_whole_between_borders():
    assert crop_matrix((100, 200), (100, 100), Box(10, -0.5, 90, 199.5), "person") is None
    padded = crop_matrix((100, 200), (100, 100), Box(10, -0.5, 90, 199.5), "pad")
    assert padded[0, 0] == pytest.approx(0.5)
    np.testing.assert_allclose(map_points(np.array([(49.5, 99.5)]), padded), [(49.5, 49.5)], atol=1e-9)


def test_unknown_modes_are_errors():
    with pytest.raises(ValueError, match="mode"):
        crop_matrix((10, 10), (10, 10), None, "middle")


def test_boxes_of_masks_and_skeletons():
    mask = np.zeros((20, 30), bool)
    mask[4:9, 6:16] = True
    assert mask_box(mask) == Box(5.5, 3.5, 15.5, 8.5)
    assert mask_box(np.zeros((4, 4), bool)) is None
    keypoints, scores = np.zeros((2, 1, 17, 2)), np.zeros((2, 1, 17))
    keypoints[0, 0, :2], scores[0, 0, :2] = [(10, 10), (20, 30)], 1
    keypoints[1, 0, 2:4], scores[1, 0, 2:4] = [(12, 5), (200, 8)], 1
    keypoints[1, 0, 5], scores[1, 0, 5] = (0, 90), 0.1  # too unsure to count
    poses = Poses(keypoints, scores, (100, 100), 25.0)
    assert poses.box(margin=0.0) == Box(10, 5, 99.5, 30)
    assert poses.box().top == -0.5  # a tenth of 188 pixels above row 5, cut to the image
    assert Poses(keypoints, 0 * scores, (100, 100), 25.0).box() is None
    assert joint_box([], (4, 4)) is None


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(64, 1024), st.sampled_from([1, 2, 8, 64]))
def test_fitted_sizes_are_multiples_of_the_wanted_aspect(width, height, target, multiple):
    exact = np.array([width, height]) * target / max(width, height)
    fitted = frame_size((width, height), exact.prod(), multiple)
    assert all(side % multiple == 0 and side >= multiple for side in fitted)
    assert abs(max(fitted) - target) <= multiple / 2 + 1e-6
    assert (np.abs(np.array(fitted) - exact) <= multiple / 2 + 1e-6)[exact >= multiple].all()


def test_frame_sizes_keep_the_area():
    assert frame_size((1920, 1080), 512 * 288, 64) == (512, 256)
