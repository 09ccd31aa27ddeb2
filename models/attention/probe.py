"""Attention of chosen query tokens, as a differentiable by-product of a forward pass.

Shapes use b = batch, f = frames, n = query tokens of a layer, p = probed queries, k = reference images that a frame
sees, r = tokens of one reference image, g = flag channels, d = channels of a head.
"""

from collections.abc import Mapping
from copy import copy
from typing import Protocol, Self

import torch
from torch import Tensor


class Probe(Protocol):
    """Who looks at the attention of layers that read the reference, handed to a UNet inside `ReferenceContext`.

    A probe looks beside the computation: the result of the pass does not depend on it.
    """

    def look(self, layer: str, query: Tensor, key: Tensor, flags: tuple[Tensor, Tensor] | None, scale: float) -> None:
        """Note the attention of one layer.

        Args:
            query: (b*f, heads, n, d).
            key: (b*f, heads, n + k*r, d), of [own tokens | image 0 | ... | image k-1].
            flags: of queries (b*f, n, g) and keys (b*f, n + k*r, g), see `tpc.attention`; None: all is visible.
            scale: factor of the logits.
        """

    def clip(self, rows: slice) -> Self:
        """Who looks at these frames of the batch, where the clips of a batch pass a network one after another."""


class AttentionProbe:
    """What some queries of some layers attend to, with gradients; see `Probe`.

    Args:
        queries: number of query tokens n of a layer -> the probed ones, (b*f, p) long; levels that are not named are
            left alone.

    Attributes:
        tokens: layer -> n.
    """

    def __init__(self, queries: Mapping[int, Tensor]):
        self.queries = dict(queries)
        self.tokens: dict[str, int] = {}
        self._first = 0  # of the frames it looks at
        self._parts: dict[str, dict[int, Tensor]] = {}

    @property
    def maps(self) -> dict[str, Tensor]:
        """Layer -> probabilities (b*f, heads, p, n + k*r) over [own tokens | image 0 | ... | image k-1], float32."""
        return {layer: torch.cat([parts[first] for first in sorted(parts)]) for layer, parts in self._parts.items()}

    def clip(self, rows: slice) -> Self:
        part = copy(self)  # both note in the same places
        part.queries = {tokens: chosen[rows] for tokens, chosen in self.queries.items()}
        part._first = rows.start
        return part

    def look(self, layer: str, query: Tensor, key: Tensor, flags: tuple[Tensor, Tensor] | None, scale: float) -> None:
        chosen = self.queries.get(query.shape[2])
        if chosen is None:
            return
        self.tokens[layer] = query.shape[2]
        query, flags = choose_queries(query, flags, chosen)
        self._parts.setdefault(layer, {})[self._first] = attention_rows(query, key, flags, scale)


def choose_queries(
    query: Tensor, flags: tuple[Tensor, Tensor] | None, chosen: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Only the chosen queries (b, p) of (b, heads, n, d), and of their flags."""
    query = query.gather(2, chosen[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    if flags is not None:
        flags = flags[0].gather(1, chosen[..., None].expand(-1, -1, flags[0].shape[-1])), flags[1]
    return query, flags


def attention_rows(query: Tensor, key: Tensor, flags: tuple[Tensor, Tensor] | None, scale: float) -> Tensor:
    """Probabilities (b, heads, p, keys) of queries (b, heads, p, d) over keys (b, heads, keys, d), in float32.

    Args:
        flags: of queries (b, p, g) and keys (b, keys, g). A pair that shares one gets exactly 0, where
            `tpc.attach.masked_attention` gives it what single precision cannot tell from 0.
    """
    logits = (query.float() @ key.float().transpose(2, 3)).float() * scale
    if flags is not None:
        hidden = flags[0].float() @ flags[1].float().transpose(1, 2) > 0  # (b, p, keys)
        logits = logits.masked_fill(hidden[:, None], float("-inf"))
    return torch.softmax(logits, dim=-1)
