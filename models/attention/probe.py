"""Probes: attention of chosen query tokens as a by-product of a forward pass, for losses or for recordings.

Shapes use b = batch, f = frames, n = query tokens of a layer, p = probed queries, q = some of them, k = reference
images that a frame attends to, r = tokens of one image, g = flag channels, d = channels of a head.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from models.attention.layers import LayerShape
from models.attention.maps import LayerMaps, MapSelection
from models.attention.masking import hidden_pairs
from models.attention.measures import token_indices

# Numbers that are computed at a time, and how many tensors of that many numbers exist at once: product, scaled and
# masked logits, probabilities, copies for the result.
BLOCK = 2**21
COPIES = 4


class AttentionProbe:
    """Attention of some queries of some layers, with gradients; a `models.attention.context.Probe`."""

    def __init__(self, queries: Mapping[int, Tensor]):
        # Number of query tokens n of a layer -> the probed ones, (b*f, p) long; other layers are left alone.
        self.queries = dict(queries)
        self.tokens: dict[str, int] = {}  # layer -> n
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


@dataclass(eq=False)
class WindowProbe:
    """Records one pass over a window; a `models.attention.context.Probe`."""

    selection: MapSelection
    maps: dict[str, LayerMaps]
    step: int  # position on the axis of steps
    rows: list[int]  # recorded rows of the pass; one comes again where it has several frames, as a latent of video
    frames: list[int]  # of the clip, one for each of the rows
    points: Tensor | None  # (rows, p, 2) pixels (x, y); None: all query tokens
    weights: np.ndarray  # (rows, p), or (rows, 1) for all query tokens
    images: tuple[int, ...] | None = None  # those of the run that are among the keys; None: the first ones

    def __post_init__(self) -> None:
        self._done: set[str] = set()

    def clip(self, rows: slice) -> Self:
        return self  # a window is one clip

    def of_rows(self, rows: Sequence[int], images: Sequence[int]) -> Self | None:
        """The probe of a part of the pass, these rows with keys of these images; None where none is recorded."""
        kept = [i for i, row in enumerate(self.rows) if row in rows]
        if not kept:
            return None
        return replace(
            self,
            rows=[rows.index(self.rows[i]) for i in kept],
            frames=[self.frames[i] for i in kept],
            points=None if self.points is None else self.points[kept],
            weights=self.weights[kept],
            images=tuple(images),
        )

    @torch.no_grad()
    def record(
        self, layer: str, query: Tensor, key: Tensor, flags: tuple[Tensor, Tensor] | None, scale: float
    ) -> None:
        # With gradient checkpointing a layer runs twice; means must not count it twice.
        if layer not in self.maps or layer in self._done:
            return
        self._done.add(layer)
        shape, heads = self.selection.layers[layer], self.selection.heads[layer]
        queries = self.selection.queries(layer)
        picked = slice(None) if len(heads) == shape.heads else list(heads)  # a slice copies nothing
        chosen = None
        if self.points is not None:
            chosen = token_indices(self.points.nan_to_num(), self.selection.size[::-1], shape.grid)
        at_once, part = block_sizes(shape, len(heads), queries, self.selection.keys(layer), len(self.rows))
        for first in range(0, len(self.rows), at_once):
            block = slice(first, first + at_once)
            rows = torch.tensor(self.rows[block], device=query.device)
            # In single precision once for all parts.
            block_query, block_key = query[rows][:, picked], key[rows][:, picked].float()
            block_flags = None if flags is None else (flags[0][rows], flags[1][rows])
            if chosen is not None:
                block_query, block_flags = choose_queries(block_query, block_flags, chosen[block].to(query.device))
            for start in range(0, queries, part):
                some = slice(start, min(start + part, queries))
                some_flags = None if flags is None else (block_flags[0][:, some], block_flags[1])
                # Mixed precision would round the products.
                with torch.autocast(query.device.type, enabled=False):
                    found = attention_rows(block_query[:, :, some], block_key, some_flags, scale)
                self._add(layer, block, some, found)

    def _add(self, layer: str, block: slice, queries: slice, found: Tensor) -> None:
        """Add probabilities (rows, heads, q, keys) to the layer's maps."""
        shape, layout = self.selection.layers[layer], self.selection.layers[layer].layout
        if "heads" in self.selection.mean:
            found = found.mean(dim=1, keepdim=True)
        before = shape.tokens * layout.own
        own, images = found[..., :before].sum(-1), found[..., before:].unflatten(-1, (-1, layout.tokens))
        if layout.grid is None:
            images = images.sum(-1, keepdim=True)
        elif layout.whole:
            own = own + images[..., : layout.whole].sum((-2, -1))
            images = images[..., layout.whole :]
        own, images = own.cpu().numpy(), images.cpu().numpy()  # (rows, heads, q), (rows, heads, q, k, r)
        for row, frame in enumerate(self.frames[block]):
            weights = self.weights[block][row]
            weights = np.broadcast_to(weights, own.shape[-1:]) if self.points is None else weights[queries]
            position = self.selection.position("frames", frame)
            self.maps[layer].add(self.step, position, queries, own[row], images[row], weights, self.images)


def block_sizes(shape: LayerShape, heads: int, queries: int, keys: int, rows: int) -> tuple[int, int]:
    """Frames, and queries of a frame, that are recorded at a time."""
    per_row = keys * (heads * queries + shape.channels)
    at_once = min(rows, max(1, BLOCK // per_row))
    part = queries if per_row <= BLOCK else max(1, BLOCK // (keys * heads))
    return at_once, min(part, queries)


def choose_queries(
    query: Tensor, flags: tuple[Tensor, Tensor] | None, chosen: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The chosen queries (b, p) of (b, heads, n, d), and of their flags."""
    query = query.gather(2, chosen[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    if flags is not None:
        flags = flags[0].gather(1, chosen[..., None].expand(-1, -1, flags[0].shape[-1])), flags[1]
    return query, flags


def attention_rows(query: Tensor, key: Tensor, flags: tuple[Tensor, Tensor] | None, scale: float) -> Tensor:
    """Probabilities (b, heads, p, keys) of queries (b, heads, p, d) over keys (b, heads, keys, d), in float32."""
    # Hidden pairs get exactly 0, where `masked_attention` gives them what single precision cannot tell from 0.
    logits = (query.float() @ key.float().transpose(2, 3)).float() * scale
    if flags is not None:
        logits = logits.masked_fill(hidden_pairs(*flags)[:, None], float("-inf"))
    return torch.softmax(logits, dim=-1)
