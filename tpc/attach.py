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
    scene       own, c_j on its mask                         own, the reference where no calibrated person is, and
                                                             every c where such a person stood

In `exclusive` and `scene` a token of the outline, person in part, also sees the reference where no person is: its
background has to come from somewhere. `scene` keeps the reference's person from showing through where the clip's is
smaller or elsewhere; calibrated images of `fill=scene` have that place painted over. Nobody sees the calibrated tokens
of somebody else. In a frame where nobody is calibrated every token sees all of the reference, as without TPC.

Other models attend to other tokens, which `KeyLayout` describes. A token of the whole image, such as CLIP's class
token, has no place that a mask could cover: the reference's is never hidden, a calibrated image's is hidden from
whoever is not its person (in `paper` from other persons) and in frames where the image is absent. Where all tokens are
of the whole image there is nothing to mask, and images are only present or absent, frame by frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from models.attention.tokens import KeyLayout, TokenLevel, level_grids, pool_masks, self_attention_level
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
        key: n -> (b, keys, g) float, 0 or 1; keys = n + r + persons c in reference attention, see `KeyLayout`.
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
    latent_size: tuple[int, int] | None,
    grids: int | Sequence[tuple[int, int] | TokenLevel] = 4,
    preset: str | None = None,
    *,
    reference_grids: Sequence[tuple[int, int]] | None = None,
) -> Visibility:
    """Flags for some frames of a clip at one denoising step.

    Args:
        frame_indices: (b,) numbers of the frames in the clip, such as those of a context window.
        member_index: (b, persons) the calibrated images these frames use, `calibration.index(step)[frame_indices]`;
            -1 = uncalibrated.
        latent_size: (h, w) of the latents; None where `grids` says everything.
        grids: number of levels of reference attention, each half the one before, rounded up; or the (h, w) of every
            level; or levels of any attention.
        preset: "paper", "release", "exclusive" or "scene"; None = the calibration's.
        reference_grids: (h, w) of the reference's tokens at every level; None = as the levels say, or as the queries'.
    """
    frame_indices, member_index = np.asarray(frame_indices), np.asarray(member_index)
    if member_index.shape != (len(frame_indices), calibration.persons):
        expected = (len(frame_indices), calibration.persons)
        raise ValueError(f"member_index must be (frames, persons) = {expected}, got {member_index.shape}")
    preset = preset or calibration.config.visibility
    levels = _levels(latent_size, grids, reference_grids)
    present = torch.from_numpy(member_index >= 0)
    placed = [level for level in levels if level.keys.grid is not None]
    query_grids, key_grids = [level.queries for level in placed], [level.keys.grid for level in placed]
    targets = _shares(calibration.target_masks[frame_indices], query_grids)
    others = _shares(calibration.other_masks[frame_indices], query_grids)
    reference = _shares(calibration.reference_masks[None], key_grids)
    calibrated = _calibrated_shares(calibration, member_index, key_grids)
    query, key = {}, {}
    for level in levels:
        if level.keys.grid is None:
            flags = gate_flags(F.pad(~present, (1, 0)), level)
        else:
            flags = visibility_flags(
                targets.pop(0),
                others.pop(0),
                reference.pop(0).expand(len(frame_indices), -1, -1),
                calibrated.pop(0),
                present,
                preset=preset,
                threshold=calibration.config.mask_threshold,
                layout=level.keys,
            )
        query[level.tokens], key[level.tokens] = flags
    if len(query) != len(levels):
        raise ValueError(f"two levels have the same number of tokens: {[level.queries for level in levels]}")
    return Visibility(query, key)


def _levels(
    latent_size: tuple[int, int] | None,
    grids: int | Sequence[tuple[int, int] | TokenLevel],
    reference_grids: Sequence[tuple[int, int]] | None,
) -> list[TokenLevel]:
    known = level_grids(latent_size, grids) if isinstance(grids, int) else grids
    references = [None] * len(known) if reference_grids is None else reference_grids
    return [
        level if isinstance(level, TokenLevel) else self_attention_level(level, reference)
        for level, reference in zip(known, references, strict=True)
    ]


