import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from data.config import COCO_KEYPOINTS, PoseConfig
from data.poses.person import (
    COCO_MIRROR,
    Box,
    PersonEstimate,
    assign_slots,
    box_iou,
    by_prominence,
    distinct_persons,
    is_same_person,
    keypoint_similarity,
    person_box,
)
from data.poses.poses import PoseEstimate, Poses, estimate_image, estimate_poses, local_lines, open_estimator


def random_poses(frames=4, persons=2, seed=0, size=(64, 48)) -> Poses:
    rng = np.random.default_rng(seed)
    return Poses(rng.uniform(0, 40, (frames, persons, 17, 2)), rng.uniform(0.1, 1, (frames, persons, 17)), size, 25)


def person(x: float, y: float, height: float = 100, seen: float = 1.0, mask=None, seed: int = 0) -> PersonEstimate:
    """A person with scattered keypoints in a box of the height, half as wide, whose centre is (x, y)."""
    places = np.random.default_rng(seed).uniform(-0.5, 0.5, (17, 2))
    places[0], places[16] = (-0.5, -0.5), (0.5, 0.5)
    keypoints = (places * (height / 2, height) + (x, y)).astype(np.float32)
    return PersonEstimate(keypoints, np.full(17, seen, np.float32), mask, seen)


def test_coco_names_and_mirror():
    assert len(COCO_KEYPOINTS) == 17
    for index, name in enumerate(COCO_KEYPOINTS):
        swapped = {"left": "right", "right": "left"}.get(name.split("_")[0])
        mirrored = name.replace(name.split("_")[0], swapped) if swapped else name
        assert COCO_KEYPOINTS[COCO_MIRROR[index]] == mirrored


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(0, 3), st.floats(0.5, 240))
def test_save_and_load_give_the_same_poses(tmp_path_factory, frames, persons, fps):
    poses = Poses(random_poses(frames, persons).keypoints, random_poses(frames, persons).scores, (640, 480), fps)
    path = tmp_path_factory.mktemp("poses") / "clip.npz"
    poses.save(path)
    loaded = Poses.load(path)
    np.testing.assert_array_equal(loaded.keypoints, poses.keypoints)
    np.testing.assert_array_equal(loaded.scores, poses.scores)
    assert (loaded.size, loaded.fps, loaded.frames, loaded.persons) == ((640, 480), fps, frames, persons)
    with np.load(path) as archive:
        assert sorted(archive.files) == ["fps", "keypoints", "scores", "size"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"keypoints": np.zeros((4, 17, 2))}, r"\(frames, persons, 17, 2\)"),
        ({"keypoints": np.zeros((4, 2, 18, 2))}, r"\(frames, persons, 17, 2\)"),
        ({"scores": np.zeros((4, 1, 17))}, "scores must have the shape"),
        ({"scores": np.full((4, 2, 17), 1.5)}, r"\[0, 1\]"),
        ({"scores": np.full((4, 2, 17), np.nan)}, "finite"),
        ({"keypoints": np.full((4, 2, 17, 2), np.inf)}, "finite"),
        ({"keypoints": np.full((4, 2, 17, 2), "a")}, "real numbers"),
        ({"size": (0, 10)}, "size must be"),
        ({"size": (1, 2, 3)}, "size must be"),
        ({"fps": 0}, "fps must be"),
        ({"fps": np.nan}, "fps must be"),
    ],
)
def test_wrong_poses_are_refused_and_named(tmp_path, change, message):
    poses = random_poses()
    values = {"keypoints": poses.keypoints, "scores": poses.scores, "size": poses.size, "fps": poses.fps} | change
    with pytest.raises(ValueError, match=message):
        Poses(**values)
    np.savez(tmp_path / "bad.npz", **values)
    with pytest.raises(UserError, match=f"driving_poses=.*bad.npz is not a pose file: .*{message}"):
        Poses.load(tmp_path / "bad.npz", "driving_poses")


def test_files_that_are_no_pose_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="poses=.*missing.npz does not exist"):
        Poses.load(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match="is not a pose file"):
        Poses.load(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", keypoints=np.zeros((1, 1, 17, 2)))
    with pytest.raises(UserError, match="has no array 'scores'"):
        Poses.load(tmp_path / "other.npz")
    np.savez(tmp_path / "objects.npz", keypoints=np.array([{}], dtype=object), scores=0, size=0, fps=0)
    with pytest.raises(UserError, match="is not a pose file"):
        Poses.load(tmp_path / "objects.npz")
    random_poses().save(tmp_path / "whole.npz")
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "whole.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is not a pose file"):
        Poses.load(tmp_path / "whole.npz")


