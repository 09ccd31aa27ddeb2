"""Merging of reference tokens (after Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", 2023).

The tokens of reference and calibrated images are averaged over blocks of k x k in the layers with the finest grids,
where most of the keys are. Queries and a frame's own keys stay as they are, so nothing is unmerged. Keys and values
are linear in the tokens: the average of tokens has the average key and the average value. A merged key counts as often
as tokens are in it (proportional attention: the logarithm of their number is added to its logits), so merging equal
tokens changes nothing.

A merged token is a token of a coarser grid, and that is how flags see it: masks are pooled to the merged grid by the
rule that holds for the coarser levels of the network, a token belongs to a person when any of its pixels does.

Shapes use i = images, r = merged tokens of one image, h, w = a grid of tokens, c = channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.layers import LayerShape
from models.attention.tokens import KeyLayout

# Sides of a block. Powers of two end at the borders of whole pixels on every grid that was rounded up.
FACTORS = (2, 4)


@dataclass(frozen=True)
class TokenMerging:
    """Which tokens are merged.

    Attributes:
        factor: side of a block of tokens, one of `FACTORS`.
        levels: how many of the finest grids are merged.
    """

    factor: int
    levels: int = 1

    def merged_grids(self, layers: Mapping[str, LayerShape]) -> dict[str, tuple[int, int]]:
        """The layers whose images are merged, with the grids (h, w) of the tokens before."""
        finest = sorted({shape.grid for shape in layers.values()}, key=lambda grid: -grid[0] * grid[1])[: self.levels]
        return {layer: shape.grid for layer, shape in layers.items() if shape.grid in finest}

    def layers(self, layers: Mapping[str, LayerShape]) -> dict[str, LayerShape]:
        """The layers with the keys that they have after merging."""
        merged = self.merged_grids(layers)
        return {
            layer: replace(shape, keys=KeyLayout(self.grid(shape.grid), own=True)) if layer in merged else shape
            for layer, shape in layers.items()
        }

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the merged tokens; the last blocks may be smaller."""
        return -(-grid[0] // self.factor), -(-grid[1] // self.factor)

    def tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (i, h*w, c) averaged over blocks, (i, r, c)."""
        images = tokens.transpose(1, 2).unflatten(2, grid)  # (i, c, h, w)
        # Blocks that stick out of the grid are averaged over what lies inside.
        return F.avg_pool2d(images, self.factor, ceil_mode=True).flatten(2).transpose(1, 2)

    def log_counts(self, grid: tuple[int, int]) -> Tensor:
        """Logarithm of the tokens in each merged token, (r,) float32."""
        rows, columns = (
            torch.tensor([min(self.factor, side - start) for start in range(0, side, self.factor)]) for side in grid
        )
        return (rows[:, None] * columns).flatten().float().log()
