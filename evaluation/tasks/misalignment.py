"""Cost of misaligned references, and the share of it that TPC wins back.

    python evaluate.py misalignment [model=FOLDER] [output=outputs/misalignment] [kinds=[aligned,rotation]]
        [clips=4] [seeds=[0,1]] [presets=[best]] [sampling.steps=10] [key=value ...]
    python evaluate.py misalignment split=development output=outputs/choice
        variants=["visibility=exclusive","propagation=iterative groups=2"] [key=value ...]
    accelerate launch evaluate.py misalignment ...                 # clips divided among processes

Every clip of the frozen manifests is animated without TPC and with each preset; and, without TPC, as it would be with
a fitting reference, against which the cost of misalignment is measured. `retargets=[bones,exact]` does all of it again
with driving poses brought to the reference's body, for the kinds that another body drives. Poses and masks are exact.
Writes results.json, table.md, psnr.png (and .pdf) and strips.png. A run that was stopped goes on with the same
command; more seeds, clips, or ways of retargeting can be added.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from core.config import load_config
from core.errors import UserError
from core.files import complete_file
from evaluation.clips import EvaluationClip, with_retargeting
from evaluation.config import DRIVEN_KINDS, KINDS, RETARGETS, MisalignmentConfig
from evaluation.metric_suite import MetricSuite
from evaluation.misaligned_clips import MisalignedClips
from evaluation.plots import draw_bars
from evaluation.report import (
    DIFFERENCES_NOTE,
    Cell,
    Table,
    heading,
    interval_cell,
    markdown,
    measure_label,
    over_seeds,
    write_results,
)
from evaluation.statistics import Values, deciding_clips, mean_interval, ratio_interval
from evaluation.trials import (
    PERSON_PSNR,
    PERSON_PSNR_LABEL,
    WITH,
    WITHOUT,
    Trial,
    Variant,
    all_trials,
    run_task,
    values_by_trial,
)
from inference.animate import animate
from inference.comparison import labelled_sheet
from models.animators.registry import load_pipeline
from tpc import CalibrationConfig
from tpc.config import PRESETS, resolve

FITTING = "fitting reference"
LOWEST_COST = 0.5  # dB; of less, a recovered share is noise
# Kinds that a table also gives the mean of, each kind alike.
AVERAGED = tuple(kind for kind in KINDS if kind not in ("aligned", "two_persons"))
AVERAGE = "mean of misaligned kinds, one person"
AVERAGE_DRIVEN = "mean of cross-identity kinds"
DECIDING_NOTE = "fewest clips of a kind whose interval, of clips as different as these, would exclude 0"
RETARGETED = "{}, {}"  # label of a variant, and how its driving poses are brought to the reference's body
REGIONS = ("foreground", "background")
STRIP_HEIGHT = 192


def variants_of(config: MisalignmentConfig) -> dict[str, Variant]:
    """Variants by label. Settings in `tpc` beside the preset hold for all presets."""
    if len(set(config.presets)) < len(config.presets) or any(preset not in PRESETS for preset in config.presets):
        raise UserError(f"presets={config.presets} must be different ones of {', '.join(PRESETS)}")
    if len(set(config.variants)) < len(config.variants):
        raise UserError(f"variants={config.variants} must be different ones")
    found = {WITHOUT: Variant("without", config.model, None)}
    for preset in config.presets:
        found[f"TPC {preset}"] = Variant(f"tpc-{preset}", config.model, replace(config.tpc, preset=preset))
    for settings in config.variants:
        tpc = _with_settings(config.tpc, settings)
        found[settings] = Variant("variant-" + settings.replace(" ", ","), config.model, tpc)
    return found | retargeted_variants(found, config.retargets)


def retargeted_variants(variants: Mapping[str, Variant], modes: Sequence[str]) -> dict[str, Variant]:
    """Every variant by label once more with each way of retargeting."""
    if len(set(modes)) < len(modes):
        raise UserError(f"retargets={list(modes)} must be different ones of {', '.join(RETARGETS)}")
    return {
        RETARGETED.format(label, mode): variant.retargeted(mode)
        for mode in modes
        for label, variant in variants.items()
    }


def _with_settings(tpc: CalibrationConfig, settings: str) -> CalibrationConfig:
    """`tpc` with settings like "smoothing=0 min_iou=0.3"."""
    if not (words := settings.split()) or any(word.startswith("-") for word in words):
        raise UserError(f"variants: {settings!r} must be settings of tpc, such as 'smoothing=0 min_iou=0.3'")
    try:
        given = load_config(CalibrationConfig, words)
        varied = replace(tpc, **{name: getattr(given, name) for name in (word.partition("=")[0] for word in words)})
        resolve(varied)
    except UserError as error:
        # Errors of values begin with the key, which is one of the group tpc here.
        group = "tpc." if hasattr(tpc, re.split(r"\W", str(error))[0]) else ""
        raise UserError(f"variants: {settings!r}: {group}{error}") from None
    return varied


def run(config: MisalignmentConfig) -> None:
    """Write results.json, table.md, psnr.png, psnr.pdf and strips.png."""
    clips, variants = MisalignedClips(config.kinds, config.clips, config.split), variants_of(config)
    counterparts = [name for clip in clips.names for name in clips.fitting[clip] if name != clip]
    further = all_trials(counterparts, [variants[WITHOUT]], config.seeds) if counterparts else []

    def write(folders: dict[Trial, Path], metric_suite: MetricSuite, output: Path) -> None:
        values = read_values(folders, clips, config.seeds)
        count = len(next(iter(values.by_kind.values())))
        caption = f"{count} clips of each kind; mean and deviation over {len(config.seeds)} seeds"
        measured = list(next(iter(values.by_trial.values())))
        tables = [recovered_table(values, variants, PERSON_PSNR), deciding_table(values, variants, PERSON_PSNR)]
        for name in measured:
            tables += [measure_table(values, variants, name, caption), differences_table(values, variants, name)]
        varied = tuple(config.variants)  # retargeted too, whose labels begin alike
        shown = {label: variant for label, variant in variants.items() if not label.startswith(varied)}
        psnr = measure_table(values, shown, PERSON_PSNR, "")
        by_kind = psnr.rows[: len(values.by_kind)]  # a mean over kinds may follow
        bars = dict(zip(psnr.columns, zip(*(cells for _, cells in by_kind), strict=True), strict=True))
        draw_bars(output / "psnr.png", [kind.replace(" ", "\n") for kind, _ in by_kind], bars, PERSON_PSNR_LABEL)
        results = {
            "counts": {kind: len(names) for kind, names in values.by_kind.items()} | {"seeds": len(config.seeds)},
            "tables": {table.corner + " / " + table.caption: table.plain() for table in tables},
            "trials": values.plain(),
        }
        text = heading(metric_suite, caption, DIFFERENCES_NOTE) + "\n".join(markdown(table) for table in tables)
        write_results(config, metric_suite, results, {"table.md": text}, output)
        if config.strips:
            drawn = [clips.clip(name) for names in clips.by_kind.values() for name in names[: config.strips]]
            _draw_strips(config, drawn, output)

    run_task("misalignment", config, config.protocol(), REGIONS, list(variants.values()), clips, write, further)


def read_values(folders: Mapping[Trial, Path], clips: MisalignedClips, seeds: Sequence[int]) -> Values:
    return Values(values_by_trial(folders), clips.by_kind, clips.fitting, seeds)


def rows_of(values: Values) -> dict[str, list[str]]:
    """Label of a table's row -> its kinds."""
    rows = {kind.replace("_", " "): [kind] for kind in values.by_kind}
    for label, kinds in ((AVERAGE, AVERAGED), (AVERAGE_DRIVEN, DRIVEN_KINDS)):
        averaged = [kind for kind in values.by_kind if kind in kinds]
        rows |= {label: averaged} if len(averaged) > 1 else {}
    return rows


