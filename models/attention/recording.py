"""Recording of reference attention during a run of the pipeline or of a training module.

    with AttentionRecording(AttentionConfig(steps=[0, 10, 19], mean=["heads"]), points) as recording:
        frames = pipeline(image, poses, calibration, attention=recording).frames
    recorded = recording.result                                # a models.attention.maps.RecordedAttention

A probe travels to the layers among their arguments and computes a softmax of its own; the pass goes on as without it.

Shapes use f = frames, p = recorded queries, k = reference images that a frame attends to.
"""

import difflib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from core.files import complete_folder
from models.attention.layers import LayerShape
from models.attention.maps import AXES, LayerMaps, MapSelection, RecordedAttention, recording_folder
from models.attention.probe import COPIES, WindowProbe, block_sizes
from models.sampling import window_weights

WINDOWS = ("nearest", "mean")
FLOAT_BYTES = 4


@dataclass(frozen=True)
class AttentionConfig:
    """The part of a run to record; None: all of it."""

    layers: Sequence[str] | None = None  # names as the animator's `attention_layers` gives them
    steps: Sequence[int] | None = None  # denoising steps, 0 first
    frames: Sequence[int] | None = None  # of the clip
    heads: Sequence[int] | None = None  # of every layer
    mean: Sequence[str] = ()  # axes of which a running mean is kept instead of every value, any of `AXES`
    # The value of a frame that several context windows denoise: "nearest", of the window with the largest blending
    # weight, in whose middle the frame lies; or "mean", weighted as the windows' predictions are blended.
    windows: str = "nearest"
    folder: str | Path | None = None  # of memory-mapped .npy files, complete when the recording ends; None: memory
    limit_bytes: int | None = None  # a run whose estimate is above it is refused before it begins; None: no limit

    def check(self) -> None:
        """Refuse words that do not exist, naming them."""
        for name, value, known in [("windows", self.windows, WINDOWS)] + [("mean", axis, AXES) for axis in self.mean]:
            if value not in known:
                raise UserError(f"{name}={value} is not one of {', '.join(known)}")


@dataclass(frozen=True)
class AttentionRun:
    """The sizes of a run, known before it begins."""

    # In which frames attend to images, in the order in which they run; of a segment of latents, see `joint_layers`
    layers: dict[str, LayerShape]
    size: tuple[int, int]  # (width, height) of the images in pixels
    frames: int  # of the clip; of a training batch, the frames of all its clips
    steps: int
    images: int = 1  # k: the reference, and a calibrated image for every person
    replaced: bool = False  # calibrated images take the reference's place, so that there are only these


@dataclass(frozen=True)
class RecordingSize:
    """Bytes of a recording."""

    stored_bytes: int  # of the maps, in memory or on disk
    working_bytes: int  # at most, while a layer is recorded, on the device
    on_disk: bool  # where the maps are

    @property
    def memory_bytes(self) -> int:
        """Memory, of the device and beside it."""
        return self.working_bytes + (0 if self.on_disk else self.stored_bytes)

    @property
    def total_bytes(self) -> int:
        """Memory and disk, which `AttentionConfig.limit_bytes` limits."""
        return self.working_bytes + self.stored_bytes


def select(config: AttentionConfig, run: AttentionRun, points: int | None) -> MapSelection:
    """The part of a run that a configuration chooses; UserError for what the run does not have."""
    names = list(run.layers) if config.layers is None else list(config.layers)
    for name in names:
        if name not in run.layers:
            nearest = ", ".join(map(repr, difflib.get_close_matches(name, run.layers, n=3, cutoff=0.0)))
            raise UserError(f"layers: {name!r} does not read the reference; the nearest that do are {nearest}")
    if not names:
        raise UserError("layers=[] leaves nothing to record")
    steps, frames = _indices("steps", config.steps, run.steps), _indices("frames", config.frames, run.frames)
    layers = {name: shape for name, shape in run.layers.items() if name in names}
    heads = {name: _indices("heads", config.heads, shape.heads, f" of {name}") for name, shape in layers.items()}
    return MapSelection(layers, heads, steps, frames, points, run.images, run.size, tuple(config.mean), run.replaced)


def _indices(name: str, chosen: Sequence[int] | None, count: int, of: str = "") -> tuple[int, ...]:
    if chosen is None:
        return tuple(range(count))
    for index in chosen:
        if not 0 <= index < count:
            raise UserError(f"{name}: {index} is out of range; there are {name} 0 to {count - 1}{of}")
    if not chosen:
        raise UserError(f"{name}=[] leaves nothing to record")
    return tuple(sorted(set(chosen)))


