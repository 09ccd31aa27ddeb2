"""Animations of clips by several variants and seeds, measured as they are made."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from core.config import config_dict
from core.errors import UserError
from core.files import output_folder, write_json
from core.processes import choose_device, process_state
from data.poses.poses import PoseEstimator, open_estimator
from data.transforms import fit_matrix
from evaluation.clips import ClipSet, EvaluationClip, with_estimates, with_masks, with_pose_noise, with_retargeting
from evaluation.config import ProtocolConfig
from evaluation.measure import (
    FramePair,
    Number,
    PersonKeypoints,
    clip_means,
    measure_clip,
    person_tracks,
    person_values,
    summarise,
    with_persons,
)
from evaluation.metric_suite import MetricSuite, open_metric_suite
from evaluation.report import claim_output, close_output, run_parts
from inference.animate import Animation, animate
from inference.config import SamplingConfig
from metrics.face import FaceNetwork
from metrics.protocols import Protocol, brought_to_form, generated_to_form
from models.animators.registry import TRAINING_FILE, load_pipeline
from models.pipeline import AnimationPipeline
from tpc import CalibrationConfig

PERSON_PSNR = "foreground_psnr"
PERSON_PSNR_LABEL = "PSNR of the person (dB)"  # of axes
WITHOUT, WITH = "without TPC", "with TPC"  # labels
VARIANT_NAMES = {WITHOUT: "without", WITH: "with"}
# Keys that do not decide a trial's numbers: where it runs, and what only adds trials.
WHERE = ("output", "device", "keep_parts", "weights", "strips", "variants_on_test")
EXTENDABLE = (
    *("seeds", "clips", "angles", "scales", "kinds", "presets", "variants"),
    *("transforms", "propagations", "subsets", "attachments", "retargets"),
)


@dataclass(frozen=True)
class Variant:
    """One way of animating."""

    name: str  # fit for a file name; different from those of the other variants of a run
    model: str  # pipeline folder
    tpc: CalibrationConfig | None = field(compare=False)  # None runs without calibration
    retarget: str = "off"  # what brings driving poses to the reference's body, see `evaluation.config.RETARGETS`

    def retargeted(self, mode: str) -> "Variant":
        """The same with driving poses brought to the reference's body."""
        return replace(self, name=f"{self.name}-{mode}", retarget=mode)


def without_and_with(config: Any) -> list[Variant]:
    """The model of a configuration without and with its TPC."""
    tpc = {WITHOUT: None, WITH: config.tpc}
    return [Variant(name, config.model, tpc[label]) for label, name in VARIANT_NAMES.items()]


@dataclass(frozen=True)
class Trial:
    """One clip animated by one variant with one seed."""

    clip: str
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.name}--{self.clip}--seed{self.seed}"


# Animates the clip of a trial; may write more about it to the folder of its measurements.
Sampler = Callable[[AnimationPipeline, EvaluationClip, SamplingConfig, Trial, Path], Animation]


def plain_sampler(
    pipeline: AnimationPipeline, clip: EvaluationClip, sampling: SamplingConfig, trial: Trial, folder: Path
) -> Animation:
    """The animation and nothing else."""
    return animate(pipeline, clip.reference, clip.driving, sampling, trial.variant.tpc, show_progress=False)


def all_trials(clips: Sequence[str], variants: Sequence[Variant], seeds: Sequence[int]) -> list[Trial]:
    """Every clip by every variant with every seed; trials of one model and of one clip are neighbours."""
    if not clips or not seeds:
        raise UserError(f"nothing to do: {len(clips)} clips, seeds={list(seeds)}")
    models = list(dict.fromkeys(variant.model for variant in variants))
    return [
        Trial(clip, variant, seed)
        for model in models
        for clip in clips
        for variant in variants
        if variant.model == model
        for seed in seeds
    ]


