"""Intervals over clips by the bootstrap: of means, of paired differences, of ratios and of other statistics.

A clip is one observation, however many seeds and frames it has. Intervals are percentile intervals of `LEVEL` at the
expanded level of Hesterberg ("What teachers should know about the bootstrap", 2015): of ten clips with normal values
they cover the mean in 95 % of cases, plain ones in 91 %, and BCa intervals are no better for the mean of so few.
Resamples come from one fixed seed, so a table comes out the same again.
"""

import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import DegenerateDataWarning, bootstrap, norm, t

LEVEL, RESAMPLES, SEED = 0.95, 9999, 0
FEWEST = 6  # clips; five differences are all of one sign by chance more often than an interval of 95 % may err
ROUNDING = 1e-9  # relative spread of resampled values that is none


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval."""

    value: float | None  # None where there is nothing to compute it of
    low: float | None  # None where the clips are too few
    high: float | None
    n: int  # clips

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and (self.low > 0 or self.high < 0)

    def plain(self) -> dict[str, float | int | None]:
        """As in JSON."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def statistic_interval(statistic: Callable[..., np.ndarray], *strata: ArrayLike) -> Interval:
    """A statistic of clips with its interval.

    Args:
        statistic: takes an array (..., n, k) for each stratum and returns (...).
        strata: arrays (n, k) of k numbers for each clip. Each is resampled by itself, as the kinds of clips have fixed
            numbers. Clips with a NaN or None are left out.
    """
    known = [rows[~np.isnan(rows).any(axis=1)] for rows in (np.asarray(rows, np.float64) for rows in strata)]
    counts = [len(rows) for rows in known]
    n, spare = sum(counts), sum(counts) - len(counts)

    def resampled(*indices: np.ndarray, axis: int = -1) -> np.ndarray:
        return statistic(*(rows[chosen.astype(int)] for rows, chosen in zip(known, indices, strict=True)))

    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # seen below
        value = float(statistic(*known)) if counts and min(counts) else np.nan
        if not np.isfinite(value):
            return Interval(None, None, None, n)
        if n < FEWEST or min(counts) < 2:
            return Interval(value, None, None, n)
        level = 1 - 2 * norm.cdf(-np.sqrt(n / spare) * t.ppf((1 + LEVEL) / 2, spare))
        found = bootstrap(
            [np.arange(count) for count in counts],
            resampled,
            n_resamples=RESAMPLES,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(SEED),
        )
    if np.ptp(found.bootstrap_distribution) <= ROUNDING * abs(value):
        return Interval(value, value, value, n)
    low, high = map(float, found.confidence_interval)
    return Interval(value, low, high, n) if np.isfinite([low, high]).all() else Interval(value, None, None, n)


def mean_interval(*strata: ArrayLike) -> Interval:
    """The mean over strata, each of which counts alike, of the means over their clips (n,)."""
    return statistic_interval(lambda *rows: _means(*rows)[..., 0], *(_columns(values) for values in strata))


def ratio_interval(numerators: Sequence[ArrayLike], denominators: Sequence[ArrayLike]) -> Interval:
    """The ratio of two means as of `mean_interval`, of strata of the same clips (n,), which are drawn jointly."""

    def ratio(*rows: np.ndarray) -> np.ndarray:
        means = _means(*rows)
        return means[..., 0] / means[..., 1]

    return statistic_interval(ratio, *(_columns(*pair) for pair in zip(numerators, denominators, strict=True)))


def half_width(clips: int, *strata: ArrayLike) -> float:
    """Of an interval of Student's t of the mean over strata, each with so many clips as scattered as these (n,)."""
    known = [values[~np.isnan(values)] for values in (np.asarray(values, np.float64) for values in strata)]
    if min(map(len, known)) < 2 or clips < 2:
        return np.nan
    error = np.sqrt(sum(values.var(ddof=1) for values in known) / clips) / len(known)
    return float(t.ppf((1 + LEVEL) / 2, len(known) * (clips - 1)) * error)


def deciding_clips(*strata: ArrayLike, most: int = 10_000) -> int | None:
    """Fewest clips of each stratum with which `half_width` is below the mean of these (n,), None above `most`."""
    mean = abs(mean_interval(*strata).value or 0.0)
    if not half_width(most, *strata) < mean:
        return None
    return bisect_left(range(most), True, FEWEST, key=lambda clips: half_width(clips, *strata) < mean)


def clip_differences(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """(n,) means over seeds of first minus second (n, seeds), of the seeds that both have; NaN without any."""
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    known = ~np.isnan(differences)
    with np.errstate(invalid="ignore"):
        return np.where(known, differences, 0).sum(axis=1) / known.sum(axis=1)


@dataclass(frozen=True)
class Values:
    """Means over the frames of every trial."""

    # (variant, clip, seed) -> measure -> value, None where there is none
    by_trial: Mapping[tuple[str, str, int], Mapping[str, float | None]]
    by_kind: Mapping[str, Sequence[str]]  # kind -> its clips
    fitting: Mapping[str, Sequence[str]]  # clip -> the clips that it would be without misalignment
    seeds: Sequence[int]  # of the initial noise

    def by_clip(self, kind: str, variant: str, measure: str, fitting: bool = False) -> np.ndarray:
        """(clips, seeds), NaN where there is none; of those `fitting` a clip (several count once) in its place."""
        by_clip = []
        for clip in self.by_kind[kind]:
            names = self.fitting[clip] if fitting else [clip]
            found = [[self.by_trial[variant, name, seed].get(measure) for name in names] for seed in self.seeds]
            known = [[value for value in values if value is not None] for values in found]
            by_clip.append([float(np.mean(values)) if values else np.nan for values in known])
        return np.array(by_clip, np.float64)

    def by_seed(self, kinds: Sequence[str], variant: str, measure: str, fitting: bool = False) -> list[float | None]:
        """Mean over kinds, each of which counts alike, of the means over their clips, for every seed."""
        means = []
        for kind in kinds:
            columns = [column[~np.isnan(column)] for column in self.by_clip(kind, variant, measure, fitting).T]
            means.append([float(np.mean(column)) if len(column) else None for column in columns])
        return [None if None in of_kinds else float(np.mean(of_kinds)) for of_kinds in zip(*means, strict=True)]

    def differences(
        self, kinds: Sequence[str], first: str, second: str, measure: str, fitting: bool = False
    ) -> list[np.ndarray]:
        """(clips,) of each kind: one variant, of the clips `fitting` where so, minus another, mean over seeds."""
        return [
            clip_differences(self.by_clip(kind, first, measure, fitting), self.by_clip(kind, second, measure))
            for kind in kinds
        ]

    def plain(self) -> list[dict[str, Any]]:
        return [
            {"condition": variant, "clip": clip, "seed": seed, **measured}
            for (variant, clip, seed), measured in self.by_trial.items()
        ]


def _means(*strata: np.ndarray) -> np.ndarray:
    """(..., k): mean over strata (..., n, k) of the means over their clips."""
    return sum(rows.mean(axis=-2) for rows in strata) / len(strata)


def _columns(*values: ArrayLike) -> np.ndarray:
    """(n, k) float64 of k sequences (n,) of numbers; None becomes NaN."""
    return np.stack([np.asarray(numbers, np.float64) for numbers in values], axis=-1)
