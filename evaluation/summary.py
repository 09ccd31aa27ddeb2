"""From measured clips to the numbers of a table: means over frames, and Frechet distances of pooled features."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.measure import SIDES, measured_name, read_features, read_values
from evaluation.metric_suite import MetricSuite
from metrics.frechet import Moments, frechet_distance
from metrics.protocols import MEASURES


@dataclass(frozen=True)
class Number:
    """One number of a result.

    Attributes:
        value: None when nothing could be measured.
        samples: frames or windows that it rests on, of each side.
        warning: what makes it doubtful, or None.
    """

    value: float | None
    samples: int
    warning: str | None = None

    def plain(self) -> dict[str, Any]:
        """Only dicts, lists and scalars, as in JSON."""
        return asdict(self)


def summarise(folders: Sequence[Path], metric_suite: MetricSuite) -> dict[str, Number]:
    """Every measure over all clips, by name. Frames count alike, whichever clip they are of."""
    means = _frame_means(folders)
    numbers: dict[str, Number] = {}
    for name, region, measure in measured_names(metric_suite):
        if measure in metric_suite.extractors:
            numbers[name] = _distance(folders, measure, region, metric_suite)
        elif name in means:
            numbers[name] = means[name]
    return numbers


def measured_names(metric_suite: MetricSuite) -> list[tuple[str, str, str]]:
    """Name, region and measure of everything that is measured, in the order of tables; persons have no regions."""
    persons = metric_suite.of_kind("person")
    names = [
        (measured_name(measure, region), region, measure)
        for region in metric_suite.regions
        for measure in metric_suite.measures
        if measure not in persons
    ]
    return names + [(measure, "", measure) for measure in persons]


def clip_means(folder: Path) -> dict[str, float | None]:
    """The mean over the frames of one clip of every measure that is taken frame by frame."""
    return {name: number.value for name, number in _frame_means([folder]).items()}


def _frame_means(folders: Sequence[Path]) -> dict[str, Number]:
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    lengths: dict[str, int] = {}
    for folder in folders:
        for name, measured in read_values(folder).items():
            known = measured[~np.isnan(measured)]
            sums[name] = sums.get(name, 0.0) + float(known.sum())
            counts[name] = counts.get(name, 0) + len(known)
            lengths[name] = lengths.get(name, 0) + len(measured)
    numbers = {}
    for name, count in counts.items():
        frames = lengths[name]
        missing = f"{frames - count} of {frames} frames could not be measured" if count < frames else None
        numbers[name] = Number(sums[name] / count if count else None, count, missing)
    return numbers


def _distance(folders: Sequence[Path], measure: str, region: str, metric_suite: MetricSuite) -> Number:
    extractor = metric_suite.extractors[measure]
    moments = [Moments(extractor.dimension) for _ in SIDES]
    for side, total in zip(SIDES, moments, strict=True):
        for folder in folders:
            for block in read_features(folder, measure, region, side, extractor.dimension):
                total.update(block)
    kind = MEASURES[measure].kind
    if min(total.count for total in moments) < 2:
        window = f" of {metric_suite.protocol.window} frames" if kind == "windows" else ""
        return Number(None, moments[1].count, f"{moments[1].count} {kind}{window}; a covariance needs two")
    distance = frechet_distance(*moments)
    return Number(distance.value, distance.samples[1], distance.warning)