def measure_table(values: Values, variants: Mapping[str, Variant], measure: str, caption: str) -> Table:
    """One measure: a row a kind, a column for the fitting reference and for every variant, `WITHOUT` among them."""
    rows = []
    for label, kinds in rows_of(values).items():
        cells = [over_seeds(values.by_seed(kinds, variants[WITHOUT].name, measure, fitting=True))]
        cells += [over_seeds(values.by_seed(kinds, variant.name, measure)) for variant in variants.values()]
        rows.append((label, tuple(cells)))
    return Table(measure_label(measure), (FITTING, *variants), tuple(rows), caption)


def compared(variants: Mapping[str, Variant]) -> list[tuple[str, str]]:
    """Pairs of labels: what misalignment costs; each variant with the one without TPC, with the first that has it, and
    if it has TPC and retargeted poses, with each of both alone.
    """
    others = [label for label in variants if label != WITHOUT]
    retargeted = {variant.retarget: label for label, variant in variants.items() if variant.tpc is None}
    plain = [label for label in others if variants[label].retarget == "off"]
    pairs = [(FITTING, WITHOUT), *((label, WITHOUT) for label in others), *((label, plain[0]) for label in plain[1:])]
    for label in others:
        if label not in plain and variants[label].tpc is not None:
            pairs += [(label, label.rpartition(", ")[0]), (label, retargeted[variants[label].retarget])]
    return pairs


