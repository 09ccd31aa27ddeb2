"""Driving clips from files: which frames, which poses, which pose images, and errors that name their argument."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from data.inputs import load_driving
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


def save_poses(path: Path, frames: int, size: tuple[int, int]) -> None:
    """Joints along a diagonal that starts at the frame's number."""
    keypoints = np.float32(np.arange(frames)[:, None, None, None] + np.arange(17)[:, None].repeat(2, axis=1))
    Poses(keypoints, np.ones((frames, 1, 17), np.float32), size, 12.0).save(path)


def save_images(folder: Path, frames: int, size: tuple[int, int]) -> None:
    folder.mkdir()
    for number in range(frames):
        Image.new("RGB", size, (number, 0, 0)).save(folder / f"{number:03d}.png")


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
    assert driving.images[:, 0, 0, 0].tolist() == list(numbers)
    assert np.allclose(driving.frames[:, 0, 0, 0], 40 * np.array(numbers), atol=3)
    assert driving.fps == 12.0 / stride and driving.size == SIZE


def test_images_alone_are_enough_where_no_poses_are_wanted(folder, tmp_path):
    write_video(tmp_path / "dense.mp4", [np.zeros((32, 48, 3), np.uint8)] * 5, 10.0)
    driving = load_driving(None, None, None, no_estimator, images=tmp_path / "dense.mp4", poses_wanted=False, stride=2)
    assert driving.poses is None and driving.frames is None
    assert driving.images.shape == (3, 32, 48, 3) and driving.size == SIZE and driving.fps == pytest.approx(5.0)
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
