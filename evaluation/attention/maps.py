"""What recorded attention says: where a point of the body looks, and where it should.

    names, points = body_points(driving.poses, frame_map, size)
    with AttentionRecording(AttentionConfig(mean=["heads"]), points, names) as recording:
        pipeline(image, poses, calibration, attention=recording)
    truth = body_truth(recording.result, reference.poses, calibration)
    pointing(recording.result, truth, layer).accuracy(radius=0.15)

A point is a keypoint of a person in a driving frame; its true place is the same keypoint in the reference, and in a
calibrated image the place to which the calibration's transform moves that. Distances are in body heights of the person
as the image shows them, so images of small and of large persons compare.

Shapes use s = steps, f = frames, a = heads, p = points, k = images that may be looked at (the reference, then a
calibrated image a person), h, w = a layer's grid, r = h*w tokens of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from data.poses.person import COCO_KEYPOINTS
from data.poses.poses import Poses
from data.transforms import fit_matrix, map_points
from models.attention.measures import (
    EPS,
    centroid,
    edge_distances,
    entropy,
    mass_within,
    normalised,
    token_coords,
    value_at_argmax,
)
from models.attention.record import RecordedAttention
from tpc import Calibration
from tpc.silhouettes import body_height, visible

SCORE = 0.3
JOINTS = len(COCO_KEYPOINTS)


@dataclass(frozen=True)
class BodyTruth:
    """Where the points of a recording are in the images they may look at.

    Attributes:
        places: (s, f, p, k, 2) in pixels of the model's frame, (x, y); NaN where the image does not show the point,
            or is not of its person.
        heights: (s, f, p, k) body height of the point's person in the image, pixels; NaN where it is not of them.
        size: (width, height) of the images.
    """

    places: Tensor
    heights: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class Pointing:
    """How attention points in one layer; NaN where a point is not visible in the frame or in the reference.

    Attributes:
        strongest: (s, f, a, p) distance of the strongest token of all images from the true place in its image, in
            body heights; 0 when the token holds it.
        offset: (s, f, a, p, 2) from the true place to the centroid, in the image that gets most, body heights.
        entropy: (s, f, a, p) of attention over all images, nats.
        near: (s, f, a, p) part of attention to images that falls on tokens within the `radius` that was asked for.
    """

    strongest: Tensor
    offset: Tensor
    entropy: Tensor
    near: Tensor

    @property
    def centroid(self) -> Tensor:
        """(s, f, a, p) distance of the centroid from the true place, body heights."""
        return self.offset.norm(dim=-1)

    def accuracy(self, radius: float, by: str = "strongest") -> Tensor:
        """(s, f, a, p): 1 where the "strongest" token or the "centroid" lies within `radius` body heights, else 0."""
        distance = getattr(self, by)
        return torch.where(distance.isnan(), distance, (distance <= radius).to(distance.dtype))

    def drift(self) -> Tensor:
        """(s - 1, f, a, p): how far the centroid moves on the body from a recorded step to the next, body heights."""
        return (self.offset[1:] - self.offset[:-1]).norm(dim=-1)


def body_points(
    poses: Poses, frame_map: np.ndarray, size: tuple[int, int], threshold: float = SCORE
) -> tuple[list[str], np.ndarray]:
    """Names and places (f, persons*17, 2) of keypoints in the model's frame, for `AttentionRecording`.

    Keypoints below the threshold or outside the frame are NaN. Persons after the first have their number in the name.

    Args:
        frame_map: (3, 3), pixels of the driving clip to the model's frame.
        size: (width, height) of the model's frame.
    """
    moved = poses.mapped(frame_map, size).clipped()
    seen = visible(moved.scores, moved.keypoints, threshold)
    points = np.where(seen[..., None], moved.keypoints, np.nan).reshape(poses.frames, -1, 2)
    names = [f"{name} {person}" if person else name for person in range(poses.persons) for name in COCO_KEYPOINTS]
    return names, points.astype(np.float32)


def require_reference(recorded: RecordedAttention) -> None:
    """Refuse recordings in which no map of the reference can be read.

    Raises:
        UserError: calibrated images took the reference's place, or an image's tokens have no place in it.
    """
    if recorded.selection.replaced:
        raise UserError("tpc.attach=replace shows no reference beside calibrated images; record with tpc.attach=add")
    for name, shape in recorded.selection.layers.items():
        if shape.layout.grid is None:
            raise UserError(
                f"{name} sees tokens that mix the whole image, so its attention points nowhere in it; what each "
                "image gets in all is in the recording's maps"
            )


def body_truth(
    recorded: RecordedAttention,
    reference: Poses,
    calibration: Calibration | None = None,
    reference_map: np.ndarray | None = None,
    persons: Sequence[int] | None = None,
    threshold: float = SCORE,
) -> BodyTruth:
    """Where the points of `body_points` are in the reference and in the calibrated images.

    Args:
        reference: pose of the reference, in its own pixels; one frame.
        calibration: what the run was given.
        reference_map: (3, 3), pixels of the reference to the model's frame; None: it is fitted in whole.
        persons: which person of the reference every person of the points is; None: in order.

    Raises:
        UserError: no map of the reference, points that are not 17 keypoints a person, persons that the reference does
            not show, or a running mean over steps or frames while the calibrated image changes.
    """
    require_reference(recorded)
    selection = recorded.selection
    if recorded.points is None or selection.points % JOINTS:
        raise UserError("points: record the keypoints of `body_points` to compare them with the reference's")
    persons = list(range(selection.points // JOINTS)) if persons is None else list(persons)
    if len(persons) * JOINTS != selection.points or max(persons) >= reference.persons:
        raise UserError(
            f"persons={persons}: the reference shows {reference.persons}, points are of {selection.points}"
        )
    if reference_map is None:
        reference_map = fit_matrix(reference.size, selection.size, "contain")
    steps, frames = selection.shape(recorded.layers[0])[:2]
    places = np.full((steps, frames, selection.points, selection.images, 2), np.nan)
    heights = np.full(places.shape[:-1], np.nan)
    matrices = image_matrices(recorded, calibration, reference_map)
    for number, person in enumerate(persons):
        rows = slice(number * JOINTS, (number + 1) * JOINTS)
        keypoints = map_points(reference.keypoints[0, person].astype(np.float64), reference_map)
        seen = visible(reference.scores[0, person], keypoints, threshold)
        height = body_height(keypoints, seen) or np.nan
        shown = np.where(seen[:, None], keypoints, np.nan)
        places[:, :, rows, 0], heights[:, :, rows, 0] = shown, height
        if selection.images > 1:
            moves = matrices[:, :, person]  # (s, f, 3, 3)
            places[:, :, rows, 1 + person] = shown @ moves[..., :2, :2].mT + moves[..., None, :2, 2]
            scale = np.sqrt(np.abs(np.linalg.det(moves[..., :2, :2])))
            heights[:, :, rows, 1 + person] = (scale * height)[..., None]
    return BodyTruth(torch.from_numpy(places), torch.from_numpy(heights), selection.size)


def image_matrices(
    recorded: RecordedAttention, calibration: Calibration | None, reference_map: np.ndarray
) -> np.ndarray:
    """(s, f, persons, 3, 3): from the reference to the calibrated image each frame saw, both in the model's frame.

    NaN where a person is not calibrated.

    Raises:
        UserError: the mean over steps or frames was recorded, and they saw different images.
    """
    selection = recorded.selection
    persons = selection.images - 1
    steps, frames = selection.shape(recorded.layers[0])[:2]
    if persons == 0:
        return np.empty((steps, frames, 0, 3, 3))
    if calibration is None or calibration.persons != persons:
        raise UserError(f"calibration: the recorded run had one of {persons} persons; give the same")
    images = np.stack([calibration.index(step)[list(selection.frames)] for step in selection.steps])
    for axis, name in enumerate(("steps", "frames")):
        if name in selection.mean:
            if (images != images.take([0], axis)).any():
                raise UserError(f"mean: {name} saw different calibrated images, which have no common true place")
            images = images.take([0], axis)
    to_model = np.linalg.inv(reference_map)
    found = np.full((*images.shape, 3, 3), np.nan)
    for person in range(persons):
        for image in np.unique(images[..., person][images[..., person] >= 0]):
            frame = int(np.flatnonzero(calibration.member[:, person] == image)[0])
            matrix = calibration.frame_map @ calibration.matrices[frame, person] @ to_model
            found[images[..., person] == image, person] = matrix
    return found


def layer_maps(recorded: RecordedAttention, layer: str, mean_heads: bool = True) -> Tensor:
    """(s, f, a, p, k, r) float32; with `mean_heads` a = 1."""
    maps = torch.from_numpy(np.asarray(recorded.maps[layer]))
    return maps.mean(dim=2, keepdim=True) if mean_heads else maps


def pointing(
    recorded: RecordedAttention, truth: BodyTruth, layer: str, radius: float = 0.15, mean_heads: bool = True
) -> Pointing:
    """How the attention of one layer points; heads apart without `mean_heads`."""
    return pointing_of(layer_maps(recorded, layer, mean_heads), truth, recorded.grid(layer), radius)


def pointing_of(maps: Tensor, truth: BodyTruth, grid: tuple[int, int], radius: float = 0.15) -> Pointing:
    """How attention maps (s, f, a, p, k, r) point; everything but `strongest` is differentiable in them.

    All images are one field of view: with exclusive masks a point on a calibrated person does not see the reference.
    """
    width, height = truth.size
    places = token_coords(truth.places.to(maps), (height, width), grid)[:, :, None]  # (s, f, 1, p, k, 2)
    # Pixels are square, tokens of rounded grids nearly so.
    unit = (truth.heights.to(maps) * (grid[0] * grid[1] / (height * width)) ** 0.5)[:, :, None]
    gaps = (edge_distances(places, grid) / unit[..., None]).nan_to_num(nan=torch.inf).flatten(-2)
    given = maps.sum(-1)  # (s, f, a, p, k)
    total = given.sum(-1)
    known = (total > EPS) & ~places[..., 0, 0].isnan()
    everywhere = normalised(maps, dim=(-2, -1)).flatten(-2)
    gaps = gaps.expand_as(everywhere)
    best = given.argmax(-1)[..., None, None]
    chosen = maps.gather(-2, best.expand(*maps.shape[:-2], 1, maps.shape[-1]))[..., 0, :]
    expected = places.expand(*given.shape, 2).gather(-2, best.expand(*best.shape[:-1], 2))[..., 0, :]
    scale = unit.expand_as(given).gather(-1, best[..., 0])
    offset = (centroid(normalised(chosen), grid) - expected) / scale
    return Pointing(
        _where(known, value_at_argmax(everywhere.nan_to_num(), gaps)),
        _where(known[..., None], offset),
        _where(known, entropy(everywhere)),
        _where(known, mass_within(everywhere, gaps, radius)),
    )


def chance(recorded: RecordedAttention, truth: BodyTruth, layer: str, person: np.ndarray, radius: float) -> Tensor:
    """(s, f, p) accuracy of a look at a random token of the person in the reference, to compare `accuracy` with.

    Args:
        person: (r,) part of every reference token that the person covers, see `tpc.attach.pool_masks`.
    """
    grid, (width, height) = recorded.grid(layer), truth.size
    places = token_coords(truth.places[..., 0, :], (height, width), grid)
    unit = truth.heights[..., 0] * (grid[0] * grid[1] / (height * width)) ** 0.5
    gaps = edge_distances(places, grid) / unit[..., None]
    found = mass_within(normalised(torch.as_tensor(person).to(gaps)), gaps, radius)
    return _where(~places[..., 0].isnan(), found)


def pck(distances: Tensor, radii: Sequence[float]) -> np.ndarray:
    """(len(radii),) share of the known distances that are at most each radius; NaN when none is known."""
    known = distances[~distances.isnan()]
    if not len(known):
        return np.full(len(radii), np.nan)
    return np.array([float((known <= radius).float().mean()) for radius in radii])


def _where(known: Tensor, values: Tensor) -> Tensor:
    return torch.where(known, values, torch.nan)
