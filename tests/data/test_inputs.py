"""Driving clips from files: which frames, which poses, which pose images, and errors that name their argument."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from data.inputs import load_driving, read_driving_masks
from data.poses.person import PersonEstimate
from data.poses.poses import PoseEstimator, Poses
from data.video.files import write_video

FRAMES, SIZE = 6, (48, 32)


def no_estimator() -> PoseEstimator:
    raise AssertionError("poses are given: nothing may be estimated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """clip.mp4 and clip.npz of six frames at 12 frames a second, and pose images whose red is the frame's number."""
    folder = tmp_path_factory.mktemp("driving")
    write_video(folder / "clip.mp4", [np.full((SIZE[1], SIZE[0], 3), 40 * n, np.uint8) for n in range(FRAMES)], 12.0)
    save_poses(folder / "clip.npz", FRAMES, SIZE)
    save_images(folder / "images", FRAMES, SIZE)
    return folder


class Follower:
    """A pose estimator that finds one person, in every frame or those chosen, one pixel further each time."""

    def __init__(self, missed: tuple[int, ...] = (), jitter: float = 0.0):
        self.missed, self.noise = missed, np.random.default_rng(0).normal(0, max(jitter, 1e-9), (400, 17, 2))

    def video(self, frames, max_persons=1):
        for index, frame in enumerate(frames):
            mask = np.zeros(frame.shape[:2], bool)
            mask[5:20, index % 30 : index % 30 + 10] = True
            keypoints = np.linspace([5, 5], [15, 25], 17) + [index, 0] + self.noise[index]
            person = PersonEstimate(keypoints.astype(np.float32), np.full(17, 0.9, np.float32), mask, 0.9)
            yield [None if index in self.missed else person]


def save_poses(path: Path, frames: int, size: tuple[int, int]) -> None:
    """Joints along a diagonal that starts at the frame's number."""
    keypoints = np.float32(np.arange(frames)[:, None, None, None] + np.arange(17)[:, None].repeat(2, axis=1))
    Poses(keypoints, np.ones((frames, 1, 17), np.float32), size, 12.0).save(path)


def save_images(folder: Path, frames: int, size: tuple[int, int]) -> None:
    folder.mkdir()
    for number in range(frames):
        Image.new("RGB", size, (number, 0, 0)).save(folder / f"{number:03d}.png")


@pytest.mark.parametrize(("fps", "numbers"), [(6, (0, 2, 4)), (24, np.repeat(range(6), 2)), (8, (0, 1, 3, 4))])
def test_given_poses_and_masks_follow_a_resampled_video(folder, fps, numbers, tmp_path):
    masks = save_masks(tmp_path / "masks", 6)
    driving = load_driving(folder / "clip.mp4", folder / "clip.npz", masks, no_estimator, fps=fps)
    assert driving.poses.keypoints[:, 0, 0, 0].tolist() == list(numbers) and driving.poses.fps == driving.fps == fps
    assert np.allclose([frame[0, 0, 0] for frame in driving.frames], 40 * np.array(numbers), atol=3)
    assert [int(mask.sum()) for mask in driving.masks] == [SIZE[1] * (number + 1) for number in numbers]
    save_poses(tmp_path / "few.npz", 3, SIZE)
    with pytest.raises(
        UserError, match="cannot be resampled with driving=.*clip.mp4, which has more frames than these 3"
    ):
        load_driving(folder / "clip.mp4", tmp_path / "few.npz", None, no_estimator, fps=fps)


@pytest.mark.parametrize(("max_frames", "stride", "numbers"), [(None, 1, range(6)), (2, 2, (0, 2)), (None, 4, (0, 4))])
def test_frames_poses_and_images_stay_together(folder, max_frames, stride, numbers):
    driving = load_driving(
        folder / "clip.mp4",
        folder / "clip.npz",
        None,
        no_estimator,
        max_frames=max_frames,
        stride=stride,
        images=folder / "images",
    )
    assert driving.poses.keypoints[:, 0, 0, 0].tolist() == list(numbers)
    assert [int(image[0, 0, 0]) for image in driving.images] == list(numbers)
    assert np.allclose([frame[0, 0, 0] for frame in driving.frames], 40 * np.array(numbers), atol=3)
    assert driving.fps == 12.0 / stride and driving.size == SIZE


def test_images_alone_are_enough_where_no_poses_are_wanted(folder, tmp_path):
    write_video(tmp_path / "dense.mp4", [np.zeros((32, 48, 3), np.uint8)] * 5, 10.0)
    driving = load_driving(None, None, None, no_estimator, images=tmp_path / "dense.mp4", poses_wanted=False, stride=2)
    assert driving.poses is None and driving.frames is None
    assert (
        np.stack(list(driving.images)).shape == (3, 32, 48, 3)
        and driving.size == SIZE
        and driving.fps == pytest.approx(5.0)
    )
    with pytest.raises(UserError, match="driving= or driving_poses= is required"):
        load_driving(None, None, None, no_estimator, images=tmp_path / "dense.mp4")


def test_a_lost_last_image_shortens_the_clip(folder, tmp_path):
    save_images(tmp_path / "five", 5, (96, 64))
    driving = load_driving(folder / "clip.mp4", folder / "clip.npz", None, no_estimator, images=tmp_path / "five")
    assert len(driving.frames) == driving.poses.frames == len(driving.images) == 5


