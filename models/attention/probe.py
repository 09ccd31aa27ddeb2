"""Attention of chosen query tokens, as a differentiable by-product of a forward pass.

Shapes use b = batch, f = frames, n = query tokens of a layer, p = probed queries, g = flag channels, d = channels of a
head.
"""

from collections.abc import Mapping
from copy import copy
from typing import Self

import torch
from torch import Tensor

from models.attention.masking import hidden_pairs


class AttentionProbe:
    """Attention of some queries of some layers, with gradients; a `models.attention.context.Probe`.

    Args:
        queries: number of query tokens n of a layer -> the probed ones, (b*f, p) long; layers with other numbers are
            left alone.

    Attributes:
        tokens: layer -> n.
    """

    def __init__(self, queries: Mapping[int, Tensor]):
        self.queries = dict(queries)
        self.tokens: dict[str, int] = {}
        self._first_row = 0
        self._parts: dict[str, dict[int, Tensor]] = {}

    @property
    def maps(self) -> dict[str, Tensor]:
        """Layer -> probabilities (b*f, heads, p, keys) over [own tokens | image 0 | ... | image k-1], float32."""
        return {layer: torch.cat([parts[row] for row in sorted(parts)]) for layer, parts in self._parts.items()}

    def clip(self, rows: slice) -> Self:
        part = copy(self)  # `tokens` and `_parts` stay shared
        part.queries = {tokens: chosen[rows] for tokens, chosen in self.queries.items()}
        part._first_row = rows.start
        return part

    def record(
        self, layer: str, query: Tensor, key: Tensor, flags: tuple[Tensor, Tensor] | None, scale: float
    ) -> None:
        chosen = self.queries.get(query.shape[2])
        if chosen is None:
            return
        self.tokens[layer] = query.shape[2]
        query, flags = choose_queries(query, flags, chosen)
        self._parts.setdefault(layer, {})[self._first_row] = attention_rows(query, key, flags, scale)


def choose_queries(
    query: Tensor, flags: tuple[Tensor, Tensor] | None, chosen: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The chosen queries (b, p) of (b, heads, n, d), and of their flags."""
    query = query.gather(2, chosen[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    if flags is not None:
        flags = flags[0].gather(1, chosen[..., None].expand(-1, -1, flags[0].shape[-1])), flags[1]
    return query, flags


def attention_rows(query: Tensor, key: Tensor, flags: tuple[Tensor, Tensor] | None, scale: float) -> Tensor:
    """Probabilities (b, heads, p, keys) of queries (b, heads, p, d) over keys (b, heads, keys, d), in float32.

    Args:
        flags: of queries (b, p, g) and keys (b, keys, g). A hidden pair gets exactly 0, where
            `models.attention.masking.masked_attention` gives it what single precision cannot tell from 0.
    """
    logits = (query.float() @ key.float().transpose(2, 3)).float() * scale
    if flags is not None:
        logits = logits.masked_fill(hidden_pairs(*flags)[:, None], float("-inf"))
    return torch.softmax(logits, dim=-1)
