"""Recorded reference attention: what it is, kept in memory or in a folder of .npy files.

Shapes use s = steps, f = frames, p = recorded queries, k = reference images that a frame sees, h, w = a layer's grid,
r = h*w tokens of one image.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.files import complete_folder, write_json
from models.attention.layers import KeyLayout, LayerShape
from models.attention.run import Selection

RECORD_FILE, POINTS_FILE = "record.json", "points.npy"


@dataclass(frozen=True)
class QueryMap:
    """Where one query looks.

    Attributes:
        maps: (k, h, w) attention over the reference and every calibrated image.
        own: attention to the frame itself and to whole images; with the sum of `maps` it makes 1.
    """

    maps: np.ndarray
    own: float


@dataclass(frozen=True)
class RecordedAttention:
    """Attention of some queries in some layers, steps, frames and heads of one run.

    Attributes:
        selection: what was recorded.
        timesteps: of the recorded steps.
        points: (all frames of the run, p, 2) places in pixels, (x, y), NaN where not visible; None: all query tokens.
        names: of the points; None: they have none.
        maps: layer -> (s, f, heads, p, k, r) float32, see `Selection.shape`; NaN where a point is not visible. Where
            the images' tokens have no place, r is 1: what an image gets in all.
        own: layer -> (s, f, heads, p), what the frame's own tokens get, and tokens of a whole image beside those that
            have a place, such as CLIP's class token.
    """

    selection: Selection
    timesteps: tuple[int, ...]
    points: np.ndarray | None
    names: tuple[str, ...] | None
    maps: dict[str, np.ndarray]
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
        """Of all arrays."""
        return sum(array.nbytes for arrays in (self.maps, self.own) for array in arrays.values())

    def query_map(
        self,
        layer: str,
        point: int | str | tuple[float, float],
        step: int | None = None,
        frame: int | None = None,
        head: int | None = None,
    ) -> QueryMap:
        """Where one query looks.

        Args:
            point: number or name of a recorded point; with all query tokens recorded, a place (x, y) in pixels.
            step, frame, head: None takes the mean of the recorded ones.

        Raises:
            UserError: something that was not recorded, or a point that is not visible there.
        """
        if layer not in self.maps:
            raise UserError(f"layer={layer} was not recorded; there are {', '.join(self.maps)}")
        selection = self.selection
        chosen = tuple(
            self._axis(name, number, known)
            for name, number, known in (
                ("steps", step, selection.steps),
                ("frames", frame, selection.frames),
                ("heads", head, selection.heads[layer]),
            )
        )
        number = self.query_number(layer, point)
        rows, own = (
            array[chosen][..., number, :, :] for array in (self.maps[layer], self.own[layer][..., None, None])
        )
        known = ~np.isnan(own[..., 0, 0])
        if not known.any():
            where = "in the recorded frames" if frame is None else f"in frame {frame}"
            raise UserError(f"point={point} is not visible {where}; choose another point or frame")
        return QueryMap(rows[known].mean(axis=0).reshape(-1, *self.grid(layer)), float(own[known].mean()))

    def query_number(self, layer: str, point: int | str | tuple[float, float]) -> int:
        """The place of a point on the axis of queries; see `query_map`."""
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

    def _axis(self, axis: str, number: int | None, known: Sequence[int]) -> slice:
        if number is None:
            return slice(None)
        what = axis.removesuffix("s")
        if axis in self.selection.mean:
            raise UserError(f"{what}={number}: only the mean over {axis} was recorded")
        if number not in known:
            raise UserError(f"{what}={number} was not recorded; there are {', '.join(map(str, known))}")
        return slice(known.index(number), known.index(number) + 1)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` reads; an earlier recording in it is replaced, anything else is refused."""
        folder = recording_folder(folder)
        with complete_folder(folder) as temporary:
            for layer in self.maps:
                for kind, arrays in (("maps", self.maps), ("own", self.own)):
                    np.save(temporary / array_file(kind, layer), arrays[layer])
            self.write_facts(temporary)

    def write_facts(self, folder: Path) -> None:
        """Write everything but the maps."""
        if self.points is not None:
            np.save(folder / POINTS_FILE, self.points)
        facts = {"selection": asdict(self.selection), "timesteps": list(self.timesteps), "names": self.names}
        write_json(folder / RECORD_FILE, facts)

    @classmethod
    def load(cls, folder: str | Path) -> "RecordedAttention":
        """Open a recording; maps stay on disk until they are used.

        Raises:
            UserError: the folder does not hold one.
        """
        folder = Path(folder)
        try:
            facts = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
            selection = _selection(facts["selection"])
            arrays = [
                {layer: np.load(folder / array_file(kind, layer), mmap_mode="r") for layer in selection.layers}
                for kind in ("maps", "own")
            ]
            points = None if selection.points is None else np.load(folder / POINTS_FILE)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} does not hold recorded attention: {error}") from None
        names = None if facts["names"] is None else tuple(facts["names"])
        return cls(selection, tuple(facts["timesteps"]), points, names, *arrays)


def array_file(kind: str, layer: str) -> str:
    """File name of the "maps" or "own" shares of a layer."""
    return f"{kind}-{layer}.npy"


def recording_folder(folder: str | Path) -> Path:
    """The folder as a path, or a UserError when something else than a recording is there."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / RECORD_FILE).exists() or not any(folder.iterdir()))):
        raise UserError(f"folder={folder} exists and does not hold recorded attention; give a new folder")
    return folder


def _selection(facts: dict) -> Selection:
    layers = {name: _layer_shape(shape) for name, shape in facts["layers"].items()}
    heads = {name: tuple(numbers) for name, numbers in facts["heads"].items()}
    rest = {name: tuple(facts[name]) for name in ("steps", "frames", "size", "mean")}
    rest |= {"points": facts["points"], "images": facts["images"], "replaced": facts.get("replaced", False)}
    return Selection(layers=layers, heads=heads, **rest)


def _layer_shape(facts: dict) -> LayerShape:
    keys = facts.get("keys")
    if keys is not None:
        keys = KeyLayout(keys["grid"] and tuple(keys["grid"]), keys["whole"], keys["own"])
    return LayerShape(tuple(facts["grid"]), facts["heads"], facts["channels"], keys)
