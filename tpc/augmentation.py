"""Training on misaligned references: composition augmentation and calibrated training.

Composition augmentation moves, turns and resizes the reference, so that the model learns to attend elsewhere;
calibrated training also gives calibrated tokens, as inference will. Both are functions on a training batch, but for
articulated references, which the loader makes, an item at a time (b = batch, f = frames, sizes of the model's frame):

    reference (b, 3, h, w) in [-1, 1]; reference_mask (b, 1, h, w); reference_keypoints (b, 17, 3) x, y, score
    frames (b, 3, f, h, w) in [-1, 1]; masks (b, 1, f, h, w); keypoints (b, f, 17, 3)

Pixel coordinates are (x, y), y down, centres at integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.config import check_config
from core.processes import to_device
from data.poses.person import box_iou
from data.poses.poses import Poses
from models.attention.layers import TokenLevel, pool_masks, self_attention_level
from models.attention.masking import Visibility
from tpc.attach import gate_flags, visibility_flags
from tpc.calibration import calibrate
from tpc.config import CalibratedTrainingConfig, CalibrationConfig, CompositionConfig
from tpc.procrustes import SimilarityTransform, apply_matrix
from tpc.silhouettes import FIXED_RULES, head_axis, keypoint_box, relative_angle
from tpc.trajectory import group_of_frames

Batch = dict[str, Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None  # of a whole batch, or one for each of its samples
# The middle of the person stays this far inside the image, as a part of its sides.
MARGIN = 0.2
PADDING = {"edge": "border", "black": "zeros"}
SUPERSAMPLING = 2  # samples along each side of a pixel: no aliasing down to half the scale


@dataclass(frozen=True)
class CalibratedBatch:
    """Calibrated references of a batch."""

    images: Tensor  # (b, m, 3, h, w) in [-1, 1]
    masks: Tensor  # (b, m, 1, h, w) float, 1 = the calibrated person
    index: Tensor  # (b, f) which of the m images each frame uses
    present: Tensor  # (b, f) bool, False where the sample was not drawn or could not be calibrated


@torch.no_grad()
def compose_references(batch: Batch, config: CompositionConfig, step: int = 0, generator: Generators = None) -> Batch:
    """The batch with the references of some samples moved, turned and resized about their persons."""
    check_config(config, "composition")
    reference, mask = batch["reference"], batch["reference_mask"]
    size = _size(reference)
    if config.probability == 0:
        return batch
    matrices = composition_matrices(mask, config, step, generator)
    moved_mask = (warp(mask.float(), matrices, size, "black") >= 0.5).to(mask.dtype)
    moved = place(reference, mask.float(), matrices, size, config.fill)
    keypoints = batch["reference_keypoints"]
    points = apply_matrix(matrices, keypoints[..., :2]).to(keypoints.dtype)
    inside = (points >= -0.5).all(-1) & (points[..., 0] < size[0] - 0.5) & (points[..., 1] < size[1] - 0.5)
    keypoints = torch.cat([points, (keypoints[..., 2] * inside)[..., None]], -1)
    changed = (matrices != torch.eye(3, dtype=matrices.dtype, device=matrices.device)).flatten(1).any(1)
    composed = {"reference": moved, "reference_mask": moved_mask, "reference_keypoints": keypoints}
    for name, value in composed.items():
        composed[name] = torch.where(changed.reshape(-1, *[1] * (value.ndim - 1)), value, batch[name])
    return {**batch, **composed}


def composition_matrices(
    mask: Tensor, config: CompositionConfig, step: int = 0, generator: Generators = None
) -> Tensor:
    """(b, 3, 3) float64 random similarities about the persons of masks (b, 1, h, w); some are identities."""
    b, strength = len(mask), min(1.0, step / config.ramp_steps) if config.ramp_steps > 0 else 1.0
    drawn = to_device(_draw(partial(torch.rand, dtype=torch.float64), (6, b), 1, generator), mask.device)
    even = 2 * drawn - 1
    low, high = math.log(config.min_scale), math.log(config.max_scale)
    scale = torch.exp(strength * (low + (high - low) * drawn[0]))
    angle = math.radians(config.max_rotation) * strength * even[1]
    centre = _middles(mask)
    goal = centre
    if strength > 0:
        moved = zip(centre.unbind(-1), even[2:4], _size(mask), strict=True)
        moved = [(x + strength * config.max_translation * side * by, side) for x, by, side in moved]
        goal = torch.stack([x.clamp(MARGIN * side, (1 - MARGIN) * side) for x, side in moved], dim=-1)
    turn = SimilarityTransform(scale, angle, torch.zeros_like(centre)).matrix
    turn[:, :2, 2] = goal - (turn[:, :2, :2] @ centre[..., None])[..., 0]
    keep = (drawn[4] < config.probability)[:, None, None]
    return torch.where(keep, turn, torch.eye(3, dtype=turn.dtype, device=turn.device))


def _draw(draw: Callable[..., Tensor], shape: tuple[int, ...], samples: int, generator: Generators) -> Tensor:
    """Random numbers whose axis `samples` is a batch's; of the CPU, so that they are the same for every device."""
    if generator is None or isinstance(generator, torch.Generator):
        return draw(shape, generator=generator)
    alone = (*shape[:samples], 1, *shape[samples + 1 :])
    return torch.cat([draw(alone, generator=own) for own in generator], dim=samples)