def test_frames_and_persons_can_be_picked():
    poses = random_poses(6, 2)
    assert len(poses) == poses.frames == 6
    np.testing.assert_array_equal(poses[2:5].keypoints, poses.keypoints[2:5])
    np.testing.assert_array_equal(poses[-1].keypoints, poses.keypoints[5:])
    np.testing.assert_array_equal(poses[np.array([3, 0])].scores, poses.scores[[3, 0]])
    np.testing.assert_array_equal(poses.person(-1).keypoints, poses.keypoints[:, 1:])
    with pytest.raises(IndexError):
        poses[6]
    with pytest.raises(IndexError):
        poses.person(2)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 900), st.integers(2, 900))
def test_resizing_maps_edges_to_edges(width, height):
    corners = np.zeros((1, 1, 17, 2), np.float32)
    corners[0, 0, :2] = (-0.5, -0.5), (63.5, 47.5)
    resized = Poses(corners, np.ones((1, 1, 17)), (64, 48), 25).resized((width, height))
    assert resized.size == (width, height)
    np.testing.assert_allclose(resized.keypoints[0, 0, 0], (-0.5, -0.5), atol=1e-4)
    np.testing.assert_allclose(resized.keypoints[0, 0, 1], (width - 0.5, height - 0.5), rtol=1e-5)


def test_affine_maps_compose_and_leave_missing_persons_alone():
    poses = random_poses()
    scores = poses.scores.copy()
    scores[1, 0] = 0
    poses = Poses(np.where(scores[..., None] > 0, poses.keypoints, 0), scores, poses.size, poses.fps)
    angle = 0.7
    matrix = np.array([[math.cos(angle), -math.sin(angle), 5], [math.sin(angle), math.cos(angle), -3], [0, 0, 1]])
    there = poses.mapped(matrix, (80, 90))
    x, y = poses.keypoints[0, 1, 4]
    expected = (math.cos(angle) * x - math.sin(angle) * y + 5, math.sin(angle) * x + math.cos(angle) * y - 3)
    np.testing.assert_allclose(there.keypoints[0, 1, 4], expected, rtol=1e-5)
    assert there.size == (80, 90) and not there.keypoints[1, 0].any()
    np.testing.assert_allclose(there.mapped(np.linalg.inv(matrix), (64, 48)).keypoints, poses.keypoints, atol=1e-4)


def test_clipping_hides_what_lies_outside():
    keypoints = np.zeros((1, 1, 17, 2))
    keypoints[0, 0, :5] = (-0.5, 0), (-0.6, 0), (63.5, 47.5), (63, 47.6), (30, 20)
    clipped = Poses(keypoints, np.full((1, 1, 17), 0.8), (64, 48), 25).clipped()
    np.testing.assert_allclose(clipped.scores[0, 0, :5], [0.8, 0, 0.8, 0, 0.8])
    np.testing.assert_array_equal(clipped.keypoints, keypoints.astype(np.float32))


def test_presence():
    scores = np.zeros((3, 2, 17))
    scores[1, 0, 5] = 0.2
    poses = Poses(np.zeros((3, 2, 17, 2)), scores, (64, 48), 25)
    np.testing.assert_array_equal(poses.present(), [[False, False], [True, False], [False, False]])
    assert not poses.present(0.2).any()


