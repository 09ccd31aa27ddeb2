"""Masked attention without a mask tensor: flags of queries and keys say what is hidden from whom.

hidden(query, key) = sum_g query_flags[g] key_flags[g] > 0. Flags times a penalty, appended as g channels, push hidden
logits far down in plain scaled-dot-product attention, so every fused kernel serves; visible ones get exactly 0 added.

Shapes use b = batch, n = query tokens, g = flag channels, d = channels of a head.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Subtracted from a hidden pair's logit for every shared flag. e^-100 is 0 beside anything a softmax adds up, and 100
# times any number of flags is finite in half precision.
PENALTY = 100.0


@dataclass(frozen=True)
class Visibility:
    """Flags, 0 or 1, of all layers with n query tokens, for every n of a network."""

    query: dict[int, Tensor]  # n -> (b, n, g)
    key: dict[int, Tensor]  # n -> (b, keys, g), keys in the order of `models.attention.layers.KeyLayout`

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Visibility":
        """The same flags on another device or in another dtype."""
        return self.map(lambda flags: flags.to(device, dtype))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Visibility":
        """Flags (b, ., g) after a function of them."""
        query, key = ({n: function(t) for n, t in flags.items()} for flags in (self.query, self.key))
        return Visibility(query, key)

    def rows(self, rows: slice) -> "Visibility":
        """Flags of some entries of the batch."""
        return self.map(lambda flags: flags[rows])

    def lifted(self, rows: Tensor) -> "Visibility":
        """The same flags, but nothing is hidden in the entries of the batch that `rows` (b,) bool marks."""
        return Visibility({n: t * ~rows[:, None, None] for n, t in self.query.items()}, self.key)


def joined_visibility(parts: Sequence[Visibility | None]) -> Visibility | None:
    """Flags of a batch of parts, which all have flags of the same channels, or all none."""
    if parts[0] is None:
        return None
    query, key = (
        {n: torch.cat([flags[n] for flags in side]) for n in side[0]}
        for side in ([part.query for part in parts], [part.key for part in parts])
    )
    return Visibility(query, key)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, query_flags: Tensor, key_flags: Tensor, scale: float | None = None
) -> Tensor:
    """Scaled-dot-product attention (b, heads, n, d) that leaves out pairs with a common flag."""
    channels = value.shape[-1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key = append_flags(query, key, query_flags, key_flags, scale)
    value = F.pad(value, (0, query.shape[-1] - channels))  # fused kernels want one head size for all three
    return F.scaled_dot_product_attention(query, key, value, scale=scale)[..., :channels]


def append_flags(
    query: Tensor, key: Tensor, query_flags: Tensor, key_flags: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Query (b, heads, n, d) and key (b, heads, keys, d) with g flag channels and zeros up to a multiple of 8."""
    # `scale` stays that of d channels, 1 / sqrt(d).
    padding = -(query.shape[-1] + query_flags.shape[-1]) % 8
    # A power of two is exact in every dtype, and the factor goes where 0 stays 0.
    factor = 2.0 ** math.ceil(math.log2(PENALTY / scale))
    query, key = (
        torch.cat([x, F.pad(flags, (0, padding)).to(x.dtype)[:, None].expand(-1, x.shape[1], -1, -1)], dim=-1)
        for x, flags in ((query, query_flags * -factor), (key, key_flags))
    )
    return query, key


def hidden_pairs(query_flags: Tensor, key_flags: Tensor) -> Tensor:
    """(b, n, keys) bool, True where a pair has a common flag."""
    return query_flags.float() @ key_flags.float().transpose(1, 2) > 0


def dense_mask(visibility: Visibility, n: int) -> Tensor:
    """(b, n, keys) bool, True where layers with n query tokens leave a pair visible."""
    return ~hidden_pairs(visibility.query[n], visibility.key[n])
