"""What a recording of reference attention covers: the run it is of, and what is chosen of it.

Shapes use f = frames, p = recorded queries, n = query tokens of a layer, k = reference images that a frame sees.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from core.errors import UserError
from models.attention.layers import LayerShape, unet_layers

AXES = ("steps", "frames", "heads")
WINDOWS = ("nearest", "mean")


@dataclass(frozen=True)
class AttentionConfig:
    """What is recorded.

    Attributes:
        layers: names as in `models.attention.processors.reference_layers`; None: all that read the reference.
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
class AttentionRun:
    """What a run is going to be, known before it begins.

    Attributes:
        layers: those in which frames see the reference, in the order in which they run.
        size: (width, height) of the images in pixels.
        frames, steps: of the run.
        images: reference images that a frame sees: the reference, and a calibrated image for every person.
        replaced: calibrated images take the reference's place, so that there are only these.
    """

    layers: dict[str, LayerShape]
    size: tuple[int, int]
    frames: int
    steps: int
    images: int = 1
    replaced: bool = False


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
        latent_size: (h, w); size: (width, height) of the images in pixels.
        frames: of the clip; of a training batch, the frames of all its clips.
        layers: those in which frames see the reference; None: all that can.
    """
    return AttentionRun(unet_layers(unet, latent_size, layers), size, frames, steps, images)


@dataclass(frozen=True)
class Selection:
    """What is recorded of a run.

    Attributes:
        layers: recorded ones.
        heads: layer -> recorded heads.
        steps, frames: recorded ones, ascending.
        points: number of points p; None: all query tokens of each layer.
        images: k; replaced: whether the first of them is a calibrated one, too.
        size: (width, height) of the images in pixels.
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
    replaced: bool = False

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
    return Selection(layers, heads, steps, frames, points, run.images, run.size, tuple(config.mean), run.replaced)


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
