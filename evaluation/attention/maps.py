"""Recorded attention against the truth: where points of the body attend and where they should; shares of attention.

    names, points = body_points(driving.poses, frame_map, size)
    with AttentionRecording(AttentionConfig(mean=["heads"]), points, names) as recording:
        pipeline(image, poses, calibration, attention=recording)
    truth = body_truth(recording.result, reference.poses, calibration)
    pointing(recording.result, truth, layer).accuracy(radius=0.15)

A point is a keypoint of a person in a driving frame; its true coordinates are those of the same keypoint in the
reference, moved by the calibration's transform, of its part where the person bends, into a calibrated image. Distances
are in body heights in the image.

Shapes use s = steps, f = frames, a = heads, p = points or queries, k = attended images (the reference, then a
calibrated image a person), h, w = a layer's grid, r = h*w tokens of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from data.config import COCO_KEYPOINTS
from data.poses.poses import Poses
from data.transforms import fit_matrix, map_points
from models.attention.layers import pool_masks
from models.attention.maps import RecordedAttention
from models.attention.measures import (
    EPS,
    centroid,
    edge_distances,
    entropy,
    mass_within,
    normalised,
    region_share,
    token_coords,
    value_at_argmax,
)
from tpc import Calibration
from tpc.bends.parts import keypoint_matrices
from tpc.silhouettes import body_height, visible

SCORE = 0.3
JOINTS = len(COCO_KEYPOINTS)


@dataclass(frozen=True)
class BodyTruth:
    """Coordinates of a recording's points in the attended images, in pixels of the model's frame."""

    coords: Tensor  # (s, f, p, k, 2), (x, y); NaN where the image does not show the point, or is not of its person
    heights: Tensor  # (s, f, p, k), body height of the point's person in the image; NaN where it is not of them
    size: tuple[int, int]  # (width, height) of the images


@dataclass(frozen=True)
class Pointing:
    """Attention of one layer against the truth, in body heights; NaN where frame or reference hide a point."""

    # (s, f, a, p), from the true coordinates to the strongest token of all images; 0 when the token holds them
    strongest: Tensor
    offset: Tensor  # (s, f, a, p, 2), from the true coordinates to the centroid in the image that gets most
    entropy: Tensor  # (s, f, a, p), of attention over all images, nats
    near: Tensor  # (s, f, a, p), part of attention to images that falls within the `radius` that was asked for

    @property
    def centroid(self) -> Tensor:
        """(s, f, a, p) distance of the centroid from the true coordinates."""
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
    """Names and coordinates (f, persons*17, 2) of keypoints in the model's frame; NaN where hidden or outside."""
    moved = poses.mapped(frame_map, size).clipped()
    shown = visible(moved.scores, moved.keypoints, threshold)
    points = np.where(shown[..., None], moved.keypoints, np.nan).reshape(poses.frames, -1, 2)
    names = [f"{name} {person}" if person else name for person in range(poses.persons) for name in COCO_KEYPOINTS]
    return names, points.astype(np.float32)


def require_reference(recorded: RecordedAttention) -> None:
    if recorded.selection.replaced:
        raise UserError("tpc.attach=replace shows no reference beside calibrated images; record with tpc.attach=add")
    for name, shape in recorded.selection.layers.items():
        if shape.layout.grid is None:
            raise UserError(
                f"{name} attends to tokens that mix the whole image, so it points nowhere in it; what each "
                "image gets in all is in the recording's maps"
            )


