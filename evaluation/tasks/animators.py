"""Table 1 of the TPC paper on the clips of the misalignment benchmark: animators without and with TPC.

    python evaluate.py animators [models=[FOLDER,FOLDER,...]] [names=[A,B,...]] [output=outputs/animators]
        [kinds=[aligned,rotation]] [clips=4] [seeds=[0,1]] [attachments=[add,replace]] [sampling.steps=10]
        [key=value ...]
    accelerate launch evaluate.py animators ...                    # clips divided among processes

Every clip of the frozen manifests (see `evaluate.py misalignment`) is animated by every model without TPC and with
each attachment, from the same noise. "original" are the clips whose reference is aligned, "misaligned" the mean over
the other kinds, but for those that another body drives, which have a mean of their own, and for which
`retargets=[bones]` does all of it again with driving poses brought to the reference's body. Writes results.json,
table.md, table.tex and strips.png. A run that was stopped goes on with the same command; more seeds or clips can be
added.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.processes import choose_device
from evaluation.clips import EvaluationClip, with_retargeting
from evaluation.config import DRIVEN_KINDS, AnimatorsConfig
from evaluation.metric_suite import MetricSuite
from evaluation.misaligned_clips import MisalignedClips
from evaluation.misalignment import SUBSETS
from evaluation.report import (
    Table,
    best_table,
    comparison_table,
    heading,
    latex,
    markdown,
    measure_label,
    over_seeds,
    write_results,
)
from evaluation.statistics import Values
from evaluation.tasks.misalignment import REGIONS, read_values, retargeted_variants, save_sheet
from evaluation.trials import PERSON_PSNR, Trial, Variant, run_task
from inference.animate import animate
from models.animators.registry import (
    load_pipeline,
    pipeline_names,
    read_index,
    saved_class,
    supervised_attention,
    supervision_words,
)
from tpc.config import ATTACHMENTS

LABELS = {"add": "TPC", "replace": "TPC (replace)"}
DRIVEN = "cross-identity"  # a subset beside `SUBSETS`
COLUMNS = (PERSON_PSNR, "foreground_ssim", "background_psnr")


def model_names(config: AnimatorsConfig) -> list[str]:
    names = config.names or [animator_name(model) for model in config.models]
    if not config.models or len(names) != len(config.models) or len(set(names)) < len(names):
        raise UserError(f"names={names} must be different names, one for each of models={config.models}")
    return names


def animator_name(model: str) -> str:
    """Name of the animator's class in a pipeline folder."""
    index = read_index(Path(model))
    cls = saved_class(index)
    if cls is None:
        known = ", ".join(pipeline_names())
        raise UserError(f"models={model} is a {index.get('_class_name')}; the pipelines known here are {known}")
    return cls.animator_cls.__name__


def variants_of(config: AnimatorsConfig) -> dict[str, Variant]:
    """Variants by label: every model without TPC, and with each attachment."""
    attachments = config.attachments
    if len(set(attachments)) < len(attachments) or not set(attachments) <= set(ATTACHMENTS):
        raise UserError(f"attachments={attachments} must be different ones of {', '.join(ATTACHMENTS)}")
    found = {}
    for index, (name, model) in enumerate(zip(model_names(config), config.models, strict=True)):
        of_model = {name: Variant(f"model{index}-without", model, None)}
        for attach in attachments:
            tpc = replace(config.tpc, attach=attach)
            of_model[f"{name} + {LABELS[attach]}"] = Variant(f"model{index}-{attach}", model, tpc)
        found |= of_model | retargeted_variants(of_model, config.retargets)
    return found


