"""Layers in which frames attend to reference images: their grids in a network, and their keys.

Shapes use n = query tokens of a layer, r = tokens of one image, h, w = a grid of tokens, H, W = image size.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.processors import image_layers, reference_layers

BLOCKS = ("down", "mid", "up")  # in the order in which they run


@dataclass(frozen=True)
class KeyLayout:
    """The keys of a layer: [own n, if any | image 0 | image 1 | ...], each image [whole | h*w of the grid]."""

    grid: tuple[int, int] | None  # (h, w) of an image's tokens that have a position in it; None: no token has
    whole: int = 0  # tokens of the whole image, such as CLIP's class token
    own: int = 0  # frames whose tokens are among the keys: 1, that which attends; more, all latents of a segment

    @property
    def tokens(self) -> int:
        """Tokens r of one image."""
        return self.whole + (0 if self.grid is None else math.prod(self.grid))


@dataclass(frozen=True)
class TokenLevel:
    """Layers with the same numbers of tokens."""

    queries: tuple[int, int]  # (h, w) of the frame's tokens
    keys: KeyLayout

    @property
    def tokens(self) -> int:
        """Query tokens n."""
        return math.prod(self.queries)


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer."""

    grid: tuple[int, int]  # (h, w)
    heads: int
    channels: int  # of all heads together
    keys: KeyLayout | None = None  # None: reference attention, images on the layer's own grid

    @property
    def tokens(self) -> int:
        """Query tokens n."""
        return math.prod(self.grid)

    @property
    def layout(self) -> KeyLayout:
        """`keys`, written out."""
        return KeyLayout(self.grid, own=1) if self.keys is None else self.keys

    @property
    def map_grid(self) -> tuple[int, int]:
        """(h, w) of a map of attention over one image; (1, 1) where no token has a position."""
        return self.layout.grid or (1, 1)


def self_attention_level(grid: tuple[int, int], image_grid: tuple[int, int] | None = None) -> TokenLevel:
    """The level of reference attention on a grid (h, w); image_grid: of an image's tokens, None = the same."""
    return TokenLevel(tuple(grid), KeyLayout(tuple(image_grid or grid), own=1))


def token_levels(layers: dict[str, LayerShape]) -> list[TokenLevel]:
    """Different levels of some layers, finest first; ValueError where equal query tokens attend to different keys."""
    levels = {TokenLevel(shape.grid, shape.layout) for shape in layers.values()}
    if len({level.tokens for level in levels}) < len(levels):
        raise ValueError(f"layers with as many query tokens must have the same grids and keys, got {levels}")
    return sorted(levels, key=lambda level: -level.tokens)


def unet_layers(
    unet: nn.Module, latent_size: tuple[int, int], layers: Iterable[str] | None = None
) -> dict[str, LayerShape]:
    """Layers of reference attention in a UNet, all or those named, in the order in which they run."""
    return layer_shapes(unet, latent_size, reference_layers(unet) if layers is None else layers, None)


def image_token_layers(
    network: nn.Module, latent_size: tuple[int, int], keys: KeyLayout, prefix: str = ""
) -> dict[str, LayerShape]:
    """Layers of cross-attention to image tokens, as they run; prefix: see `set_image_processors`."""
    names = [name.removeprefix(prefix) for name in image_layers(network)]
    found = layer_shapes(network, latent_size, names, keys)
    return {f"{prefix}{name}": shape for name, shape in found.items()}


def layer_shapes(
    network: nn.Module, latent_size: tuple[int, int], names: Iterable[str], keys: KeyLayout | None
) -> dict[str, LayerShape]:
    """Shapes of attention layers named by their modules, in the order in which they run."""
    grids = stage_grids(network, *latent_size)
    shapes = {}
    for name in sorted(names, key=lambda name: BLOCKS.index(name.split("_")[0])):
        block, index = name.split(".")[:2]
        if block == "mid_block":
            grid = grids[-1]
        else:
            # Upward blocks resize at their end: each works at the size of the downward block whose features it gets.
            grid = grids[int(index)] if block == "down_blocks" else grids[-2 - int(index)]
        attention = network.get_submodule(name)
        shapes[name] = LayerShape(grid, attention.heads, attention.inner_dim, keys)
    return shapes


def stage_grids(network: nn.Module, height: int, width: int) -> list[tuple[int, int]]:
    """Token grids (h, w) of the downward stages of a UNet or ControlNet, then of its middle block."""
    grids = []
    for block in network.down_blocks:
        grids.append((height, width))
        if block.downsamplers is not None:
            height, width = -(-height // 2), -(-width // 2)  # a stride-2 convolution with padding 1 rounds up
    return [*grids, (height, width)]


def joint_layers(layers: dict[str, LayerShape], latents: int) -> dict[str, LayerShape]:
    """The same layers where so many latents attend to each other, in place of each frame to itself."""
    joint = {name: replace(shape.layout, own=shape.layout.own * latents) for name, shape in layers.items()}
    return {name: replace(shape, keys=joint[name]) for name, shape in layers.items()}


def pool_masks(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Part of every token's pixels that a mask covers: (..., H, W) -> (..., h w) float in [0, 1]."""
    # A token is a block of whole pixels. When the grid was rounded up, the last blocks stick out of the frame; their
    # part is of what lies inside.
    (height, width), (rows, columns) = masks.shape[-2:], grid
    flat = masks.reshape(-1, 1, height, width).float()
    pitch = block_pitch(height, rows), block_pitch(width, columns)
    pad = (0, columns * pitch[1] - width, 0, rows * pitch[0] - height)
    if pitch[0] == 0 or pitch[1] == 0 or min(pad) < 0:
        pooled = F.adaptive_avg_pool2d(flat, grid)
    else:
        inside = F.pad(flat.new_ones(1, 1, height, width), pad)
        pooled = F.avg_pool2d(F.pad(flat, pad), pitch) / F.avg_pool2d(inside, pitch)
    return pooled.reshape(*masks.shape[:-2], rows * columns)


def block_pitch(pixels: int, tokens: int) -> int:
    """Pixels along a side of a token: the quotient, or the power of two behind a grid rounded up; 0 = neither."""
    if pixels % tokens == 0:
        return pixels // tokens
    pitch = 2 ** math.ceil(math.log2(pixels / tokens)) if tokens <= pixels else 0
    return pitch if pitch and -(-pixels // pitch) == tokens else 0
