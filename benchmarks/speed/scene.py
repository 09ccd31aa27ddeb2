"""Inputs of the measurements: rendered people, standing beside each other, and a clip that turns and zooms."""

from dataclasses import dataclass

import numpy as np

from data.people.bodies import build_person, load_people, random_identity
from data.people.motion import random_motion
from data.people.renderer import Camera, Figure, render_people
from data.poses.drawing import draw_pose
from data.poses.poses import Poses
from tpc import Calibration, CalibrationConfig, calibrate

FPS = 15.0
HEIGHT = 0.7  # of a standing person, as a share of the image's


@dataclass(frozen=True)
class Scene:
    """A reference image and a driving clip of the same persons."""

    reference: np.ndarray  # (H, W, 3) uint8 RGB
    reference_poses: Poses  # one frame
    reference_masks: np.ndarray  # (p, H, W) bool
    poses: Poses  # f frames
    masks: np.ndarray  # (f, p, H, W) bool
    images: np.ndarray  # (f, height, width, 3) uint8, the drawn poses
    size: tuple[int, int]  # (width, height) of the animation

    def calibration(self, config: CalibrationConfig) -> Calibration:
        inputs = self.reference, self.reference_poses, self.poses, self.size, config
        return calibrate(*inputs, reference_masks=self.reference_masks, driving_masks=self.masks)


def make_scene(persons: int, frames: int, size: tuple[int, int], times: int = 1, seed: int = 0) -> Scene:
    """A scene for an animation of `size`; people are rendered `times` smaller, which takes less time."""
    rng, library, rendered = np.random.default_rng(seed), load_people(), (size[0] // times, size[1] // times)
    people = [build_person(random_identity(rng, library, "heldout"), library) for _ in range(persons)]
    motions = [random_motion(rng, frames, FPS) for _ in people]
    centres = (np.arange(persons) + 0.5) / persons
    height = HEIGHT / max(1.0, 0.6 * persons)

    def drawn(frame: int, scale: float, angle: float):
        cameras = [Camera(height * scale, angle, (centre, 0.5)) for centre in centres]
        poses = [motion.pose(frame) for motion in motions]
        return render_people([Figure(*figure) for figure in zip(people, poses, cameras, strict=True)], rendered)

    reference = drawn(0, 1.0, 0.0)
    shares = np.arange(frames) / max(frames - 1, 1)
    clip = [drawn(frame, 1.0 - 0.4 * share, 0.6 * share) for frame, share in enumerate(shares)]

    def poses(images: list) -> Poses:
        keypoints = np.stack([image.keypoints for image in images])
        return Poses(keypoints, np.stack([image.scores for image in images]), rendered, FPS)

    driving = poses(clip)
    figures = zip(driving.keypoints * times, driving.scores, strict=True)
    return Scene(
        reference.image,
        poses([reference]),
        reference.masks,
        driving,
        np.stack([image.masks for image in clip]),
        np.stack([draw_pose(*figure, size) for figure in figures]),
        size,
    )
