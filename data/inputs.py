"""What a user gives to animate: a reference picture and a driving video, with poses and masks given or estimated."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from core.errors import UserError
from data.pose import PoseEstimate, PoseEstimator, Poses, estimate_image, estimate_poses
from data.pose_files import load_poses
from data.video import list_images, read_image, read_video


@dataclass(frozen=True)
class Reference:
    """The picture whose person is animated.

    Attributes:
        image: (h, w, 3) uint8 RGB.
        poses: one frame; None when neither given nor wanted.
        masks: (persons, h, w) bool, or None.
    """

    image: np.ndarray
    poses: Poses | None
    masks: np.ndarray | None


@dataclass(frozen=True)
class Driving:
    """The motion.

    Attributes:
        frames: (f, h, w, 3) uint8 RGB, or None when only poses were given.
        poses: f frames.
        masks: (f, persons, h, w) bool, or None.
    """

    frames: np.ndarray | None
    poses: Poses
    masks: np.ndarray | None


def load_reference(
    path: str | Path,
    poses: str | Path | None,
    mask: str | Path | None,
    estimator: Callable[[], PoseEstimator] | None,
    max_persons: int = 1,
) -> Reference:
    """Read the reference picture; estimate its poses and masks unless they are given.

    Args:
        path: picture.
        poses: pose file, or None to estimate.
        mask: 8-bit picture, 255 = person; a folder with p0.png, p1.png for several persons; or None.
        estimator: makes the pose estimator, called only when it is needed; None leaves `poses` None without a file.

    Raises:
        UserError: unreadable files, sizes that disagree, a picture without a person.
    """
    image = read_image(path, argument="reference")
    size = image.shape[1::-1]
    if poses is None and estimator is None:
        return Reference(image, None, None)
    if poses is None:
        found = estimate_image(image, estimator(), max_persons).require_person(f"reference={path}")
        estimated, masks = found.poses, found.masks[0] if found.masks is not None else None
    else:
        estimated = fitting_poses(load_poses(poses, size=size, argument="reference_poses"), size, "reference_poses")
        if estimated.frames != 1:
            raise UserError(f"reference_poses={poses} has {estimated.frames} frames; a picture has one")
        masks = None
    if mask is not None:
        masks = read_reference_masks(Path(mask), estimated.persons, size)
    return Reference(image, estimated, masks)


def load_driving(
    path: str | Path | None,
    poses: str | Path | None,
    masks: str | Path | None,
    estimator: Callable[[], PoseEstimator],
    max_persons: int = 1,
    max_frames: int | None = None,
    stride: int = 1,
    smoothing: float = 0.0,
) -> Driving:
    """Read the driving video; estimate its poses and masks unless they are given.

    Args:
        path: video, or None when poses are given.
        poses: pose file of all frames of the video, or None to estimate.
        masks: folder with 000000.png (one person) or 000000_p0.png; or None.
        max_frames: frames to use, counted after `stride`.
        stride: use every stride-th frame.

    Raises:
        UserError: unreadable files, counts or sizes that disagree, a video without a person.
    """
    if path is None and poses is None:
        raise UserError("driving= or driving_poses= is required")
    video = None
    if path is not None:
        needed = None if max_frames is None else (max_frames - 1) * stride + 1
        video = read_video(path, max_frames=needed, argument="driving")
    if poses is not None:
        given = load_poses(poses, size=video.size if video else None, fps=video.fps if video else None)
        if video is not None:
            given = fitting_poses(given, video.size, "driving_poses")
            if given.frames < len(video.frames):
                raise UserError(
                    f"driving_poses={poses} has {given.frames} frames, driving={path} has {len(video.frames)}"
                )
            given = given[: len(video.frames)]
        used = replace(given[::stride][: max_frames or given.frames], fps=given.fps / stride)
        found = PoseEstimate(used, None).require_person("driving_poses")
    else:
        found = estimate_poses(video.frames[::stride], video.fps / stride, estimator(), max_persons, smoothing)
        found.require_person(f"driving={path}")
    poses_ = found.poses
    if not (poses_.scores > 0).any():
        raise UserError(f"driving_poses={poses}: no keypoint of any frame has a score above 0")
    person_masks = found.masks
    if masks is not None:
        person_masks = read_driving_masks(Path(masks), poses_.frames, poses_.persons, poses_.size, stride)
    return Driving(video.frames[::stride] if video else None, poses_, person_masks)


def fitting_poses(poses: Poses, size: tuple[int, int], argument: str) -> Poses:
    """Poses in a picture's pixels: resized when they are of the picture at another resolution.

    Raises:
        UserError: the aspect ratios differ by more than rounding.
    """
    if poses.size == tuple(size):
        return poses
    if abs(poses.size[0] / poses.size[1] * size[1] / size[0] - 1) > 0.02:
        sizes = f"{poses.size[0]}x{poses.size[1]}, the picture is {size[0]}x{size[1]}"
        raise UserError(f"{argument} are for {sizes}")
    return poses.resized(tuple(size))


def read_reference_masks(path: Path, persons: int, size: tuple[int, int]) -> np.ndarray:
    """(persons, h, w) bool from one mask file, or from a folder with p0.png, p1.png, ..."""
    files = [path / f"p{person}.png" for person in range(persons)] if path.is_dir() else [path]
    if len(files) != persons:
        raise UserError(f"reference_mask={path} is one picture for {persons} persons; give a folder with p0.png, ...")
    return np.stack([read_mask(file, size, "reference_mask") for file in files])


def read_driving_masks(folder: Path, frames: int, persons: int, size: tuple[int, int], stride: int = 1) -> np.ndarray:
    """(frames, persons, h, w) bool from a folder with 000000.png or 000000_p0.png, numbered as the video's frames."""
    if not folder.is_dir():
        raise UserError(f"driving_masks={folder} is not a folder")
    if not list_images(folder):
        raise UserError(f"driving_masks={folder} holds no pictures")
    masks = np.zeros((frames, persons, size[1], size[0]), bool)
    for frame in range(frames):
        for person in range(persons):
            name = f"{frame * stride:06d}_p{person}.png"
            if persons == 1 and not (folder / name).exists():
                name = f"{frame * stride:06d}.png"
            masks[frame, person] = read_mask(folder / name, size, "driving_masks")
    return masks


def read_mask(path: Path, size: tuple[int, int], argument: str) -> np.ndarray:
    """(h, w) bool from an 8-bit picture, 255 = person; half and more counts as person."""
    mask = read_image(path, argument=argument)[..., 0]
    if mask.shape[::-1] != tuple(size):
        raise UserError(f"{argument}={path} is {mask.shape[1]}x{mask.shape[0]}, the picture is {size[0]}x{size[1]}")
    return mask >= 128