@pytest.mark.parametrize(("frames", "deviation"), [(1, 2.0), (40, 0.0), (40, 0.7), (40, 3.0), (7, 100.0)])
def test_smoothing_fits_a_weighted_line_around_every_frame(frames, deviation):
    rng = np.random.default_rng(frames)
    values, weights = 500 * rng.random((frames, 3)), rng.random((frames, 3)) * (rng.random((frames, 3)) > 0.4)
    fitted, reach = local_lines(values, weights, deviation), np.ceil(3 * deviation)
    for (t, k), weight in np.ndenumerate(weights):
        offsets = np.arange(frames) - t
        near = weights[:, k] * np.exp(-0.5 * (offsets / max(deviation, 1e-6)) ** 2) * (abs(offsets) <= reach)
        if weight == 0:
            expected = values[t, k]
        elif np.count_nonzero(near > 1e-6) == 1:
            expected = values[t, k]
        else:
            expected = np.polyfit(offsets, values[:, k], 1, w=np.sqrt(near))[1]
        assert fitted[t, k] == pytest.approx(expected, abs=1e-3)
    poses = Poses(rng.random((frames, 1, 17, 2)), rng.random((frames, 1, 17)), (500, 500), 25)
    lines = local_lines(poses.keypoints, poses.scores[..., None], deviation)
    assert np.array_equal(poses.smoothed(deviation).keypoints, lines.astype(np.float32))


def test_smoothing_removes_noise_keeps_lines_and_ignores_missing_frames():
    rng = np.random.default_rng(0)
    t = np.arange(80.0)
    clean = np.broadcast_to(np.stack([100 + 0.5 * t, 300 - t], axis=-1)[:, None, None], (80, 1, 17, 2))
    scores = np.full((80, 1, 17), 0.9)
    noisy = Poses(clean + rng.normal(0, 1, clean.shape), scores, (640, 480), 25)
    smooth = noisy.smoothed(2.0)
    inner = slice(10, 70)
    before = np.abs(noisy.keypoints - clean)[inner].mean()
    assert np.abs(smooth.keypoints - clean)[inner].mean() < 0.5 * before
    assert abs((smooth.keypoints - clean)[inner].mean()) < 0.05  # no lag
    exact = Poses(clean, scores, (640, 480), 25)
    np.testing.assert_allclose(exact.smoothed(2.0).keypoints, clean, atol=1e-3)  # nor at the ends
    scores[40:45] = 0
    gone = np.where(scores[..., None] > 0, clean, 0)
    patched = Poses(gone, scores, (640, 480), 25).smoothed(1.0)
    assert not patched.keypoints[40:45].any()
    np.testing.assert_allclose(patched.keypoints[46:70], clean[46:70], atol=1.5)


def test_person_box():
    keypoints, scores = np.zeros((17, 2)), np.zeros(17)
    keypoints[3], keypoints[9], keypoints[12] = (10, 40), (30, 20), (900, 900)
    scores[[3, 9, 12]] = 0.9, 0.8, 0.3
    assert person_box(keypoints, scores) == Box(10, 20, 30, 40)
    assert person_box(keypoints, scores, margin=0.1) == Box(8, 18, 32, 42)
    assert person_box(keypoints, scores, threshold=0.2) == Box(10, 20, 900, 900)
    assert person_box(keypoints, scores, threshold=0.8) is None


