"""Training on misaligned references: composition augmentation and calibrated training.

A model trained on clips has only seen references whose person sits as in the clip. Composition augmentation moves,
turns and resizes the reference, so that the model learns to look elsewhere. Calibrated training also hands it
calibrated tokens, as inference will. Both are functions on a training batch (b = batch, f = frames, sizes of the
model's frame):

    reference (b, 3, h, w) in [-1, 1]; reference_mask (b, 1, h, w); reference_keypoints (b, 17, 3) x, y, score
    frames (b, 3, f, h, w) in [-1, 1]; masks (b, 1, f, h, w); keypoints (b, f, 17, 3)

Pixel coordinates are (x, y), y down, centres at integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.config import check_config
from core.errors import UserError
from models.attention.layers import TokenLevel, pool_masks, self_attention_level
from models.attention.masking import Visibility
from tpc.attach import gate_flags, visibility_flags
from tpc.config import VISIBILITIES
from tpc.procrustes import SimilarityTransform, apply_matrix
from tpc.propagation import group_of_frames
from tpc.silhouettes import LEFT_HIP, NOSE, RIGHT_HIP
from tpc.subset import FIXED_RULES
from tpc.tensors import FILLS, place, warp

Batch = dict[str, Tensor]
# The middle of the person stays this far inside the image, as a part of its sides.
MARGIN = 0.2


@dataclass
class CompositionConfig:
    """Ranges from which the reference's new composition is drawn, per sample."""

    probability: float = 0.0  # that a sample is recomposed; 0 = off
    min_scale: float = 0.4  # factor on the person's size, drawn evenly in its logarithm
    max_scale: float = 1.6
    max_rotation: float = 180.0  # degrees, either way
    max_translation: float = 0.2  # parts of the image's sides, either way
    ramp_steps: int = 0  # training steps over which the ranges grow from nothing to these
    fill: str = "scene"  # scene: only the person moves; edge, black: the image does, and what is beyond it

    def check(self) -> None:
        _check_range("probability", self.probability, 0, 1)
        _check_range("min_scale", self.min_scale, 1e-3, self.max_scale)
        _check_range("max_scale", self.max_scale, self.min_scale, 1e3)
        _check_range("max_rotation", self.max_rotation, 0, 180)
        _check_range("max_translation", self.max_translation, 0, 10)
        if self.fill not in FILLS:
            raise UserError(f"fill must be one of {', '.join(FILLS)}; got {self.fill!r}")