def run_task(
    task: str,
    config: Any,
    protocol: ProtocolConfig,
    regions: tuple[str, ...],
    variants: Sequence[Variant],
    clips: ClipSet,
    write: Callable[[dict[Trial, Path], MetricSuite, Path], None],
    further: Sequence[Trial] = (),
    sampler: Sampler = plain_sampler,
) -> None:
    """Animate and measure every clip by every variant with every seed; one process then writes the results.

    Args:
        config: of the task, a `TrialsConfig` with `output`.
        write: gets the folder of each trial's measurements, the metric suite and the output folder.
        further: trials beside these, of the same variants and of clips that `clips` can give.
    """
    state = process_state(config.device)
    device, dtype = choose_device(config.device, config.dtype, state.local_process_index)
    metric_suite = open_metric_suite(protocol, regions, config.persons, device)
    trials = [*all_trials(clips.names, variants, config.seeds), *further]
    by_name = {trial.name: trial for trial in trials}
    output = output_folder(config.output)
    claim_output(output, trials_identity(task, config, variants), state)
    estimator = open_estimator(config.pose) if config.persons or config.poses == "estimated" else None

    # Neighbouring trials share the pipeline and the clip.
    @lru_cache(maxsize=1)
    def pipeline(model: str) -> AnimationPipeline:
        loaded = load_pipeline(model, dtype).to(device)
        loaded.set_progress_bar_config(disable=True)
        guidance = config.sampling.guidance_scales or config.sampling.guidance_scale
        for tpc in (variant.tpc for variant in variants if variant.model == model):
            loaded.check_wanted(guidance, config.sampling.solver, None, tpc and tpc.attach, tpc and tpc.start)
        return loaded

    clip_of = lru_cache(maxsize=1)(clips.clip)

    @lru_cache(maxsize=1)
    def estimated(name: str) -> EvaluationClip:
        return with_estimates(clip_of(name), estimator, config.pose.smoothing)

    def work(name: str, folder: Path) -> None:
        trial = by_name[name]
        sampling = replace(config.sampling, seed=trial.seed, compare=False)
        clip = clip_of(trial.clip)
        shown = clip if config.poses == "exact" else estimated(trial.clip)
        draws = [trial.seed, *trial.clip.encode()]  # the same errors for every variant
        if config.pose_noise:
            shown = with_pose_noise(shown, config.pose_noise, np.random.default_rng(draws))
        shown = with_masks(shown, clip, config.masks, np.random.default_rng([*draws, 1]))
        shown = with_retargeting(shown, clip, trial.variant.retarget)
        animation = sampler(pipeline(trial.variant.model), shown, sampling, trial, folder)
        if animation.calibration is not None:
            summary = animation.calibration.summary()
            if config.poses == "estimated":  # persons, over all frames
                parts = {"reference": shown.reference.poses, "frames": shown.driving.poses}
                summary["not_found"] = {name: int((~poses.present()).sum()) for name, poses in parts.items()}
            write_json(folder / "calibration.json", summary)
        found = estimator if config.persons else None
        pairs = frame_pairs_of(animation.result, clip, metric_suite.protocol, found, metric_suite.face)
        measure_clip(pairs, metric_suite, folder)

    if state.is_main_process:
        counts = f"{len(clips.names)} clips, {len(variants)} variants and {len(config.seeds)} seeds"
        print(f"{counts}: {len(trials)} animations of {config.sampling.steps} steps on {device}")
    inputs = {trial.name: clips.stamps(trial.clip) for trial in trials}
    folders = run_parts(list(by_name), work, output, state, "animating", inputs)
    if state.is_main_process:
        write(dict(zip(trials, folders, strict=True)), metric_suite, output)
        close_output(output, config.keep_parts)
    state.wait_for_everyone()


def trials_identity(task: str, config: Any, variants: Sequence[Variant]) -> dict[str, Any]:
    """Everything that decides the numbers of a trial: configuration, but for what adds trials, and model weights."""
    settings = {key: value for key, value in config_dict(config).items() if key not in (*WHERE, *EXTENDABLE)}
    models = {variant.model: _weights_digest(Path(variant.model)) for variant in variants}
    return {"task": task} | settings | {"weights of models": models}


def _weights_digest(folder: Path) -> str:
    """A digest of names, sizes and first megabytes of a pipeline's files, enough to notice a retrained model."""
    digest = hashlib.sha256()
    files = (path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin", ".json"))
    for path in sorted(path for path in files if path.name != TRAINING_FILE):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode() + file.read(2**20))
    return digest.hexdigest()[:16]


def numbers_by_seed(
    folders: dict[Trial, Path], metric_suite: MetricSuite, seeds: Sequence[int], chosen: Callable[[Trial], bool]
) -> list[dict[str, Number]]:
    """For every seed all measures over the chosen trials, pooled over clips."""
    return [
        summarise([folder for trial, folder in folders.items() if trial.seed == seed and chosen(trial)], metric_suite)
        for seed in seeds
    ]


def values_by_trial(folders: dict[Trial, Path]) -> dict[tuple[str, str, int], dict[str, float | None]]:
    """(variant, clip, seed) -> the means over frames of every trial, for `evaluation.statistics.Values`."""
    return {(trial.variant.name, trial.clip, trial.seed): clip_means(folder) for trial, folder in folders.items()}


def frame_pairs_of(
    result: np.ndarray,
    clip: EvaluationClip,
    protocol: Protocol,
    estimator: PoseEstimator | None,
    face: FaceNetwork | None = None,
) -> Iterator[FramePair]:
    """The animation beside the truth; persons are compared before the protocol crops and resizes."""
    size = (result.shape[2], result.shape[1])
    truths, masks = clip.truth(size)
    found = None if estimator is None else [person for _, person in with_persons(result, estimator)]
    poses = (clip.target or clip.driving).poses
    poses = poses.mapped(fit_matrix(poses.size, size), size)
    for index, (generated, truth, mask) in enumerate(zip(result, truths, masks, strict=True)):
        person = tracks = None
        if found is not None:
            target = PersonKeypoints(poses.keypoints[index, 0], poses.scores[index, 0])
            person = person_values(generated, found[index], truth, target, face)
            tracks = person_tracks(found[index], target, size)
        yield FramePair(
            generated_to_form(generated, size, protocol),
            brought_to_form(truth, protocol),
            brought_to_form(mask, protocol, nearest=True),
            person,
            tracks,
        )