def differences_table(values: Values, variants: Mapping[str, Variant], measure: str) -> Table:
    """One measure, the pairs of `compared` clip by clip."""
    rows = _compared_rows(values, variants, measure, lambda found: interval_cell(mean_interval(*found)))
    return Table(f"differences of {measure_label(measure)}", *rows, "clip by clip")


def deciding_table(values: Values, variants: Mapping[str, Variant], measure: str) -> Table:
    """How many clips of each kind decide about each pair of `compared`."""
    rows = _compared_rows(values, variants, measure, lambda found: Cell(deciding_clips(*found)))
    return Table(f"clips that decide, {measure_label(measure)}", *rows, DECIDING_NOTE)


def _compared_rows(
    values: Values, variants: Mapping[str, Variant], measure: str, cell: Callable[[list[np.ndarray]], Cell]
) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[Cell, ...]], ...]]:
    """Columns and rows of the pairs of `compared`; `cell` gets the differences (clips,) of every kind of a row."""
    pairs = compared(variants)

    def differences(kinds: Sequence[str], first: str, second: str) -> list[np.ndarray]:
        names = variants[WITHOUT if first == FITTING else first].name, variants[second].name
        return values.differences(kinds, *names, measure, fitting=first == FITTING)

    columns = tuple(f"{first} minus {second}" for first, second in pairs)
    rows = rows_of(values).items()
    return columns, tuple((label, tuple(cell(differences(kinds, *pair)) for pair in pairs)) for label, kinds in rows)


def recovered_table(values: Values, variants: Mapping[str, Variant], measure: str) -> Table:
    """The cost of misalignment, and the share of it that every other variant wins back: gain by cost, of means."""
    others = {label: variant for label, variant in variants.items() if label != WITHOUT}
    without = variants[WITHOUT].name
    rows = []
    for label, kinds in rows_of(values).items():
        costs = values.differences(kinds, without, without, measure, fitting=True)
        cost = mean_interval(*costs)
        known = cost.value is not None and cost.value >= LOWEST_COST and (cost.low is None or cost.excludes_zero)
        cells = [interval_cell(cost)]
        for variant in others.values():
            percents = [100 * gains for gains in values.differences(kinds, variant.name, without, measure)]
            cells.append(interval_cell(ratio_interval(percents, costs)) if known else Cell(None))
        rows.append((label, tuple(cells)))
    columns = ("cost of misalignment (dB)", *(f"{label}: won back (%)" for label in others))
    caption = f"shares only where misalignment surely costs something, and at least {LOWEST_COST} dB"
    return Table(measure_label(measure), columns, tuple(rows), caption)


def _draw_strips(config: MisalignmentConfig, clips: Sequence[EvaluationClip], output: Path) -> None:
    """Draw the last frame of some clips, without and with TPC."""
    pipeline = load_pipeline(config.model)
    pipeline.set_progress_bar_config(disable=True)
    sampling = replace(config.sampling, seed=config.seeds[0], compare=True)
    tpc = replace(config.tpc, preset=config.presets[0]) if config.presets else None
    rows = []
    driven = any(clip.target is not None for clip in clips)
    for clip in clips:
        animation = animate(pipeline, clip.reference, clip.driving, sampling, tpc, show_progress=False)
        columns = animation.columns() | ({"driver": clip.driving.frames} if driven else {})
        for mode in config.retargets:
            given = with_retargeting(clip, clip, mode)
            made = animate(pipeline, given.reference, given.driving, sampling, tpc, show_progress=False).columns()
            columns |= {f"{mode}, {name}": made[name] for name in (WITHOUT, WITH) if name in made}
        columns |= {"truth": clip.truth(animation.result.shape[2:0:-1])[0]}
        rows.append({label: frames[-1] for label, frames in columns.items()})
    save_sheet(output / "strips.png", rows)


def save_sheet(path: Path, rows: Sequence[Mapping[str, np.ndarray]]) -> None:
    with complete_file(path) as temporary:
        Image.fromarray(labelled_sheet(rows, STRIP_HEIGHT)).save(temporary)