class AttentionRecording:
    """Records one run, as a context manager. When the block raises, nothing is kept.

    The tokens that contain `points` (f, p, 2), coords (x, y) in pixels, are recorded; NaN: not visible in this frame;
    None: every query token. `names` are of the points.
    """

    def __init__(
        self,
        config: AttentionConfig | None = None,
        points: np.ndarray | Tensor | None = None,
        names: Sequence[str] | None = None,
    ):
        self.config = config or AttentionConfig()
        self.config.check()
        self.points = None if points is None else np.array(torch.as_tensor(points).cpu(), np.float32)
        if self.points is not None and (self.points.ndim != 3 or self.points.shape[2] != 2):
            raise ValueError(f"points must have shape (frames, points, 2), got {self.points.shape}")
        self.names = None if names is None else tuple(names)
        if self.names is not None and (self.points is None or len(self.names) != self.points.shape[1]):
            raise ValueError(f"names must be one for each point, got {len(self.names)}")
        self._stack: ExitStack | None = None
        self._folder: Path | None = None
        self._selection: MapSelection | None = None
        self._maps: dict[str, LayerMaps] = {}
        self._timesteps: dict[int, int] = {}
        self._result: RecordedAttention | None = None

    def __enter__(self) -> Self:
        if self._stack is not None or self._result is not None:
            raise ValueError("a recording is of one run; make another one")
        self._stack = ExitStack()
        if self.config.folder is not None:
            self._folder = self._stack.enter_context(complete_folder(recording_folder(self.config.folder)))
        return self

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        filled, self._maps = self._maps, {}
        stack, self._stack = self._stack, None
        if cls is not None:
            stack.__exit__(cls, error, trace)
            return
        with stack:
            if self._selection is None:
                raise ValueError("no run was recorded: hand the recording to one, attention=recording")
            for maps in filled.values():
                maps.finish()
            recorded = RecordedAttention(
                self._selection,
                tuple(self._timesteps.get(step, -1) for step in self._selection.steps),
                self.points,
                self.names,
                {layer: maps.maps for layer, maps in filled.items()},
                {layer: maps.own for layer, maps in filled.items()},
            )
            if self._folder is not None:
                recorded.write_facts(self._folder)
        self._result = recorded if self._folder is None else RecordedAttention.load(self.config.folder)

    @property
    def result(self) -> RecordedAttention:
        """The recorded attention, once the block has ended."""
        if self._result is None:
            raise ValueError("there is no result before the recording's block has ended, nor after it has failed")
        return self._result

    def estimate(self, run: AttentionRun) -> RecordingSize:
        """The bytes that recording a run would take; UserError where it lacks something that is to be recorded."""
        return recording_size(self._select(run), run.frames, self.config.folder is not None)

    def _select(self, run: AttentionRun) -> MapSelection:
        if self.points is not None and len(self.points) != run.frames:
            raise UserError(f"points are of {len(self.points)} frames, the run has {run.frames}")
        return select(self.config, run, None if self.points is None else self.points.shape[1])

    def begin(self, run: AttentionRun) -> None:
        """Make room for a run before its first pass; UserError where it lacks something or exceeds the limit."""
        if self._stack is None:
            raise ValueError("the recording is not open: use it inside `with AttentionRecording(...) as recording:`")
        if self._selection is not None:
            raise ValueError("a recording is of one run; make another one")
        selection, limit = self._select(run), self.config.limit_bytes
        needed = recording_size(selection, run.frames, self._folder is not None).total_bytes
        if limit is not None and needed > limit:
            raise UserError(
                f"recording attention would take {needed / 2**20:.1f} MiB, limit_bytes allows {limit / 2**20:.1f}; "
                f"record fewer layers, steps, frames or points, or their mean"
            )
        self._selection = selection
        self._maps = {layer: LayerMaps(selection, layer, self._folder) for layer in selection.layers}

    def probe(self, step: int, timestep: int, windows: Sequence[range], index: int) -> WindowProbe | None:
        """Probe of window `index` of the `windows` of a denoising step; None when nothing of it is recorded."""
        window = windows[index]
        return self.row_probe(step, timestep, window, range(len(window)), self._weights(windows)[index])

    def row_probe(
        self, step: int, timestep: int, frames: Sequence[int], rows: Sequence[int], weights: np.ndarray | None = None
    ) -> WindowProbe | None:
        """Probe of a pass that has frames of the clip in these rows; None when nothing of it is recorded.

        `weights` (frames,): the part of each frame's values that the pass gives; None: all.
        """
        selection = self._selection
        if step not in selection.steps:
            return None
        self._timesteps[step] = timestep
        weights = np.ones(len(frames), np.float32) if weights is None else weights
        kept = [i for i, frame in enumerate(frames) if frame in selection.frames and weights[i] > 0]
        if not kept:
            return None
        rows, frames = [rows[i] for i in kept], [frames[i] for i in kept]
        weights = weights[kept, None]  # (rows, 1)
        points = None
        if self.points is not None:
            points = torch.from_numpy(self.points[frames])
            weights = weights * ~np.isnan(self.points[frames]).any(-1)  # (rows, p)
        return WindowProbe(selection, self._maps, selection.position("steps", step), rows, frames, points, weights)

    def _weights(self, windows: Sequence[range]) -> list[np.ndarray]:
        """Kept part of every window's frames, (size,) each; sums to 1 over the windows of a frame."""
        total = max(window.stop for window in windows)
        blending = [weight.numpy() for weight in window_weights(list(windows), total)]
        if self.config.windows == "mean":
            return blending
        table = np.zeros((len(windows), total), np.float32)
        for row, window, weight in zip(table, windows, blending, strict=True):
            row[window.start : window.stop] = weight
        nearest = table.argmax(axis=0)
        return [
            (nearest[window.start : window.stop] == index).astype(np.float32) for index, window in enumerate(windows)
        ]


def recording_size(selection: MapSelection, frames: int, on_disk: bool) -> RecordingSize:
    """The bytes that recording a selection takes in a run of so many frames."""
    stored, working = 0, 0
    for layer, shape in selection.layers.items():
        heads, tokens = selection.heads[layer], prod(shape.map_grid)
        rows, keys = prod(selection.shape(layer)), selection.keys(layer)
        steps, kept_frames, _, queries = selection.shape(layer)
        stored += FLOAT_BYTES * (rows * (selection.images * tokens + 1) + steps * kept_frames * queries)
        at_once, part = block_sizes(shape, len(heads), queries, keys, min(frames, len(selection.frames)))
        numbers = at_once * keys * (len(heads) * part + shape.channels)
        if shape.layout.own > 1:  # queries and keys of the whole sequence are made, and chosen, beside the pass
            numbers += keys * shape.channels
        working = max(working, FLOAT_BYTES * COPIES * numbers)
    return RecordingSize(stored, working, on_disk)
