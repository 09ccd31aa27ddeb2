"""How attention is divided: the frame itself, the reference's person and background, each person's calibrated image.

Shapes use s = steps, f = frames, a = heads, p = queries, k = images, r = tokens of an image.
"""

import numpy as np
import torch
from torch import Tensor

from evaluation.attention.maps import layer_maps, require_reference
from models.attention.measures import region_share
from models.attention.record import RecordedAttention
from models.attention.tokens import pool_masks

SELF, PERSON, BACKGROUND = "self", "reference person", "reference background"


def shares(
    recorded: RecordedAttention, layer: str, reference_mask: np.ndarray, mean_heads: bool = True
) -> dict[str, Tensor]:
    """Attention of every query by what gets it, (s, f, a, p) each; they sum to 1.

    Args:
        reference_mask: (H, W) bool, the persons in the model's reference image.

    Returns:
        By name: `SELF` (and class tokens, see `RecordedAttention.own`), `PERSON`, `BACKGROUND`, and "calibrated 0" ...
        for every person.
    """
    require_reference(recorded)
    maps = layer_maps(recorded, layer, mean_heads)
    own = torch.from_numpy(np.asarray(recorded.own[layer]))
    found = {SELF: own.mean(dim=2, keepdim=True) if mean_heads else own}
    return found | image_shares(maps, token_coverage(reference_mask, recorded.grid(layer)))


def image_shares(maps: Tensor, person: Tensor) -> dict[str, Tensor]:
    """`shares` without the frame itself, of maps (..., k, r); differentiable.

    Args:
        person: (r,) part of every reference token that persons cover.
    """
    found = {
        PERSON: region_share(maps[..., 0, :], person.to(maps)),
        BACKGROUND: region_share(maps[..., 0, :], 1 - person.to(maps)),
    }
    return found | {f"calibrated {k}": maps[..., 1 + k, :].sum(-1) for k in range(maps.shape[-2] - 1)}


def token_coverage(mask: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """(r,) part of every token of a grid that a mask (H, W) bool covers."""
    return pool_masks(torch.from_numpy(np.ascontiguousarray(mask)), grid)


def mean_over(values: Tensor, weights: Tensor | None = None) -> float | None:
    """Mean over queries (..., p) that are there, weighted with (p,) or (..., p); None when none is.

    Args:
        weights: such as the `token_coverage` of the driving person, when all query tokens were recorded, or 1 minus
            it for the background's queries.
    """
    known = ~values.isnan()
    weights = known.to(values.dtype) * (1 if weights is None else weights.to(values))
    total = float(weights.sum())
    return float((values.nan_to_num() * weights).sum()) / total if total > 0 else None
