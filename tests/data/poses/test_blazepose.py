"""BlazePose on a photograph that ships with scikit-image (the astronaut: head, torso, arms partly hidden)."""

import math

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from data.poses.blazepose import BlazePose, _agreeing, _person, _tiles
from data.poses.blazepose_networks import (
    COCO_FROM_BLAZEPOSE,
    Detection,
    Landmarks,
    Roi,
    _anchor_centres,
    _decode_boxes,
    crop_region,
    refine_with_heatmaps,
    weighted_clusters,
)
from data.poses.dwpose import turn_image
from data.poses.person import person_box
from data.poses.poses import estimate_image, estimate_poses
from data.poses.weights import fetch_models

# Where a person sees them in the photograph, read off by eye: nose, eyes (left, right), shoulders (left, right).
SEEN_BY_EYE = {0: (216, 125), 1: (243, 104), 2: (202, 106), 5: (299, 240), 6: (115, 240)}


@pytest.fixture(scope="module")
def blazepose():
    try:
        fetch_models()
    except UserError as error:
        pytest.skip(f"the model files cannot be had: {error}")
    return BlazePose(threads=1)


@pytest.fixture(scope="module")
def photo():
    return skimage.data.astronaut()


@pytest.fixture(scope="module")
def upright(blazepose, photo):
    (person,) = blazepose.image(photo)
    return person


def shrunk_into(photo: np.ndarray, side: int, canvas: tuple[int, int], corner: tuple[int, int]) -> np.ndarray:
    """The photograph at `side` pixels on grey, its top left corner at `corner`."""
    image = np.full((canvas[1], canvas[0], 3), 128, np.uint8)
    x, y = corner
    image[y : y + side, x : x + side] = cv2.resize(photo, (side, side), interpolation=cv2.INTER_AREA)
    return image


def test_keypoints_are_where_the_eye_sees_them(upright):
    for index, place in SEEN_BY_EYE.items():
        assert np.linalg.norm(upright.keypoints[index] - place) < 20, index
        assert upright.scores[index] > 0.8
    # Her left is on the right of the image.
    assert (upright.keypoints[[1, 3, 5, 7, 11], 0] > upright.keypoints[[2, 4, 6, 8, 12], 0]).all()
    assert upright.confidence > 0.5


def test_keypoints_that_the_image_does_not_show_have_no_score(upright):
    outside = (upright.keypoints < -0.5).any(axis=-1) | (upright.keypoints > 511.5).any(axis=-1)
    assert outside[[15, 16]].all()  # the ankles are below the image
    assert not upright.scores[outside].any()
    assert upright.scores.min() >= 0 and upright.scores.max() <= 1


def test_the_mask_covers_the_person_and_not_the_background(upright):
    assert upright.mask.shape == (512, 512) and upright.mask.dtype == bool
    assert upright.mask[100:140, 200:260].all() and upright.mask[330:420, 150:250].mean() > 0.98
    assert upright.mask[:200, 440:].mean() < 0.02 and upright.mask[:150, :100].mean() < 0.02
    assert 0.35 < upright.mask.mean() < 0.55


@pytest.mark.parametrize("degrees", [40, 90, 155, 180, 270])
def test_a_turned_image_gives_turned_keypoints(blazepose, photo, upright, degrees):
    turned, matrix = turn_image(photo, math.radians(degrees))
    (person,) = blazepose.image(turned)
    sure = (upright.scores > 0.8) & (person.scores > 0.8)
    assert sure[[0, 1, 2, 3, 4, 5, 6]].all()
    expected = upright.keypoints @ matrix[:, :2].T + matrix[:, 2]
    distances = np.linalg.norm(person.keypoints - expected, axis=-1)[sure]
    assert np.median(distances) < 5 and distances.max() < 35  # of a person 500 pixels high
    mask = cv2.warpAffine(upright.mask.astype(np.uint8), matrix, turned.shape[1::-1]) > 0
    assert (mask & person.mask).sum() / (mask | person.mask).sum() > 0.85


@pytest.mark.parametrize("side, corner", [(420, (500, 20)), (200, (40, 250)), (200, (700, 30))])
def test_small_persons_are_found_anywhere(blazepose, photo, upright, side, corner):
    image = shrunk_into(photo, side, (1000, 500), corner)
    (person,) = blazepose.image(image)
    head = [0, 1, 2, 3, 4]
    expected = (upright.keypoints[head] + 0.5) * side / 512 - 0.5 + corner
    assert np.linalg.norm(person.keypoints[head] - expected, axis=-1).max() < 0.04 * side


def test_two_persons_one_of_them_upside_down(blazepose, photo):
    image = np.concatenate([photo, photo[::-1, ::-1]], axis=1)
    persons = blazepose.image(image, max_persons=3)
    assert len(persons) == 2
    left, right = sorted(persons, key=lambda person: person.keypoints[0, 0])
    assert np.linalg.norm(left.keypoints[0] - SEEN_BY_EYE[0]) < 20
    assert np.linalg.norm(right.keypoints[0] - (1023 - SEEN_BY_EYE[0][0], 511 - SEEN_BY_EYE[0][1])) < 20
    assert not (left.mask & right.mask).any()
    assert len(blazepose.image(image, max_persons=1)) == 1


