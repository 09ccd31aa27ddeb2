"""Which tokens a frame attends to once calibrated images stand beside the reference, or in its place.

A layer that reads the reference attends from n queries (the tokens of a frame) to the keys

    [ own n | reference r | calibrated image of person 0 r | calibrated image of person 1 r | ... ]

(paper, "calibration branch": K = V = [r, c]), or to those that `KeyLayout` describes. What is hidden from whom is said
by flags, see `models.attention.masking`; the table `HIDDEN` says it by groups of queries and of keys.

The calibrated image of a person who is not calibrated in a frame is hidden from all of the frame, so that without any
every token attends to all of the reference, as without TPC.

Tokens of a whole image, such as CLIP's class token, have no position that a mask could cover: the reference's are
never hidden, a calibrated image's are hidden as its mask is. In layers where all tokens are of the whole image nothing
is masked, and images are only present or absent, frame by frame.

Shapes use b = frames, n = query tokens, r = tokens of one image on a grid, g = flag channels.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.layers import KeyLayout, TokenLevel, pool_masks
from models.attention.masking import Visibility
from models.images import CalibratedClip
from tpc.config import CalibrationConfig

# The groups of keys that are hidden from each group of queries.
#
# Queries: "person", all of the token inside calibrated persons; "outline", part of it, whose background has to come
# from somewhere; "plain", on somebody who is not calibrated in this frame; "background", on nobody.
# Keys: "body", the reference where calibrated persons stand; "rest", the remainder of the reference; "others",
# calibrated images on their masks, for queries that are not on their person; "painted", calibrated images off their
# masks in the place of "body". What else is off their masks is hidden from all queries, and what is on the mask of a
# query's own person is never hidden from it.
#
# `scene` keeps the reference's person from showing through where the clip's is smaller or elsewhere: calibrated images
# of `fill=scene` have that place painted over.
# fmt: off
HIDDEN = {
    #             person                      outline                     plain             background
    "paper":     ("others painted",           "others painted",           "others painted", "painted"),
    "release":   ("body rest others painted", "body rest others painted", "others painted", "body others painted"),
    "exclusive": ("body rest others painted", "body others painted",      "others painted", "others painted"),
    "scene":     ("body rest others painted", "body others",              "others painted", "body others"),
}
# fmt: on


class MaskedClip(CalibratedClip, Protocol):
    """The masks that flags are made of; `tpc.Calibration` has them."""

    config: CalibrationConfig
    target_masks: np.ndarray  # (frames, persons, H, W) bool, each person of the reference in the driving frames
    other_masks: np.ndarray  # (frames, H, W) bool, persons of the driving clip who are not in the reference


def calibration_flags(
    calibration: MaskedClip, frames: range, step: int, levels: Sequence[TokenLevel]
) -> Visibility | None:
    """Flags for consecutive frames of a clip at one denoising step; None where nothing is hidden."""
    index = calibration.index(step)[frames.start : frames.stop]
    if calibration.replaces_reference:
        return replacement_visibility(index, levels)
    return frame_visibility(calibration, frames, index, levels)


def replacement_visibility(index: np.ndarray, levels: Sequence[TokenLevel]) -> Visibility | None:
    """Flags where calibrated images take the reference's place, one for each person; index: (b, persons)."""
    if index.shape[1] < 2:
        return None
    # The reference stands in for whoever is uncalibrated; further copies of it are hidden.
    absent = torch.from_numpy(index < 0)
    twice = absent & (absent.cumsum(dim=1) > 1)
    flags = {level.tokens: gate_flags(twice, level) for level in levels}
    return Visibility({n: query for n, (query, _) in flags.items()}, {n: key for n, (_, key) in flags.items()})


def frame_visibility(
    calibration: MaskedClip,
    frames: Sequence[int] | np.ndarray,
    index: np.ndarray,
    levels: Sequence[TokenLevel],
    preset: str | None = None,
) -> Visibility:
    """Flags for frames (b,) of a clip where calibrated images stand beside the reference.

    `index` (b, persons) are their calibrated images, -1 = uncalibrated; `preset` is of `HIDDEN`, None = configured.
    """
    frames, index = np.asarray(frames), np.asarray(index)
    if index.shape != (len(frames), calibration.persons):
        raise ValueError(f"index must be (frames, persons) = {(len(frames), calibration.persons)}, got {index.shape}")
    if len({level.tokens for level in levels}) < len(levels):
        raise ValueError(f"two levels have the same number of tokens: {[level.queries for level in levels]}")
    present = torch.from_numpy(index >= 0)
    # Unpacked once; images that frames share are pooled once.
    targets, others = (
        torch.from_numpy(np.ascontiguousarray(masks[frames]))
        for masks in (calibration.target_masks, calibration.other_masks)
    )
    distinct, inverse = np.unique(index, return_inverse=True)
    masks = torch.from_numpy(np.ascontiguousarray(calibration.masks[distinct[distinct >= 0]]))
    masks = F.pad(masks, (0, 0, 0, 0, int(len(distinct) > len(masks)), 0))  # nothing where uncalibrated, -1, first
    inverse = torch.from_numpy(inverse.reshape(index.shape))
    reference = torch.from_numpy(np.ascontiguousarray(calibration.reference_masks))
    query, key = {}, {}
    for level in levels:
        grid = level.keys.grid
        if grid is None:
            flags = gate_flags(F.pad(~present, (1, 0)), level)
        else:
            flags = visibility_flags(
                pool_masks(targets, level.queries),
                pool_masks(others, level.queries),
                pool_masks(reference, grid).expand(len(frames), -1, -1),
                pool_masks(masks, grid)[inverse],
                present,
                preset=preset or calibration.config.visibility,
                threshold=calibration.config.mask_threshold,
                layout=level.keys,
            )
        query[level.tokens], key[level.tokens] = flags
    return Visibility(query, key)


