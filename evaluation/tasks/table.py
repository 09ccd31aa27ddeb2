"""`evaluate.py table`: models without and with TPC on original and misaligned clips (Table 1)."""

from pathlib import Path

from core.errors import UserError
from evaluation.clips import open_clips
from evaluation.config import TableConfig
from evaluation.measure import Number
from evaluation.metric_suite import MetricSuite
from evaluation.misalignment import SUBSETS, UNSEEN, split_clips
from evaluation.report import best_table, comparison_table, measure_numbers, over_seeds, write_table
from evaluation.statistics import Values
from evaluation.trials import Trial, Variant, numbers_by_seed, run_task, values_by_trial


def run(config: TableConfig) -> None:
    """Write results.json, table.md and table.tex."""
    variants, clips = table_variants(config), open_clips(config)

    def write(folders: dict[Trial, Path], metric_suite: MetricSuite, output: Path) -> None:
        split = split_clips(clips, config.thresholds)
        members = {subset: [name for name, of in split.items() if of.subset == subset] for subset in SUBSETS}
        unseen = [name for name, of in split.items() if of.subset == UNSEEN]

        def numbers(variant: Variant, names: list[str]) -> list[dict[str, Number]]:
            return numbers_by_seed(
                folders, metric_suite, config.seeds, lambda trial: trial.variant == variant and trial.clip in names
            )

        runs = {
            label: {subset: numbers(variant, names) for subset, names in members.items()}
            for label, variant in variants.items()
        }
        columns = [(subset, measure) for subset in SUBSETS if members[subset] for measure in metric_suite.measures]
        cells = [
            [over_seeds([run[m].value if m in run else None for run in by_subset[subset]]) for subset, m in columns]
            for by_subset in runs.values()
        ]
        counts = ", ".join(f"{len(members[subset])} {subset}" for subset in SUBSETS)
        counts += f", {len(unseen)} {UNSEEN} and left out" if unseen else ""
        caption = f"{counts} clips; mean and deviation over {len(config.seeds)} seeds."
        table = best_table("model", [(f"{subset}: ", measure) for subset, measure in columns], runs, cells, caption)
        results = {
            "counts": {subset: len(names) for subset, names in members.items()}
            | {UNSEEN: len(unseen), "seeds": len(config.seeds)},
            "subsets": members | {UNSEEN: unseen},
            "results": {
                label: {subset: measure_numbers(by_seed, config.seeds) for subset, by_seed in by_subset.items()}
                for label, by_subset in runs.items()
            },
        }
        warnings = (
            (f"{subset} {name}", number.warning)
            for by_subset in runs.values()
            for subset, by_seed in by_subset.items()
            if members[subset]
            for run in by_seed
            for name, number in run.items()
        )
        compared = [
            (f"{label} + TPC minus {label}", variants[f"{label} + TPC"].name, variant.name)
            for label, variant in variants.items()
            if variant.tpc is None
        ]
        known = [(f"{s}: ", [s], name) for s in SUBSETS if members[s] for name in metric_suite.names_by_clip()]
        values = Values(values_by_trial(folders), members, {}, config.seeds)
        differences = comparison_table("differences", known, compared, values)
        results["differences"] = differences.plain()
        write_table(config, metric_suite, table, results, warnings, output, differences)

    run_task("table", config, config, ("",), list(variants.values()), clips, write)


def table_variants(config: TableConfig) -> dict[str, Variant]:
    """Variants by label: every model without and with TPC."""
    names = config.names or [Path(model).name for model in config.models]
    if not config.models or len(names) != len(config.models) or len(set(names)) < len(names):
        raise UserError(f"names={names} must be different names, one for each of models={config.models}")
    found = {}
    for index, (name, model) in enumerate(zip(names, config.models, strict=True)):
        found[name] = Variant(f"model{index}-without", model, None)
        found[f"{name} + TPC"] = Variant(f"model{index}-with", model, config.tpc)
    return found
