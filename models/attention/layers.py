"""Layers in which frames see reference images: where they are in a network, and what their tokens are.

Shapes use n = query tokens of a layer, r = tokens of one image, h, w = a grid of tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from models.attention.processors import image_layers, reference_layers
from models.attention.tokens import KeyLayout, TokenLevel

BLOCKS = ("down", "mid", "up")  # in the order in which they run


@dataclass(frozen=True)
class LayerShape:
    """A layer's token grid (h, w), heads, and channels of all heads together.

    Attributes:
        keys: what its queries attend to; None: reference attention, images on the layer's own grid.
    """

    grid: tuple[int, int]
    heads: int
    channels: int
    keys: KeyLayout | None = None

    @property
    def tokens(self) -> int:
        """Query tokens n."""
        return self.grid[0] * self.grid[1]

    @property
    def layout(self) -> KeyLayout:
        """`keys`, written out."""
        return KeyLayout(self.grid, own=True) if self.keys is None else self.keys

    @property
    def map_grid(self) -> tuple[int, int]:
        """(h, w) of a map of attention over one image; (1, 1) where tokens have no place and only their sum means
        something."""
        return self.layout.grid or (1, 1)


def unet_layers(
    unet: nn.Module, latent_size: tuple[int, int], layers: Iterable[str] | None = None
) -> dict[str, LayerShape]:
    """Layers of reference attention in a UNet, in the order in which they run.

    Args:
        latent_size: (h, w).
        layers: their names; None: all that can see images.
    """
    return layer_shapes(unet, latent_size, reference_layers(unet) if layers is None else layers, None)


def image_token_layers(
    network: nn.Module, latent_size: tuple[int, int], keys: KeyLayout, prefix: str = ""
) -> dict[str, LayerShape]:
    """Layers of cross-attention to image tokens in a UNet or ControlNet, in the order in which they run.

    Args:
        latent_size: (h, w).
        prefix: what `set_image_processors` put before their names.
    """
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
        attention = network.get_submodule(name)
        shapes[name] = LayerShape(_layer_grid(name, grids), attention.heads, attention.inner_dim, keys)
    return shapes


def stage_grids(network: nn.Module, height: int, width: int) -> list[tuple[int, int]]:
    """Token grids (h, w) of the downward stages of a UNet or ControlNet, then of its middle block."""
    grids = []
    for block in network.down_blocks:
        grids.append((height, width))
        if block.downsamplers is not None:
            height, width = -(-height // 2), -(-width // 2)
    return [*grids, (height, width)]


def token_levels(layers: dict[str, LayerShape]) -> list[TokenLevel]:
    """The different levels of some layers, finest first.

    Raises:
        ValueError: layers of as many query tokens that attend to different keys.
    """
    levels = {TokenLevel(shape.grid, shape.layout) for shape in layers.values()}
    if len({level.tokens for level in levels}) < len(levels):
        raise ValueError(f"layers with as many query tokens must have the same grids and keys, got {levels}")
    return sorted(levels, key=lambda level: -level.tokens)


def _layer_grid(layer: str, grids: list[tuple[int, int]]) -> tuple[int, int]:
    block, number = layer.split(".")[:2]
    if block == "mid_block":
        return grids[-1]
    # Upward blocks resize at their end: each works at the size of the downward block whose features it gets.
    return grids[int(number)] if block == "down_blocks" else grids[-2 - int(number)]
