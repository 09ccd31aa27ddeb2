"""Images of posed people with exact keypoints, masks and surface maps.

Conventions: pixels (x, y), y down, pixel centres at integers; COCO-17 keypoints, "left" is the person's left.

Scores of the keypoints: 0 outside the image; 1 in plain sight; hidden behind the person's own body or another
person, 0.6 for the joints of trunk and limbs, which estimators still place, and 0 for the points of the face, which
they do not.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from data.people.bodies import Body, Person, Pose, axis_rotation, pose_joints
from data.people.rasterizer import EMPTY_DEPTH, rasterize, resolve, skin_and_project

HIDDEN_SCORE = 0.6
_HIDDEN_SCORES = np.array([0.0] * 5 + [HIDDEN_SCORE] * 12)  # nose, eyes and ears come first in COCO order
# Metres in front of a keypoint from which a surface hides it: joints lie inside the body, ears may be under hair.
_TOLERANCES = np.array([0.06] * 3 + [0.09] * 2 + [0.22] * 2 + [0.13] * 4 + [0.22] * 2 + [0.13] * 4)
SUPERSAMPLING_LIMIT = 640  # images with a longer side than this are drawn without supersampling
VIEWING_DISTANCE = 2.6  # from the camera to the person, in body heights; gives a mild perspective


@dataclass(frozen=True)
class Camera:
    """Framing of a person in the image; angles in radians."""

    scale: float = 0.85  # the standing person's height as a share of the image's height
    rotation: float = 0.0  # of the person in the image plane, clockwise (y points down)
    center: tuple[float, float] = (0.5, 0.5)  # of the standing person, as shares of the image's width and height
    yaw: float = 0.0  # turn of the person about the vertical, positive towards the person's left
    pitch: float = 0.0  # tilt of the view, positive looks down on the person


@dataclass(frozen=True)
class Light:
    """Direction towards the light (x right, y away from the camera, z up) and the share that falls everywhere."""

    direction: tuple[float, float, float] = (0.45, -0.7, 0.55)
    ambient: float = 0.45


@dataclass(frozen=True)
class Figure:
    person: Person
    pose: Pose
    camera: Camera = field(default_factory=Camera)
    light: Light = field(default_factory=Light)


@dataclass(frozen=True)
class Rendered:
    image: np.ndarray  # (h, w, 3) uint8 RGB
    mask: np.ndarray  # (h, w) bool, where the person is visible
    keypoints: np.ndarray  # (17, 2) float32 pixels
    scores: np.ndarray  # (17,) float32, see the module


@dataclass(frozen=True)
class RenderedGroup:
    """An image of several people, as `Rendered` with a first axis of persons."""

    image: np.ndarray
    masks: np.ndarray
    keypoints: np.ndarray
    scores: np.ndarray


def camera_matrix(camera: Camera, size: tuple[int, int], height: float) -> np.ndarray:
    """Similarity (2, 3) from metres (right, down) around the middle of a person of this height to pixels."""
    scale = camera.scale * size[1] / height
    cosine, sine = scale * math.cos(camera.rotation), scale * math.sin(camera.rotation)
    x, y = camera.center[0] * size[0] - 0.5, camera.center[1] * size[1] - 0.5
    return np.array([[cosine, -sine, x], [sine, cosine, y]])


def project_keypoints(
    body: Body, pose: Pose, camera: Camera, size: tuple[int, int], transforms: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """COCO keypoints (17, 2) in pixels, in or outside the image, and their depths (17,) in metres.

    `transforms` are of `_view_transforms`, when they are known already.
    """
    transforms = _view_transforms(body, pose, camera) if transforms is None else transforms
    points = np.tensordot(body.keypoints, transforms, axes=((1, 2), (0, 2)))  # (17, 3) in camera axes
    depths = points[:, 1] + _distance(body)
    plane = np.stack([points[:, 0], -points[:, 2]], 1) * (_distance(body) / depths)[:, None]
    matrix = camera_matrix(camera, size, body.height)
    return plane @ matrix[:, :2].T + matrix[:, 2], depths


def render_person(
    person: Person,
    pose: Pose,
    camera: Camera,
    size: tuple[int, int],
    background: np.ndarray | None = None,
    light: Light | None = None,
) -> Rendered:
    """Render one person into an image of (width, height), over a background of that size or mid-grey."""
    group = render_people([Figure(person, pose, camera, light or Light())], size, background)
    return Rendered(group.image, group.masks[0], group.keypoints[0], group.scores[0])


def render_people(figures: list[Figure], size: tuple[int, int], background: np.ndarray | None = None) -> RenderedGroup:
    """Render several persons, the first one farthest back; masks hold visible pixels and do not overlap."""
    width, height = size
    image = np.full((height, width, 3), 128, np.uint8) if background is None else background.copy()
    if image.shape != (height, width, 3) or image.dtype != np.uint8:
        raise ValueError(f"background must be uint8 of shape {(height, width, 3)}, got {image.dtype} {image.shape}")
    masks = np.zeros((len(figures), height, width), bool)
    keypoints = np.zeros((len(figures), 17, 2), np.float32)
    scores = np.zeros((len(figures), 17), np.float32)
    for index, figure in enumerate(figures):
        body = figure.person.body
        transforms = _view_transforms(body, figure.pose, figure.camera)
        depth = _draw(figure, transforms, image, masks[index])
        keypoints[index], depths = project_keypoints(body, figure.pose, figure.camera, size, transforms)
        scores[index] = _visibility(keypoints[index], depths, depth, size)
        masks[:index] &= ~masks[index]  # the person in front hides those behind
        for behind in range(index):
            _hide(scores[behind], keypoints[behind], masks[index])
    return RenderedGroup(image, masks, keypoints, scores)


def project_vertices(
    figure: Figure, size: tuple[int, int], factor: int, transforms: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Vertices in the image, (v, 3) x, y in samples (`factor` a pixel and axis) and depth in metres; brightness (v,).

    `transforms` as in `project_keypoints`.
    """
    person = figure.person
    if transforms is None:
        transforms = _view_transforms(person.body, figure.pose, figure.camera)
    matrix = camera_matrix(figure.camera, size, person.body.height) * factor
    matrix[:, 2] += 0.5 * (factor - 1)  # samples' centres at integers too
    screen = np.empty((len(person.vertices), 3), np.float32)
    shades = np.empty(len(person.vertices), np.float32)
    light = np.array(figure.light.direction, np.float32)
    skin_and_project(
        person.vertices,
        person.normals,
        person.joint_indices,
        person.joint_weights,
        transforms.astype(np.float32),
        np.float32(_distance(person.body)),
        matrix.astype(np.float32),
        light / np.linalg.norm(light),
        np.float32(figure.light.ambient),
        screen,
        shades,
    )
    return screen, shades


