"""Attention supervision: a point in a frame should attend to the same point of the reference.

After Zhou et al., "Learning Flow Fields in Attention" (CVPR 2025), with correspondences of the skeleton or of the
rendered surface, and of the background where the camera stands still. Shapes: b = batch, f = frames, p = points,
q = keypoints, n = query tokens of a level, r = reference tokens, h, w = a level's grid, H, W = image size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from core.processes import to_device
from models.attention.measures import (
    EPS,
    gaussian_mass,
    normalised,
    pixel_coords,
    scaled,
    token_centres,
    token_coords,
    token_distances,
    token_indices,
    value_at_argmax,
)
from models.attention.probe import AttentionProbe
from training.config import AttentionLossConfig

NOSE = 0
LIMBS = ((5, 7), (7, 9), (6, 8), (8, 10), (11, 13), (13, 15), (12, 14), (14, 16))  # COCO indices
LIMB_FRACTIONS = (1 / 3, 2 / 3, 1.0)
SHOULDERS, HIPS = (5, 6), (11, 12)
NEAR = 1.5  # tokens
SAME_POINT = 0.05  # metres on the person between places of two surface maps that show the same point
FAR = 1e4  # metres
ACROSS, ALONG = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class MatchingPoints:
    """The same points in frames and in their references, in pixels."""

    targets: Tensor  # (b*f, p, 2) in the frames
    sources: Tensor  # (b*f, p, 2) in the references
    valid: Tensor  # (b*f, p) bool, visible in both images
    size: tuple[int, int]  # (H, W)
    body: int  # number of them, the first ones, that are of the person


@cache
def point_weights() -> Tensor:
    """Weights (p, 17) of COCO keypoints in every point of the body: nose, limbs, and inside the trunk."""
    rows = [{NOSE: 1.0}]
    rows += [{start: 1 - part, end: part} for start, end in LIMBS for part in LIMB_FRACTIONS]
    for across in ACROSS:
        for along in ALONG:
            sides = (1 - across, across)
            rows.append({joint: side * (1 - along) for joint, side in zip(SHOULDERS, sides, strict=True)})
            rows[-1] |= {joint: side * along for joint, side in zip(HIPS, sides, strict=True)}
    weights = torch.zeros(len(rows), 17)
    for index, row in enumerate(rows):
        for joint, weight in row.items():
            weights[index, joint] = weight
    return weights


def body_points(batch: dict[str, Tensor], threshold: float) -> MatchingPoints:
    """Corresponding points of frames and references, made of keypoints that score at least `threshold`.

    The batch has "keypoints" (b, f, 17, 3) and "reference_keypoints" (b, 17, 3): x, y in pixels, score.
    """
    weights = to_device(point_weights(), batch["keypoints"].device).to(batch["keypoints"])
    frames = batch["keypoints"].flatten(0, 1)
    references = batch["reference_keypoints"].repeat_interleave(batch["keypoints"].shape[1], dim=0)
    size = (batch["poses"].shape[-2], batch["poses"].shape[-1])
    needed = (weights > 0).float()

    def coords(keypoints: Tensor) -> tuple[Tensor, Tensor]:
        points = torch.einsum("pq,bqc->bpc", weights, keypoints[..., :2].nan_to_num())
        missing = torch.einsum("pq,bq->bp", needed, (keypoints[..., 2] < threshold).float())
        inside = (points >= 0).all(-1) & (points[..., 0] < size[1]) & (points[..., 1] < size[0])
        return points, (missing == 0) & inside

    (targets, in_frame), (sources, in_reference) = coords(frames), coords(references)
    return MatchingPoints(targets, sources, in_frame & in_reference, size, len(weights))


def surface_points(batch: dict[str, Tensor], count: int, generators: Sequence[torch.Generator]) -> MatchingPoints:
    """At most `count` random points of the person's surface in each frame, and the same points in the references.

    The batch has "surfaces" (b, 3, f, h, w) and "reference_surface" (b, 3, h, w) of `data.clips.caches`. Points
    off the person are invalid. Each sample has its generator.
    """
    frames = batch["surfaces"].transpose(1, 2).flatten(0, 1).flatten(2).transpose(1, 2)  # (b*f, h*w, 3)
    (height, width), each = batch["reference_surface"].shape[-2:], len(frames) // len(generators)
    references = batch["reference_surface"].repeat_interleave(each, dim=0).flatten(2).transpose(1, 2)
    shown = frames.isfinite().all(-1)
    order = torch.cat([torch.rand(each, height * width, generator=g) for g in generators])
    order = to_device(order, frames.device).to(frames) + shown  # the person's come first
    chosen = order.topk(min(count, height * width)).indices  # (b*f, p)
    points = frames.gather(1, chosen[..., None].expand(-1, -1, 3))
    distance = torch.cdist(points.nan_to_num(), references.nan_to_num(nan=FAR))  # (b*f, p, h*w)
    nearest, match = distance.min(dim=-1)
    size = (batch["poses"].shape[-2], batch["poses"].shape[-1])
    pixels = pixel_coords(token_centres((height, width), frames), size, (height, width))  # (h*w, 2)
    valid = shown.gather(1, chosen) & (nearest < SAME_POINT)
    return MatchingPoints(pixels[chosen], pixels[match], valid, size, chosen.shape[1])


def with_background(
    points: MatchingPoints, batch: dict[str, Tensor], per_side: int, generators: Sequence[torch.Generator]
) -> MatchingPoints:
    """`points`, and one of the background in each of per_side x per_side cells, at the same place in both images.

    The batch has "masks" (b, 1, f, H, W) and "reference_mask" (b, 1, H, W), 1 where the person is.
    """
    frames = points.targets.shape[0] // len(generators)
    cells = torch.arange(per_side)
    corners = torch.stack([cells.repeat(per_side), cells.repeat_interleave(per_side)], dim=-1)  # (q, 2)
    drawn = [torch.rand(frames, per_side**2, 2, generator=g) for g in generators]
    parts = to_device(corners + torch.cat(drawn), points.targets.device).to(points.targets) / per_side  # in [0, 1)
    coords = scaled(parts, points.size[1], points.size[0]) - 0.5  # (b*f, q, 2)
    person = torch.maximum(batch["masks"], batch["reference_mask"][:, :, None])  # (b, 1, f, H, W)
    masks = person.transpose(1, 2).flatten(0, 1)[:, 0]  # (b*f, H, W)
    covered = masks.flatten(1).gather(1, token_indices(coords, masks.shape[1:], masks.shape[1:])) > 0.5
    return MatchingPoints(
        torch.cat([points.targets, coords], dim=1),
        torch.cat([points.sources, coords], dim=1),
        torch.cat([points.valid, ~covered], dim=1),
        points.size,
        points.body,
    )


def point_probe(points: MatchingPoints, grids: Sequence[tuple[int, int]]) -> AttentionProbe:
    """A probe of the tokens that contain the frames' points, at every level."""
    return AttentionProbe({h * w: token_indices(points.targets, points.size, (h, w)) for h, w in grids})


