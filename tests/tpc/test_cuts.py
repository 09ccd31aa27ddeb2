"""Cuts of a driving clip: what is one, and that nothing is carried over it."""

from pathlib import Path

import numpy as np
import pytest

from core.errors import UserError
from data.cuts import PictureChanges, checked_cuts, pose_jumps
from data.poses.poses import Poses
from data.video.files import VideoReader
from models.sampling import context_windows, window_weights
from tests.tpc_bodies import body, place, poses
from tpc import Calibration, CalibrationConfig, calibrate
from tpc.trajectory import Schedule

REAL = Path(__file__).parents[3] / "shared" / "real"
SIZE = (320, 240)
PERSON = body(np.random.default_rng(0))


def texture(seed: int, height: int = 96, width: int = 200) -> np.ndarray:
    """(height, width, 3) uint8: smooth random colours."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (6, 10, 3))
    rows, columns = np.linspace(0, 4.99, height), np.linspace(0, 8.99, width)
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[:, None, None], (columns - left)[None, :, None]
    upper = coarse[top][:, left] * (1 - right) + coarse[top][:, left + 1] * right
    lower = coarse[top + 1][:, left] * (1 - right) + coarse[top + 1][:, left + 1] * right
    return (upper * (1 - down) + lower * down).astype(np.uint8)


def pan(seed: int, count: int, speed: int = 2) -> list[np.ndarray]:
    return [texture(seed)[:, speed * k : speed * k + 128] for k in range(count)]


def tinted(frame: np.ndarray, channel: int) -> np.ndarray:
    """The frame with one channel alone."""
    return frame * (np.arange(3) == channel % 3).astype(np.uint8)


def walk(count: int, x: float = 80, height: float = 100, turn: float = 0.0, speed: float = 1.0) -> np.ndarray:
    """(count, 1, 17, 2): a person who walks to the right, with an estimator's jitter."""
    noise = np.random.default_rng(count).normal(0, 0.5, (count, 1, 17, 2))
    return np.stack([place(PERSON, height, turn, (x + speed * k, 120)) for k in range(count)])[:, None] + noise


def glitch(values: np.ndarray, frame: int) -> np.ndarray:
    changed = values.copy()
    changed[frame] += 90
    return changed


JOINED = np.concatenate([walk(20), walk(20, 230, 150, -0.6)])
REST = walk(10, speed=0)

