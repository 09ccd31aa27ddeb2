"""Recorded maps of reference attention: filled during a run, read afterwards, in memory or in a folder of .npy files.

Shapes use s = steps, f = frames, p = recorded queries, q = some of them, k = reference images that a frame attends to,
h, w = a grid of tokens, r = h*w tokens of one image.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

from core.errors import UserError
from core.files import complete_folder, write_json
from models.attention.layers import KeyLayout, LayerShape

AXES = ("steps", "frames", "heads")
RECORD_FILE, POINTS_FILE = "record.json", "points.npy"


@dataclass(frozen=True)
class MapSelection:
    """The part of a run that is recorded."""

    layers: dict[str, LayerShape]
    heads: dict[str, tuple[int, ...]]  # of each layer
    steps: tuple[int, ...]  # ascending, as frames
    frames: tuple[int, ...]
    points: int | None  # p; None: all query tokens of each layer
    images: int  # k
    size: tuple[int, int]  # (width, height) of the images in pixels
    mean: tuple[str, ...] = ()  # those of `AXES` of which a running mean is kept
    replaced: bool = False  # all images are calibrated ones

    def queries(self, layer: str) -> int:
        """Number of recorded queries of a layer."""
        return self.layers[layer].tokens if self.points is None else self.points

    def keys(self, layer: str) -> int:
        """Number of keys of a layer, with all images."""
        shape = self.layers[layer]
        return shape.tokens * shape.layout.own + shape.layout.tokens * self.images

    def shape(self, layer: str) -> tuple[int, int, int, int]:
        """(s, f, heads, p) of the maps of a layer; 1 for axes with a running mean."""
        lengths = {"steps": len(self.steps), "frames": len(self.frames), "heads": len(self.heads[layer])}
        steps, frames, heads = (1 if axis in self.mean else lengths[axis] for axis in AXES)
        return steps, frames, heads, self.queries(layer)

    def position(self, axis: str, index: int) -> int:
        """Position of a recorded step or frame on its axis of the maps."""
        return 0 if axis in self.mean else getattr(self, axis).index(index)


@dataclass(frozen=True)
class QueryMap:
    """Attention of one query."""

    maps: np.ndarray  # (k, h, w), to the reference and every calibrated image
    own: float  # to the frame itself and to whole images; with the sum of `maps` it makes 1


@dataclass(frozen=True)
class RecordedAttention:
    """Attention of some queries in some layers, steps, frames and heads of one run."""

    selection: MapSelection
    timesteps: tuple[int, ...]  # of the recorded steps
    points: np.ndarray | None  # (all frames of the run, p, 2) pixels (x, y), NaN where not visible; None: all tokens
    names: tuple[str, ...] | None  # of the points
    # Layer -> (s, f, heads, p, k, r) float32, see `MapSelection.shape`; NaN where a point is not visible. Where the
    # images' tokens have no position r is 1, the attention to the image in all.
    maps: dict[str, np.ndarray]
    # Layer -> (s, f, heads, p), attention to the frame's own tokens, and to tokens of a whole image beside those that
    # have a position, such as CLIP's class token.
    own: dict[str, np.ndarray]

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.maps)

    @property
    def images(self) -> tuple[str, ...]:
        """Names of the k images."""
        persons = self.selection.images if self.selection.replaced else self.selection.images - 1
        calibrated = tuple(f"calibrated {person}" for person in range(persons))
        return calibrated if self.selection.replaced else ("reference", *calibrated)

    def grid(self, layer: str) -> tuple[int, int]:
        """(h, w) of a layer's maps."""
        return self.selection.layers[layer].map_grid

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for arrays in (self.maps, self.own) for array in arrays.values())

    def query_map(
        self,
        layer: str,
        point: int | str | tuple[float, float],
        step: int | None = None,
        frame: int | None = None,
        head: int | None = None,
    ) -> QueryMap:
        """Attention of one query; step, frame, head: None takes the mean of the recorded ones.

        `point` is an index or name, or (x, y) in pixels where all query tokens were recorded. UserError for what was
        not recorded, or a point that is not visible there.
        """
        if layer not in self.maps:
            raise UserError(f"layer={layer} was not recorded; there are {', '.join(self.maps)}")
        selection = self.selection
        known = {"steps": selection.steps, "frames": selection.frames, "heads": selection.heads[layer]}
        chosen = tuple(
            self._axis(axis, index, known[axis]) for axis, index in zip(AXES, (step, frame, head), strict=True)
        )
        query = self.query_index(layer, point)
        maps, own = self.maps[layer][chosen][..., query, :, :], self.own[layer][chosen][..., query]
        visible = ~np.isnan(own)
        if not visible.any():
            where = "in the recorded frames" if frame is None else f"in frame {frame}"
            raise UserError(f"point={point} is not visible {where}; choose another point or frame")
        return QueryMap(maps[visible].mean(axis=0).reshape(-1, *self.grid(layer)), float(own[visible].mean()))

    def query_index(self, layer: str, point: int | str | tuple[float, float]) -> int:
        """Index of a point on the axis of queries; see `query_map`."""
        if isinstance(point, str):
            if self.names is None or point not in self.names:
                raise UserError(
                    f"point={point} was not recorded; there are {', '.join(self.names or ['numbers only'])}"
                )
            return self.names.index(point)
        count = self.selection.queries(layer)
        if isinstance(point, (int, np.integer)):
            if not 0 <= point < count:
                raise UserError(f"point={point} is out of range; there are points 0 to {count - 1}")
            return int(point)
        width, height = self.selection.size
        x, y = point
        if self.selection.points is not None:
            raise UserError(f"point={point}: places need all query tokens recorded; give the number of a point")
        if not (-0.5 <= x < width - 0.5 and -0.5 <= y < height - 0.5):
            raise UserError(f"point=({x:g}, {y:g}) lies outside the image of {width}x{height} pixels")
        rows, columns = self.selection.layers[layer].grid
        return int((y + 0.5) * rows / height) * columns + int((x + 0.5) * columns / width)

    def _axis(self, axis: str, index: int | None, known: Sequence[int]) -> slice:
        if index is None:
            return slice(None)
        name = axis.removesuffix("s")
        if axis in self.selection.mean:
            raise UserError(f"{name}={index}: only the mean over {axis} was recorded")
        if index not in known:
            raise UserError(f"{name}={index} was not recorded; there are {', '.join(map(str, known))}")
        return slice(known.index(index), known.index(index) + 1)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` reads; an earlier recording in it is replaced, anything else is refused."""
        with complete_folder(recording_folder(folder)) as temporary:
            for layer in self.maps:
                np.save(temporary / array_file("maps", layer), self.maps[layer])
                np.save(temporary / array_file("own", layer), self.own[layer])
            self.write_facts(temporary)

    def write_facts(self, folder: Path) -> None:
        """Write everything but the maps."""
        if self.points is not None:
            np.save(folder / POINTS_FILE, self.points)
        facts = {"selection": asdict(self.selection), "timesteps": list(self.timesteps), "names": self.names}
        write_json(folder / RECORD_FILE, facts)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Open a recording, maps staying on disk until they are used; UserError when the folder does not hold one."""
        folder = Path(folder)
        try:
            facts = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
            selection = _selection(facts["selection"])
            maps, own = (
                {layer: np.load(folder / array_file(name, layer), mmap_mode="r") for layer in selection.layers}
                for name in ("maps", "own")
            )
            points = None if selection.points is None else np.load(folder / POINTS_FILE)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} does not hold recorded attention: {error}") from None
        names = None if facts["names"] is None else tuple(facts["names"])
        return cls(selection, tuple(facts["timesteps"]), points, names, maps, own)


class LayerMaps:
    """The arrays of one layer while they are filled, in memory or in files of `folder`: sums, and of the weights."""

    def __init__(self, selection: MapSelection, layer: str, folder: Path | None):
        shape, (rows, columns) = selection.shape(layer), selection.layers[layer].map_grid
        self.maps = _zeros((*shape, selection.images, rows * columns), folder, array_file("maps", layer))
        self.own = _zeros(shape, folder, array_file("own", layer))
        self.weights = np.zeros((shape[0], shape[1], shape[3]), np.float32)

    def add(
        self,
        step: int,
        frame: int,
        queries: slice,
        own: np.ndarray,
        maps: np.ndarray,
        weights: np.ndarray,
        images: Sequence[int] | None = None,
    ) -> None:
        """Add own (heads, q) and maps (heads, q, i, r) of some queries, with weights (q,).

        `images` (i,) are the maps' among the k of the run; None: the first ones.
        """
        # A pass may have fewer images than the run: calibrated training does not calibrate every batch.
        images = slice(maps.shape[2]) if images is None else list(images)
        self.own[step, frame, :, queries] += own * weights
        self.maps[step, frame][:, queries][:, :, images] += maps * weights[:, None, None]
        self.weights[step, frame, queries] += weights

    def finish(self) -> None:
        """Turn sums into means; NaN where there was nothing."""
        for step, weights in enumerate(self.weights[:, :, None]):  # (f, 1, p)
            with np.errstate(invalid="ignore"):
                self.own[step] /= weights
                self.maps[step] /= weights[..., None, None]
        for array in (self.own, self.maps):
            if isinstance(array, np.memmap):
                array.flush()


def array_file(name: str, layer: str) -> str:
    """File of the "maps" or of the "own" attention of a layer."""
    return f"{name}-{layer}.npy"


def recording_folder(folder: str | Path) -> Path:
    """The folder as a path; UserError when something else than a recording is there."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / RECORD_FILE).exists() or not any(folder.iterdir()))):
        raise UserError(f"folder={folder} exists and does not hold recorded attention; give a new folder")
    return folder


def _zeros(shape: tuple[int, ...], folder: Path | None, name: str) -> np.ndarray:
    if folder is None:
        return np.zeros(shape, np.float32)
    return np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.float32, shape=shape)


def _selection(facts: dict) -> MapSelection:
    """A selection out of JSON, where tuples are lists; `keys` and `replaced` are absent in early recordings."""
    layers = {}
    for name, shape in facts["layers"].items():
        keys = shape.get("keys")
        if keys is not None:
            keys = KeyLayout(keys["grid"] and tuple(keys["grid"]), keys["whole"], int(keys["own"]))
        layers[name] = LayerShape(tuple(shape["grid"]), shape["heads"], shape["channels"], keys)
    heads = {name: tuple(indices) for name, indices in facts["heads"].items()}
    rest = {name: tuple(facts[name]) for name in ("steps", "frames", "size", "mean")}
    rest |= {"points": facts["points"], "images": facts["images"], "replaced": facts.get("replaced", False)}
    return MapSelection(layers=layers, heads=heads, **rest)
