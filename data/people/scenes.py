"""Rendered scenes: a person and their motion, camera, light, and background, all drawn from a seed."""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from data.people.bodies import Person, Pose
from data.people.renderer import Camera, Light, Rendered, render_person


@dataclass(frozen=True)
class CameraRanges:
    """Framing of people; one camera holds for a clip and its reference. Angles in radians, either way."""

    height: tuple[float, float] = (0.55, 1.05)  # of the standing person as a share of the image's
    rotation: float = 0.09  # largest turn in the image plane
    shift: float = 0.12  # largest distance of the person from the middle, as a share of the image's width
    pitch: float = 0.12  # largest tilt of the view
    close_ups: float = 0.12  # share of clips that show the upper half of the body, as talking people are filmed
    close_up_height: tuple[float, float] = (1.2, 1.6)  # as `height`, for close-ups
    tilted: float = 0.0  # share of clips that are turned by up to `tilt`, as by a camera that is not held upright
    tilt: float = np.pi / 2
    reframed: float = 0.0  # share of references whose person is framed otherwise than in the clip, see `reframed`:
    reframed_scale: tuple[float, float] = (0.55, 1.5)  # factors on its size, drawn evenly in their logarithm
    reframed_rotation: float = np.pi
    reframed_shift: float = 0.12  # as `shift`


@dataclass(frozen=True)
class Scene:
    """Content of a rendered clip; light and background (h, w, 3) uint8 are the same for all images."""

    person: Person
    reference_pose: Pose
    poses: list[Pose]
    camera: Camera
    light: Light
    background: np.ndarray
    reference_camera: Camera | None = None  # of the reference, where its person is framed otherwise

    @property
    def size(self) -> tuple[int, int]:
        return self.background.shape[1], self.background.shape[0]

    def render(self, pose: Pose) -> Rendered:
        return self._render(pose, self.camera)

    def render_reference(self) -> Rendered:
        return self._render(self.reference_pose, self.reference_camera or self.camera)

    def _render(self, pose: Pose, camera: Camera) -> Rendered:
        return render_person(self.person, pose, camera, self.size, self.background, self.light)


def random_camera(rng: np.random.Generator, ranges: CameraRanges) -> Camera:
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
    """Camera with another framing of the person; see `misaligned_reference`."""
    center = (camera.center[0] + shift[0], camera.center[1] + shift[1])
    return replace(camera, scale=camera.scale * scale, rotation=camera.rotation + rotation, center=center)


def random_reframing(rng: np.random.Generator, camera: Camera, ranges: CameraRanges) -> Camera | None:
    """Camera of the reference of a clip that `camera` films, None where it is the same."""
    if ranges.reframed == 0 or rng.random() >= ranges.reframed:
        return None
    low, high = np.log(ranges.reframed_scale)
    turn = rng.uniform(-ranges.reframed_rotation, ranges.reframed_rotation)
    shift = rng.uniform(-ranges.reframed_shift, ranges.reframed_shift, 2)
    return reframed(camera, float(np.exp(rng.uniform(low, high))), float(turn), (float(shift[0]), float(shift[1])))


def misaligned_reference(
    scene: Scene,
    scale: float = 1.0,
    rotation: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    background: np.ndarray | None = None,
) -> Rendered:
    """Scene's reference with the person framed otherwise than in the clip; a background gives it another size.

    The turn in the image plane is in radians, clockwise, the shift in shares of the image's width and height.
    """
    camera = reframed(scene.camera, scale, rotation, shift)
    background = scene.background if background is None else background
    size = (background.shape[1], background.shape[0])
    return render_person(scene.person, scene.reference_pose, camera, size, background, scene.light)


_CANVAS = 192  # longer side of the image in which shapes are drawn before they are enlarged or reduced