def attention_loss(
    probe: AttentionProbe, points: MatchingPoints, grids: Sequence[tuple[int, int]], config: AttentionLossConfig
) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of pointing at the same points of the reference, scalars, mean over layers.

    The loss is -log of the share of a query's attention to the reference (image 0) near the right place, weighted with
    a Gaussian of `radius` tokens. The accuracy is the share of body queries whose strongest reference token, mean over
    heads, is at most `NEAR` tokens off; nan when none counts.
    """
    losses, accuracies = [], []
    for layer, probabilities in probe.maps.items():
        grid = next(grid for grid in grids if grid[0] * grid[1] == probe.tokens[layer])
        n = grid[0] * grid[1]
        reference = probabilities[..., n : 2 * n]  # (b*f, heads, p, r)
        # Queries that do not attend to the reference do not count.
        counts = points.valid & (reference.sum(-1).mean(dim=1) > EPS)  # (b*f, p)
        # Normalised: how attention is divided between frame and reference is left to the diffusion objective.
        pointing = normalised(reference).mean(dim=1)  # (b*f, p, r)
        distance = token_distances(token_coords(points.sources, points.size, grid), grid)
        near = gaussian_mass(pointing, distance, config.radius)
        total = counts.sum().clamp(min=1)
        losses.append(-(near.clamp(min=1e-6).log() * counts).sum() / total)
        body = slice(points.body)
        right = (value_at_argmax(pointing[:, body], distance[:, body]) <= NEAR) & counts[:, body]
        accuracies.append(right.sum() / counts[:, body].sum())
    return torch.stack(losses).mean(), torch.stack(accuracies).mean()