def run(config: AnimatorsConfig) -> None:
    """Write results.json, table.md, table.tex and strips.png."""
    variants, clips = variants_of(config), MisalignedClips(config.kinds, config.clips, config.split)

    def write(folders: dict[Trial, Path], metric_suite: MetricSuite, output: Path) -> None:
        values = read_values(folders, clips, config.seeds)
        each = len(next(iter(values.by_kind.values())))
        counts = {subset: each * len(kinds) for subset, kinds in subsets_of(config.kinds).items()}
        counted = ", ".join(f"{count} {subset}" for subset, count in counts.items())
        caption = f"{counted} clips; mean and deviation over {len(config.seeds)} seeds"
        table = animators_table(values, variants, caption)
        by_kind = {measure: kinds_table(values, variants, measure) for measure in COLUMNS}
        differences = differences_table(values, variants, subsets_of(list(values.by_kind)))
        each_kind = differences_table(values, variants, {kind: [kind] for kind in values.by_kind})
        supervised = dict(zip(model_names(config), map(supervised_attention, config.models), strict=True))
        shown_supervised = ", ".join(f"{name} {supervision_words(of)}" for name, of in supervised.items())
        results = {
            "attention supervised": supervised,
            "counts": counts | {"seeds": len(config.seeds)},
            "results": table.plain(),
            "kinds": {measure: table.plain() for measure, table in by_kind.items()},
            "differences": differences.plain(),
            "differences by kind": each_kind.plain(),
            "trials": values.plain(),
        }
        shown = map(markdown, [table, differences, *by_kind.values()])
        facts = caption, f"attention supervised in training: {shown_supervised}", differences.caption
        text = heading(metric_suite, *facts) + "\n".join(shown)
        written = {"table.md": text, "table.tex": latex(table) + "\n" + latex(differences)}
        write_results(config, metric_suite, results, written, output)
        if config.strips:
            _draw_strips(config, [clips.clip(names[0]) for names in clips.by_kind.values()], variants, output)

    run_task("animators", config, config.protocol(), REGIONS, list(variants.values()), clips, write)


def subsets_of(kinds: Sequence[str]) -> dict[str, list[str]]:
    """The kinds of clips that are original, misaligned and driven by another body; what is empty is left out."""
    original, misaligned = SUBSETS
    found: dict[str, list[str]] = {original: [], misaligned: [], DRIVEN: []}
    for kind in kinds:
        found[original if kind == "aligned" else DRIVEN if kind in DRIVEN_KINDS else misaligned].append(kind)
    return {subset: names for subset, names in found.items() if names}


def animators_table(values: Values, variants: Mapping[str, Variant], caption: str) -> Table:
    """Original and misaligned clips, a column for each of `COLUMNS`."""
    kinds = subsets_of(list(values.by_kind))
    columns = [(subset, measure) for subset in kinds for measure in COLUMNS]
    rows = [
        [over_seeds(values.by_seed(kinds[subset], variant.name, measure)) for subset, measure in columns]
        for variant in variants.values()
    ]
    return best_table("model", [(f"{subset}: ", measure) for subset, measure in columns], variants, rows, caption)


def differences_table(values: Values, variants: Mapping[str, Variant], kinds: Mapping[str, Sequence[str]]) -> Table:
    """Every model's variants compared with those before it, a column for each of `COLUMNS` of each group of kinds."""
    compared = [
        (f"{second} minus {first}", variants[second].name, variants[first].name)
        for first, second in combinations(variants, 2)
        if variants[first].model == variants[second].model
    ]
    columns = [
        (f"{label.replace('_', ' ')}: ", names, measure) for label, names in kinds.items() for measure in COLUMNS
    ]
    return comparison_table("differences", columns, compared, values)


def kinds_table(values: Values, variants: Mapping[str, Variant], measure: str) -> Table:
    """One measure, a column for each kind of clips."""
    rows = tuple(
        (label, tuple(over_seeds(values.by_seed([kind], variant.name, measure)) for kind in values.by_kind))
        for label, variant in variants.items()
    )
    columns = tuple(kind.replace("_", " ") for kind in values.by_kind)
    return Table(measure_label(measure), columns, rows, measure_label(measure))


def _draw_strips(
    config: AnimatorsConfig, clips: Sequence[EvaluationClip], variants: dict[str, Variant], output: Path
) -> None:
    """Draw the last frame of some clips: a row a clip, a column a variant."""
    sampling = replace(config.sampling, seed=config.seeds[0], compare=False)
    rows: dict[str, dict[str, np.ndarray]] = {clip.name: {} for clip in clips}
    device, dtype = choose_device(config.device, config.dtype)
    for model in config.models:
        pipeline = load_pipeline(model, dtype).to(device)
        pipeline.set_progress_bar_config(disable=True)
        of_model = {label: variant for label, variant in variants.items() if variant.model == model}
        for clip in clips:
            row = rows[clip.name]
            for label, variant in of_model.items():
                given = with_retargeting(clip, clip, variant.retarget)
                shown = animate(pipeline, given.reference, given.driving, sampling, variant.tpc, show_progress=False)
                if not row:
                    truth, _ = clip.truth(shown.result.shape[2:0:-1])
                    row |= {"reference": shown.reference, "truth": truth[-1]}
                row[label] = shown.result[-1]
    save_sheet(output / "strips.png", list(rows.values()))