def render_surface(person: Person, pose: Pose, camera: Camera, size: tuple[int, int]) -> np.ndarray:
    """Surface map of one person, (h, w, 3) float32: for every pixel the point at rest in metres; NaN off the person.

    Two maps of one person tell exactly which of their pixels show the same point of the body or of the clothes. A
    camera counts in shares of the image, so a map of any (width, height) belongs to it.
    """
    width, height = size
    screen, _ = project_vertices(Figure(person, pose, camera), size, factor=1)
    # The rasterizer interpolates brightness between vertices. On a texture of ones it writes just that.
    ones = np.ones((len(person.texture), 1, 1, 3), np.uint8)
    surface = np.empty((height, width, 3), np.float32)
    for axis in range(3):
        value = np.empty((height, width, 3), np.float32)
        depth = np.full((height, width), EMPTY_DEPTH, np.float32)
        along = np.ascontiguousarray(person.vertices[:, axis], np.float32)
        rasterize(screen, along, person.faces, person.corner_uv, person.parts, person.two_sided, ones, value, depth)
        surface[..., axis] = np.where(depth < EMPTY_DEPTH, value[..., 0], np.nan)
    return surface


def _draw(figure: Figure, transforms: np.ndarray, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw a person over `image` and into `mask`; return the depth buffer, which may be supersampled."""
    person = figure.person
    height, width = mask.shape
    factor = 2 if max(height, width) <= SUPERSAMPLING_LIMIT else 1
    screen, shades = project_vertices(figure, (width, height), factor, transforms)
    color = np.empty((height * factor, width * factor, 3), np.float32)
    depth = np.full((height * factor, width * factor), EMPTY_DEPTH, np.float32)
    rasterize(
        screen, shades, person.faces, person.corner_uv, person.parts, person.two_sided, person.texture, color, depth
    )
    resolve(color, depth, factor, image, mask)
    return depth


def _distance(body: Body) -> float:
    return VIEWING_DISTANCE * body.height


def _view_transforms(body: Body, pose: Pose, camera: Camera) -> np.ndarray:
    """Joint transforms (19, 3, 4) from rest to camera axes, around the middle of the standing person."""
    transforms = pose_joints(body.joints, body.neutral, pose, body.height).astype(np.float64)
    transforms[:, 2, 3] -= body.height / 2  # the middle of the standing person is the origin
    return axis_rotation(0, camera.pitch) @ axis_rotation(2, camera.yaw) @ transforms


def _visibility(keypoints: np.ndarray, depths: np.ndarray, buffer: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scores (17,) from the depth buffer at the keypoints."""
    width, height = size
    factor = buffer.shape[0] // height
    nearest = np.rint(keypoints).astype(int)
    inside = (nearest >= 0).all(1) & (nearest < (width, height)).all(1)
    columns, rows = np.clip(nearest, 0, np.array(size) - 1).T * factor
    hidden = buffer[rows, columns] < depths - _TOLERANCES  # (17,)
    scores = np.where(hidden, _HIDDEN_SCORES, 1.0)
    return np.where(inside, scores, 0.0)


def _hide(scores: np.ndarray, keypoints: np.ndarray, mask: np.ndarray) -> None:
    """Lower the scores of keypoints that a person in front covers."""
    nearest = np.clip(np.rint(keypoints).astype(int), 0, np.array(mask.shape[::-1]) - 1)
    covered = mask[nearest[:, 1], nearest[:, 0]]
    scores[covered] = np.minimum(scores, _HIDDEN_SCORES)[covered]