def test_box_iou():
    assert box_iou(Box(0, 0, 2, 2), Box(1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_iou(Box(0, 0, 2, 2), Box(2, 0, 3, 3)) == 0
    assert box_iou(Box(0, 0, 2, 2), Box(0, 0, 2, 2)) == 1
    assert box_iou(Box(1, 1, 1, 1), Box(1, 1, 1, 1)) == 0


def test_the_same_person_is_recognised_and_the_surer_estimate_kept():
    a, b, far = person(50, 60), person(51, 61, seen=0.8), person(200, 60)
    assert keypoint_similarity(a, a) == pytest.approx(1)
    assert keypoint_similarity(a, b) > 0.9 > 0.1 > keypoint_similarity(a, far)
    assert is_same_person(a, b) and not is_same_person(a, far)
    assert distinct_persons([b, far, a]) == [far, a]
    upside_down = PersonEstimate(a.keypoints[::-1].copy(), a.scores, None, 0.5)
    assert keypoint_similarity(a, upside_down) < 0.5 and is_same_person(a, upside_down)  # by their boxes


def test_masks_tell_persons_apart_whose_boxes_coincide():
    left, right = np.zeros((2, 120, 120), bool)
    left[:, :60], right[:, 60:] = True, True
    a = person(60, 60, mask=left, seed=1)
    assert is_same_person(a, person(60, 60, mask=left, seed=2))
    assert not is_same_person(a, person(60, 60, mask=right, seed=2))


def test_prominence_is_size_centre_and_certainty():
    size = (400, 200)
    central, large, aside, doubtful = (
        person(200, 100, 80),
        person(100, 100, 160),
        person(30, 100, 80),
        person(200, 100, 90, seen=0.5),
    )
    assert by_prominence([aside, doubtful, central, large], size) == [large, central, aside, doubtful]


def test_slots_follow_persons_and_new_ones_take_free_slots():
    a, b = person(50, 60), person(200, 60)
    assert assign_slots([None, None, None], [a, b]) == [a, b, None]
    moved_a, moved_b, new = person(60, 62), person(190, 60), person(350, 60)
    assert assign_slots([a, b, None], [moved_b, new, moved_a]) == [moved_a, moved_b, new]
    assert assign_slots([a, b], [moved_b]) == [None, moved_b]
    assert assign_slots([a, b], [new, moved_b]) == [new, moved_b]  # a is gone: the newcomer takes the slot
    assert assign_slots([a], [new, moved_a]) == [moved_a]
    assert assign_slots([None], []) == [None]


class MovingDots:
    """A pose estimator for images in which every person is a column of one grey value on black."""

    def image(self, image, max_persons=1):
        return [p for p in next(self.video([image], max_persons)) if p is not None]

    def video(self, frames, max_persons=1):
        for frame in frames:
            slots = []
            for value in range(1, max_persons + 1):
                mask = frame[..., 0] == value * 50
                rows, columns = np.nonzero(mask)
                points = np.linspace([columns.min(), rows.min()], [columns.max(), rows.max()], 17) if len(rows) else 0
                slots.append(PersonEstimate(points, np.full(17, 0.9), mask, 0.9) if len(rows) else None)
            yield slots


def test_estimates_are_collected_frame_by_frame():
    frames = np.zeros((5, 40, 60, 3), np.uint8)
    for k in range(5):
        frames[k, 5:30, 10 + k : 14 + k] = 50
        if k in (1, 2):
            frames[k, 10:35, 40:45] = 150  # the third value: the second slot stays empty
    estimate = estimate_poses(iter(frames), 12.5, MovingDots(), max_persons=3)
    poses, masks = estimate.poses, estimate.masks
    assert (poses.frames, poses.persons, poses.size, poses.fps) == (5, 2, (60, 40), 12.5)
    np.testing.assert_array_equal(poses.present(), [[1, 0], [1, 1], [1, 1], [1, 0], [1, 0]])
    np.testing.assert_allclose(poses.keypoints[3, 0, [0, 16]], [(13, 5), (16, 29)])
    np.testing.assert_array_equal(masks[:, 0], frames[..., 0] == 50)
    np.testing.assert_array_equal(masks[:, 1], frames[..., 0] == 150)
    assert estimate.require_person("driving=a.mp4") is estimate
    still = estimate_image(frames[1], MovingDots(), max_persons=3)
    assert still.poses.keypoints.shape == (1, 2, 17, 2) and still.masks.shape == (1, 2, 40, 60)


def test_nobody_found():
    nobody = estimate_poses(np.zeros((3, 8, 8, 3), np.uint8), 25, MovingDots())
    assert nobody.poses.keypoints.shape == (3, 0, 17, 2) and nobody.masks is None
    with pytest.raises(UserError, match="reference=r.png: no person was found"):
        nobody.require_person("reference=r.png")
    assert isinstance(estimate_image(np.zeros((8, 8, 3), np.uint8), MovingDots()), PoseEstimate)
    with pytest.raises(ValueError, match="at least one frame"):
        estimate_poses([], 25, MovingDots())


@pytest.mark.parametrize(
    "config, message",
    [
        (PoseConfig(backend="openpose"), "pose.backend=openpose must be one of blazepose, dwpose"),
        (PoseConfig(backend="dwpose"), "pose.weights=detector.onnx,pose.onnx"),
        (PoseConfig(backend="dwpose", weights="a.onnx"), "must name two files"),
        (PoseConfig(backend="dwpose", weights="/missing/a.onnx,/missing/b.onnx"), "a.onnx does not exist"),
        (PoseConfig(weights="a.onnx,b.onnx"), "belongs to pose.backend=dwpose"),
        (PoseConfig(max_persons=0), "pose.max_persons=0"),
        (PoseConfig(smoothing=-1), "pose.smoothing=-1"),
    ],
)
def test_settings_that_cannot_work_are_named(config, message):
    with pytest.raises(UserError, match=message):
        open_estimator(config)