def test_nobody_is_found_where_nobody_is(blazepose):
    for image in (skimage.data.coffee(), np.zeros((90, 40, 3), np.uint8)):
        assert blazepose.image(image) == []
    assert estimate_image(np.full((64, 64, 3), 200, np.uint8), blazepose).poses.persons == 0


def test_grey_tiny_and_extreme_images_are_survived(blazepose, photo):
    for image in (photo[:1, :1], photo[:3], np.ascontiguousarray(photo[::64, ::64])):
        assert isinstance(blazepose.image(image), list)
    grey = np.repeat(photo.mean(axis=-1).astype(np.uint8)[..., None], 3, axis=-1)
    assert len(blazepose.image(grey)) == 1


def test_a_video_is_followed_through_cuts_turns_and_absence(blazepose, photo):
    small = cv2.resize(photo, (256, 256), interpolation=cv2.INTER_AREA)
    frames = [np.roll(small, 2 * k, axis=1) for k in range(6)]
    frames += [np.full_like(small, 90)] * 3
    frames += [small[::-1, ::-1].copy()] * 2  # after the cut the person is upside down
    frames += [np.full_like(small, 90)] * 2
    estimate = estimate_poses(iter(frames), 25, blazepose, max_persons=2)
    poses = estimate.poses
    assert (poses.frames, poses.persons, poses.size) == (13, 1, (256, 256))
    present = poses.present()[:, 0]
    assert present[:6].all() and not present[6:9].any() and not present[11:].any()
    nose = np.array(SEEN_BY_EYE[0]) / 2
    for k in range(6):
        assert np.linalg.norm(poses.keypoints[k, 0, 0] - (nose + (2 * k, 0))) < 12
    assert estimate.masks.shape == (13, 1, 256, 256)
    np.testing.assert_array_equal(estimate.masks[:].any(axis=(2, 3))[:, 0], present)


def test_a_person_who_starts_upside_down_is_tracked(blazepose, photo):
    frames = [cv2.resize(photo, (256, 256), interpolation=cv2.INTER_AREA)[::-1, ::-1].copy()] * 3
    poses = estimate_poses(frames, 25, blazepose).poses
    assert poses.present().all()
    assert np.linalg.norm(poses.keypoints[2, 0, 0] - (255.5 - np.array(SEEN_BY_EYE[0]) / 2)) < 12


def test_persons_keep_their_slots_when_one_leaves_and_returns(blazepose, photo):
    small = cv2.resize(photo, (256, 256), interpolation=cv2.INTER_AREA)
    absent = np.full_like(small, 90)
    pairs = [(small, small)] * 3 + [(absent, small)] * 3 + [(small, small)] * 3
    poses = estimate_poses([np.concatenate(pair, axis=1) for pair in pairs], 25, blazepose, max_persons=2).poses
    assert poses.persons == 2
    slot_of_left = 0 if poses.keypoints[0, 0, 0, 0] < 256 else 1
    present = poses.present()
    assert present[:, 1 - slot_of_left].all()
    np.testing.assert_array_equal(present[:6, slot_of_left], [1, 1, 1, 0, 0, 0])
    assert present[6:, slot_of_left].any()
    noses = poses.keypoints[:, :, 0, 0]
    assert (noses[:, 1 - slot_of_left] > 256).all()
    assert (noses[present[:, slot_of_left], slot_of_left] < 256).all()


@settings(max_examples=30, deadline=None)
@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(5, 300), st.floats(-3.1, 3.1))
def test_regions_map_up_to_up(x, y, radius, rotation):
    up = np.array([math.sin(rotation), -math.cos(rotation)])
    roi = Roi.from_points(np.array([x, y]), np.array([x, y]) + radius * up)
    assert roi.side == pytest.approx(2.5 * radius)
    assert math.remainder(roi.rotation - rotation, 2 * math.pi) == pytest.approx(0, abs=1e-6)
    matrix = roi.matrix(256)
    np.testing.assert_allclose(matrix @ (128, 128, 1), (x, y), atol=1e-6)
    top = matrix @ (128, 0, 1)
    np.testing.assert_allclose(top, np.array([x, y]) + roi.side / 2 * up, atol=1e-6)


def test_crops_are_exact_copies_when_nothing_is_scaled():
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    np.testing.assert_array_equal(crop_region(image, Roi(30, 20, 16, 0.0), 16), image[12:28, 22:38])
    np.testing.assert_array_equal(crop_region(image, Roi(30, 20, 16, math.pi), 16), image[12:28, 22:38][::-1, ::-1])
    # A person who lies with the head to the right stands upright in the crop.
    np.testing.assert_array_equal(crop_region(image, Roi(30, 20, 16, math.pi / 2), 16), np.rot90(image[12:28, 22:38]))
    outside = crop_region(image, Roi(0, 0, 16, 0.0), 16)
    assert not outside[:8].any() and not outside[:, :8].any()
    np.testing.assert_array_equal(outside[8:, 8:], image[:8, :8])


