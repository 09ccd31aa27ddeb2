"""What a recording of reference attention covers: the run it is of, and what is chosen of it.

Shapes use f = frames, p = recorded queries, n = query tokens of a layer, k = reference images that a frame sees.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from core.errors import UserError
from models.reference_attention import reference_layers

AXES = ("steps", "frames", "heads")
WINDOWS = ("nearest", "mean")
BLOCKS = ("down", "mid", "up")  # in the order in which they run


@dataclass(frozen=True)
class AttentionConfig:
    """What is recorded.

    Attributes:
        layers: names as in `models.reference_attention.reference_layers`; None: all that read the reference.
        steps: denoising steps, 0 first; None: all.
        frames: of the clip; None: all.
        heads: of every layer; None: all.
        mean: axes of which a running mean is kept instead of every value, any of `AXES`.
        windows: which value is kept of a frame that several context windows denoise: "nearest", that of the window
            with the largest blending weight, in whose middle the frame lies; or "mean", weighted as the windows'
            predictions are blended.
        folder: where maps go as memory-mapped .npy files, complete when the recording ends; None: memory.
        limit_bytes: a run whose estimate is above it is refused before it begins; None: no limit.
    """

    layers: Sequence[str] | None = None
    steps: Sequence[int] | None = None
    frames: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    mean: Sequence[str] = ()
    windows: str = "nearest"
    folder: str | Path | None = None
    limit_bytes: int | None = None

    def check(self) -> None:
        """Refuse words that mean nothing, naming them."""
        for name, value, known in [("windows", self.windows, WINDOWS)] + [("mean", axis, AXES) for axis in self.mean]:
            if value not in known:
                raise UserError(f"{name}={value} is not one of {', '.join(known)}")


@dataclass(frozen=True)
class LayerShape:
    """A layer's token grid (h, w), heads, and channels of all heads together."""

    grid: tuple[int, int]
    heads: int
    channels: int

    @property
    def tokens(self) -> int:
        """Query tokens n, and tokens of one reference image."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class AttentionRun:
    """What a run is going to be, known before it begins.

    Attributes:
        layers: those in which frames see the reference, in the order in which they run.
        size: (width, height) of the pictures in pixels.
        frames, steps: of the run.
        images: reference images that a frame sees: the reference, and a calibrated image for every person.
    """

    layers: dict[str, LayerShape]
    size: tuple[int, int]
    frames: int
    steps: int
    images: int = 1


def attention_run(
    unet: nn.Module,
    latent_size: tuple[int, int],
    size: tuple[int, int],
    frames: int,
    steps: int,
    images: int = 1,
    layers: Iterable[str] | None = None,
) -> AttentionRun:
    """The run of a denoising UNet.

    Args:
        latent_size: (h, w); size: (width, height) of the pictures in pixels.
        frames: of the clip; of a training batch, the frames of all its clips.
        layers: those in which frames see the reference; None: all that can.
    """
    grids = unet.stage_grids(*latent_size)
    shapes = {}
    names = reference_layers(unet) if layers is None else layers
    for name in sorted(names, key=lambda name: BLOCKS.index(name.split("_")[0])):
        attention = unet.get_submodule(name)
        shapes[name] = LayerShape(_layer_grid(name, grids), attention.heads, attention.inner_dim)
    return AttentionRun(shapes, size, frames, steps, images)


def _layer_grid(layer: str, grids: list[tuple[int, int]]) -> tuple[int, int]:
    block, number = layer.split(".")[:2]
    if block == "mid_block":
        return grids[-1]
    # Upward blocks resize at their end: each works at the size of the downward block whose features it gets.
    return grids[int(number)] if block == "down_blocks" else grids[-2 - int(number)]


@dataclass(frozen=True)
class Selection:
    """What is recorded of a run.

    Attributes:
        layers: recorded ones.
        heads: layer -> recorded heads.
        steps, frames: recorded ones, ascending.
        points: number of points p; None: all query tokens of each layer.
        images: k.
        size: (width, height) of the pictures in pixels.
        mean: axes with a running mean.
    """

    layers: dict[str, LayerShape]
    heads: dict[str, tuple[int, ...]]
    steps: tuple[int, ...]
    frames: tuple[int, ...]
    points: int | None
    images: int
    size: tuple[int, int]
    mean: tuple[str, ...] = ()

    def queries(self, layer: str) -> int:
        """Recorded queries of a layer."""
        return self.layers[layer].tokens if self.points is None else self.points

    def shape(self, layer: str) -> tuple[int, int, int, int]:
        """(steps, frames, heads, queries) of what is kept of a layer; 1 for axes with a running mean."""
        lengths = {"steps": len(self.steps), "frames": len(self.frames), "heads": len(self.heads[layer])}
        steps, frames, heads = (1 if axis in self.mean else lengths[axis] for axis in AXES)
        return steps, frames, heads, self.queries(layer)

    def place(self, axis: str, number: int) -> int:
        """Where a recorded step or frame lies on its axis."""
        return 0 if axis in self.mean else getattr(self, axis).index(number)


def select(config: AttentionConfig, run: AttentionRun, points: int | None) -> Selection:
    """What a configuration chooses of a run.

    Raises:
        UserError: a layer, step, frame or head that the run does not have.
    """
    names = list(run.layers) if config.layers is None else list(config.layers)
    for name in names:
        if name not in run.layers:
            nearest = difflib.get_close_matches(name, run.layers, n=3, cutoff=0.0)
            raise UserError(
                f"layers: {name!r} does not read the reference; the nearest that do are {_listed(nearest)}"
            )
    if not names:
        raise UserError("layers=[] leaves nothing to record")
    steps = _numbers("steps", config.steps, run.steps)
    frames = _numbers("frames", config.frames, run.frames)
    layers = {name: shape for name, shape in run.layers.items() if name in names}
    heads = {name: _numbers("heads", config.heads, shape.heads, f" of {name}") for name, shape in layers.items()}
    return Selection(layers, heads, steps, frames, points, run.images, run.size, tuple(config.mean))


def _numbers(what: str, chosen: Sequence[int] | None, count: int, of: str = "") -> tuple[int, ...]:
    if chosen is None:
        return tuple(range(count))
    for number in chosen:
        if not 0 <= number < count:
            raise UserError(f"{what}: {number} is out of range; there are {what} 0 to {count - 1}{of}")
    if not chosen:
        raise UserError(f"{what}=[] leaves nothing to record")
    return tuple(sorted(set(chosen)))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
