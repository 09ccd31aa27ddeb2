"""Tokens of frames and images: grids, what a layer attends to, and how much of a token a mask covers.

Shapes use n = query tokens of a layer, r = tokens of one image, h, w = a grid of tokens, H, W = image size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class KeyLayout:
    """The keys of a layer: [own n, if any | image 0 | image 1 | ...], each image [whole | h*w of the grid].

    Attributes:
        grid: (h, w) of an image's tokens that have a place in it; None: no token has.
        whole: tokens of the whole image, before the others.
        own: the frame's own tokens are among the keys, as in self-attention.
    """

    grid: tuple[int, int] | None
    whole: int = 0
    own: bool = False

    @property
    def tokens(self) -> int:
        """Tokens r of one image."""
        return self.whole + self.placed

    @property
    def placed(self) -> int:
        """Tokens of one image that have a place."""
        return 0 if self.grid is None else self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class TokenLevel:
    """Layers with the same numbers of tokens.

    Attributes:
        queries: (h, w) of the frame's tokens.
        keys: what they attend to.
    """

    queries: tuple[int, int]
    keys: KeyLayout

    @property
    def tokens(self) -> int:
        """Query tokens n."""
        return self.queries[0] * self.queries[1]


def self_attention_level(grid: tuple[int, int], reference: tuple[int, int] | None = None) -> TokenLevel:
    """The level of reference attention on a grid; reference: (h, w) of an image's tokens, None = the same."""
    return TokenLevel(tuple(grid), KeyLayout(tuple(reference or grid), own=True))


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