def random_background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Draw a background, (height, width, 3) uint8 RGB: a room, a street of blurred boxes, a studio, blobs, stripes."""
    width, height = size
    factor = max(1.0, _CANVAS / max(size))
    canvas = _gradient(rng, round(width * factor), round(height * factor))
    _BACKGROUNDS[rng.choice(len(_BACKGROUNDS), p=(0.12, 0.34, 0.18, 0.18, 0.18))](rng, canvas)
    blur = rng.choice([0.0, 0.004, 0.012, 0.03], p=(0.35, 0.3, 0.2, 0.15)) * max(canvas.shape)
    if blur > 0.3:
        canvas = cv2.GaussianBlur(canvas, (0, 0), blur)
    canvas = cv2.resize(canvas, size, interpolation=cv2.INTER_AREA)
    canvas += rng.normal(0, rng.uniform(0, 3), (height, width, 1))
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _color(rng: np.random.Generator) -> np.ndarray:
    grey = rng.uniform(30, 235)
    return np.clip(grey + rng.uniform(0.1, 1.0) * rng.normal(0, 55, 3), 5, 250).astype(np.float32)


def _scalar(rng: np.random.Generator) -> tuple[float, ...]:
    return tuple(float(value) for value in _color(rng))


def _gradient(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    x, y = _axes(width, height)
    weight = np.clip(0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle), 0, 1)[..., None]
    first = _color(rng)
    second = np.clip(first + rng.normal(0, 40, 3), 5, 250).astype(np.float32)
    return first + (second - first) * weight


def _axes(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """x (1, width) and y (height, 1) float32 in units of the longer side."""
    longer = max(width, height)
    x, y = np.arange(width, dtype=np.float32) / longer, np.arange(height, dtype=np.float32) / longer
    return x[None], y[:, None]


def _studio(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """A backdrop lit from one spot."""
    x, y = _axes(canvas.shape[1], canvas.shape[0])
    distance = np.hypot(x - rng.uniform(0.2, 0.8) * x.max(), y - rng.uniform(0.1, 0.7) * y.max())
    canvas *= np.clip(1.2 - 0.8 * distance, 0.3, 1.3)[..., None]


def _room(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """A wall and a floor, a skirting board, windows or images, furniture standing on the floor."""
    height, width = canvas.shape[:2]
    horizon = int(height * rng.uniform(0.55, 0.85))
    floor = _color(rng)
    shade = np.linspace(0.75, 1.1, height - horizon, dtype=np.float32)[:, None, None]
    canvas[horizon:] = floor * shade
    if rng.random() < 0.5:
        _floor_boards(rng, canvas, horizon)
    if rng.random() < 0.4:
        _wallpaper(rng, canvas[:horizon])
    if rng.random() < 0.6:
        cv2.rectangle(canvas, (0, horizon - max(1, height // 40)), (width, horizon), _scalar(rng), -1)
    for _ in range(rng.integers(0, 4)):
        _framed_rectangle(rng, canvas, 0, int(horizon * 0.75))
    for _ in range(rng.integers(0, 4)):
        _furniture(rng, canvas, horizon)


def _floor_boards(rng: np.random.Generator, canvas: np.ndarray, horizon: int) -> None:
    """Lines on the floor that meet at a point behind the wall."""
    height, width = canvas.shape[:2]
    vanishing_x, count = rng.uniform(0.2, 0.8) * width, int(rng.integers(6, 20))
    color = tuple(float(value) for value in canvas[-1, 0] * rng.uniform(0.6, 0.9))
    vanishing_y = horizon - 0.4 * height
    for bottom in np.linspace(-width, 2 * width, count):
        share = (horizon - vanishing_y) / (height - vanishing_y)
        top = vanishing_x + (bottom - vanishing_x) * share
        cv2.line(canvas, (int(top), horizon), (int(bottom), height), color, 1, cv2.LINE_AA)


def _wallpaper(rng: np.random.Generator, wall: np.ndarray) -> None:
    """Stripes or bricks of nearly the wall's colour."""
    height, width = wall.shape[:2]
    period = int(rng.integers(6, 28))
    columns, rows = np.arange(width) // period % 2, np.arange(height) // max(3, period // 2) % 2
    pattern = columns[None] * np.ones((height, 1)) if rng.random() < 0.6 else (columns[None] + rows[:, None]) % 2
    wall *= (1 + rng.uniform(-0.25, 0.25) * pattern[..., None]).astype(np.float32)


