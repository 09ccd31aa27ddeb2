"""Tables of accelerations: quality against the run without any, and what is saved."""

from collections.abc import Mapping, Sequence

from benchmarks.accelerations.cost import Cost
from benchmarks.accelerations.settings import FAMILIES, NONE, Setting
from evaluation.animators_report import kinds_mean
from evaluation.benchmark_report import Values
from evaluation.report import Cell, Table, measure_label, over_seeds
from evaluation.trials import PERSON_PSNR

FOREGROUND = "foreground_"


def person_measures(values: Values) -> list[str]:
    """What was measured of the person, PSNR first."""
    names = [name for name in next(iter(values.by_trial.values())) if name.startswith(FOREGROUND)]
    return sorted(names, key=lambda name: (name != PERSON_PSNR, name))


def changes(values: Values, kinds: Sequence[str], setting: str, baseline: str, measure: str) -> list[float | None]:
    """Mean over kinds of clips, against the baseline's, for every seed; both start from the same noise."""
    with_it, without = (kinds_mean(values, kinds, name, measure) for name in (setting, baseline))
    return [None if None in pair else pair[0] - pair[1] for pair in zip(with_it, without, strict=True)]


def summary_table(values: Values, settings: Sequence[Setting], costs: Mapping[str, Cost], caption: str) -> Table:
    """A row for each setting: changes of what is measured of the person, and cost. The first row has no changes."""
    measures, kinds, plain = person_measures(values), list(values.kinds), settings[0]
    base = costs[plain.name]
    rows = []
    for setting in settings:
        cells = [
            over_seeds(changes(values, kinds, setting.name, plain.name, measure))
            if setting is not plain
            else over_seeds(kinds_mean(values, kinds, plain.name, measure))
            for measure in measures
        ]
        cost = costs[setting.name]
        cells += [Cell(cost.seconds), Cell(100 * cost.seconds / base.seconds)]
        known = cost.operations is not None and base.operations
        cells += [Cell(cost.operations), Cell(100 * cost.operations / base.operations if known else None)]
        cells.append(Cell(cost.cache_bytes / 2**20))
        rows.append((setting.label, tuple(cells)))
    columns = (
        *(f"change of {measure_label(measure)}" for measure in measures),
        *("seconds", "of the first (%)", "10^12 operations", "of the first (%)", "kept attention (MiB)"),
    )
    return Table("setting", columns, tuple(rows), caption)


def kinds_table(values: Values, settings: Sequence[Setting]) -> Table:
    """Change of the person's PSNR, a column for each kind of clips; absolute in the first row."""
    plain, rows = settings[0], []
    for setting in settings:
        cells = []
        for kind in values.kinds:
            found = changes(values, [kind], setting.name, plain.name, PERSON_PSNR)
            cells.append(over_seeds(values.by_seed(kind, plain.name, PERSON_PSNR) if setting is plain else found))
        rows.append((setting.label, tuple(cells)))
    columns = tuple(kind.replace("_", " ") for kind in values.kinds)
    corner = f"change of {measure_label(PERSON_PSNR)}"
    return Table(corner, columns, tuple(rows), corner)


def trade_offs(
    values: Values, settings: Sequence[Setting], costs: Mapping[str, Cost]
) -> dict[str, tuple[list[float], list[float]]]:
    """Family -> operations in % of the baseline's and change of the person's PSNR, for a figure."""
    plain = settings[0]
    points: dict[str, tuple[list[float], list[float]]] = {family: ([], []) for family in FAMILIES}
    for setting in settings:
        change = over_seeds(changes(values, list(values.kinds), setting.name, plain.name, PERSON_PSNR)).mean
        cost, base = costs[setting.name].operations, costs[plain.name].operations
        if setting.family != NONE and None not in (change, cost, base):
            for axis, number in zip(points[setting.family], (100 * cost / base, change), strict=True):
                axis.append(number)
    return {family: axes for family, axes in points.items() if axes[0]}
