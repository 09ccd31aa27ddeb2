"""What misalignment costs and what TPC wins back: numbers, tables and figures of the benchmark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.report import Cell, Table, measure_label, over_seeds
from evaluation.summary import clip_means
from evaluation.trials import WITHOUT, Trial

FITTING = "fitting reference"
LEAST_COST = 0.5  # dB; of less, a recovered share is noise


@dataclass(frozen=True)
class Values:
    """Means over the frames of every trial.

    Attributes:
        by_trial: (condition, clip, seed) -> measure -> value, None where there is none.
        kinds: kind -> its clips.
        fitting: clip -> the clips that it would be without misalignment.
        seeds: of the initial noise.
    """

    by_trial: Mapping[tuple[str, str, int], Mapping[str, float | None]]
    kinds: Mapping[str, Sequence[str]]
    fitting: Mapping[str, Sequence[str]]
    seeds: Sequence[int]

    def by_seed(self, kind: str, condition: str, measure: str, fitting: bool = False) -> list[float | None]:
        """Mean over the clips of a kind, for every seed.

        Args:
            fitting: of the clips without misalignment instead; a clip with several counts once.
        """
        means = []
        for seed in self.seeds:
            clips = []
            for clip in self.kinds[kind]:
                names = self.fitting[clip] if fitting else [clip]
                found = [self.by_trial[condition, name, seed].get(measure) for name in names]
                found = [value for value in found if value is not None]
                if found:
                    clips.append(float(np.mean(found)))
            means.append(float(np.mean(clips)) if clips else None)
        return means


def read_values(
    folders: Mapping[Trial, Path],
    kinds: Mapping[str, Sequence[str]],
    fitting: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
) -> Values:
    """The values of all measured trials."""
    by_trial = {
        (trial.condition.name, trial.clip, trial.seed): clip_means(folder) for trial, folder in folders.items()
    }
    return Values(by_trial, kinds, fitting, seeds)


def measure_table(values: Values, conditions: Mapping[str, str], measure: str, caption: str) -> Table:
    """One measure: a row a kind, a column for the fitting reference and for every condition.

    Args:
        conditions: label -> name; `WITHOUT` must be among them.
    """
    rows = []
    for kind in values.kinds:
        cells = [over_seeds(values.by_seed(kind, conditions[WITHOUT], measure, fitting=True))]
        cells += [over_seeds(values.by_seed(kind, name, measure)) for name in conditions.values()]
        rows.append((kind.replace("_", " "), tuple(cells)))
    return Table(measure_label(measure), (FITTING, *conditions), tuple(rows), caption)


def recovered_table(values: Values, conditions: Mapping[str, str], measure: str) -> Table:
    """What misalignment costs, and the share of it that every condition with TPC wins back."""
    with_tpc = {label: name for label, name in conditions.items() if label != WITHOUT}
    rows = []
    for kind in values.kinds:
        fitting = values.by_seed(kind, conditions[WITHOUT], measure, fitting=True)
        without = values.by_seed(kind, conditions[WITHOUT], measure)
        cost = [a - b for a, b in zip(fitting, without, strict=True)]
        cells = [over_seeds(cost)]
        for name in with_tpc.values():
            won = [a - b for a, b in zip(values.by_seed(kind, name, measure), without, strict=True)]
            enough = min(cost) >= LEAST_COST
            shares = [100 * a / b for a, b in zip(won, cost, strict=True)] if enough else [None]
            cells.append(over_seeds(shares))
        rows.append((kind.replace("_", " "), tuple(cells)))
    columns = ("cost of misalignment (dB)", *(f"{label}: won back (%)" for label in with_tpc))
    return Table(
        measure_label(measure), columns, tuple(rows), f"shares only where misalignment costs at least {LEAST_COST} dB"
    )


def table_numbers(table: Table) -> dict[str, dict[str, Any]]:
    """A table as JSON: row -> column -> mean and deviation."""
    return {
        label: {
            column: {"mean": cell.mean, "deviation": cell.deviation}
            for column, cell in zip(table.columns, cells, strict=True)
        }
        for label, cells in table.rows
    }


def trial_numbers(values: Values) -> list[dict[str, Any]]:
    """Every trial as JSON, with the means over its frames."""
    return [
        {"condition": condition, "clip": clip, "seed": seed, **measured}
        for (condition, clip, seed), measured in values.by_trial.items()
    ]


def bars(values: Values, conditions: Mapping[str, str], measure: str) -> dict[str, list[Cell]]:
    """The cells of `measure_table` by column."""
    table = measure_table(values, conditions, measure, "")
    return {column: [cells[place] for _, cells in table.rows] for place, column in enumerate((FITTING, *conditions))}