def gate_flags(hidden: torch.Tensor, level: TokenLevel) -> tuple[torch.Tensor, torch.Tensor]:
    """Flags of one level, (b, n, 1) and (b, keys, 1), that hide whole images from whole frames.

    Args:
        hidden: (b, images) bool.
    """
    key = hidden.float().repeat_interleave(level.keys.tokens, dim=1)[..., None]
    key = F.pad(key, (0, 0, level.tokens if level.keys.own else 0, 0))
    return key.new_ones(len(hidden), level.tokens, 1), key


def visibility_flags(
    target: torch.Tensor,
    other: torch.Tensor,
    reference: torch.Tensor,
    calibrated: torch.Tensor,
    present: torch.Tensor,
    *,
    preset: str,
    threshold: float = 0.0,
    layout: KeyLayout | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flags of one level: (b, n, g) for the queries, (b, keys, g) for the keys, n + r + persons r of them.

    Args:
        target: (b, persons, n) part of each query token covered by each person.
        other: (b, n) part covered by persons whom nobody in the reference corresponds to.
        reference: (b, persons, r) part of each reference token covered by each person of the reference.
        calibrated: (b, persons, r) part of each calibrated token covered by its person.
        present: (b, persons) bool, False where a person is not calibrated.
        preset: "paper", "release", "exclusive" or "scene".
        threshold: part above which a token belongs to a person; 0 = any pixel does.
        layout: of the keys, whose grid has r tokens; None = reference attention.
    """
    if preset not in VISIBILITIES:
        raise ValueError(f"preset must be one of {', '.join(VISIBILITIES)}, got {preset!r}")
    persons, n = target.shape[1:]
    inside = target > threshold
    mine = inside & present[..., None]
    anybody = mine.any(1)
    plain = (inside & ~present[..., None]).any(1) | (other > threshold)
    background = ~anybody & ~plain
    body = ((reference > threshold) & present[..., None]).any(1)  # of whoever is shown elsewhere
    hidden_part = ~((calibrated > threshold) & present[..., None])  # of the calibrated tokens
    scene = preset == "scene"
    # Calibrated tokens where persons stood, painted over.
    left = body[:, None] & hidden_part & present[..., None] & scene
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
            outline = inner & ~covered
            reference_rules = [(inner & covered, everywhere), (outline | background if scene else outline, body)]
    blank, nobody = torch.zeros_like(hidden_part), torch.zeros_like(present)
    # Queries, tokens of the reference, of the calibrated images that have a place, and that have none, by person.
    rules = [(torch.ones_like(anybody), none, hidden_part & ~left, ~present)]
    rules += [(query, key, blank, nobody) for query, key in reference_rules]
    if scene:
        rules.append((~(background | outline), none, left, nobody))
    for person in range(persons):
        own, whole = blank.clone(), nobody.clone()
        own[:, person], whole[:, person] = ~left[:, person], True
        rules.append((apart[:, person], none, own, whole))
    query_flags = torch.stack([query for query, _, _, _ in rules], -1)
    leading = 0 if layout is None else layout.whole
    tokens = []
    for _, key, own, whole in rules:
        images = torch.cat([whole[..., None].expand(-1, -1, leading), own], dim=2)
        tokens.append(torch.cat([F.pad(key, (leading, 0)), images.flatten(1)], dim=1))
    key_flags = torch.stack(tokens, -1)
    if layout is None or layout.own:
        key_flags = F.pad(key_flags, (0, 0, n, 0))
    return query_flags.float(), key_flags.float()


def dense_mask(visibility: Visibility, n: int) -> torch.Tensor:
    """(b, n, keys) bool, True = visible: what the flags say, written out. For tests and figures."""
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


def _shares(masks: np.ndarray, grids: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Masks (..., H, W) -> for every grid (..., h w)."""
    tensor = torch.from_numpy(np.ascontiguousarray(masks))
    return [pool_masks(tensor, grid) for grid in grids]


def _calibrated_shares(
    calibration: Calibration, member_index: np.ndarray, grids: list[tuple[int, int]]
) -> list[torch.Tensor]:
    """For every grid (b, persons, h w); 0 where uncalibrated. An image that frames share is pooled once."""
    distinct, inverse = np.unique(member_index, return_inverse=True)
    shares = _shares(calibration.masks[distinct[distinct >= 0]], grids)
    missing = len(distinct) and distinct[0] < 0
    pooled = [torch.cat([torch.zeros(1, s.shape[-1]), s]) if missing else s for s in shares]
    return [p[torch.from_numpy(inverse.reshape(member_index.shape))] for p in pooled]