@pytest.mark.parametrize(
    ("frames", "size", "named"),
    [(2, SIZE, "pose_images=.* has 2 frames, the driving clip has 6"), (6, (32, 32), "pose_images=.* 32x32")],
)
def test_images_of_another_clip_are_refused(folder, tmp_path, frames, size, named):
    save_images(tmp_path / "other", frames, size)
    with pytest.raises(UserError, match=named):
        load_driving(folder / "clip.mp4", folder / "clip.npz", None, no_estimator, images=tmp_path / "other")


def test_errors_name_the_argument(folder, tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    for poses, named in (
        (tmp_path / "none.npz", "driving_poses=.*none.npz"),
        (tmp_path / "bad.npz", "driving_poses="),
    ):
        with pytest.raises(UserError, match=named):
            load_driving(folder / "clip.mp4", poses, None, no_estimator)
    for count, options in (
        (3, {}),
        (7, {}),
        (12, {}),
        (12, {"max_frames": 3}),
        (5, {"stride": 5}),
        (7, {"stride": 6}),
    ):
        save_poses(tmp_path / "other.npz", count, SIZE)
        with pytest.raises(UserError, match=f"driving_poses=.* has {count} frames, driving=.*clip.mp4 has 6"):
            load_driving(folder / "clip.mp4", tmp_path / "other.npz", None, no_estimator, **options)
    save_poses(tmp_path / "square.npz", 6, (32, 32))
    with pytest.raises(UserError, match="driving_poses are for 32x32"):
        load_driving(folder / "clip.mp4", tmp_path / "square.npz", None, no_estimator)
    with pytest.raises(UserError, match="pose_images=.*none does not exist"):
        load_driving(folder / "clip.mp4", folder / "clip.npz", None, no_estimator, images=tmp_path / "none")


def test_a_long_video_is_read_frame_by_frame(tmp_path):
    """Neither its frames nor its masks are held, and those that are asked for are read again."""
    size, frames = (320, 240), 150
    pictures = (np.full((size[1], size[0], 3), 100 + n, np.uint8) for n in range(frames))
    write_video(tmp_path / "long.mp4", pictures, 25.0, crf=30)
    tracemalloc.start()
    driving = load_driving(tmp_path / "long.mp4", None, None, Follower)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * size[0] * size[1] * 3, f"{peak / 2**20:.0f} MiB for {frames} frames"
    assert len(driving.frames) == driving.poses.frames == len(driving.masks) == frames
    assert driving.frames[120].shape == (240, 320, 3) and abs(int(driving.frames[120].mean()) - 220) < 3
    assert driving.masks[7].sum() == 150 and driving.masks[7][0, 10, 10]
    given = read_driving_masks(save_masks(tmp_path / "masks", 3), range(3), 1, (48, 32))
    assert [int(given[frame].sum()) for frame in range(3)] == [32, 64, 96]


def save_masks(folder: Path, frames: int) -> Path:
    folder.mkdir()
    for frame in range(frames):
        mask = np.zeros((32, 48), np.uint8)
        mask[:, : frame + 1] = 255
        Image.fromarray(mask).save(folder / f"{frame:06d}.png")
    return folder


def test_estimated_poses_are_steadied_and_short_misses_bridged_given_ones_are_neither(tmp_path):
    write_video(tmp_path / "clip.mp4", [np.full((32, 48, 3), 90, np.uint8)] * 40, 25.0)
    missed, jitter = (10, 11, 12, 25), 1.0
    raw = Follower(missed, jitter)
    driving = load_driving(tmp_path / "clip.mp4", None, None, lambda: raw)
    true = np.linspace([5, 5], [15, 25], 17) + np.arange(40)[:, None, None] * [1, 0]
    off = np.linalg.norm(driving.drawn.keypoints[:, 0] - true, axis=-1)
    assert off.mean() < 0.75 * np.linalg.norm(raw.noise[:40], axis=-1).mean()
    assert off[list(missed)].max() < 3 and (driving.drawn.scores[list(missed)] > 0.8).all()
    assert not driving.poses.present()[list(missed)].any(), "calibration is told of the misses"
    cut = load_driving(tmp_path / "clip.mp4", None, None, lambda: Follower(missed), cuts=[11])
    assert not cut.drawn.present()[10:13].any() and cut.drawn.present()[25].all() and cut.cuts == (11,)
    rough = load_driving(tmp_path / "clip.mp4", None, None, lambda: raw, smoothing=0.0)
    np.testing.assert_allclose(rough.poses.keypoints[:10, 0], true[:10] + raw.noise[:10], atol=1e-4)
    rough.poses.save(tmp_path / "clip.npz")
    given = load_driving(tmp_path / "clip.mp4", tmp_path / "clip.npz", None, no_estimator)
    np.testing.assert_array_equal(given.poses.keypoints, rough.poses.keypoints)
    assert given.drawn is None


def test_a_clip_of_one_frame_is_told(tmp_path):
    write_video(tmp_path / "d.mp4", [np.zeros((16, 16, 3), np.uint8)] * 6, 8.0)
    keypoints = np.random.default_rng(0).uniform(2, 14, (6, 1, 17, 2))
    poses = Poses(keypoints, np.ones((6, 1, 17)), (16, 16), 8.0)
    poses.save(tmp_path / "d.npz")

    def note(stride: int, wanted: int | None) -> str | None:
        driving = load_driving(tmp_path / "d.mp4", tmp_path / "d.npz", None, None, 1, wanted, stride)
        return driving.note(stride, wanted)

    assert "stride=1000 leaves one of 6" in note(1000, None)
    assert note(1, None) is note(1, 1) is None