@dataclass
class CalibratedTrainingConfig:
    """How training samples are given calibrated tokens."""

    probability: float = 0.0  # that a sample is calibrated; 0 = off
    keypoints: str = "trunk"  # all, trunk, torso, face
    score_threshold: float = 0.3  # a keypoint counts above it
    noise: float = 0.01  # standard deviation of the keypoints, parts of the image's height, as estimators have
    images: int = 1  # calibrated images a clip; its frames share them in consecutive groups
    visibility: str = "scene"  # paper, release, exclusive, scene
    mask_threshold: float = 0.0  # part of a token's pixels above which it belongs to the person

    def check(self) -> None:
        _check_range("probability", self.probability, 0, 1)
        _check_range("images", self.images, 1, 10**6)
        for name, allowed in (("keypoints", tuple(FIXED_RULES)), ("visibility", VISIBILITIES)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")


@dataclass(frozen=True)
class CalibratedBatch:
    """Calibrated references of a batch.

    Attributes:
        images: (b, m, 3, h, w) in [-1, 1].
        masks: (b, m, 1, h, w) float, 1 = the calibrated person.
        index: (b, f) which of the m images each frame uses.
        present: (b, f) bool, False where the sample was not drawn or could not be calibrated.
    """

    images: Tensor
    masks: Tensor
    index: Tensor
    present: Tensor


@torch.no_grad()
def compose_references(
    batch: Batch, config: CompositionConfig, step: int = 0, generator: torch.Generator | None = None
) -> Batch:
    """The batch with the references of some samples moved, turned and resized about their persons."""
    check_config(config, "composition")
    reference, mask = batch["reference"], batch["reference_mask"]
    size = _size(reference)
    if config.probability == 0:
        return batch
    matrices = composition_matrices(mask, config, step, generator).to(reference.device)
    moved_mask = (warp(mask.float(), matrices, size, "black") >= 0.5).to(mask.dtype)
    moved = place(reference, mask.float(), matrices, size, config.fill)
    keypoints = batch["reference_keypoints"]
    points = apply_matrix(matrices, keypoints[..., :2]).to(keypoints.dtype)
    inside = ((points >= -0.5) & (points < points.new_tensor(size) - 0.5)).all(-1)
    keypoints = torch.cat([points, (keypoints[..., 2] * inside)[..., None]], -1)
    changed = (matrices != torch.eye(3, dtype=matrices.dtype, device=matrices.device)).any(-1).any(-1)
    pick = {"reference": moved, "reference_mask": moved_mask, "reference_keypoints": keypoints}
    chosen = {name: torch.where(_expand(changed, value), value, batch[name]) for name, value in pick.items()}
    return {**batch, **chosen}


def composition_matrices(
    mask: Tensor, config: CompositionConfig, step: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """(b, 3, 3) float64 random similarities about the persons of masks (b, 1, h, w); identities with 1 - probability.

    Drawn on the CPU, so that one generator gives the same on every device.
    """
    b, (width, height) = len(mask), _size(mask)
    strength = min(1.0, step / config.ramp_steps) if config.ramp_steps > 0 else 1.0
    drawn = torch.rand((6, b), generator=generator, dtype=torch.float64)
    even = 2 * drawn - 1
    low, high = math.log(config.min_scale), math.log(config.max_scale)
    scale = torch.exp(strength * (low + (high - low) * drawn[0]))
    angle = math.radians(config.max_rotation) * strength * even[1]
    sides = torch.tensor([width, height], dtype=torch.float64)
    centre = _middles(mask.cpu())
    goal = centre + strength * config.max_translation * sides * even[2:4].T
    goal = torch.minimum(torch.maximum(goal, MARGIN * sides), (1 - MARGIN) * sides)
    goal = torch.where((strength > 0) & torch.ones_like(goal, dtype=torch.bool), goal, centre)
    turn = SimilarityTransform(scale, angle, torch.zeros(b, 2, dtype=torch.float64)).matrix
    turn[:, :2, 2] = goal - (turn[:, :2, :2] @ centre[..., None])[..., 0]
    keep = (drawn[4] < config.probability)[:, None, None]
    return torch.where(keep, turn, torch.eye(3, dtype=torch.float64))


@torch.no_grad()
def calibrate_batch(
    batch: Batch, config: CalibratedTrainingConfig, generator: torch.Generator | None = None
) -> CalibratedBatch:
    """Calibrate the references of some samples to frames of their clips, as inference calibrates.

    The frames of a clip are divided into groups; the frames of a group share the image of one of them, drawn at
    random, as in iterative propagation.
    """
    check_config(config, "calibrated_training")
    reference, keypoints = batch["reference"], batch["keypoints"]
    (b, frames), size = keypoints.shape[:2], _size(reference)
    groups = torch.from_numpy(group_of_frames(frames, max(1, min(config.images, frames))))
    m = int(groups[-1]) + 1
    lottery = torch.rand((b, frames), generator=generator)
    chosen = torch.stack([(lottery - 2.0 * (groups != g)).argmax(1) for g in range(m)], 1).to(keypoints.device)
    target = torch.gather(keypoints, 1, chosen[:, :, None, None].expand(-1, -1, *keypoints.shape[2:]))
    source = batch["reference_keypoints"][:, None]
    noise = torch.randn((2, b, m, *source.shape[2:3], 2), generator=generator).to(source.device)
    noise = noise * config.noise * size[1]
    rule = torch.zeros(source.shape[2], device=source.device)
    rule[list(FIXED_RULES[config.keypoints])] = 1
    seen = (source[..., 2] > config.score_threshold) & (target[..., 2] > config.score_threshold)
    transform = SimilarityTransform.from_estimate(
        source[..., :2] + noise[0], target[..., :2] + noise[1], seen * rule * source[..., 2] * target[..., 2]
    )
    wanted = torch.rand(b, generator=generator).to(keypoints.device) < config.probability
    if transform:
        valid = transform.valid & wanted[:, None] & (seen * rule).sum(-1).ge(2)
        matrices = torch.where(
            valid[..., None, None], transform.matrix, torch.eye(3, dtype=torch.float64).to(valid.device)
        )
    else:
        valid = torch.zeros(b, m, dtype=torch.bool, device=keypoints.device)
        matrices = torch.eye(3, dtype=torch.float64, device=keypoints.device).expand(b, m, 3, 3)
    mask = batch["reference_mask"].float()
    flat = matrices.flatten(0, 1)
    images = place(reference.repeat_interleave(m, 0), mask.repeat_interleave(m, 0), flat, size, "scene")
    masks = (warp(mask.repeat_interleave(m, 0), flat, size, "black") >= 0.5).float()
    index = groups.to(keypoints.device).expand(b, -1)
    return CalibratedBatch(images.unflatten(0, (b, m)), masks.unflatten(0, (b, m)), index, valid.gather(1, index))


def training_visibility(
    batch: Batch,
    calibrated: CalibratedBatch,
    grids: Sequence[tuple[int, int] | TokenLevel],
    config: CalibratedTrainingConfig,
) -> Visibility:
    """Flags as inference gives them, for b f frames in the order of `frames.transpose(1, 2).flatten(0, 1)`.

    The keys are [own | the sample's reference | the calibrated image of the frame].

    Args:
        grids: (h, w) of every level of reference attention, or levels of any attention.
    """
    b, frames = calibrated.index.shape
    masks = batch["masks"].transpose(1, 2).flatten(0, 1)[:, 0]
    reference = batch["reference_mask"].repeat_interleave(frames, 0)[:, 0]
    rows = torch.arange(b, device=masks.device)[:, None]
    warped = calibrated.masks[rows, calibrated.index].flatten(0, 1)[:, 0]
    query, key = {}, {}
    present = calibrated.present.reshape(-1, 1)
    for level in (grid if isinstance(grid, TokenLevel) else self_attention_level(grid) for grid in grids):
        if level.keys.grid is None:
            hidden = torch.cat([torch.zeros_like(present), ~present], dim=1)
            query[level.tokens], key[level.tokens] = gate_flags(hidden, level)
            continue
        target = pool_masks(masks, level.queries)[:, None]
        ours, theirs = (pool_masks(mask, level.keys.grid)[:, None] for mask in (reference, warped))
        query[level.tokens], key[level.tokens] = visibility_flags(
            target,
            torch.zeros_like(target[:, 0]),
            ours,
            theirs,
            present,
            preset=config.visibility,
            threshold=config.mask_threshold,
            layout=level.keys,
        )
    return Visibility(query, key)


def misalignment(batch: Batch, threshold: float = 0.3) -> dict[str, Tensor]:
    """What the model is trained on, to be logged: the paper's two measures for every sample and frame (b, f).

    Returns:
        relative_angle_deg: between the pelvis-to-nose lines, [0, 180]; nan where a line is not visible.
        box_iou: of the boxes of the visible keypoints; nan without two boxes.
    """
    source, target = batch["reference_keypoints"][:, None], batch["keypoints"]
    (ours, ours_seen), (theirs, theirs_seen) = (_head_axis(k, threshold) for k in (source, target))
    turn = torch.atan2(theirs[..., 1], theirs[..., 0]) - torch.atan2(ours[..., 1], ours[..., 0])
    angle = torch.rad2deg(torch.atan2(turn.sin(), turn.cos())).abs()
    nan = torch.full_like(angle, torch.nan)
    boxes, others = _box(source, threshold), _box(target, threshold)
    sides = (torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])).clamp(
        min=0
    )
    both = sides.prod(-1)
    total = sum((box[..., 2:] - box[..., :2]).prod(-1) for box in (boxes, others)) - both
    return {
        "relative_angle_deg": torch.where(ours_seen & theirs_seen, angle, nan),
        "box_iou": torch.where(torch.isfinite(total) & (total > 0), both / total, nan),
    }


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{name} must be in {low:g} to {high:g}; got {value!r}")


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-1], images.shape[-2]


