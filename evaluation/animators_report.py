"""The table of animators: a row for each model without and with TPC, original clips beside misaligned ones."""

from collections.abc import Mapping, Sequence

import numpy as np

from evaluation.benchmark_report import Values
from evaluation.report import Table, measure_label, over_seeds, split_name, with_best
from evaluation.trials import PERSON_PSNR
from metrics.protocols import MEASURES

SUBSETS = ("original", "misaligned")
COLUMNS = (PERSON_PSNR, "foreground_ssim", "background_psnr")


def subsets_of(kinds: Sequence[str]) -> dict[str, list[str]]:
    """The kinds of clips that are original, and those that are misaligned; what is empty is left out."""
    found = {SUBSETS[0]: [k for k in kinds if k == "aligned"], SUBSETS[1]: [k for k in kinds if k != "aligned"]}
    return {subset: names for subset, names in found.items() if names}


def kinds_mean(values: Values, kinds: Sequence[str], condition: str, measure: str) -> list[float | None]:
    """Mean over some kinds of clips, each of which counts alike, for every seed."""
    by_kind = [values.by_seed(kind, condition, measure) for kind in kinds]
    return [None if None in found else float(np.mean(found)) for found in zip(*by_kind, strict=True)]


def animators_table(values: Values, conditions: Mapping[str, str], caption: str) -> Table:
    """Original and misaligned clips, a column for each of `COLUMNS`.

    Args:
        conditions: label -> name.
    """
    subsets = subsets_of(list(values.kinds))
    rows = [
        [over_seeds(kinds_mean(values, kinds, name, measure)) for kinds in subsets.values() for measure in COLUMNS]
        for name in conditions.values()
    ]
    rows = with_best(rows, [MEASURES[split_name(measure)[1]].better for _ in subsets for measure in COLUMNS])
    columns = tuple(f"{subset}: {measure_label(measure)}" for subset in subsets for measure in COLUMNS)
    cells = tuple((label, tuple(row)) for label, row in zip(conditions, rows, strict=True))
    return Table("model", columns, cells, caption)


def kinds_table(values: Values, conditions: Mapping[str, str], measure: str) -> Table:
    """One measure, a column for each kind of clips."""
    rows = tuple(
        (label, tuple(over_seeds(values.by_seed(kind, name, measure)) for kind in values.kinds))
        for label, name in conditions.items()
    )
    columns = tuple(kind.replace("_", " ") for kind in values.kinds)
    return Table(measure_label(measure), columns, rows, measure_label(measure))
