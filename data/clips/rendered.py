"""Clips for training and measurement: their items, and people rendered on the fly.

Every item is a dictionary of float32 tensors, ready for `default_collate`, with F frames of H x W pixels:

    reference            (3, H, W)      image of the person in [-1, 1]
    frames               (3, F, H, W)   the clip in [-1, 1]
    poses                (3, F, H, W)   its pose images in [0, 1]
    reference_mask       (1, H, W)      1 where the person is, 0 elsewhere
    masks                (1, F, H, W)
    reference_keypoints  (17, 3)        x, y in pixels and score, COCO order
    keypoints            (F, 17, 3)

Item i is a function of the data set's arguments and i alone, whichever worker process makes it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from data.config import SPLITS, PeopleConfig
from data.people.bodies import PeopleLibrary, Pose, build_person, load_people, random_identity
from data.people.motion import random_motion
from data.people.renderer import Rendered
from data.people.scenes import (
    CameraRanges,
    Scene,
    random_background,
    random_camera,
    random_light,
    random_reframing,
)
from data.poses.drawing import draw_pose


def camera_ranges(people: PeopleConfig) -> CameraRanges:
    height = (people.height[0], people.height[1])
    return CameraRanges(height, close_ups=people.close_ups, tilted=people.tilted, reframed=people.reframed)


class RenderedPeople(Dataset):
    """Rendered people in motion; the reference is another moment, under the same camera as in filmed data sets unless
    `people.reframed` says otherwise.

    `fps` is that of the motion, before every `stride`-th frame is taken. The splits "train" and "heldout" share no
    body, no outfit and no clip. `cameras` and `library` take the place of the framing of `people` and of the bodies
    that are shipped.
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
        people: PeopleConfig | None = None,
        cameras: CameraRanges | None = None,
        library: PeopleLibrary | None = None,
    ) -> None:
        check_positive(num_frames=num_frames, stride=stride, length=length, size=min(size))
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        self.size, self.num_frames, self.fps, self.stride = size, num_frames, fps, stride
        self.split, self.seed, self.length = split, seed, length
        people = people or PeopleConfig()
        self.cameras, self.plain = cameras or camera_ranges(people), people.plain
        self.library = library or load_people()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        scene = self.scene(index)
        return clip_item(_image(scene.render_reference()), [_image(scene.render(pose)) for pose in scene.poses])

    def scene(self, index: int) -> Scene:
        """Content of clip `index`, before it is rendered."""
        check_index(index, self.length)
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])  # any worker draws the same
        camera = random_camera(rng, self.cameras)
        texture_size = 128 if camera.scale * self.size[1] <= 200 else 256
        identity = random_identity(rng, self.library, self.split, self.plain)
        person = build_person(identity, self.library, texture_size)
        poses, reference_pose = self._poses(rng)
        light, background = random_light(rng), random_background(rng, self.size)
        # Drawn last, so that the clips stay what they are without.
        other = random_reframing(rng, camera, self.cameras)
        return Scene(person, reference_pose, poses, camera, light, background, other)

    def _poses(self, rng: np.random.Generator) -> tuple[list[Pose], Pose]:
        span = (self.num_frames - 1) * self.stride + 1
        length = span + round(4.0 * self.fps)  # four seconds, in which a clip and its reference are chosen
        motion = random_motion(rng, length, self.fps)
        start = int(rng.integers(length - span + 1))
        poses = [motion.pose(frame) for frame in range(start, start + span, self.stride)]
        # Of the references, 30 % are from another motion of the person.
        source = random_motion(rng, length, self.fps) if rng.random() < 0.3 else motion
        return poses, source.pose(int(rng.integers(length)))


@dataclass(frozen=True)
class LabelledImage:
    image: np.ndarray | None  # (h, w, 3) uint8 RGB; None where features take its place
    mask: np.ndarray  # (h, w) bool
    keypoints: np.ndarray  # (persons, 17, 2) in pixels
    scores: np.ndarray  # (persons, 17)


def clip_item(reference: LabelledImage, frames: list[LabelledImage]) -> dict[str, torch.Tensor]:
    """Tensors of a clip, see the module; images that are None are left out."""
    size = (reference.mask.shape[1], reference.mask.shape[0])
    poses = [draw_pose(frame.keypoints, frame.scores, size) for frame in frames]
    item = {} if reference.image is None else {"reference": clip_tensor([reference.image])[:, 0]}
    if all(frame.image is not None for frame in frames):
        item["frames"] = clip_tensor([frame.image for frame in frames])
    return item | {
        "poses": pixel_tensor(poses).div_(255),
        "reference_mask": torch.from_numpy(reference.mask[None]).float(),
        "masks": torch.from_numpy(np.stack([frame.mask for frame in frames])[None]).float(),
        "reference_keypoints": keypoint_tensor(reference.keypoints[0], reference.scores[0]),
        "keypoints": torch.stack([keypoint_tensor(frame.keypoints[0], frame.scores[0]) for frame in frames]),
    }


def latent_item(mean: torch.Tensor, deviation: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a clip for the latents (1 + F, c, h, w) of its reference and frames, of any float type."""
    deviation = torch.zeros_like(mean) if deviation is None else deviation
    return {
        "latent_mean": mean[1:].transpose(0, 1).float(),  # (c, F, h, w)
        "latent_deviation": deviation[1:].transpose(0, 1).float(),
        "reference_latents": mean[0].float(),  # (c, h, w)
    }


def clip_tensor(images: list[np.ndarray]) -> torch.Tensor:
    """f images (h, w, 3) uint8 -> float32 (3, f, h, w) in [-1, 1]."""
    return pixel_tensor(images).div_(127.5).sub_(1)


def pixel_tensor(images: list[np.ndarray]) -> torch.Tensor:
    """f images (h, w, 3) uint8 -> float32 (3, f, h, w) in [0, 255]; a copy of its own."""
    # In one pass over all images: long clips of large ones spend most of a loader's time here.
    stacked = torch.from_numpy(np.stack(images)).permute(3, 0, 1, 2)
    return stacked.to(torch.float32, memory_format=torch.contiguous_format)


def keypoint_tensor(keypoints: np.ndarray, scores: np.ndarray) -> torch.Tensor:
    """(17, 2) and (17,) -> float32 (17, 3)."""
    return torch.from_numpy(np.concatenate([keypoints, scores[:, None]], 1).astype(np.float32))


def _image(rendered: Rendered) -> LabelledImage:
    return LabelledImage(rendered.image, rendered.mask, rendered.keypoints[None], rendered.scores[None])


def check_positive(**arguments: int) -> None:
    """ValueError for an argument below 1."""
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_index(index: int, length: int) -> None:
    """IndexError for an item beyond a data set's length."""
    # Not a ValueError: iteration over a map-style data set ends with an IndexError.
    if not 0 <= index < length:
        raise IndexError(f"index must be in [0, {length}), got {index}")