PICTURES = {
    "two places": (pan(1, 20) + pan(2, 20), [20]),
    "a short shot": (pan(1, 20) + pan(2, 5) + pan(3, 12), [20, 25]),
    "a fast pan": (pan(1, 9, speed=8) + pan(2, 9, speed=8), [9]),
    "a pan alone": (pan(1, 30), []),
    "from rest to a fast pan": (pan(1, 12, 0) + pan(1, 9, 8), []),
    "a flash": (pan(1, 10) + [np.full((96, 128, 3), 255, np.uint8)] + pan(1, 20)[11:], []),
    "a title": (pan(1, 12) + [np.full((96, 128, 3), 20, np.uint8)] * 8 + pan(2, 12), [12, 20]),
    "light goes out": ([frame // 2 for frame in pan(1, 10)] + pan(1, 20)[10:], []),
    "every frame shown six times": ([f for f in pan(1, 6, speed=12) for _ in range(6)], []),
    "frames are missing": (pan(1, 30)[:10] + pan(1, 30)[16:], []),
    "a shaking camera": ([texture(1)[:, k : k + 128] for k in np.random.default_rng(0).integers(0, 70, 30)], []),
    "ten short shots": ([tinted(frame, k) for k in range(10) for frame in pan(k, 4, 4)], list(range(4, 37, 4))),
    "slides": ([texture(k) for k in range(20)], []),
    "one frame": (pan(1, 1), []),
}
POSES = {
    "two shots": (JOINED, [20]),
    "a walk": (walk(40), []),
    "a sprint from rest": (np.concatenate([REST, walk(10, speed=14)]), []),
    "one wrong frame": (glitch(walk(20), 8), []),
    "every frame another": (np.random.default_rng(0).uniform(0, 200, (30, 1, 17, 2)), []),
    "one of two persons jumps": (np.concatenate([JOINED, walk(40, 20, speed=0)], 1), []),
    "nobody": (np.zeros((20, 0, 17, 2)), []),
    "two frames": (JOINED[19:21], []),
}


@pytest.mark.parametrize("case", PICTURES)
def test_cuts_of_pictures(case):
    frames, expected = PICTURES[case]
    assert PictureChanges().over(frames).cuts() == expected


@pytest.mark.parametrize("case", POSES)
def test_cuts_of_poses(case):
    keypoints, expected = POSES[case]
    assert pose_jumps(keypoints, np.ones(keypoints.shape[:3])) == expected


def cuts_with_poses(frames: list[np.ndarray], jump: int) -> list[int]:
    return PictureChanges().over(frames).cuts([jump])


def test_pictures_say_where_poses_were_cut():
    """Whoever is found late makes no second cut, and a person who stands elsewhere, in the same room, makes one."""
    scores = np.ones((40, 1, 17))
    scores[18:22] = 0
    assert pose_jumps(JOINED, scores) == [22]
    assert cuts_with_poses(pan(1, 20) + pan(2, 20), 22) == [20]
    room = np.stack([pan(1, 1)[0]] * 40)
    room[:20, 60:80, 20:30] = room[20:, 60:80, 90:100] = 128
    grain = np.random.default_rng(0).integers(0, 8, room.shape, np.uint8)
    assert cuts_with_poses(room // 2 + grain, 20) == [20] and cuts_with_poses(room // 2 + grain, 30) == []


@pytest.mark.skipif(not (REAL / "walk.mp4").is_file(), reason="no real clips here")
def test_two_real_clips_joined():
    walk, talk = (list(VideoReader(REAL / name)) for name in ("walk.mp4", "talking_head.mp4"))
    assert PictureChanges().over(walk).cuts() == []
    assert PictureChanges().over(talk).cuts() == [269], "an end card"
    assert PictureChanges().over(walk + talk[:60]).cuts() == [93]
    assert PictureChanges().over((walk + talk[:90])[::6]).cuts() == [16]


def errors(found: Calibration, driving: Poses) -> np.ndarray:
    """(frames,) pixels by which the calibrated reference misses the driving person's keypoints."""
    person = place(PERSON, 120, 0, (160, 120))
    placed = person @ found.matrices[:, 0, :2, :2].transpose(0, 2, 1) + found.matrices[:, 0, None, :2, 2]
    return np.linalg.norm(placed - driving.keypoints[:, 0], axis=-1).mean(1)


@pytest.mark.parametrize("transform", ["procrustes", "affine"])
def test_nothing_is_smoothed_or_bridged_over_a_cut(transform, tmp_path):
    reference = poses(place(PERSON, 120, 0, (160, 120))[None, None], SIZE)
    image, config = np.zeros((240, 320, 3), np.uint8), CalibrationConfig(keypoints="torso", transform=transform)
    driving = poses(JOINED, SIZE)
    found = calibrate(image, reference, driving, SIZE, config)
    assert found.cuts == (20,) and errors(found, driving).max() < 3
    assert errors(calibrate(image, reference, driving, SIZE, config, cuts=[]), driving).max() > 30, "as one shot"
    found.save(tmp_path / "found")
    assert Calibration.load(tmp_path / "found").cuts == (20,) and found.report()["cuts"] == [20]
    # Both gaps are short; only the one within a shot is bridged.
    scores = np.ones((40, 1, 17))
    scores[[8, 9, 19, 20, 21]] = 0
    status = calibrate(image, reference, poses(JOINED, SIZE, scores), SIZE, config, cuts=[20]).status[:, 0]
    assert set(status[8:10]) == {"interpolated"} and set(status[19:22]) == {"uncalibrated"}


def test_persons_are_assigned_anew_in_every_shot():
    """Slots of the estimator change at the cut; in both shots the left person is the reference's left one."""
    left, right = walk(20, 60), walk(20, 200)
    swapped = np.concatenate([walk(20, 190, 60), walk(20, 90, 60)], 1)
    driving = poses(np.concatenate([np.concatenate([left, right], 1), swapped]), SIZE)
    pair = np.stack([place(PERSON, 120, 0, (80, 120)), place(PERSON, 120, 0, (240, 120))])
    config = CalibrationConfig(keypoints="torso")
    found = calibrate(np.zeros((240, 320, 3), np.uint8), poses(pair[None], SIZE), driving, SIZE, config, cuts=[20])
    slots = np.array([[record.slot for record in row] for row in found.records])
    assert (slots[:20] == [0, 1]).all() and (slots[20:] == [1, 0]).all()


def test_groups_and_windows_end_at_cuts():
    plan = Schedule(np.ones((24, 1), bool), 0, "iterative", 0, (6, 13))
    shot = np.searchsorted([6, 13], np.arange(24), side="right")
    for step in range(20):
        source = plan.source_frame(step)[:, 0]
        np.testing.assert_array_equal(shot[source], shot)
    windows = context_windows(40, 8, 2, 0.4, cuts=(3, 20))
    assert sorted({frame for window in windows for frame in window}) == list(range(40))
    assert all(len({np.searchsorted([3, 20], frame, side="right") for frame in window}) == 1 for window in windows)
    total = np.zeros(40)
    for window, weight in zip(windows, window_weights(windows, 40), strict=True):
        total[window.start : window.stop] += weight.numpy()
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    alone = window_weights(context_windows(17, 8, 2), 17)
    joined = window_weights(context_windows(20, 8, 2, cuts=(3,)), 20)
    assert all(np.allclose(a, b) for a, b in zip(alone, joined[1:], strict=True))


@pytest.mark.parametrize("cuts", [[0], [40], [9, 4], [5, 5], [-3]])
def test_cuts_that_cannot_be_are_refused(cuts):
    with pytest.raises(UserError, match=r"cuts=\[.* below the clip's 40"):
        checked_cuts(cuts, 40)
