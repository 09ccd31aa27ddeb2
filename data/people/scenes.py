"""Rendered scenes: a person, what they do, how they are framed and lit, and what is behind them."""

from dataclasses import dataclass, replace

import numpy as np

from data.people.bodies import Person
from data.people.renderer import Camera, Light, Rendered, render_person
from data.people.skeleton import Pose


@dataclass(frozen=True)
class CameraRanges:
    """How people are framed; one camera holds for a clip and its reference.

    Attributes:
        height: the standing person's height as a share of the image's.
        rotation: largest turn in the image plane, either way, radians.
        tilted: share of clips that are turned by up to `tilt`, as by a camera that is not held upright.
        tilt: largest turn of tilted clips, either way, radians.
        shift: largest distance of the person from the middle, as a share of the image's width.
        pitch: largest tilt of the view, either way, radians.
        close_ups: share of clips that show the upper half of the body, as talking people are filmed.
        close_up_height: as `height`, for close-ups.
    """

    height: tuple[float, float] = (0.55, 1.05)
    rotation: float = 0.09
    shift: float = 0.12
    pitch: float = 0.12
    close_ups: float = 0.12
    close_up_height: tuple[float, float] = (1.2, 1.6)
    tilted: float = 0.0
    tilt: float = np.pi / 2


@dataclass(frozen=True)
class Scene:
    """Everything that a rendered clip shows.

    Attributes:
        person: who.
        reference_pose, poses: what they do in the reference image and in the frames.
        camera, light, background: the same for all images; (h, w, 3) uint8.
    """

    person: Person
    reference_pose: Pose
    poses: list[Pose]
    camera: Camera
    light: Light
    background: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.background.shape[1], self.background.shape[0]

    def render(self, pose: Pose) -> Rendered:
        """The person in `pose`, as the clip's camera sees it."""
        return render_person(self.person, pose, self.camera, self.size, self.background, self.light)


def random_camera(rng: np.random.Generator, ranges: CameraRanges) -> Camera:
    """Draw how a person is framed."""
    close_up = rng.random() < ranges.close_ups
    scale = rng.uniform(*(ranges.close_up_height if close_up else ranges.height))
    if close_up:
        middle = rng.uniform(0.06, 0.16) + scale / 2
    else:
        middle = 0.5 + rng.uniform(-0.4, 0.4) * abs(1 - scale) + 0.01
    rotation = rng.uniform(-ranges.rotation, ranges.rotation)
    if ranges.tilted > 0 and rng.random() < ranges.tilted:
        rotation = rng.uniform(-ranges.tilt, ranges.tilt)
    return Camera(
        scale=float(scale),
        rotation=float(rotation),
        center=(float(0.5 + rng.uniform(-ranges.shift, ranges.shift)), float(middle)),
        pitch=float(rng.uniform(-ranges.pitch, ranges.pitch)),
    )


def random_light(rng: np.random.Generator) -> Light:
    """Light from above and in front, more or less soft."""
    angle = rng.uniform(-1.2, 1.2)
    direction = (float(np.sin(angle)), float(-np.cos(angle)), float(rng.uniform(0.1, 1.0)))
    return Light(direction, ambient=float(rng.uniform(0.35, 0.7)))


def reframed(camera: Camera, scale: float, rotation: float, shift: tuple[float, float]) -> Camera:
    """A camera that shows the person otherwise; see `misaligned_reference`."""
    center = (camera.center[0] + shift[0], camera.center[1] + shift[1])
    return replace(camera, scale=camera.scale * scale, rotation=camera.rotation + rotation, center=center)


def misaligned_reference(
    scene: Scene,
    scale: float = 1.0,
    rotation: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    background: np.ndarray | None = None,
) -> Rendered:
    """The scene's reference with the person framed otherwise than in the clip.

    Args:
        scale: factor on the person's size.
        rotation: turn added in the image plane, radians, clockwise as seen.
        shift: added to the person's place, as shares of the image's width and height.
        background: (h, w, 3) uint8, of any size, which the reference then has; the scene's own without it.
    """
    camera = reframed(scene.camera, scale, rotation, shift)
    background = scene.background if background is None else background
    size = (background.shape[1], background.shape[0])
    return render_person(scene.person, scene.reference_pose, camera, size, background, scene.light)
