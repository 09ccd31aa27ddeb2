"""Inputs of an animation: a reference image and a driving video, with poses and masks given or estimated."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from core.errors import UserError
from data.cuts import PictureChanges, checked_cuts, pose_jumps
from data.poses.files import load_poses
from data.poses.person import PackedMasks
from data.poses.poses import PoseEstimate, PoseEstimator, Poses, estimate_image, estimate_poses
from data.video.files import VideoReader
from data.video.images import list_images, read_image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    image: np.ndarray  # (h, w, 3) uint8 RGB
    poses: Poses | None  # one frame; None when neither given nor wanted
    masks: np.ndarray | None  # (persons, h, w) bool


@dataclass(frozen=True)
class Driving:
    # (f, h, w, 3) uint8 RGB, of a file read when they are asked for; None when only poses were given
    frames: Sequence[np.ndarray] | None
    poses: Poses | None  # None when there are pose images and no poses were given or wanted
    masks: Sequence[np.ndarray] | None  # (f, persons, h, w) bool
    images: VideoReader | None = None  # pose images, such as DensePose; None: to be drawn
    cuts: tuple[int, ...] = ()  # first frames of the clip's shots after the first
    drawn: Poses | None = None  # that figures are drawn of, an estimator's misses bridged; None: `poses`
    sound: VideoReader | None = None  # the video whose sound results carry
    filmed: Poses | None = None  # where the persons of `frames` are, if `poses` were moved; None: as `poses`

    @property
    def size(self) -> tuple[int, int]:
        return self.images.size if self.poses is None else self.poses.size

    @property
    def fps(self) -> float:
        return self.images.fps if self.poses is None else self.poses.fps

    def note(self, stride: int, wanted: int | None) -> str | None:
        """What is odd about a clip of one frame, unless one was `wanted`; None: nothing."""
        frames = self.poses.frames if self.images is None else len(self.images)
        if frames > 1 or wanted == 1:
            return None
        stored = 1 if self.sound is None else self.sound.stored_frames
        left = f"; stride={stride} leaves one of {stored}" if stored > 1 else ""
        return f"the driving clip has a single frame, so has the result{left}"


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
    smoothing: float | None = None,  # of estimated poses, see `Poses.smoothed`
    images: str | Path | None = None,  # pose images, one for each frame of the video and of its shape
    poses_wanted: bool = True,  # False: `images` alone are read
    cuts: Sequence[int] | None = None,  # see `Driving`; None: found
    fps: float | None = None,  # to which the video is resampled first, repeating or leaving out frames; None: its own
    progress: Callable[[VideoReader], Iterable[np.ndarray]] = iter,  # wraps the frames that poses are estimated in
) -> Driving:
    """Driving clip, with poses and masks given or estimated; one frame is held at a time."""
    used = {"stride": stride, "max_frames": max_frames}
    changes = PictureChanges()
    video = None if path is None else VideoReader(path, fps, argument="driving", **used)
    if video is not None and video.note:
        logger.warning("driving=%s: %s", path, video.note)
    pose_images = None if images is None else VideoReader(images, argument="pose_images", **used)
    if pose_images is not None and not poses_wanted:
        if cuts is None:
            cuts = changes.over(pose_images).cuts()
        return Driving(None, None, None, pose_images, cuts=checked_cuts(cuts, len(pose_images)), sound=video)
    if path is None and poses is None:
        raise UserError("driving= or driving_poses= is required")
    if poses is not None:
        given = given_poses(poses, video, max_frames, stride) if fps is None else resampled_poses(poses, video)
        estimate = PoseEstimate(given, None).require_person("driving_poses")
        if cuts is None:
            changes.over(video or ())
    else:
        estimate = estimate_poses(changes.watch(progress(video)), video.fps, estimator(), max_persons)
        estimate.require_person(f"driving={path}")
    clip = estimate.poses
    if not (clip.scores > 0).any():
        raise UserError(f"driving_poses={poses}: no keypoint of any frame has a score above 0")
    if pose_images is not None:
        clip = matching_images(clip, pose_images, images)
        pose_images, video = pose_images.part(0, clip.frames), video and video.part(0, clip.frames)
    person_masks = None if estimate.masks is None else estimate.masks.select(slice(clip.frames))
    if masks is not None:
        numbers = np.arange(clip.frames) * stride if fps is None else video.indices
        person_masks = read_driving_masks(Path(masks), numbers, clip.persons, clip.size)
    if cuts is None:
        jumps = pose_jumps(clip.keypoints, clip.scores)
        cuts = jumps if video is None else changes.cuts(jumps)
        cuts = [cut for cut in cuts if cut < clip.frames]
    cuts = checked_cuts(cuts, clip.frames)
    if poses is not None:
        return Driving(video, clip, person_masks, pose_images, cuts, sound=video)
    clip = clip.smoothed(smoothing, cuts)
    return Driving(video, clip, person_masks, pose_images, cuts, clip.bridged(cuts), video)


def given_poses(path: str | Path, video: VideoReader | None, max_frames: int | None, stride: int) -> Poses:
    """Every stride-th frame of a pose file, in pixels of the video of these frames, which it must have a pose for."""
    size, fps = (video.size, video.fps * stride) if video else (None, None)
    poses = load_poses(path, size=size, fps=fps, argument="driving_poses")
    used = replace(poses[::stride][: max_frames or poses.frames], fps=poses.fps / stride)
    if video is None:
        return used
    if used.frames < len(video) or poses.frames > video.stored_frames:
        raise UserError(
            f"driving_poses={path} has {poses.frames} frames, driving={video.path} has {video.stored_frames}; "
            "give the poses of this video, one for each of its frames"
        )
    return fitting_poses(used, video.size, "driving_poses")


def resampled_poses(path: str | Path, video: VideoReader) -> Poses:
    """Poses of the frames that are read of a resampled video, from a file of all of its frames."""
    poses = load_poses(path, size=video.size, fps=video.fps, argument="driving_poses")
    if not video.constant_rate or poses.frames <= video.indices.max():
        fault = "varies in rate" if not video.constant_rate else f"has more frames than these {poses.frames}"
        raise UserError(
            f"driving_poses={path} cannot be resampled with driving={video.path}, which {fault}; leave fps= out, or "
            "give the poses of this video, one for each of its frames"
        )
    return fitting_poses(replace(poses[video.indices], fps=video.fps), video.size, "driving_poses")


def matching_images(poses: Poses, images: VideoReader, path: str | Path) -> Poses:
    """Poses cut to the number of pose images; the last few may lack one, as tools often lose a frame."""
    frames = len(images)
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


def read_driving_masks(folder: Path, numbers: Sequence[int], persons: int, size: tuple[int, int]) -> PackedMasks:
    """(frames, persons, h, w) from a folder with 000000.png or 000000_p0.png, named after the frames' `numbers`."""
    if not folder.is_dir() or not list_images(folder):
        raise UserError(f"driving_masks={folder} {'holds no images' if folder.is_dir() else 'is not a folder'}")
    masks = PackedMasks.zeros((len(numbers), persons), size)
    for frame, number in enumerate(numbers):
        for person in range(persons):
            name = f"{number:06d}_p{person}.png"
            if persons == 1 and not (folder / name).exists():
                name = f"{number:06d}.png"
            masks[frame, person] = read_mask(folder / name, size, "driving_masks")
    return masks


def read_mask(path: Path, size: tuple[int, int], argument: str) -> np.ndarray:
    """(h, w) bool from an 8-bit image of (width, height), 255 = person."""
    mask = read_image(path, argument=argument)[..., 0]
    if mask.shape[::-1] != tuple(size):
        raise UserError(f"{argument}={path} is {mask.shape[1]}x{mask.shape[0]}, the image is {size[0]}x{size[1]}")
    return mask >= 128  # half and more counts as person
