"""The working part of recording attention: the arrays that are filled, and the probe that fills them.

Shapes use f = frames, p = recorded queries, q = some of them, n = query tokens of a layer, k = reference images that a
frame sees, r = tokens of one reference image.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.attention.layers import LayerShape
from models.attention.measures import token_indices
from models.attention.probe import attention_rows, choose_queries
from models.attention.record import array_file
from models.attention.run import Selection

# Numbers that are computed at a time, and how many tensors of that many numbers exist at once: product, scaled and
# masked logits, probabilities, copies for the result.
BLOCK = 2**21
COPIES = 4
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Estimate:
    """What a recording takes.

    Attributes:
        stored_bytes: of the maps, in memory or on disk.
        working_bytes: at most, while a layer is looked at, on the device.
        on_disk: where the maps are.
    """

    stored_bytes: int
    working_bytes: int
    on_disk: bool

    @property
    def memory_bytes(self) -> int:
        """Memory, of the device and beside it."""
        return self.working_bytes + (0 if self.on_disk else self.stored_bytes)

    @property
    def total_bytes(self) -> int:
        """Memory and disk, which `AttentionConfig.limit_bytes` limits."""
        return self.working_bytes + self.stored_bytes


class LayerStore:
    """The arrays of one layer while they are filled: sums of attention, and of the weights it came with."""

    def __init__(self, selection: Selection, layer: str, folder: Path | None):
        shape, (rows, columns) = selection.shape(layer), selection.layers[layer].map_grid
        self.mean_heads = "heads" in selection.mean
        heads = selection.heads[layer]
        # A slice copies nothing.
        self.heads = slice(None) if len(heads) == selection.layers[layer].heads else list(heads)
        self.maps = _zeros((*shape, selection.images, rows * columns), folder, array_file("maps", layer))
        self.own = _zeros(shape, folder, array_file("own", layer))
        self.weights = np.zeros((shape[0], shape[1], shape[3]), np.float32)

    def add(
        self, step: int, frame: int, queries: slice, own: np.ndarray, maps: np.ndarray, weights: np.ndarray
    ) -> None:
        """Add own (heads, q) and maps (heads, q, k, r) of some queries, with weights (q,)."""
        self.own[step, frame, :, queries] += own * weights
        # A pass may offer fewer images than the run: calibrated training does not calibrate every batch.
        self.maps[step, frame, :, queries, : maps.shape[2]] += maps * weights[:, None, None]
        self.weights[step, frame, queries] += weights

    def finish(self) -> None:
        """Turn sums into means; NaN where there was nothing."""
        for step, weights in enumerate(self.weights[:, :, None]):  # (frames, 1, queries)
            with np.errstate(invalid="ignore"):
                self.own[step] /= weights
                self.maps[step] /= weights[..., None, None]
        for array in (self.own, self.maps):
            if isinstance(array, np.memmap):
                array.flush()


class WindowProbe:
    """Looks at one pass over a window; a `models.attention.probe.Probe`.

    Args:
        step: place on the axis of steps.
        rows, frames: recorded rows of the window and what frames they are.
        points: (rows, p, 2) places in pixels; None: all query tokens.
        weights: (rows, p), or (rows, 1) for all query tokens.
    """

    def __init__(
        self,
        selection: Selection,
        stores: dict[str, LayerStore],
        step: int,
        rows: list[int],
        frames: list[int],
        points: Tensor | None,
        weights: np.ndarray,
    ):
        self.selection, self.stores = selection, stores
        self.step, self.rows, self.frames = step, rows, frames
        self.points, self.weights = None if points is None else points.nan_to_num(), weights
        self._done: set[str] = set()

    def clip(self, rows: slice) -> "WindowProbe":
        return self  # a window is one clip

    @torch.no_grad()
    def record(
        self, layer: str, query: Tensor, key: Tensor, flags: tuple[Tensor, Tensor] | None, scale: float
    ) -> None:
        # With gradient checkpointing a layer runs twice; means must not count it twice.
        if layer not in self.stores or layer in self._done:
            return
        self._done.add(layer)
        shape = self.selection.layers[layer]
        chosen = None if self.points is None else token_indices(self.points, self.selection.size[::-1], shape.grid)
        heads, queries = self.stores[layer].heads, self.selection.queries(layer)
        count = len(self.selection.heads[layer])
        at_once, part = block_sizes(shape, count, queries, key.shape[2], len(self.rows))
        for first in range(0, len(self.rows), at_once):
            block = slice(first, first + at_once)
            rows = torch.tensor(self.rows[block], device=query.device)
            block_query, block_key = query[rows][:, heads], key[rows][:, heads]
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
        """Hand probabilities (rows, heads, q, keys) to the layer's store."""
        store, shape = self.stores[layer], self.selection.layers[layer]
        layout, before = shape.layout, shape.tokens if shape.layout.own else 0
        if store.mean_heads:
            found = found.mean(dim=1, keepdim=True)
        own, images = found[..., :before].sum(-1), found[..., before:].unflatten(-1, (-1, layout.tokens))
        if layout.grid is None:
            images = images.sum(-1, keepdim=True)
        elif layout.whole:
            own = own + images[..., : layout.whole].sum((-2, -1))
            images = images[..., layout.whole :]
        own, maps = own.cpu().numpy(), images.cpu().numpy()
        for row, frame in enumerate(self.frames[block]):
            weights = self.weights[block][row]
            weights = np.broadcast_to(weights, own.shape[-1:]) if self.points is None else weights[queries]
            place = self.selection.place("frames", frame)
            store.add(self.step, place, queries, own[row], maps[row], weights)


def block_sizes(shape: LayerShape, heads: int, queries: int, keys: int, rows: int) -> tuple[int, int]:
    """Frames, and queries of a frame, that are looked at at a time."""
    per_row = keys * (heads * queries + shape.channels)
    at_once = min(rows, max(1, BLOCK // per_row))
    part = queries if per_row <= BLOCK else max(1, BLOCK // (keys * heads))
    return at_once, min(part, queries)


def estimate(selection: Selection, frames: int, on_disk: bool) -> Estimate:
    """What recording a selection takes in a run of so many frames."""
    stored, working = 0, 0
    for layer, shape in selection.layers.items():
        layout, heads, placed = shape.layout, selection.heads[layer], prod(shape.map_grid)
        rows, keys = prod(selection.shape(layer)), shape.tokens * layout.own + layout.tokens * selection.images
        steps, kept_frames, _, queries = selection.shape(layer)
        stored += FLOAT_BYTES * (rows * (selection.images * placed + 1) + steps * kept_frames * queries)
        at_once, part = block_sizes(shape, len(heads), queries, keys, min(frames, len(selection.frames)))
        numbers = at_once * keys * (len(heads) * part + shape.channels)
        working = max(working, FLOAT_BYTES * COPIES * numbers)
    return Estimate(stored, working, on_disk)


def _zeros(shape: tuple[int, ...], folder: Path | None, name: str) -> np.ndarray:
    if folder is None:
        return np.zeros(shape, np.float32)
    return np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.float32, shape=shape)
