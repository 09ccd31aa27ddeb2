"""Trials of `evaluate.py attention` by row of the table, and how their pointing goes with their fidelity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

from evaluation.attention_trial import MeasuredAttention
from evaluation.trials import WITH, WITHOUT

SUBSETS = ("aligned", "misaligned")
FEWEST = 3  # points that a correlation is computed of


@dataclass(frozen=True)
class Outcome:
    """One trial: where its attention pointed and how well the person came out."""

    attention: MeasuredAttention
    person_psnr: float | None


@dataclass(frozen=True)
class Group:
    """A row of the table: the trials of one subset under one condition, by clip and seed.

    Attributes:
        example: the clip that images show: of misaligned clips the one whose reference is turned most, of aligned
            ones that whose is turned least.
    """

    subset: str
    condition: str
    outcomes: dict[tuple[str, int], Outcome]
    example: str

    @property
    def label(self) -> str:
        return f"{self.subset}, {self.condition}"

    def by_seed(self, seeds: Sequence[int], value: Callable[[Outcome], Any]) -> list[Any]:
        """The mean over clips of what `value(outcome)` gives, for every seed; None where no clip has it."""
        means = []
        for seed in seeds:
            known = [value(outcome) for (_, s), outcome in self.outcomes.items() if s == seed]
            known = [number for number in known if number is not None]
            means.append(np.nanmean(known, axis=0) if known else None)
        return means

    def clip_means(self, value: Callable[[Outcome], float | None]) -> dict[str, float]:
        """The mean over seeds of what `value(outcome)` gives, by clip."""
        found: dict[str, list[float]] = {}
        for (clip, _), outcome in self.outcomes.items():
            if (number := value(outcome)) is not None:
                found.setdefault(clip, []).append(number)
        return {clip: float(np.mean(numbers)) for clip, numbers in found.items()}


def accuracy_of(outcome: Outcome) -> float | None:
    return outcome.attention.mean("strongest")


def psnr_of(outcome: Outcome) -> float | None:
    return outcome.person_psnr


def correlations(groups: list[Group]) -> dict[str, Any]:
    """Pearson's and Spearman's correlation over clips of pointing accuracy with the person's PSNR.

    "all" takes every clip under every condition, "gain with TPC" the differences that TPC makes to a clip, the rest
    one row of the table each. Null where there are too few clips, or all are alike.
    """
    points = {group.label: paired(group) for group in groups}
    found = {"all": _correlation([pair for pairs in points.values() for pair in pairs.values()])}
    gains = []
    for subset in SUBSETS:
        before, after = (points.get(f"{subset}, {condition}", {}) for condition in (WITHOUT, WITH))
        gains += [np.subtract(after[clip], before[clip]) for clip in before.keys() & after.keys()]
    found["gain with TPC"] = _correlation(gains)
    return found | {label: _correlation(list(pairs.values())) for label, pairs in points.items()}


def paired(group: Group) -> dict[str, tuple[float, float]]:
    """Clip -> pointing accuracy and PSNR, where both are known."""
    accuracy, psnr = group.clip_means(accuracy_of), group.clip_means(psnr_of)
    return {clip: (accuracy[clip], psnr[clip]) for clip in sorted(accuracy.keys() & psnr.keys())}


def _correlation(pairs: list[Any]) -> dict[str, float | int | None]:
    values = np.array(pairs, np.float64).reshape(-1, 2)
    if len(values) < FEWEST or (np.ptp(values, axis=0) == 0).any():
        return {"pearson": None, "spearman": None, "points": len(values)}
    return {
        "pearson": float(pearsonr(*values.T).statistic),
        "spearman": float(spearmanr(*values.T).statistic),
        "points": len(values),
    }