@torch.no_grad()
def calibrate_item(item: Batch, config: CalibratedTrainingConfig, generator: torch.Generator | None = None) -> Batch:
    """What `CalibratedBatch` has, of one item of a data set, bent by body part; by its names after "calibrated_"."""
    check_config(config, "calibrated_training")
    (frames, joints), size = item["keypoints"].shape[:2], _size(item["reference"])
    groups, chosen = _draw_members(1, frames, config.images, generator)
    points = torch.cat([item["reference_keypoints"][None], item["keypoints"][chosen[0]]]).double()  # (1 + m, 17, 3)
    points[..., :2] += config.noise * size[1] * torch.randn((len(points), joints, 2), generator=generator)
    images = item["reference"].repeat(len(points) - 1, 1, 1, 1)
    masks = torch.zeros_like(images[:, :1])
    present = torch.zeros(len(images), dtype=torch.bool)
    if torch.rand(1, generator=generator) < config.probability:
        shown = points[..., 2] > 0
        keypoints = torch.where(shown[..., None], points[..., :2], 0).float().numpy()[:, None]
        scores = torch.where(shown, points[..., 2], 0).float().numpy()[:, None]
        reference = ((item["reference"] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        found = calibrate(
            reference,
            Poses(keypoints[:1], scores[:1], size, 1.0),
            Poses(keypoints[1:], scores[1:], size, 1.0),
            size,
            # The frames are not in a row, so that nothing is filtered over time.
            CalibrationConfig(
                transform="articulated",
                keypoints=config.keypoints,
                score_threshold=config.score_threshold,
                reference_score_threshold=config.score_threshold,
                max_gap=0,
                smoothing=0.0,
                match="given",
            ),
            reference_masks=item["reference_mask"].numpy() > 0.5,
            driving_masks=item["masks"][:, chosen[0]].transpose(0, 1).numpy() > 0.5,
        )
        for k, image in enumerate(found.member[:, 0]):
            if image >= 0:
                present[k] = True
                images[k] = torch.from_numpy(found.images[image]).permute(2, 0, 1) / 127.5 - 1
                masks[k, 0] = torch.from_numpy(np.asarray(found.masks[image]))
    return {
        "calibrated_images": images,
        "calibrated_masks": masks,
        "calibrated_index": groups,
        "calibrated_present": present[groups],
    }


def _draw_members(b: int, frames: int, images: int, generator: Generators) -> tuple[Tensor, Tensor]:
    """Groups (f,) of a clip's frames, and (b, m) the frame of each group, drawn at random, whose image all share."""
    groups = torch.from_numpy(group_of_frames(frames, max(1, min(images, frames))))
    # The member of each group with the highest number.
    drawn = _draw(torch.rand, (b, frames), 0, generator)
    chosen = [(drawn - 2.0 * (groups != g)).argmax(1) for g in range(int(groups[-1]) + 1)]
    return groups, torch.stack(chosen, 1)


@torch.no_grad()
def calibrate_batch(batch: Batch, config: CalibratedTrainingConfig, generator: Generators = None) -> CalibratedBatch:
    """Calibrate the references of some samples to frames of their clips, as inference calibrates, by one similarity.

    The frames of a clip are divided into groups; the frames of a group share the image of one of them, drawn at
    random, as in iterative propagation.
    """
    check_config(config, "calibrated_training")
    reference, keypoints = batch["reference"], batch["keypoints"]
    (b, frames, joints), size, device = keypoints.shape[:3], _size(reference), keypoints.device
    groups, chosen = _draw_members(b, frames, config.images, generator)
    m, chosen = chosen.shape[1], to_device(chosen, device)
    target = torch.gather(keypoints, 1, chosen[:, :, None, None].expand(-1, -1, *keypoints.shape[2:]))
    source = batch["reference_keypoints"][:, None]
    noise = to_device(_draw(torch.randn, (2, b, m, joints, 2), 1, generator), device) * config.noise * size[1]
    rule = torch.zeros(joints)
    rule[list(FIXED_RULES[config.keypoints])] = 1
    rule = to_device(rule, device)
    seen = (source[..., 2] > config.score_threshold) & (target[..., 2] > config.score_threshold)
    transform = SimilarityTransform.from_estimate(
        source[..., :2] + noise[0], target[..., :2] + noise[1], seen * rule * source[..., 2] * target[..., 2]
    )
    wanted = to_device(_draw(torch.rand, (b,), 0, generator), device) < config.probability
    valid = torch.zeros(b, m, dtype=torch.bool, device=device)
    matrices = torch.eye(3, dtype=torch.float64, device=device).expand(b, m, 3, 3)
    if transform:
        valid = transform.valid & wanted[:, None] & (seen * rule).sum(-1).ge(2)
        matrices = torch.where(valid[..., None, None], transform.matrix, matrices)
    mask = batch["reference_mask"].float()
    flat = matrices.flatten(0, 1)
    images = place(reference.repeat_interleave(m, 0), mask.repeat_interleave(m, 0), flat, size, "scene")
    masks = (warp(mask.repeat_interleave(m, 0), flat, size, "black") >= 0.5).float()
    index = to_device(groups, device).expand(b, -1)
    return CalibratedBatch(images.unflatten(0, (b, m)), masks.unflatten(0, (b, m)), index, valid.gather(1, index))


def training_visibility(
    batch: Batch,
    calibrated: CalibratedBatch,
    grids: Sequence[tuple[int, int] | TokenLevel],
    config: CalibratedTrainingConfig,
) -> Visibility:
    """Flags as inference gives them, for b f frames in the order of `frames.transpose(1, 2).flatten(0, 1)`.

    The keys are [own | the sample's reference | the calibrated image of the frame]. Grids (h, w) are levels of
    reference attention.
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
    """The paper's two measures of every sample and frame (b, f), for the log; nan where keypoints are missing.

    Angles are between the pelvis-to-nose lines, in [0, 180]; boxes those of the visible keypoints.
    """
    source, target = batch["reference_keypoints"][:, None], batch["keypoints"]
    people = [(person[..., :2], person[..., 2] > threshold) for person in (source, target)]
    angle = relative_angle(*(head_axis(*person) for person in people))
    return {
        "relative_angle_deg": torch.rad2deg(angle).abs(),
        "box_iou": box_iou(*(keypoint_box(*person) for person in people)),
    }


def warp(images: Tensor, matrices: Tensor, size: tuple[int, int], fill: str) -> Tensor:
    """Resample images (b, c, h, w) by matrices (b, 3, 3) into (b, c, height, width) of `size` (width, height).

    Beyond the image lies its edge ("edge") or 0 ("black").
    """
    # Other pixels than those of `tpc.warping.ImagePyramid`, which takes one image at a time, on the CPU: here every
    # sample has a matrix of its own, on the device, and none shrinks so far that a pyramid would be needed.
    inverse = torch.linalg.inv_ex(matrices.double()).inverse  # unlike `inv` it reads nothing from the device
    n = SUPERSAMPLING
    offsets = (torch.arange(n, dtype=torch.float64, device=inverse.device) + 0.5) / n - 0.5
    x = (torch.arange(size[0], device=inverse.device)[:, None] + offsets).reshape(-1)
    y = (torch.arange(size[1], device=inverse.device)[:, None] + offsets).reshape(-1)
    rows = [
        row[:, 0, None, None] * x + row[:, 1, None, None] * y[:, None] + row[:, 2, None, None]
        for row in (inverse[:, 0], inverse[:, 1])
    ]
    height, width = images.shape[-2:]
    # grid_sample puts -1 and 1 on the outer edges of the outermost pixels.
    grid = torch.stack([(2 * rows[0] + 1) / width - 1, (2 * rows[1] + 1) / height - 1], -1)
    sampled = F.grid_sample(
        images, grid.to(images.dtype), mode="bilinear", padding_mode=PADDING[fill], align_corners=False
    )
    return F.avg_pool2d(sampled, n)


def place(images: Tensor, masks: Tensor, matrices: Tensor, size: tuple[int, int], fill: str) -> Tensor:
    """Images (b, 3, h, w) in [-1, 1] whose persons, masks (b, 1, h, w) in [0, 1], have moved by matrices (b, 3, 3).

    With "scene" only the person moves and the place where it stood is filled from around it; else the image moves.
    The value beyond an image that is filled with "black" is -1.
    """
    if fill != "scene":
        return warp(images + 1, matrices, size, fill) - 1
    person, alpha = warp(images, matrices, size, "edge"), warp(masks, matrices, size, "black")
    return alpha * person + (1 - alpha) * remove_persons(images, masks)


def remove_persons(images: Tensor, masks: Tensor) -> Tensor:
    """Fill masks (b, 1, h, w) smoothly from the pixels around them, from coarse to fine; all mask becomes 0 (grey)."""
    reach = max(3, max(images.shape[-2:]) // 64) // 2 * 2 + 1  # the mask's edge still shows the person
    known = 1 - F.max_pool2d(masks, reach, 1, reach // 2)
    return torch.where(known > 0, images, _push_pull(images * known, known))


def _push_pull(weighted: Tensor, known: Tensor) -> Tensor:
    # As in `tpc.warping`, on the device; odd sides are halved by windows that overlap, not by parts of pixels.
    height, width = known.shape[-2:]
    if max(height, width) == 1:
        return torch.where(known > 0, weighted / known.clamp(min=1e-6), 0.0)
    half = ((height + 1) // 2, (width + 1) // 2)
    coarse = _push_pull(F.adaptive_avg_pool2d(weighted, half), F.adaptive_avg_pool2d(known, half))
    return weighted + (1 - known) * F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-1], images.shape[-2]


def _middles(mask: Tensor) -> Tensor:
    """(b, 2) centres of masks (b, 1, h, w); the middle of the image for an empty one."""
    weight = mask[:, 0].double()
    height, width = weight.shape[1:]
    total = weight.sum((1, 2))
    columns, rows = (torch.arange(n, dtype=weight.dtype, device=weight.device) for n in (width, height))
    sums = (weight.sum(1) @ columns, width), (weight.sum(2) @ rows, height)
    return torch.stack([torch.where(total > 0, s / total.clamp(min=1e-12), (n - 1) / 2) for s, n in sums], dim=-1)
