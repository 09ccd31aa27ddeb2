"""Attention of chosen query tokens, as a differentiable by-product of a forward pass.

Shapes use b = batch, f = frames, n = query tokens of a layer, p = probed queries, k = reference images that a frame
sees, r = tokens of one reference image, g = flag channels, d = channels of a head.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tpc.attention import append_flags


class AttentionProbe:
    """What some queries of some layers attend to.

    Handed to a UNet inside `ReferenceContext`; the layers that read the reference fill `maps`. The result of the pass
    does not change.

    Args:
        queries: number of query tokens n of a layer -> the probed ones, (b*f, p) long; levels that are not named are
            left alone.

    Attributes:
        tokens: layer -> n.
        maps: layer -> probabilities (b*f, heads, p, n + k*r) over [own tokens | image 0 | ... | image k-1], float32.
    """

    def __init__(self, queries: Mapping[int, Tensor]):
        self.queries = dict(queries)
        self.tokens: dict[str, int] = {}
        self.maps: dict[str, Tensor] = {}

    def look(
        self,
        layer: str,
        query: Tensor,
        key: Tensor,
        flags: tuple[Tensor, Tensor] | None,
        scale: float,
    ) -> None:
        """Note the attention of one layer.

        Args:
            query: (b*f, heads, n, d).
            key: (b*f, heads, n + k*r, d).
            flags: of queries (b*f, n, g) and keys (b*f, n + k*r, g), see `tpc.attention`; None: all is visible.
        """
        chosen = self.queries.get(query.shape[2])
        if chosen is None:
            return
        self.tokens[layer] = query.shape[2]
        query = query.gather(2, chosen[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        if flags is not None:
            own = flags[0].gather(1, chosen[..., None].expand(-1, -1, flags[0].shape[-1]))
            query, key = append_flags(query, key, own, flags[1], scale)
        self.maps[layer] = torch.softmax((query @ key.transpose(2, 3)).float() * scale, dim=-1)