def _framed_rectangle(rng: np.random.Generator, canvas: np.ndarray, top: int, bottom: int) -> None:
    """A window, image or door: a rectangle with a frame, sometimes with a cross in it."""
    width = canvas.shape[1]
    left, upper = int(rng.uniform(-0.1, 0.85) * width), int(rng.uniform(top, max(top + 1, bottom)))
    right = left + int(rng.uniform(0.1, 0.4) * width)
    lower = upper + int(rng.uniform(0.1, 0.5) * canvas.shape[0])
    cv2.rectangle(canvas, (left, upper), (right, lower), _scalar(rng), -1)
    frame, thickness = _scalar(rng), max(1, width // 60)
    cv2.rectangle(canvas, (left, upper), (right, lower), frame, thickness)
    if rng.random() < 0.4:
        cv2.line(canvas, ((left + right) // 2, upper), ((left + right) // 2, lower), frame, thickness)
        cv2.line(canvas, (left, (upper + lower) // 2), (right, (upper + lower) // 2), frame, thickness)


def _furniture(rng: np.random.Generator, canvas: np.ndarray, horizon: int) -> None:
    """A cupboard, a table, a plant or a lamp."""
    height, width = canvas.shape[:2]
    left, foot = int(rng.uniform(-0.1, 0.9) * width), int(horizon + rng.uniform(0, 0.12) * height)
    breadth, tall = int(rng.uniform(0.08, 0.35) * width), int(rng.uniform(0.12, 0.5) * height)
    color, dark = _scalar(rng), _scalar(rng)
    kind = rng.integers(4)
    if kind == 0:
        cv2.rectangle(canvas, (left, foot - tall), (left + breadth, foot), color, -1)
        for step in np.linspace(foot - tall, foot, int(rng.integers(2, 6)))[1:-1]:
            cv2.line(canvas, (left, int(step)), (left + breadth, int(step)), dark, 1)
    elif kind == 1:
        leg = max(1, width // 70)
        cv2.rectangle(canvas, (left, foot - tall // 2), (left + breadth, foot - tall // 2 + 2 * leg), color, -1)
        for x in (left + leg, left + breadth - leg):
            cv2.rectangle(canvas, (x - leg // 2, foot - tall // 2), (x + leg // 2, foot), color, -1)
    elif kind == 2:
        cv2.rectangle(canvas, (left, foot - tall // 4), (left + breadth // 2, foot), color, -1)
        leaf = (float(rng.uniform(20, 90)), float(rng.uniform(80, 170)), float(rng.uniform(20, 90)))
        for _ in range(rng.integers(5, 12)):
            end = (left + int(rng.uniform(-0.4, 0.9) * breadth), foot - tall // 4 - int(rng.uniform(0.2, 0.8) * tall))
            cv2.line(canvas, (left + breadth // 4, foot - tall // 4), end, leaf, max(1, width // 60), cv2.LINE_AA)
    else:
        centre = left + breadth // 2
        cv2.line(canvas, (centre, foot), (centre, foot - tall), dark, max(1, width // 90))
        shade = np.array([[-0.3, 0.0], [0.3, 0.0], [0.18, -0.35], [-0.18, -0.35]]) * breadth + (centre, foot - tall)
        cv2.fillPoly(canvas, [np.rint(shade).astype(np.int32)], color, cv2.LINE_AA)


def _boxes(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Overlapping rectangles, as a street or a shop out of focus."""
    height, width = canvas.shape[:2]
    for _ in range(rng.integers(4, 14)):
        x, y = rng.uniform(-0.1, 1.0, 2) * (width, height)
        across, down = rng.uniform(0.05, 0.5, 2) * (width, height)
        cv2.rectangle(canvas, (int(x), int(y)), (int(x + across), int(y + down)), _scalar(rng), -1)


def _blobs(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Rounded shapes and, below, a meadow or road: the outdoors."""
    height, width = canvas.shape[:2]
    for _ in range(rng.integers(3, 12)):
        centre = (int(rng.uniform(0, 1) * width), int(rng.uniform(0, 0.8) * height))
        axes = (int(rng.uniform(0.03, 0.3) * width), int(rng.uniform(0.03, 0.25) * height))
        cv2.ellipse(canvas, centre, axes, float(rng.uniform(0, 180)), 0, 360, _scalar(rng), -1, cv2.LINE_AA)
    if rng.random() < 0.7:
        ground = int(height * rng.uniform(0.6, 0.9))
        canvas[ground:] = _color(rng) * np.linspace(0.85, 1.1, height - ground, dtype=np.float32)[:, None, None]


def _stripes(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Blinds, panels or shelves: parallel bands at any angle, and a few things in front of them."""
    angle = rng.choice([0.0, np.pi / 2, rng.uniform(0, np.pi)])
    x, y = _axes(canvas.shape[1], canvas.shape[0])
    bands = np.sin(2 * np.pi * rng.uniform(3, 14) * (x * np.cos(angle) + y * np.sin(angle)))
    canvas += (np.clip(4 * bands, -1, 1) * rng.uniform(8, 45))[..., None].astype(np.float32)
    for _ in range(rng.integers(0, 3)):
        _framed_rectangle(rng, canvas, 0, canvas.shape[0] - 1)


_BACKGROUNDS = (_studio, _room, _boxes, _blobs, _stripes)
