"""Clips with everything that an animation is measured by: what they consist of, and rendered ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from core.errors import UserError
from data.clips.rendered import PeopleConfig, RenderedPeople
from data.inputs import Driving, Reference
from data.people.renderer import Rendered
from data.people.scenes import Scene, misaligned_reference
from data.poses.poses import Poses
from data.transforms import apply_fit, fit_matrix
from tpc.silhouettes import body_height

RENDERED = "rendered"
RENDERED_FPS = 24.0
# How the references of rendered clips are misaligned, in turn.
VARIATIONS = ("aligned", "turned", "aligned", "scaled", "aligned", "turned and scaled")


@dataclass
class ClipsConfig:
    """Where clips come from.

    dataset: "rendered" (held-out people, exact poses and masks); a folder that `prepare.py` made; or a folder of
        videos with pose files beside them (name.mp4, name.npz, and masks in name_masks/). The reference of a video is
        one of its own frames.
    clips: number of clips, 0 = all of a folder; frames, stride: of every clip, 0 frames = all of a video.
    source: pixels of the side of rendered images; clip_seed: other seeds are other rendered clips.
    reference_frame: of a video, the image that is animated.
    people: how rendered people look; the clothes that the shipped model knows, whole persons, cameras held upright.
    """

    dataset: str = RENDERED
    clips: int = 8
    frames: int = 16
    stride: int = 2
    source: int = 256
    clip_seed: int = 100
    reference_frame: int = 0
    people: PeopleConfig = field(
        default_factory=lambda: PeopleConfig(height=[0.7, 1.0], close_ups=0.0, tilted=0.0, plain=0.7)
    )

    def check(self) -> None:
        """Refuse values that cannot work, naming them."""
        some = int(self.dataset == RENDERED)  # rendered clips have no end of their own
        least = {"frames": some, "stride": 1, "source": 32, "reference_frame": 0, "clips": some}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"{name}={getattr(self, name)} must be at least {value}")


@dataclass(frozen=True)
class EvaluationClip:
    """A reference and a driving clip of the same person, whose frames are the truth.

    Attributes:
        reference, driving: inputs of the animation; `driving.frames` and `driving.masks` are given.
    """

    name: str
    reference: Reference
    driving: Driving

    def truth(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """True frames (f, h, w, 3) uint8 and person masks (f, h, w) bool in a model's frame of (width, height)."""
        matrix = fit_matrix(self.driving.poses.size, size)
        frames = np.stack([apply_fit(frame, matrix, size) for frame in self.driving.frames])
        person = self.driving.masks.any(axis=1).astype(np.uint8) * 255
        return frames, np.stack([apply_fit(mask, matrix, size) for mask in person]) >= 128


class ClipSet(Protocol):
    """Clips by name."""

    names: Sequence[str]

    def poses(self, name: str) -> tuple[Poses, Poses]:
        """Poses of the reference, one frame, and of the clip."""

    def clip(self, name: str) -> EvaluationClip:
        """Everything about a clip."""

    def stamps(self, name: str) -> list:
        """What tells whether a clip's files have changed."""


def rendered_clip(scene: Scene, reference: Rendered, name: str) -> EvaluationClip:
    """A rendered scene with the reference given, which may be framed otherwise than the scene."""
    frames = [scene.render(pose) for pose in scene.poses]
    size = (reference.image.shape[1], reference.image.shape[0])
    return EvaluationClip(
        name,
        Reference(reference.image, _poses_of([reference], size), reference.mask[None]),
        Driving(
            np.stack([frame.image for frame in frames]),
            _poses_of(frames, scene.size),
            np.stack([frame.mask for frame in frames])[:, None],
        ),
    )


def rendered_people(config: ClipsConfig) -> RenderedPeople:
    """Held-out people as the clips of a configuration show them."""
    return RenderedPeople(
        size=(config.source, config.source),
        num_frames=config.frames,
        stride=config.stride,
        fps=RENDERED_FPS,
        split="heldout",
        seed=config.clip_seed,
        length=config.clips,
        people=config.people,
    )


def with_pose_noise(clip: EvaluationClip, deviation: float, rng: np.random.Generator) -> EvaluationClip:
    """The clip with errors in the keypoints of reference and frames, as a pose estimator makes them; masks stay exact.

    Args:
        deviation: standard deviation of the errors along x and along y, in parts of the person's standing height in
            that image; every keypoint of every image has an error of its own.
    """
    reference, driving = (
        replace(given, poses=_noisy(given.poses, deviation, rng)) for given in (clip.reference, clip.driving)
    )
    return replace(clip, reference=reference, driving=driving)


def at_first_frame(scene: Scene) -> Scene:
    """The scene with its first frame's pose as the reference's, as in the field's protocols for filmed clips."""
    return replace(scene, reference_pose=scene.poses[0])


class RenderedClips:
    """Held-out people; half of the references are the first frame, the others show it turned, scaled, or both."""

    def __init__(self, config: ClipsConfig):
        self._config, self._people = config, rendered_people(config)
        self.names = [f"rendered-{number:03d}" for number in range(config.clips)]

    def poses(self, name: str) -> tuple[Poses, Poses]:
        clip = self.clip(name)
        return clip.reference.poses, clip.driving.poses

    def clip(self, name: str) -> EvaluationClip:
        number = self.names.index(name)
        scene = at_first_frame(self._people.scene(number))
        rng = np.random.default_rng([self._config.clip_seed, number])
        turn = float(rng.choice([-1, 1]) * rng.uniform(np.pi / 4, np.pi))
        scale = float(rng.choice([rng.uniform(0.35, 0.6), rng.uniform(1.5, 2.2)]))
        variation = VARIATIONS[number % len(VARIATIONS)]
        reference = misaligned_reference(
            scene,
            scale=scale if "scaled" in variation else 1.0,
            rotation=turn if "turned" in variation else 0.0,
        )
        return rendered_clip(scene, reference, name)

    def stamps(self, name: str) -> list:
        return []


def _noisy(poses: Poses, deviation: float, rng: np.random.Generator) -> Poses:
    errors = rng.normal(0.0, deviation, poses.keypoints.shape)
    heights = [
        [body_height(points, seen > 0) for points, seen in zip(*frame, strict=True)]
        for frame in zip(poses.keypoints, poses.scores, strict=True)
    ]
    found = (poses.scores > 0)[..., None]  # what was not found stays where it is
    return replace(poses, keypoints=poses.keypoints + errors * np.asarray(heights)[..., None, None] * found)


def _poses_of(frames: Sequence[Rendered], size: tuple[int, int]) -> Poses:
    keypoints = np.stack([frame.keypoints for frame in frames])[:, None]
    return Poses(keypoints, np.stack([frame.scores for frame in frames])[:, None], size, RENDERED_FPS)
