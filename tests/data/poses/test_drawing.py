import colorsys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.poses.drawing import body_joints, draw_pose, draw_thin_pose

# A standing figure in an image of 512 pixels, COCO order; the person's left is on the right of the image.
FIGURE = np.array(
    [[256, 80], [266, 70], [246, 70], [280, 78], [232, 78], [310, 140], [202, 140], [350, 210], [160, 210]]
    + [[330, 290], [150, 290], [290, 290], [222, 290], [300, 380], [215, 380], [305, 470], [210, 470]],
    dtype=np.float32,
)


def figure_at(side: int) -> np.ndarray:
    return ((FIGURE + 0.5) * side / 512 - 0.5)[None]


def hue_colour(step: int, brightness: float = 1.0) -> np.ndarray:
    return np.array([255 * v for v in colorsys.hsv_to_rgb(step / 18, 1, brightness)])


def test_neck_is_the_mean_of_the_shoulders_and_sides_are_kept():
    joints, visible = body_joints(FIGURE[None], np.ones((1, 17)), 0.3)
    assert visible.all()
    np.testing.assert_allclose(joints[0, 1], (FIGURE[5] + FIGURE[6]) / 2)
    np.testing.assert_allclose(joints[0, [2, 5, 8, 11, 14, 15]], FIGURE[[6, 5, 12, 11, 2, 1]])


def test_joints_and_limbs_have_the_openpose_colours():
    image = draw_pose(figure_at(512), np.ones((1, 17)), (512, 512))
    # right shoulder is joint 2, left wrist joint 7, left ankle joint 13, left ear joint 17
    for keypoint, step in ((6, 2), (9, 7), (15, 13), (3, 17)):
        x, y = FIGURE[keypoint].round().astype(int)
        np.testing.assert_allclose(image[y, x], hue_colour(step), atol=2)
    # neck to right shoulder is limb 0, left hip to left knee limb 10, neck to nose limb 12; limbs are darker
    for (a, b), step in ((((256, 140), FIGURE[6]), 0), ((FIGURE[11], FIGURE[13]), 10), (((256, 140), FIGURE[0]), 12)):
        x, y = np.round((np.array(a) + b) / 2).astype(int)
        np.testing.assert_allclose(image[y, x], hue_colour(step, 0.6), atol=2)


def test_limbs_are_eight_pixels_wide_at_512():
    image = draw_pose(figure_at(512), np.ones((1, 17)), (512, 512))
    column = image[120:160, 229].astype(float).max(axis=-1)  # across the limb from the neck to the right shoulder
    assert column.sum() / (0.6 * 255) == pytest.approx(8, abs=0.7)


@pytest.mark.parametrize("side", [64, 128, 256])
def test_small_images_are_what_large_ones_average_to(side):
    large = draw_pose(figure_at(2048), np.ones((1, 17)), (2048, 2048))
    expected = cv2.resize(large, (side, side), interpolation=cv2.INTER_AREA).astype(float)
    image = draw_pose(figure_at(side), np.ones((1, 17)), (side, side)).astype(float)
    assert np.sqrt(np.mean((image - expected) ** 2)) < 2.5
    assert image.sum() == pytest.approx(expected.sum(), rel=0.15)


def test_sub_pixel_motion_shows():
    still = draw_pose(figure_at(128), np.ones((1, 17)), (128, 128))
    moved = draw_pose(figure_at(128) + 0.25, np.ones((1, 17)), (128, 128))
    assert 0 < np.abs(still.astype(int) - moved).mean() < 3


def test_only_visible_keypoints_are_drawn():
    scores = np.zeros((1, 17))
    assert not draw_pose(figure_at(128), scores, (128, 96)).any()
    scores[0, 9] = 0.31  # one wrist alone: a joint, no limb
    image = draw_pose(figure_at(128), scores, (128, 128))
    rows, columns = np.nonzero(image.any(axis=-1))
    np.testing.assert_allclose([columns.mean(), rows.mean()], figure_at(128)[0, 9], atol=0.3)
    assert not draw_pose(figure_at(128), scores, (128, 128), threshold=0.31).any()


def test_no_persons_give_a_black_image_of_the_size():
    image = draw_pose(np.zeros((0, 17, 2)), np.zeros((0, 17)), (40, 30))
    assert image.shape == (30, 40, 3) and image.dtype == np.uint8 and not image.any()


def test_several_persons_are_drawn_together():
    both = np.concatenate([figure_at(256) - (60, 0), figure_at(256) + (60, 0)])
    image = draw_pose(both, np.ones((2, 17)), (256, 256))
    halves = [draw_pose(both[k : k + 1], np.ones((1, 17)), (256, 256)) for k in (0, 1)]
    np.testing.assert_array_equal(image[:, :128], halves[0][:, :128])
    np.testing.assert_array_equal(image[:, 128:], halves[1][:, 128:])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e3, 1e7, 1e30]), st.integers(1, 70), st.integers(1, 70))
def test_any_coordinates_are_survived(seed, spread, width, height):
    rng = np.random.default_rng(seed)
    keypoints = rng.normal(0, spread, (2, 17, 2))
    keypoints[0, 0] = np.nan
    keypoints[1, 3] = keypoints[1, 4]
    assert draw_pose(keypoints, np.ones((2, 17)), (width, height)).shape == (height, width, 3)


def test_far_keypoints_leave_the_direction_of_a_limb():
    keypoints, scores = figure_at(256), np.zeros((1, 17))
    scores[0, [7, 9]] = 1
    keypoints[0, 7], keypoints[0, 9] = (128, 128), (128 + 4000, 128)
    rows, columns = np.nonzero(draw_pose(keypoints, scores, (256, 256)).any(axis=-1))
    assert columns.max() == 255 and np.abs(rows - 128).max() <= 3


def test_the_skeleton_alone_is_drawn():
    drawn = draw_pose(figure_at(128), np.ones((1, 17)), (160, 128))
    assert 0.005 < drawn.any(axis=-1).mean() < 0.2
    x, y = figure_at(128)[0, 6].round().astype(int)
    assert drawn[y, x].max() > 80


@pytest.mark.parametrize("shapes", [((17, 2), (17,)), ((1, 18, 2), (1, 18)), ((1, 17, 2), (2, 17))])
def test_wrong_shapes_are_named(shapes):
    with pytest.raises(ValueError, match=r"\(persons, 17, 2\)"):
        draw_pose(np.zeros(shapes[0]), np.zeros(shapes[1]), (64, 64))


@pytest.mark.parametrize(("side", "half_width"), [(128, 1), (1080, 4)])
def test_thin_figures_are_of_few_pixels_and_hard_edges(side, half_width):
    """The published code's width, `int(side / 200) - 1` to either side of a line's middle, and its colours."""
    figure = figure_at(side)
    image = draw_thin_pose(figure, np.ones((1, 17)), (side, side))
    colours = {tuple(colour) for colour in image.reshape(-1, 3)}
    known = {tuple(hue_colour(step).astype(int)) for step in range(18)}
    known |= {tuple(int(value * 0.6) for value in colour) for colour in known}
    assert colours <= {(0, 0, 0)} | known, "no colour between two"
    x, y = (figure[0, 5] + figure[0, 6]) / 2  # half of the way between the shoulders: the neck, with its joint
    column = image[:, int((x + figure[0, 5, 0]) / 2)].any(-1)  # through one shoulder's line
    rows = np.flatnonzero(column[int(y) - side // 50 : int(y) + side // 50])
    assert 1 <= len(rows) <= 2 * half_width + 1
    assert not draw_thin_pose(figure, np.full((1, 17), 0.49), (side, side)).any()
