"""Which person of the clip is which of the reference: permutations, crossings, those who come and go."""

from itertools import permutations

import numpy as np
import pytest

from tests.tpc_bodies import SIZE, TORSO, bodies, body, image, place, poses, reference
from tpc import CalibrationConfig, calibrate
from tpc.matching import assign_persons
from tpc.procrustes import apply_matrix


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_three_persons_in_every_permutation(order):
    people = np.stack(bodies(3))
    frames = 6
    driving = np.stack([people * 0.9 + [3 * f, 2] for f in range(frames)])
    shuffled = driving[:, list(order)]
    found = calibrate(
        image(0, (220, 128)), poses(people[None], (220, 128)), poses(shuffled, (220, 128)), (220, 128), TORSO
    )
    slots = np.array([[record.slot for record in row] for row in found.records])
    np.testing.assert_array_equal(slots, np.tile(np.argsort(order), (frames, 1)))
    for frame in range(frames):
        for person in range(3):
            moved = apply_matrix(found.matrices[frame, person], people[person])
            np.testing.assert_allclose(moved, driving[frame, person], atol=0.1)


def test_slots_may_change_from_frame_to_frame():
    rng = np.random.default_rng(0)
    people = np.stack(bodies(3))
    orders = np.stack([rng.permutation(3) for _ in range(20)])
    driving = np.stack([(people + [2 * f, 0])[order] for f, order in enumerate(orders)])
    seen = np.ones((20, 3, 17), bool)
    found = assign_persons(people, seen[0], (220, 128), driving, seen, (220, 128))
    np.testing.assert_array_equal(found, np.argsort(orders, axis=1))


def test_persons_who_cross_keep_their_identity():
    left, right = bodies(2)
    frames = 40
    shift = np.linspace(0, 80, frames)
    driving = np.stack([np.stack([left + [s, 0], right - [s, 4]]) for s in shift])
    driving[::2] = driving[::2, ::-1]  # and their slots alternate
    seen = np.ones((frames, 2, 17), bool)
    found = assign_persons(np.stack([left, right]), seen[0], (220, 128), driving, seen, (220, 128))
    expected = np.tile([0, 1], (frames, 1))
    expected[::2] = [1, 0]
    np.testing.assert_array_equal(found, expected)


def test_a_person_who_leaves_and_returns_is_the_same_person():
    people = np.stack(bodies(2))
    driving = np.tile(people, (60, 1, 1, 1))
    seen = np.ones((60, 2, 17), bool)
    seen[15:55, 1] = False  # longer than a track is kept
    driving[55:, 1] += [20, 0]
    found = assign_persons(people, seen[0], (220, 128), driving, seen, (220, 128))
    np.testing.assert_array_equal(found[:, 0], np.zeros(60))
    np.testing.assert_array_equal(found[:, 1], np.where(seen[:, 1, 0], 1, -1))


def test_more_persons_in_the_clip_than_in_the_reference():
    small, large = place(body(np.random.default_rng(1)), 30, 0, (30, 64)), reference()
    driving = np.tile(np.stack([small, large]), (5, 1, 1, 1))
    found = calibrate(image(), poses(large[None, None]), poses(driving), SIZE, TORSO)
    assert found.persons == 1 and {row[0].slot for row in found.records} == {1}
    # The other one is known to be somebody whom the reference does not show.
    other = found.other_masks[0]
    assert other[place_rows(small)].all() and not other[place_rows(large)].all()


def place_rows(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.round(points[[5, 6, 11, 12]]).astype(int).T
    return y, x


def test_fewer_persons_in_the_clip_than_in_the_reference():
    people = np.stack(bodies(2))
    found = calibrate(
        image(0, (220, 128)),
        poses(people[None], (220, 128)),
        poses(np.tile(people[1:], (4, 1, 1, 1)), (220, 128)),
        (220, 128),
        TORSO,
    )
    assert (found.status[:, 0] == "uncalibrated").all() and (found.status[:, 1] == "calibrated").all()


def test_given_slots_are_taken_as_they_are():
    people = np.stack(bodies(2))
    config = CalibrationConfig(keypoints="trunk", match="given")
    driving = poses(np.tile(people[::-1], (3, 1, 1, 1)), (220, 128))
    found = calibrate(image(0, (220, 128)), poses(people[None], (220, 128)), driving, (220, 128), config)
    assert [[r.slot for r in row] for row in found.records] == [[0, 1]] * 3
