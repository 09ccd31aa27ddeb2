"""What a run costs: seconds, and floating-point operations."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.speed.measuring import counting
from core.files import write_json
from evaluation.trials import Trial

COST_FILE = "cost.json"


@dataclass(frozen=True)
class Cost:
    """Of one run of the pipeline, from images to frames, or of several.

    Attributes:
        seconds: of sampling, with the VAE.
        operations: in 10^12, a multiplication and an addition counting as two; None: not counted.
        cache_bytes: the most that attention broadcast kept.
    """

    seconds: float
    operations: float | None
    cache_bytes: int

    def write(self, folder: Path) -> None:
        """Beside the measurements of a trial."""
        write_json(folder / COST_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Cost":
        return cls(**json.loads((folder / COST_FILE).read_text(encoding="utf-8")))


def count_operations(compute: Callable[[], object]) -> float:
    """Operations of a computation in 10^12."""
    with counting() as counted:
        compute()
        return counted() / 1e12


def costs_by_condition(folders: Mapping[Trial, Path]) -> dict[str, Cost]:
    """Name of a condition -> its median seconds, and the operations of the trial that counted them."""
    found: dict[str, list[Cost]] = {}
    for trial, folder in folders.items():
        found.setdefault(trial.condition.name, []).append(Cost.read(folder))
    return {name: _together(costs) for name, costs in found.items()}


def _together(costs: Iterable[Cost]) -> Cost:
    costs = list(costs)
    counted = [cost.operations for cost in costs if cost.operations is not None]
    seconds = float(np.median([cost.seconds for cost in costs]))
    return Cost(seconds, float(np.median(counted)) if counted else None, max(cost.cache_bytes for cost in costs))
