"""Which tokens a frame's patches may see once calibrated tokens keep the reference tokens company.

A layer that reads the reference attends from n queries (the patches of a frame) to the keys

    [ own n | reference r | calibrated of person 0 c | calibrated of person 1 c | ... ],        c = r

(paper, "calibration branch": K = V = [r, c]). What is hidden from whom is written as flags instead of an n x keys
mask: a pair is hidden when its query and its key share a raised flag,

    hidden(query, key) = sum_g query_flags[g] key_flags[g] > 0.

Appended to query and key as g extra channels, flags times a penalty, they push hidden logits far down in plain
scaled-dot-product attention, with no mask tensor; visible logits get exactly 0 added. See `masked_attention`.

Three rules, for a query inside person j's target mask ("person"), in nobody's ("background"), or on a person who is
not calibrated in this frame ("plain": it sees all of the reference, and no calibrated token):

    preset      person                                       background
    paper       own, all of the reference, c_j on its mask   own, all of the reference, every c on its mask
    release     own, c_j on its mask                         own, the reference where no calibrated person is
    exclusive   own, c_j on its mask                         own, all of the reference

In `exclusive` a token of the outline, person in part, also sees the reference where no person is: its background has
to come from somewhere. Nobody sees the calibrated tokens of somebody else. In a frame where nobody is calibrated
every token sees all of the reference, as without TPC.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from tpc.config import VISIBILITIES
from tpc.result import Calibration

# Subtracted from a hidden pair's logit for every shared flag. e^-100 is 0 beside anything a softmax adds up, and 100
# times any number of flags is finite in half precision.
PENALTY = 100.0


@dataclass(frozen=True)
class Visibility:
    """Flags of queries and keys, for every number of query tokens n that occurs in the network.

    Attributes:
        query: n -> (b, n, g) float, 0 or 1.
        key: n -> (b, n + r + persons c, g) float, 0 or 1.
    """

    query: dict[int, torch.Tensor]
    key: dict[int, torch.Tensor]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Visibility:
        """The same flags on another device or in another floating point type, all of which hold 0 and 1 exactly."""
        move = {"device": device, "dtype": dtype}
        return Visibility(
            {n: t.to(**move) for n, t in self.query.items()}, {n: t.to(**move) for n, t in self.key.items()}
        )


def frame_visibility(
    calibration: Calibration,
    frame_indices: Sequence[int] | np.ndarray,
    member_index: np.ndarray,
    latent_size: tuple[int, int],
    grids: int | Sequence[tuple[int, int]] = 4,
    preset: str | None = None,
    *,
    reference_grids: Sequence[tuple[int, int]] | None = None,
) -> Visibility:
    """Flags for some frames of a clip at one denoising step.

    Args:
        frame_indices: (b,) numbers of the frames in the clip, such as those of a context window.
        member_index: (b, persons) the calibrated pictures these frames use, `calibration.index(step)[frame_indices]`;
            -1 = uncalibrated.
        latent_size: (h, w) of the latents.
        grids: number of levels, each half the one before, rounded up; or the (h, w) of every level.
        preset: "paper", "release" or "exclusive"; None = the calibration's.
        reference_grids: (h, w) of the reference's tokens at every level; None = as the queries'.
    """
    frame_indices, member_index = np.asarray(frame_indices), np.asarray(member_index)
    if member_index.shape != (len(frame_indices), calibration.persons):
        expected = (len(frame_indices), calibration.persons)
        raise ValueError(f"member_index must be (frames, persons) = {expected}, got {member_index.shape}")
    preset = preset or calibration.config.visibility
    levels = level_grids(latent_size, grids) if isinstance(grids, int) else [tuple(grid) for grid in grids]
    present = torch.from_numpy(member_index >= 0)
    targets = _shares(calibration.target_masks[frame_indices], levels)
    others = _shares(calibration.other_masks[frame_indices], levels)
    key_levels = levels if reference_grids is None else [tuple(grid) for grid in reference_grids]
    reference = _shares(calibration.reference_masks[None], key_levels)
    calibrated = _calibrated_shares(calibration, member_index, key_levels)
    query, key = {}, {}
    for n, grid in enumerate(levels):
        flags = visibility_flags(
            targets[n],
            others[n],
            reference[n].expand(len(frame_indices), -1, -1),
            calibrated[n],
            present,
            preset=preset,
            threshold=calibration.config.mask_threshold,
        )
        query[grid[0] * grid[1]], key[grid[0] * grid[1]] = flags
    if len(query) != len(levels):
        raise ValueError(f"two levels have the same number of tokens: {levels}")
    return Visibility(query, key)


def visibility_flags(
    target: torch.Tensor,
    other: torch.Tensor,
    reference: torch.Tensor,
    calibrated: torch.Tensor,
    present: torch.Tensor,
    *,
    preset: str,
    threshold: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flags of one level: (b, n, g) for the queries, (b, n + r + persons r, g) for the keys.

    Args:
        target: (b, persons, n) part of each query token covered by each person.
        other: (b, n) part covered by persons whom nobody in the reference corresponds to.
        reference: (b, persons, r) part of each reference token covered by each person of the reference.
        calibrated: (b, persons, r) part of each calibrated token covered by its person.
        present: (b, persons) bool, False where a person is not calibrated.
        preset: "paper", "release" or "exclusive".
        threshold: part above which a token belongs to a person; 0 = any pixel does.
    """
    if preset not in VISIBILITIES:
        raise ValueError(f"preset must be one of {', '.join(VISIBILITIES)}, got {preset!r}")
    persons, n, r = target.shape[1], target.shape[2], reference.shape[2]
    inside = target > threshold
    mine = inside & present[..., None]
    anybody = mine.any(1)
    plain = (inside & ~present[..., None]).any(1) | (other > threshold)
    background = ~anybody & ~plain
    body = ((reference > threshold) & present[..., None]).any(1)  # of whoever is shown elsewhere
    hidden_part = ~((calibrated > threshold) & present[..., None])  # of the calibrated tokens
    none, everywhere = torch.zeros_like(body), torch.ones_like(body)
    if preset == "paper":
        apart = ~mine & (anybody | plain)[:, None]
        reference_rules = []
    else:
        apart = ~mine
        inner = anybody & ~plain
        if preset == "release":
            reference_rules = [(inner, everywhere), (background, body)]
        else:
            covered = (target * present[..., None]).sum(1) >= 1 - 1e-6
            reference_rules = [(inner & covered, everywhere), (inner & ~covered, body)]
    blank = torch.zeros_like(hidden_part)
    rules = [(torch.ones_like(anybody), none, hidden_part)]
    rules += [(query, key, blank) for query, key in reference_rules]
    for person in range(persons):
        own = blank.clone()
        own[:, person] = True
        rules.append((apart[:, person], none, own))
    query_flags = torch.stack([query for query, _, _ in rules], -1)
    tokens = [torch.cat([key, own.flatten(1)], 1) for _, key, own in rules]
    key_flags = F.pad(torch.stack(tokens, -1), (0, 0, n, 0))
    assert key_flags.shape[1] == n + r + persons * r
    return query_flags.float(), key_flags.float()