def test_large_regions_do_not_alias():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 200  # finer than the crop can show
    crop = crop_region(stripes, Roi(256, 256, 512, 0.0), 64)
    np.testing.assert_allclose(crop, 100, atol=1)


def test_anchors_lie_at_the_centres_of_cells():
    anchors = _anchor_centres()
    assert anchors.shape == (28 * 28 * 2 + 14 * 14 * 2 + 7 * 7 * 6, 2) == (2254, 2)
    np.testing.assert_allclose(anchors[[0, 1, 2, 56]], [(4, 4), (4, 4), (12, 4), (4, 12)])
    np.testing.assert_allclose(anchors[[1568, 1960, -1]], [(8, 8), (16, 16), (208, 208)])
    boxes, points = _decode_boxes(np.arange(12.0)[None], np.array([[100.0, 50.0]]))
    np.testing.assert_allclose(boxes, [[99, 49.5, 101, 52.5]])
    np.testing.assert_allclose(points[0], [(104, 55), (106, 57), (108, 59), (110, 61)])


def test_boxes_of_one_person_form_one_cluster():
    boxes = np.array([[0, 0, 10, 10], [50, 0, 60, 10], [1, 0, 11, 10], [4, 0, 14, 10], [8, 0, 18, 10]], float)
    clusters = weighted_clusters(boxes, np.array([0.9, 0.95, 0.7, 0.8, 0.6]))
    assert [cluster.tolist() for cluster in clusters] == [[1], [0, 3, 2], [4]]
    assert weighted_clusters(np.zeros((0, 4)), np.zeros(0)) == []


def test_landmarks_move_to_the_centre_of_a_sure_heatmap():
    heatmaps = np.zeros((64, 64, 3))
    heatmaps[20, 30, 0], heatmaps[20, 31, 0] = 0.9, 0.3
    heatmaps[20, 30, 1] = 0.4  # unsure: the landmark stays
    points, highest = refine_with_heatmaps(np.array([[119.0, 84], [119, 84], [-9, 84]]), heatmaps, 256)
    np.testing.assert_allclose(points, [(4 * (30 * 0.9 + 31 * 0.3) / 1.2, 80), (119, 84), (-9, 84)])
    np.testing.assert_allclose(highest, [0.9, 0.4, 0])


def look(places: np.ndarray, sharpness: float) -> Landmarks:
    ones = np.ones(33, np.float32)
    roi = Roi(50, 50, 100, 0.0)
    return Landmarks(places, ones, ones, sharpness * ones, 1.0, np.ones((256, 256), np.float32), roi, roi)


def test_a_look_that_is_at_a_loss_hardly_counts():
    places = np.random.default_rng(0).uniform(20, 80, (33, 2))
    sure, lost = look(places, 0.9), look(places + 30, 0.3)
    person = _person([sure, lost], (100, 100))
    assert np.linalg.norm(person.keypoints - places[COCO_FROM_BLAZEPOSE], axis=-1).max() < 1
    alone = _person([sure], (100, 100))
    np.testing.assert_allclose(alone.scores, 1, rtol=1e-6)
    np.testing.assert_allclose(_person([lost], (200, 200)).scores, 0.25, rtol=1e-5)
    assert (_person([sure, look(places + 30, 0.9)], (200, 200)).scores < 0.5).all()  # two sure looks that disagree
    assert alone.mask.mean() == pytest.approx(1, abs=0.05)


def test_rotations_that_agree_are_evidence():
    here = Roi(100, 100, 80, 0.0)
    hits = [(0, Detection(here, 0.9))]
    hits += [(1, Detection(Roi(104, 98, 85, 0.2), 0.6)), (1, Detection(Roi(103, 101, 80, 0.1), 0.8))]
    hits += [(2, Detection(Roi(100, 100, 80, math.pi), 0.95)), (3, Detection(Roi(200, 100, 80, 0.0), 0.5))]
    candidates = _agreeing(hits, rotations=4)
    assert [candidate.score for candidate in candidates] == pytest.approx([1.7 / 4, 0.95 / 4, 0.5 / 4])
    assert candidates[0].roi.x == pytest.approx((0.9 * 100 + 0.6 * 104 + 0.8 * 103) / 2.3)
    assert 80 < candidates[0].roi.side < 85 and 0 < candidates[0].roi.rotation < 0.2
    assert abs(candidates[1].roi.rotation) == pytest.approx(math.pi)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_tiles_cover_the_image(width, height):
    covered = np.zeros((height, width), bool)
    for left, top, tile in _tiles(covered):
        tile[:] = True
        assert covered[top, left] and max(tile.shape) <= math.ceil(max(width, height) / 2)
    assert covered.all()


def test_the_box_of_the_person(upright):
    box = person_box(upright.keypoints, upright.scores)
    assert 60 < box.left < 140 and 80 < box.top < 115 and box.bottom <= 511.5