def _expand(flags: Tensor, like: Tensor) -> Tensor:
    return flags.reshape(-1, *[1] * (like.ndim - 1))


def _middles(mask: Tensor) -> Tensor:
    """(b, 2) centres of masks (b, 1, h, w); the middle of the image for an empty one."""
    weight = mask[:, 0].double()
    height, width = weight.shape[1:]
    total = weight.sum((1, 2))
    x = weight.sum(1) @ torch.arange(width, dtype=torch.float64)
    y = weight.sum(2) @ torch.arange(height, dtype=torch.float64)
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)
    centre = torch.stack([x, y], -1) / total.clamp(min=1e-12)[:, None]
    return torch.where(total[:, None] > 0, centre, middle)


def _head_axis(keypoints: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Pelvis-to-nose vectors (..., 2) and whether they are visible (...)."""
    points, seen = keypoints[..., :2], keypoints[..., 2] > threshold
    axis = points[..., NOSE, :] - (points[..., LEFT_HIP, :] + points[..., RIGHT_HIP, :]) / 2
    return axis, seen[..., NOSE] & seen[..., LEFT_HIP] & seen[..., RIGHT_HIP]


def _box(keypoints: Tensor, threshold: float) -> Tensor:
    """(..., 4) x0, y0, x1, y1; infinite without a visible keypoint."""
    seen, points = keypoints[..., 2:] > threshold, keypoints[..., :2]
    low = torch.where(seen, points, torch.inf).amin(-2)
    high = torch.where(seen, points, -torch.inf).amax(-2)
    return torch.cat([low, high], -1)
