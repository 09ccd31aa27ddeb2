"""Inputs of an animation: a reference image and a driving video, with poses and masks given or estimated."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from core.errors import UserError
from data.poses.files import load_poses
from data.poses.poses import PoseEstimate, PoseEstimator, Poses, estimate_image, estimate_poses
from data.video.files import Video, VideoReader, read_video
from data.video.images import list_images, read_image

logger = logging.getLogger(__name__)

SAMPLES = Path(__file__).parent.parent / "assets" / "samples"  # made by data.people.samples


@dataclass(frozen=True)
class Reference:
    image: np.ndarray  # (h, w, 3) uint8 RGB
    poses: Poses | None  # one frame; None when neither given nor wanted
    masks: np.ndarray | None  # (persons, h, w) bool


@dataclass(frozen=True)
class Driving:
    frames: np.ndarray | None  # (f, h, w, 3) uint8 RGB; None when only poses were given
    poses: Poses | None  # None when there are pose images and no poses were given or wanted
    masks: np.ndarray | None  # (f, persons, h, w) bool
    images: np.ndarray | None = None  # pose images (f, h', w', 3) uint8 RGB, such as DensePose; None: to be drawn
    image_fps: float = 0.0  # frames per second of the pose images

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[2:0:-1] if self.poses is None else self.poses.size

    @property
    def fps(self) -> float:
        return self.image_fps if self.poses is None else self.poses.fps


def load_reference(
    path: str | Path,
    poses: str | Path | None,
    mask: str | Path | None,
    estimator: Callable[[], PoseEstimator] | None,
    max_persons: int = 1,
) -> Reference:
    """Reference image, with poses and masks given, or estimated where there is an opener of the estimator.

    Masks are an 8-bit image, 255 = person, or a folder with p0.png, p1.png for several persons.
    """
    image = read_image(path, argument="reference")
    size = image.shape[1::-1]
    if poses is None and estimator is None:
        return Reference(image, None, None if mask is None else read_reference_masks(Path(mask), None, size))
    if poses is None:
        found = estimate_image(image, estimator(), max_persons).require_person(f"reference={path}")
        estimated, masks = found.poses, found.masks[0] if found.masks is not None else None
    else:
        estimated = fitting_poses(load_poses(poses, size=size, argument="reference_poses"), size, "reference_poses")
        if estimated.frames != 1:
            raise UserError(f"reference_poses={poses} has {estimated.frames} frames; an image has one")
        masks = None
    if mask is not None:
        masks = read_reference_masks(Path(mask), estimated.persons, size)
    return Reference(image, estimated, masks)


def load_driving(
    path: str | Path | None,  # of the video; None when poses are given
    poses: str | Path | None,  # pose file of all frames of the video; None: estimate
    masks: str | Path | None,  # folder with 000000.png (one person) or 000000_p0.png
    estimator: Callable[[], PoseEstimator],
    max_persons: int = 1,
    max_frames: int | None = None,  # counted after every stride-th frame was taken
    stride: int = 1,
    smoothing: float = 0.0,
    images: str | Path | None = None,  # pose images, one for each frame of the video and of its shape
    poses_wanted: bool = True,  # False: `images` alone are read
) -> Driving:
    """Driving clip, with poses and masks given or estimated."""
    if path is not None and (note := VideoReader(path, argument="driving").note):
        logger.warning("driving=%s: %s", path, note)
    pose_images = None if images is None else strided_video(images, "pose_images", max_frames, stride)
    if pose_images is not None and not poses_wanted:
        return Driving(None, None, None, pose_images.frames, pose_images.fps)
    if path is None and poses is None:
        raise UserError("driving= or driving_poses= is required")
    video = None if path is None else strided_video(path, "driving", max_frames, stride)
    if poses is not None:
        given = given_poses(poses, video, path, max_frames, stride)
        found = PoseEstimate(given, None).require_person("driving_poses")
    else:
        found = estimate_poses(video.frames, video.fps, estimator(), max_persons, smoothing)
        found.require_person(f"driving={path}")
    used = found.poses
    if not (used.scores > 0).any():
        raise UserError(f"driving_poses={poses}: no keypoint of any frame has a score above 0")
    if pose_images is not None:
        used = matching_images(used, pose_images, images)
    person_masks = None if found.masks is None else found.masks[: used.frames]
    if masks is not None:
        person_masks = read_driving_masks(Path(masks), used.frames, used.persons, used.size, stride)
    driving = Driving(None if video is None else video.frames[: used.frames], used, person_masks)
    if pose_images is None:
        return driving
    return replace(driving, images=pose_images.frames[: used.frames], image_fps=pose_images.fps)


def strided_video(path: str | Path, argument: str, max_frames: int | None, stride: int) -> Video:
    """Every stride-th frame of a video or folder of images, at most `max_frames` of them."""
    needed = None if max_frames is None else (max_frames - 1) * stride + 1  # frames before striding
    video = read_video(path, max_frames=needed, argument=argument)
    return video if stride == 1 else Video(video.frames[::stride], video.fps / stride)


def given_poses(
    path: str | Path, video: Video | None, video_path: str | Path | None, max_frames: int | None, stride: int
) -> Poses:
    """Every stride-th frame of a pose file, in pixels of the `strided_video`, which it must have a pose for."""
    size, fps = (video.size, video.fps * stride) if video else (None, None)
    poses = load_poses(path, size=size, fps=fps, argument="driving_poses")
    used = replace(poses[::stride][: max_frames or poses.frames], fps=poses.fps / stride)
    if video is None:
        return used
    with VideoReader(video_path, argument="driving") as reader:
        if used.frames < len(video.frames) or poses.frames > len(reader):
            raise UserError(
                f"driving_poses={path} has {poses.frames} frames, driving={video_path} has {len(reader)}; "
                "give the poses of this video, one for each of its frames"
            )
    return fitting_poses(used, video.size, "driving_poses")


def matching_images(poses: Poses, images: Video, path: str | Path) -> Poses:
    """Poses cut to the number of pose images; the last few may lack one, as tools often lose a frame."""
    frames = len(images.frames)
    if abs(poses.frames - frames) > max(2, poses.frames // 50):
        raise UserError(f"pose_images={path} has {frames} frames, the driving clip has {poses.frames}")
    require_shape(images.size, poses.size, f"pose_images={path}")
    return poses[: min(frames, poses.frames)]


def fitting_poses(poses: Poses, size: tuple[int, int], argument: str) -> Poses:
    """Poses in an image's pixels, resized when they are of the image at another resolution."""
    if poses.size == tuple(size):
        return poses
    require_shape(poses.size, size, argument)
    return poses.resized(tuple(size))