def dense_mask(visibility: Visibility, n: int) -> torch.Tensor:
    """(b, n, n + r + persons c) bool, True = visible: what the flags say, written out. For tests and figures."""
    return torch.einsum("bqg,bkg->bqk", visibility.query[n], visibility.key[n]) == 0


def append_flags(
    query: torch.Tensor, key: torch.Tensor, query_flags: torch.Tensor, key_flags: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query (b, heads, n, d) and key (b, heads, keys, d) with g flag channels and zeros up to a multiple of 8.

    `scale` is what attention multiplies the products with; it must stay that of d channels, 1 / sqrt(d).
    """
    padding = -(query.shape[-1] + query_flags.shape[-1]) % 8
    # A power of two, exact in every floating point type, and the factor goes where 0 stays 0.
    factor = 2.0 ** math.ceil(math.log2(PENALTY / scale))
    widen = [
        torch.cat([x, F.pad(flags, (0, padding)).to(x.dtype)[:, None].expand(-1, x.shape[1], -1, -1)], dim=-1)
        for x, flags in ((query, query_flags * -factor), (key, key_flags))
    ]
    return widen[0], widen[1]


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_flags: torch.Tensor,
    key_flags: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Scaled-dot-product attention (b, heads, n, d) in which pairs that share a flag do not see each other.

    The flags travel as extra channels, so that every fused kernel serves and no n x keys tensor exists.
    """
    channels = value.shape[-1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key = append_flags(query, key, query_flags, key_flags, scale)
    # Fused kernels want one head size for all three.
    value = F.pad(value, (0, query.shape[-1] - channels))
    return F.scaled_dot_product_attention(query, key, value, scale=scale)[..., :channels]


def level_grids(latent_size: tuple[int, int], num_levels: int) -> list[tuple[int, int]]:
    """(h, w) of every level of a UNet whose downsampling halves and rounds up."""
    grids = [tuple(latent_size)]
    while len(grids) < num_levels:
        grids.append(((grids[-1][0] + 1) // 2, (grids[-1][1] + 1) // 2))
    return grids


def pool_masks(masks: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Part of every token's pixels that a mask covers: (..., H, W) -> (..., h w) float in [0, 1].

    A token is a block of whole pixels. When the grid was rounded up, the last blocks stick out of the frame and
    their part is of what lies inside.
    """
    (height, width), (rows, columns) = masks.shape[-2:], grid
    flat = masks.reshape(-1, 1, height, width).float()
    pitch = block_pitch(height, rows), block_pitch(width, columns)
    pad = (0, columns * pitch[1] - width, 0, rows * pitch[0] - height)
    if pitch[0] == 0 or pitch[1] == 0 or min(pad) < 0:
        pooled = F.adaptive_avg_pool2d(flat, grid)
    else:
        inside = F.pad(torch.ones(1, 1, height, width), pad)
        pooled = F.avg_pool2d(F.pad(flat, pad), pitch) / F.avg_pool2d(inside, pitch)
    return pooled.reshape(*masks.shape[:-2], rows * columns)


def block_pitch(pixels: int, tokens: int) -> int:
    """Pixels along a side of a token: the quotient, or the power of two behind a grid rounded up; 0 = neither."""
    if pixels % tokens == 0:
        return pixels // tokens
    pitch = 2 ** math.ceil(math.log2(pixels / tokens)) if tokens <= pixels else 0
    return pitch if pitch and -(-pixels // pitch) == tokens else 0


def _shares(masks: np.ndarray, grids: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Masks (..., H, W) -> for every grid (..., h w)."""
    tensor = torch.from_numpy(np.ascontiguousarray(masks))
    return [pool_masks(tensor, grid) for grid in grids]


def _calibrated_shares(
    calibration: Calibration, member_index: np.ndarray, grids: list[tuple[int, int]]
) -> list[torch.Tensor]:
    """For every grid (b, persons, h w); 0 where uncalibrated. A picture that frames share is pooled once."""
    distinct, inverse = np.unique(member_index, return_inverse=True)
    shares = _shares(calibration.masks[distinct[distinct >= 0]], grids)
    missing = len(distinct) and distinct[0] < 0
    pooled = [torch.cat([torch.zeros(1, s.shape[-1]), s]) if missing else s for s in shares]
    return [p[torch.from_numpy(inverse.reshape(member_index.shape))] for p in pooled]
