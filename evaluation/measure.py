"""Measure one clip: values of every frame, and feature vectors, written as they come so that memory stays small."""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.files import write_json
from evaluation.metric_suite import MetricSuite
from metrics.features import FeatureExtractor, image_tensor
from metrics.image import flicker
from metrics.protocols import pixel_measure
from metrics.video import WindowBuffer

VALUES_FILE = "values.json"
SIDES = ("generated", "truth")
OUTSIDE = 128  # grey level that measures which are not taken pixel by pixel see outside their region


@dataclass(frozen=True)
class FramePair:
    """One frame in the protocol's form.

    Attributes:
        generated, truth: (h, w, 3) uint8.
        mask: (h, w) bool, True on the person; None when regions are not measured.
        person: values of the measures of kind "person", made by who knows the poses.
    """

    generated: np.ndarray
    truth: np.ndarray
    mask: np.ndarray | None = None
    person: dict[str, float] | None = None


def measured_name(measure: str, region: str) -> str:
    """Name of a measure in a region: "ssim", "foreground_ssim"."""
    return f"{region}_{measure}" if region else measure


def feature_file(folder: Path, measure: str, region: str, side: str) -> Path:
    """Where the feature vectors of a clip lie, as rows of float32."""
    return folder / f"{measured_name(measure, region)}.{side}.f32"


@torch.no_grad()
def measure_clip(pairs: Iterable[FramePair], metric_suite: MetricSuite, folder: Path) -> None:
    """Measure the frames of a clip in order and write the results to `folder`.

    `values.json` has the number of frames and, for every measure taken frame by frame, its values; NaN is null.
    Changes from frame to frame are one fewer than frames.
    """
    values: dict[str, list[float | None]] = {}
    frames, before = 0, None
    with ExitStack() as stack:
        writers = [
            _FeatureWriter(stack, folder, measure, region, metric_suite)
            for measure in metric_suite.extractors
            for region in metric_suite.regions
        ]
        for batch in batches(pairs, metric_suite.batch_size):
            frames += len(batch)
            taken = _frame_values(batch, metric_suite) | _change_values(before, batch, metric_suite)
            before = batch[-1]
            for name, measured in taken.items():
                values.setdefault(name, []).extend(None if np.isnan(value) else value for value in measured)
            for region in metric_suite.regions if writers else ():
                for side in SIDES:
                    _write_features(batch, side, [writer for writer in writers if writer.region == region])
    write_json(folder / VALUES_FILE, {"frames": frames, "values": values})


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Consecutive items in lists of `size`, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def region_frames(batch: list[FramePair], side: str, region: str) -> np.ndarray:
    """The frames (n, h, w, 3) uint8 of one side, grey outside the region."""
    frames = np.stack([getattr(pair, side) for pair in batch])
    if region:
        masks = np.stack([pair.mask for pair in batch])
        frames[~masks if region == "foreground" else masks] = OUTSIDE
    return frames


def _frame_values(batch: list[FramePair], metric_suite: MetricSuite) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for region in metric_suite.regions:
        for measure in metric_suite.of_kind("pixels"):
            values[measured_name(measure, region)] = [
                pixel_measure(measure, metric_suite.protocol, pair.generated, pair.truth, _chosen(pair, region))
                for pair in batch
            ]
        if metric_suite.distances:
            first, second = (_distance_input(batch, side, region, metric_suite) for side in SIDES)
        for measure, distance in metric_suite.distances.items():
            values[measured_name(measure, region)] = distance.distance(first, second).tolist()
    for measure in metric_suite.of_kind("person"):
        values[measure] = [pair.person[measure] for pair in batch]
    return values


def _change_values(
    before: FramePair | None, batch: list[FramePair], metric_suite: MetricSuite
) -> dict[str, list[float]]:
    """Measures of kind "changes" of each frame of a batch since the one before; None, before the first, has none.

    The foreground is where the person is in either frame.
    """
    pairs = list(pairwise(batch if before is None else [before, *batch]))
    values: dict[str, list[float]] = {}
    for region in metric_suite.regions:
        for measure in metric_suite.of_kind("changes"):
            values[measured_name(measure, region)] = [
                flicker((first.generated, then.generated), (first.truth, then.truth), _moving(first, then, region))
                for first, then in pairs
            ]
    return values


def _moving(first: FramePair, then: FramePair, region: str) -> np.ndarray | None:
    if not region or first.mask is None or then.mask is None:
        return None
    person = first.mask | then.mask
    return person if region == "foreground" else ~person


def _chosen(pair: FramePair, region: str) -> np.ndarray | None:
    return {"": None, "foreground": pair.mask, "background": None if pair.mask is None else ~pair.mask}[region]


def _distance_input(batch: list[FramePair], side: str, region: str, metric_suite: MetricSuite) -> Tensor:
    low, high = metric_suite.protocol.lpips_range
    images = image_tensor(region_frames(batch, side, region), metric_suite.device)
    return images / 255 * (high - low) + low


def _write_features(batch: list[FramePair], side: str, writers: list["_FeatureWriter"]) -> None:
    """Hand the frames of one side to the writers of one region; those that prepare them alike share the work."""
    frames = region_frames(batch, side, writers[0].region)
    prepared: dict[int, Tensor] = {}
    for writer in writers:
        prepare = writer.extractor.prepare
        if id(prepare) not in prepared:
            prepared[id(prepare)] = prepare(frames)
        writer.write(side, prepared[id(prepare)])


class _FeatureWriter:
    """Takes the prepared frames of a clip in batches and appends their features to two files, generated and true."""

    def __init__(self, stack: ExitStack, folder: Path, measure: str, region: str, metric_suite: MetricSuite):
        self.region = region
        self.extractor: FeatureExtractor = metric_suite.extractors[measure]
        self._at_once = max(1, metric_suite.batch_size // 4)  # windows; each is many frames to the network
        protocol, windowed = metric_suite.protocol, measure in metric_suite.of_kind("windows")
        self._files = {
            side: stack.enter_context(feature_file(folder, measure, region, side).open("wb")) for side in SIDES
        }
        self._windows = {side: WindowBuffer(protocol.window, protocol.stride) if windowed else None for side in SIDES}

    def write(self, side: str, rows: Tensor) -> None:
        windows = self._windows[side]
        if windows is None:
            self._append(side, rows)
            return
        for part in windows.push(rows).split(self._at_once):
            self._append(side, part)

    def _append(self, side: str, rows: Tensor) -> None:
        if len(rows):
            self._files[side].write(self.extractor.extract(rows).cpu().numpy().astype(np.float32).tobytes())


def read_values(folder: Path) -> dict[str, np.ndarray]:
    """The values of a measured clip by name, NaN where there is none."""
    content = json.loads((folder / VALUES_FILE).read_text(encoding="utf-8"))
    return {
        name: np.array([np.nan if value is None else value for value in values], np.float64)
        for name, values in content["values"].items()
    }


def read_features(
    folder: Path, measure: str, region: str, side: str, dimension: int, rows: int = 1024
) -> Iterator[np.ndarray]:
    """The feature vectors of a measured clip in blocks of at most `rows`."""
    with feature_file(folder, measure, region, side).open("rb") as file:
        while block := file.read(rows * dimension * 4):
            yield np.frombuffer(block, np.float32).reshape(-1, dimension)
