"""Clips for training and measurement: people rendered on the fly, and folders of videos with poses.

Every item is a dictionary of float32 tensors, ready for `default_collate`, with F frames of H x W pixels:

    reference            (3, H, W)      picture of the person in [-1, 1]
    frames               (3, F, H, W)   the clip in [-1, 1]
    poses                (3, F, H, W)   its pose pictures in [0, 1]
    reference_mask       (1, H, W)      1 where the person is, 0 elsewhere
    masks                (1, F, H, W)
    reference_keypoints  (17, 3)        x, y in pixels and score, COCO order
    keypoints            (F, 17, 3)

Item i is a function of the data set's arguments and i alone, whichever worker process makes it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from core.errors import UserError
from data.backgrounds import random_background
from data.drawing import draw_pose
from data.framing import apply_fit, fit_matrix
from data.images import read_image
from data.motion import random_motion
from data.people import SPLITS, PeopleLibrary, build_person, load_people, random_identity
from data.pose import Poses
from data.render import Rendered
from data.scenes import CameraRanges, Scene, random_camera, random_light
from data.skeleton import Pose
from data.video import VideoReader

REFERENCE_SECONDS = 4.0  # the moments of a motion among which a clip and its reference are chosen
OTHER_MOTION = 0.3  # share of references taken from another motion of the person
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
SMALL_TEXTURE = 200  # persons up to this many pixels high get textures of 128 texels, taller ones of 256


class RenderedPeople(Dataset):
    """Rendered people in motion; the reference is another moment under the same camera, as in filmed data sets.

    Args:
        size: (width, height) in pixels.
        num_frames: frames of a clip; 1 for single pictures.
        fps: frames per second of the motion before every `stride`-th frame is taken.
        stride: step between the frames of a clip.
        split: "train" or "heldout"; they share no body, no outfit and no clip.
        seed: other seeds are other clips.
        length: number of clips.
        cameras: how people are framed.
        library: the bodies; the ones shipped with the project without it.
    """

    def __init__(
        self,
        size: tuple[int, int] = (128, 128),
        num_frames: int = 1,
        fps: float = 24.0,
        stride: int = 4,
        split: str = "train",
        seed: int = 0,
        length: int = 100_000,
        cameras: CameraRanges | None = None,
        library: PeopleLibrary | None = None,
    ) -> None:
        _check_positive(num_frames=num_frames, stride=stride, length=length, size=min(size))
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        self.size, self.num_frames, self.fps, self.stride = size, num_frames, fps, stride
        self.split, self.seed, self.length = split, seed, length
        self.cameras = cameras or CameraRanges()
        self.library = library or load_people()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        scene = self.scene(index)
        return clip_item(
            _picture(scene.render(scene.reference_pose)), [_picture(scene.render(pose)) for pose in scene.poses]
        )

    def scene(self, index: int) -> Scene:
        """What clip `index` shows, before it is rendered."""
        _check_index(index, self.length)
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        camera = random_camera(rng, self.cameras)
        texture_size = 128 if camera.scale * self.size[1] <= SMALL_TEXTURE else 256
        person = build_person(random_identity(rng, self.library, self.split), self.library, texture_size)
        poses, reference_pose = self._poses(rng)
        return Scene(person, reference_pose, poses, camera, random_light(rng), random_background(rng, self.size))

    def _poses(self, rng: np.random.Generator) -> tuple[list[Pose], Pose]:
        span = (self.num_frames - 1) * self.stride + 1
        length = span + round(REFERENCE_SECONDS * self.fps)
        motion = random_motion(rng, length, self.fps)
        start = int(rng.integers(length - span + 1))
        poses = [motion.pose(frame) for frame in range(start, start + span, self.stride)]
        source = random_motion(rng, length, self.fps) if rng.random() < OTHER_MOTION else motion
        return poses, source.pose(int(rng.integers(length)))


class VideoFolder(Dataset):
    """Clips of filmed people: a folder of videos with pose files beside them.

    `name.mp4` (any format that can be read) goes with `name.npz` (`data.pose.Poses`, one pose per frame) and, if there
    are masks, with the folder `name_masks` of 8-bit pictures `000000.png`, or `000000_p0.png`, `000000_p1.png` when
    there are several persons; 255 is the person. Without that folder every pixel counts as the person's. Pictures are
    scaled until they cover `size` and cut around their centre. With several persons in a video, all are in the
    pictures and masks, and the keypoints are those of the first.

    Args:
        root: the folder; videos may lie in folders below it.
        size: (width, height) in pixels.
        num_frames: frames of a clip; 1 for single pictures.
        stride: step between the frames of a clip.
        seed: other seeds are other clips.
        length: number of clips; as many as there are videos without it.

    Raises:
        UserError: no such folder, or no video in it has a pose file and enough frames.
    """

    def __init__(
        self,
        root: str | Path,
        size: tuple[int, int] = (512, 512),
        num_frames: int = 1,
        stride: int = 1,
        seed: int = 0,
        length: int | None = None,
    ) -> None:
        _check_positive(num_frames=num_frames, stride=stride, length=1 if length is None else length, size=min(size))
        self.root, self.size, self.num_frames, self.stride, self.seed = Path(root), size, num_frames, stride, seed
        if not self.root.is_dir():
            raise UserError(f"root={root} is not a folder; give one that holds videos and their pose files")
        span = (num_frames - 1) * stride + 1
        pose_files = [path for path in sorted(self.root.rglob("*.npz")) if _video_of(path) is not None]
        if not pose_files:
            raise UserError(f"root={root} holds no video with a pose file: name.mp4 needs name.npz beside it")
        self.pose_files = [path for path in pose_files if Poses.load(path).frames >= span]
        if not self.pose_files:
            raise UserError(
                f"root={root} holds no video of {span} frames or more, which num_frames={num_frames} and "
                f"stride={stride} need"
            )
        self.length = len(self.pose_files) if length is None else length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        _check_index(index, self.length)
        rng = np.random.default_rng([self.seed, index])
        path = self.pose_files[rng.integers(len(self.pose_files))]
        poses = Poses.load(path)
        span = (self.num_frames - 1) * self.stride + 1
        start = int(rng.integers(poses.frames - span + 1))
        clip = list(range(start, start + span, self.stride))
        others = sorted(set(range(poses.frames)) - set(clip)) or clip
        chosen = [others[rng.integers(len(others))], *clip]
        images = _read_frames(_video_of(path), chosen, poses)
        matrix = fit_matrix(poses.size, self.size)
        poses = poses[chosen].mapped(matrix, self.size).clipped()
        frames = [
            Picture(
                image=apply_fit(image, matrix, self.size),
                mask=apply_fit(_read_mask(path, frame, image.shape[:2]), matrix, self.size) > 127,
                keypoints=poses.keypoints[number],
                scores=poses.scores[number],
            )
            for number, (frame, image) in enumerate(zip(chosen, images, strict=True))
        ]
        return clip_item(frames[0], frames[1:])


@dataclass(frozen=True)
class Picture:
    """One picture of a clip.

    Attributes:
        image: (h, w, 3) uint8 RGB.
        mask: (h, w) bool.
        keypoints, scores: (persons, 17, 2) in pixels, and (persons, 17).
    """

    image: np.ndarray
    mask: np.ndarray
    keypoints: np.ndarray
    scores: np.ndarray


def clip_item(reference: Picture, frames: list[Picture]) -> dict[str, torch.Tensor]:
    """The tensors of a clip, see the module."""
    size = (reference.image.shape[1], reference.image.shape[0])
    poses = [draw_pose(frame.keypoints, frame.scores, size) for frame in frames]
    return {
        "reference": image_tensor(reference.image),
        "frames": torch.stack([image_tensor(frame.image) for frame in frames], 1),
        "poses": torch.stack([(image_tensor(pose) + 1) / 2 for pose in poses], 1),
        "reference_mask": mask_tensor(reference.mask),
        "masks": torch.stack([mask_tensor(frame.mask) for frame in frames], 1),
        "reference_keypoints": keypoint_tensor(reference.keypoints[0], reference.scores[0]),
        "keypoints": torch.stack([keypoint_tensor(frame.keypoints[0], frame.scores[0]) for frame in frames]),
    }


def image_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 (h, w, 3) -> float32 (3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 127.5 - 1


def mask_tensor(mask: np.ndarray) -> torch.Tensor:
    """bool (h, w) -> float32 (1, h, w), 0 or 1."""
    return torch.from_numpy(mask.astype(np.float32))[None]


def keypoint_tensor(keypoints: np.ndarray, scores: np.ndarray) -> torch.Tensor:
    """(17, 2) and (17,) -> float32 (17, 3)."""
    return torch.from_numpy(np.concatenate([keypoints, scores[:, None]], 1).astype(np.float32))


def _picture(rendered: Rendered) -> Picture:
    return Picture(rendered.image, rendered.mask, rendered.keypoints[None], rendered.scores[None])


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_index(index: int, length: int) -> None:
    # Not a ValueError: iteration over a map-style data set ends with an IndexError.
    if not 0 <= index < length:
        raise IndexError(f"index must be in [0, {length}), got {index}")


def _video_of(pose_file: Path) -> Path | None:
    """The video beside a pose file."""
    return next((path for ext in VIDEO_SUFFIXES if (path := pose_file.with_suffix(ext)).is_file()), None)


def _read_frames(video: Path, indices: list[int], poses: Poses) -> np.ndarray:
    with VideoReader(video) as reader:
        if len(reader) != poses.frames or reader.size != poses.size:
            raise UserError(
                f"{video} has {len(reader)} frames of {reader.size}, but its pose file has {poses.frames} of "
                f"{poses.size}; estimate its poses again"
            )
        return reader.get(indices)


def _read_mask(pose_file: Path, frame: int, shape: tuple[int, int]) -> np.ndarray:
    """The union (h, w) uint8 of the persons' masks in a frame."""
    folder = pose_file.with_name(f"{pose_file.stem}_masks")
    if not folder.is_dir():
        return np.full(shape, 255, np.uint8)
    files = sorted(folder.glob(f"{frame:06d}.png")) + sorted(folder.glob(f"{frame:06d}_p*.png"))
    if not files:
        raise UserError(f"{folder} holds no mask of frame {frame}: {frame:06d}.png")
    masks = [read_image(file)[..., 0] for file in files]
    if any(mask.shape != shape for mask in masks):
        raise UserError(f"{files[0]} is not of its video's size {shape[1]} x {shape[0]}")
    return np.max(masks, axis=0)