def gate_flags(hidden: Tensor, level: TokenLevel) -> tuple[Tensor, Tensor]:
    """Flags of one level, (b, n, 1) and (b, keys, 1), that hide whole images, (b, images) bool, from whole frames."""
    key = hidden.float().repeat_interleave(level.keys.tokens, dim=1)[..., None]
    key = F.pad(key, (0, 0, level.tokens if level.keys.own else 0, 0))
    return key.new_ones(len(hidden), level.tokens, 1), key


def visibility_flags(
    target: Tensor,
    other: Tensor,
    reference: Tensor,
    calibrated: Tensor,
    present: Tensor,
    *,
    preset: str,
    threshold: float = 0.0,
    layout: KeyLayout | None = None,
) -> tuple[Tensor, Tensor]:
    """Flags of one level, (b, n, g) of the queries and (b, keys, g) of the keys, as `HIDDEN` says.

    Args:
        target, reference, calibrated: (b, persons, n), (b, persons, r) twice: part of each query, reference and
            calibrated token covered by each person.
        other: (b, n) part covered by persons whom nobody in the reference corresponds to.
        present: (b, persons) bool, False where a person is not calibrated.
        threshold: part above which a token belongs to a person; 0 = any pixel does.
        layout: of the keys, whose grid has r tokens; None = reference attention.
    """
    if preset not in HIDDEN:
        raise ValueError(f"preset must be one of {', '.join(HIDDEN)}, got {preset!r}")
    present = present[..., None]  # (b, persons, 1)
    inside = target > threshold
    own = inside & present
    plain = (inside & ~present).any(1) | (other > threshold)
    person = own.any(1) & ~plain
    covered = (target * present).sum(1) >= 1 - 1e-6
    groups = (person & covered, person & ~covered, plain, ~person & ~plain)  # (b, n) each, in the order of the table

    body = ((reference > threshold) & present).any(1)  # (b, r)
    on_mask = (calibrated > threshold) & present  # (b, persons, r)
    painted = ~on_mask & body[:, None] & present
    whole = torch.ones_like(present).expand(-1, -1, 0 if layout is None else layout.whole)  # of calibrated images

    # One channel for all groups of queries from which the same keys are hidden, whoever their person is ...
    queries: dict[frozenset[str], Tensor] = {}
    from_others = torch.zeros_like(plain)
    for group, hidden in zip(groups, HIDDEN[preset], strict=True):
        keys = frozenset(hidden.split())
        from_others = from_others | group if "others" in keys else from_others
        keys -= {"others"}
        queries[keys] = queries[keys] | group if keys in queries else group
    channels = []
    for keys, query in queries.items():
        of_reference = body & ("body" in keys) | ~body & ("rest" in keys)
        of_reference = F.pad(of_reference, (whole.shape[2], 0))
        off_mask = ~on_mask if "painted" in keys else ~on_mask & ~painted
        of_images = torch.cat([whole & ~present, off_mask], dim=2)
        channels.append((query, torch.cat([of_reference, of_images.flatten(1)], dim=1)))
    # ... and one for each person, which hides the mask of its calibrated image from the others.
    images = torch.cat([whole, on_mask], dim=2)  # (b, persons, whole + r)
    for index in range(images.shape[1]):
        key = torch.zeros_like(images)
        key[:, index] = images[:, index]
        channels.append((from_others & ~own[:, index], F.pad(key.flatten(1), (images.shape[2], 0))))

    query_flags = torch.stack([query for query, _ in channels], dim=-1).float()
    key_flags = torch.stack([key for _, key in channels], dim=-1).float()
    if layout is None or layout.own:
        key_flags = F.pad(key_flags, (0, 0, target.shape[2], 0))
    return query_flags, key_flags