def body_truth(
    recorded: RecordedAttention,
    reference: Poses,  # one frame, in the reference's own pixels
    calibration: Calibration | None = None,
    reference_map: np.ndarray | None = None,  # (3, 3), those pixels to the model's frame; None: fitted in whole
    persons: Sequence[int] | None = None,  # index in the reference of every person of the points; None: in order
    threshold: float = SCORE,
) -> BodyTruth:
    """Coordinates of the points of `body_points` in the reference and in the calibrated images."""
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
    coords = np.full((steps, frames, selection.points, selection.images, 2), np.nan)
    heights = np.full(coords.shape[:-1], np.nan)
    matrices = image_matrices(recorded, calibration, reference_map)
    for index, person in enumerate(persons):
        rows = slice(index * JOINTS, (index + 1) * JOINTS)
        keypoints = map_points(reference.keypoints[0, person].astype(np.float64), reference_map)
        known = visible(reference.scores[0, person], keypoints, threshold)
        height = body_height(keypoints, known) or np.nan
        shown = np.where(known[:, None], keypoints, np.nan)  # (17, 2)
        coords[:, :, rows, 0], heights[:, :, rows, 0] = shown, height
        if selection.images > 1:
            whole, moves = matrices[:, :, person, 0], matrices[:, :, person, 1:]  # (s, f, 3, 3), (s, f, 17, 3, 3)
            coords[:, :, rows, 1 + person] = (moves[..., :2, :2] @ shown[..., None])[..., 0] + moves[..., :2, 2]
            scale = np.sqrt(np.abs(np.linalg.det(whole[..., :2, :2])))  # (s, f)
            heights[:, :, rows, 1 + person] = (scale * height)[..., None]
    return BodyTruth(torch.from_numpy(coords), torch.from_numpy(heights), selection.size)


def image_matrices(
    recorded: RecordedAttention, calibration: Calibration | None, reference_map: np.ndarray
) -> np.ndarray:
    """(s, f, persons, 18, 3, 3): reference to calibrated image, both in the model's frame; NaN where there is none.

    Of the person as a whole, then of each keypoint, which moves with its part where the person bends.
    """
    selection = recorded.selection
    persons = selection.images - 1
    steps, frames = selection.shape(recorded.layers[0])[:2]
    if persons == 0:
        return np.empty((steps, frames, 0, 1 + JOINTS, 3, 3))
    if calibration is None or calibration.persons != persons:
        raise UserError(f"calibration: the recorded run had one of {persons} persons; give the same")
    images = np.stack([calibration.index(step)[list(selection.frames)] for step in selection.steps])
    for axis, name in enumerate(("steps", "frames")):
        if name in selection.mean:
            if (images != images.take([0], axis)).any():
                raise UserError(f"mean: {name} saw different calibrated images, which have no common true place")
            images = images.take([0], axis)
    to_model = np.linalg.inv(reference_map)
    found = np.full((*images.shape, 1 + JOINTS, 3, 3), np.nan)
    for person in range(persons):
        for image in np.unique(images[..., person][images[..., person] >= 0]):
            frame = int(np.flatnonzero(calibration.member[:, person] == image)[0])
            matrix, parts = calibration.matrices[frame, person], calibration.records[frame][person].parts
            moves = np.concatenate([matrix[None], keypoint_matrices(matrix, parts)])
            found[images[..., person] == image, person] = calibration.frame_map @ moves @ to_model
    return found


def layer_maps(recorded: RecordedAttention, layer: str, mean_heads: bool = True) -> Tensor:
    """(s, f, a, p, k, r) float32; with `mean_heads` a = 1."""
    maps = torch.from_numpy(np.asarray(recorded.maps[layer]))
    return maps.mean(dim=2, keepdim=True) if mean_heads else maps


def pointing(
    recorded: RecordedAttention, truth: BodyTruth, layer: str, radius: float = 0.15, mean_heads: bool = True
) -> Pointing:
    """Attention of one layer against the truth."""
    return pointing_of(layer_maps(recorded, layer, mean_heads), truth, recorded.grid(layer), radius)


