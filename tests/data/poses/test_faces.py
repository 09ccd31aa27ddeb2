"""Pictures of faces cut out by the keypoints of the head."""

import numpy as np
import pytest

from data.poses.faces import FACE_WIDTH, crop_faces, face_boxes
from data.poses.poses import Poses

EYES = 20.0  # pixels between them
# Nose, eyes and ears of a face that looks at the camera; then of one that is turned to the side, whose far eye and ear
# are hidden.
FRONT = np.array([(0, 16), (10, 0), (-10, 0), (23, 2), (-23, 2)], np.float32)
SIDE = np.array([(-14, 15), (-3, 0), (0, 0), (22, 2), (0, 0)], np.float32)


def head(points: np.ndarray, at=(100, 100), seen=(1, 1, 1, 1, 1), frames=1, size=(200, 200)) -> Poses:
    keypoints, scores = np.zeros((frames, 1, 17, 2), np.float32), np.zeros((frames, 1, 17), np.float32)
    keypoints[:, 0, :5], scores[:, 0, :5] = points + np.array(at), seen
    return Poses(keypoints, scores, size, 25.0)


def test_the_box_is_the_published_one_around_a_face_of_average_size():
    left, top, right, bottom = face_boxes(head(FRONT))[0]
    side = FACE_WIDTH * EYES
    assert right - left == pytest.approx(1.3**0.5 * side, abs=1) == bottom - top
    assert (left + right) / 2 == pytest.approx(100, abs=1)
    added = (1.3**0.5 - 1) * side  # three quarters of it above
    assert top == pytest.approx(116 - side / 2 - 0.75 * added, abs=1)


@pytest.mark.parametrize(
    ("points", "seen"), [(FRONT, (0, 1, 1, 0, 0)), (FRONT, (0, 0, 0, 1, 1)), (SIDE, (1, 1, 0, 1, 0))]
)
def test_a_face_is_about_as_large_whatever_is_seen_of_it(points, seen):
    whole = face_boxes(head(FRONT))[0]
    box = face_boxes(head(points, seen=seen))[0]
    assert 0.8 < (box[2] - box[0]) / (whole[2] - whole[0]) < 1.25
    assert np.abs((box[:2] + box[2:]) / 2 - (whole[:2] + whole[2:]) / 2).max() < 20


def test_frames_without_a_head_have_the_nearest_box_and_none_anywhere_is_none():
    poses = head(FRONT, frames=4)
    poses.keypoints[3] += 30
    poses.scores[[0, 2]] = 0
    boxes = face_boxes(poses)
    assert np.array_equal(boxes[0], boxes[1]) and not np.array_equal(boxes[1], boxes[3])
    assert np.array_equal(boxes[2], boxes[1]), "of two as near the earlier"
    poses.scores[:] = 0
    assert face_boxes(poses) is None and crop_faces(np.zeros((4, 200, 200, 3), np.uint8), poses, 8) is None


@pytest.mark.parametrize("at", [(0, 0), (199, 100), (-500, 100), (100, 900)])
def test_faces_at_and_beyond_the_edge_are_what_the_picture_has_of_them(at):
    frame = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    left, top, right, bottom = face_boxes(head(FRONT, at))[0]
    assert 0 <= left < right <= 200 and 0 <= top < bottom <= 200
    assert crop_faces([frame], head(FRONT, at), 16).shape == (1, 16, 16, 3)


def test_the_face_is_stretched_to_a_square():
    frame = np.zeros((200, 200, 3), np.uint8)
    left, top, right, bottom = face_boxes(head(FRONT, (190, 100)))[0]
    frame[top:bottom, left:right] = 200
    assert (crop_faces([frame], head(FRONT, (190, 100)), 32) == 200).all()
