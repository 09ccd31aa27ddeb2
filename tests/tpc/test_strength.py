"""How far a person goes from the uncalibrated place to the calibrated one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.transforms import fit_matrix
from tests.tpc_bodies import SIZE, TORSO, bodies, body, image, place, poses, reference, silhouette
from tpc import CalibrationConfig, calibrate
from tpc.procrustes import apply_matrix
from tpc.trajectory import Track, partway

CENTRE = np.array([30.0, 50.0])


def similarity(scale: float, degrees: float, onto: tuple[float, float]) -> np.ndarray:
    """(3, 3) that turns and resizes about `CENTRE` and takes it to a place."""
    angle = np.radians(degrees)
    matrix = np.eye(3)
    matrix[:2, :2] = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix[:2, 2] = onto - matrix[:2, :2] @ CENTRE
    return matrix


def gone(end: np.ndarray, start: np.ndarray, **options) -> np.ndarray:
    track = Track(end[None], np.ones(1, bool), np.zeros(1, bool))
    return partway(track, start, CENTRE, CalibrationConfig(transform="procrustes", **options)).matrices[0]


@pytest.mark.parametrize(
    ("strength", "expected"),
    [(0.0, (0.5, 170, (20, 40))), (0.5, (1.0, 180, (40, 50))), (0.25, (0.5**0.5, 175, (30, 45))), (1.0, None)],
)
def test_scale_goes_evenly_in_its_logarithm_the_angle_the_short_way_and_the_centre_in_a_line(strength, expected):
    start, end = similarity(0.5, 170, (20, 40)), similarity(2.0, -170, (60, 60))
    found = gone(end, start, strength=strength)
    np.testing.assert_allclose(found, end if expected is None else similarity(*expected), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.floats(-3, 3), st.floats(-170, 170), st.floats(-50, 50))
def test_the_way_is_the_same_from_either_end(strength, size, degrees, across):
    start, end = similarity(1, 0, (0, 0)), similarity(np.exp(size), degrees, (across, 7))
    there, back = gone(end, start, strength=strength), gone(start, end, strength=1 - strength)
    np.testing.assert_allclose(there, back, atol=1e-9)


def test_frames_without_a_transform_are_left_and_affine_coefficients_go_in_a_line():
    known = np.array([True, False])
    sheared = np.array([[1, 0.5, 3], [0, 2, 4], [0, 0, 1.0]])
    track = Track(np.stack([sheared, np.eye(3)]), known, ~known & False)
    half = partway(track, np.eye(3), CENTRE, CalibrationConfig(transform="affine", strength=0.5)).matrices
    np.testing.assert_allclose(half, [(sheared + np.eye(3)) / 2, np.eye(3)])


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_a_bent_person_is_moved_as_a_whole(strength):
    """Parts become S M^-1 P, and the painted mask what that map makes of the mask at full strength."""
    points, size = reference(), (160, 128)
    driving = place(body(np.random.default_rng(3)), 60, 0.3, (90, 60))
    given = {"reference_masks": silhouette(points)[None], "driving_masks": silhouette(driving, size)[None, None]}
    full, part = (
        calibrate(
            image(),
            poses(points[None, None]),
            poses(driving[None, None], size),
            size,
            CalibrationConfig(strength=each),
            **given,
        )
        for each in (1.0, strength)
    )
    whole, moved = full.records[0][0], part.records[0][0]
    assert whole.parts and moved.following == whole.following
    after = np.array(moved.matrix) @ np.linalg.inv(whole.matrix)
    for name, matrix in whole.parts.items():
        np.testing.assert_allclose(moved.parts[name], after @ matrix, atol=1e-9)
    if strength == 0:
        fitted = np.linalg.inv(part.frame_map) @ fit_matrix(SIZE, size, "contain")
        np.testing.assert_allclose(moved.matrix, fitted, atol=1e-9)
    np.testing.assert_array_equal(part.target_masks[0], full.target_masks[0])
    rows, columns = np.nonzero(full.masks[0])
    inside = apply_matrix(after, np.stack([columns, rows], -1).astype(float)).round().astype(int)
    inside = inside[((inside >= 0) & (inside < size)).all(1)]
    assert part.masks[0][inside[:, 1], inside[:, 0]].mean() > 0.95
    area = np.count_nonzero(part.masks[0]) / np.count_nonzero(full.masks[0])
    assert area == pytest.approx(np.linalg.det(after), rel=0.05)


def test_a_bridged_frame_shows_the_person_partway_and_its_target_stays_with_the_driver():
    points = bodies(1)[0]
    driving = np.stack([points + [4 * frame, 0] for frame in range(3)])[:, None]
    scores = np.ones(driving.shape[:3])
    scores[1] = 0
    full, none = (
        calibrate(
            image(),
            poses(points[None, None]),
            poses(driving, scores=scores),
            SIZE,
            CalibrationConfig(**{**vars(TORSO), "strength": strength}),
        )
        for strength in (1.0, 0.0)
    )
    assert full.status[1, 0] == none.status[1, 0] == "interpolated"
    np.testing.assert_array_equal(none.target_masks[:], full.target_masks[:])
    np.testing.assert_allclose(none.matrices[:, 0], np.tile(np.eye(3), (3, 1, 1)), atol=1e-9)
    assert len(none.images) == 1 and len(full.images) == 3