def pointing_of(maps: Tensor, truth: BodyTruth, grid: tuple[int, int], radius: float = 0.15) -> Pointing:
    """Attention maps (s, f, a, p, k, r) against the truth; everything but `strongest` is differentiable in them."""
    width, height = truth.size
    coords = token_coords(truth.coords.to(maps), (height, width), grid)[:, :, None]  # (s, f, 1, p, k, 2)
    # Tokens a body height: pixels are square, tokens of rounded grids nearly so.
    unit = (truth.heights.to(maps) * (grid[0] * grid[1] / (height * width)) ** 0.5)[:, :, None]
    gaps = (edge_distances(coords, grid) / unit[..., None]).nan_to_num(nan=torch.inf).flatten(-2)
    given = maps.sum(-1)  # (s, f, a, p, k)
    known = (given.sum(-1) > EPS) & ~coords[..., 0, 0].isnan()  # (s, f, a, p)
    # All images are one field of view: with exclusive masks a point on a calibrated person does not see the reference.
    everywhere = normalised(maps, dim=(-2, -1)).flatten(-2)  # (s, f, a, p, k*r)
    gaps = gaps.expand_as(everywhere)
    best = given.argmax(-1)[..., None, None]  # (s, f, a, p, 1, 1)
    chosen = maps.gather(-2, best.expand(*maps.shape[:-2], 1, maps.shape[-1]))[..., 0, :]  # (s, f, a, p, r)
    expected = coords.expand(*given.shape, 2).gather(-2, best.expand(*best.shape[:-1], 2))[..., 0, :]
    scale = unit.expand_as(given).gather(-1, best[..., 0])
    offset = (centroid(normalised(chosen), grid) - expected) / scale
    return Pointing(
        torch.where(known, value_at_argmax(everywhere.nan_to_num(), gaps), torch.nan),
        torch.where(known[..., None], offset, torch.nan),
        torch.where(known, entropy(everywhere), torch.nan),
        torch.where(known, mass_within(everywhere, gaps, radius), torch.nan),
    )


def chance(recorded: RecordedAttention, truth: BodyTruth, layer: str, person: np.ndarray, radius: float) -> Tensor:
    """(s, f, p) `accuracy` of attention to a random token of the person, `token_coverage` (r,) of the reference."""
    grid, (width, height) = recorded.grid(layer), truth.size
    coords = token_coords(truth.coords[..., 0, :], (height, width), grid)
    unit = truth.heights[..., 0] * (grid[0] * grid[1] / (height * width)) ** 0.5
    gaps = edge_distances(coords, grid) / unit[..., None]
    found = mass_within(normalised(torch.as_tensor(person).to(gaps)), gaps, radius)
    return torch.where(~coords[..., 0].isnan(), found, torch.nan)


def pck(distances: Tensor, radii: Sequence[float]) -> np.ndarray:
    """(len(radii),) share of the known distances that are at most each radius; NaN when none is known."""
    known = distances[~distances.isnan()]
    if not len(known):
        return np.full(len(radii), np.nan)
    return np.array([float((known <= radius).float().mean()) for radius in radii])


SELF, PERSON, BACKGROUND = "self", "reference person", "reference background"


def shares(
    recorded: RecordedAttention, layer: str, reference_mask: np.ndarray, mean_heads: bool = True
) -> dict[str, Tensor]:
    """(s, f, a, p) attention of every query to `SELF` (see `RecordedAttention.own`), `PERSON` and `BACKGROUND` by the
    mask (H, W) bool of the model's reference, and "calibrated 0" ... for every person; they sum to 1."""
    require_reference(recorded)
    maps = layer_maps(recorded, layer, mean_heads)
    own = torch.from_numpy(np.asarray(recorded.own[layer]))
    found = {SELF: own.mean(dim=2, keepdim=True) if mean_heads else own}
    return found | image_shares(maps, token_coverage(reference_mask, recorded.grid(layer)))


def image_shares(maps: Tensor, person: Tensor) -> dict[str, Tensor]:
    """`shares` without the frame itself, of maps (..., k, r) and persons (r,); differentiable."""
    found = {
        PERSON: region_share(maps[..., 0, :], person.to(maps)),
        BACKGROUND: region_share(maps[..., 0, :], 1 - person.to(maps)),
    }
    return found | {f"calibrated {k}": maps[..., 1 + k, :].sum(-1) for k in range(maps.shape[-2] - 1)}


def token_coverage(mask: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """(r,) part of every token of a grid that a mask (H, W) bool covers."""
    return pool_masks(torch.from_numpy(np.ascontiguousarray(mask)), grid)


def mean_over(values: Tensor, weights: Tensor | None = None) -> float | None:
    """Mean over queries (..., p) that are not NaN, by weights (p,) or (..., p); None when all are."""
    known = ~values.isnan()
    weights = known.to(values.dtype) * (1 if weights is None else weights.to(values))
    total = float(weights.sum())
    return float((values.nan_to_num() * weights).sum()) / total if total > 0 else None