def require_shape(given: tuple[int, int], size: tuple[int, int], what: str) -> None:
    """UserError when the aspect ratios of two (width, height) differ by more than rounding."""
    if abs(given[0] / given[1] * size[1] / size[0] - 1) > 0.02:
        raise UserError(f"{what} are for {given[0]}x{given[1]}, the image is {size[0]}x{size[1]}")


def read_reference_masks(path: Path, persons: int | None, size: tuple[int, int]) -> np.ndarray:
    """(persons, h, w) bool from one mask file, or from a folder with p0.png, p1.png, ...; persons: None takes all."""
    if persons is None:
        persons = len(list_images(path)) if path.is_dir() else 1
    files = [path / f"p{person}.png" for person in range(persons)] if path.is_dir() else [path]
    if len(files) != persons:
        raise UserError(f"reference_mask={path} is one image for {persons} persons; give a folder with p0.png, ...")
    return np.stack([read_mask(file, size, "reference_mask") for file in files])


def read_driving_masks(folder: Path, frames: int, persons: int, size: tuple[int, int], stride: int = 1) -> np.ndarray:
    """(frames, persons, h, w) bool from a folder with 000000.png or 000000_p0.png, numbered as the video's frames."""
    if not folder.is_dir() or not list_images(folder):
        raise UserError(f"driving_masks={folder} {'holds no images' if folder.is_dir() else 'is not a folder'}")
    masks = np.zeros((frames, persons, size[1], size[0]), bool)
    for frame in range(frames):
        for person in range(persons):
            name = f"{frame * stride:06d}_p{person}.png"
            if persons == 1 and not (folder / name).exists():
                name = f"{frame * stride:06d}.png"
            masks[frame, person] = read_mask(folder / name, size, "driving_masks")
    return masks


def read_mask(path: Path, size: tuple[int, int], argument: str) -> np.ndarray:
    """(h, w) bool from an 8-bit image of (width, height), 255 = person."""
    mask = read_image(path, argument=argument)[..., 0]
    if mask.shape[::-1] != tuple(size):
        raise UserError(f"{argument}={path} is {mask.shape[1]}x{mask.shape[0]}, the image is {size[0]}x{size[1]}")
    return mask >= 128  # half and more counts as person
