"""Animations of clips under several conditions and seeds, measured as they are made."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from core.config import config_dict
from core.errors import UserError
from core.files import output_folder, write_json
from data.poses.poses import PoseConfig, PoseEstimator, open_estimator
from data.transforms import fit_matrix
from evaluation.clips import EvaluationClip, with_pose_noise
from evaluation.jobs import claim_output, remove_parts, run_parts
from evaluation.measure import FramePair, measure_clip
from evaluation.metric_suite import MetricSuite
from evaluation.persons import SeenPerson, person_values, seen_persons
from evaluation.summary import Number, summarise
from inference.animate import Animation, SamplingConfig, animate
from metrics.protocols import Protocol, brought_to_form, generated_to_form
from models.animators.registry import choose_device, load_pipeline
from models.pipeline import AnimationPipeline
from tpc import CalibrationConfig

PERSON_PSNR = "foreground_psnr"
PERSON_PSNR_LABEL = "PSNR of the person (dB)"  # of axes
WITHOUT, WITH = "without TPC", "with TPC"  # labels
WHERE = ("output", "device", "keep_parts", "weights", "strips")
EXTENDABLE = (
    *("seeds", "clips", "angles", "scales", "kinds", "presets", "variants"),
    *("transforms", "propagations", "subsets", "attachments", "families", "few_steps"),
)


@dataclass
class TrialsConfig:
    """How trials are run.

    seeds: of the initial noise; numbers are means and deviations over them.
    device: "auto", "cpu", "cuda", ...; dtype: "auto" (bfloat16 on CUDA, float32 elsewhere), "float32", ...
    keep_parts: keep the values and features of every trial when the results are written, to add seeds or clips later.
    persons: estimate poses in the results, for the error of the pose and the colours of body parts.
    pose_noise: standard deviation of errors added to the keypoints that the animator gets, in parts of the person's
        height. Results are measured against the exact ones; attention is looked up at those with errors.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    device: str = "auto"
    dtype: str = "auto"
    keep_parts: bool = True
    persons: bool = False
    pose: PoseConfig = field(default_factory=PoseConfig)
    pose_noise: float = 0.0


@dataclass(frozen=True)
class Condition:
    """One way of animating.

    Attributes:
        name: fit for a file name; different from those of the other conditions of a run.
        model: pipeline folder.
        tpc: None runs without calibration.
    """

    name: str
    model: str
    tpc: CalibrationConfig | None = field(compare=False)


@dataclass(frozen=True)
class Trial:
    """One clip under one condition with one seed."""

    clip: str
    condition: Condition
    seed: int

    @property
    def name(self) -> str:
        """Of its part."""
        return f"{self.condition.name}--{self.clip}--seed{self.seed}"


# Animates the clip of a trial; may write more about it to the folder of its measurements.
Sampler = Callable[[AnimationPipeline, EvaluationClip, SamplingConfig, Trial, Path], Animation]


def plain_sampler(
    pipeline: AnimationPipeline, clip: EvaluationClip, sampling: SamplingConfig, trial: Trial, folder: Path
) -> Animation:
    """The animation and nothing else."""
    return animate(pipeline, clip.reference, clip.driving, sampling, trial.condition.tpc, show_progress=False)


def all_trials(clips: Sequence[str], conditions: Sequence[Condition], seeds: Sequence[int]) -> list[Trial]:
    """Every clip under every condition with every seed; trials of one model and of one clip are neighbours.

    Raises:
        UserError: no clip or no seed.
    """
    if not clips or not seeds:
        raise UserError(f"nothing to do: {len(clips)} clips, seeds={list(seeds)}")
    models = list(dict.fromkeys(condition.model for condition in conditions))
    return [
        Trial(clip, condition, seed)
        for model in models
        for clip in clips
        for condition in conditions
        if condition.model == model
        for seed in seeds
    ]


def run_trials(
    trials: Sequence[Trial],
    clip_of: Callable[[str], EvaluationClip],
    config: TrialsConfig,
    sampling: SamplingConfig,
    metric_suite: MetricSuite,
    output: Path,
    state: PartialState,
    stamps: Callable[[str], Any] | None = None,
    sampler: Sampler = plain_sampler,
) -> dict[Trial, Path]:
    """Animate and measure the trials that are not done yet; the folder of each trial's measurements.

    Args:
        clip_of: a clip by name.
        stamps: what tells whether a clip's files have changed, by name; None when there are no files.
        sampler: animates.
    """
    by_name = {trial.name: trial for trial in trials}
    place, kind = choose_device(config.device, config.dtype, state.local_process_index)
    estimator = open_estimator(config.pose) if config.persons else None

    @lru_cache(maxsize=1)
    def pipeline(model: str) -> AnimationPipeline:
        loaded = load_pipeline(model, kind).to(place)
        loaded.set_progress_bar_config(disable=True)
        return loaded

    @lru_cache(maxsize=1)
    def clip(name: str) -> EvaluationClip:
        return clip_of(name)

    def work(name: str, folder: Path) -> None:
        trial = by_name[name]
        settings = replace(sampling, seed=trial.seed, compare=False)
        subject = clip(trial.clip)
        shown = subject
        if config.pose_noise:  # the same errors under every condition
            rng = np.random.default_rng([trial.seed, *trial.clip.encode()])
            shown = with_pose_noise(subject, config.pose_noise, rng)
        animation = sampler(pipeline(trial.condition.model), shown, settings, trial, folder)
        if animation.calibration is not None:
            write_json(folder / "calibration.json", animation.calibration.summary())
        pairs = frame_pairs_of(animation.result, subject, metric_suite.protocol, estimator)
        measure_clip(pairs, metric_suite, folder)

    inputs = None if stamps is None else {trial.name: stamps(trial.clip) for trial in trials}
    folders = run_parts(list(by_name), work, output, state, "animating", inputs)
    return dict(zip(trials, folders, strict=True))


def run_task(
    task: str,
    config: Any,
    conditions: Sequence[Condition],
    names: Sequence[str],
    clip_of: Callable[[str], EvaluationClip],
    metric_suite: MetricSuite,
    state: PartialState,
    write: Callable[[dict[Trial, Path], Path], None],
    stamps: Callable[[str], Any] | None = None,
    further: Sequence[Trial] = (),
    sampler: Sampler = plain_sampler,
) -> None:
    """Every named clip under every condition with every seed, measured; one process then writes the results.

    Args:
        config: of the task, a `TrialsConfig` with `output` and `sampling`.
        write: gets the folder of each trial's measurements, and the output folder.
        clip_of, stamps, sampler: see `run_trials`.
        further: trials beside these, of the same conditions.

    Raises:
        UserError: no clip or no seed, pose noise below zero, or an output folder that another run began.
    """
    if config.pose_noise < 0:
        raise UserError(f"pose_noise={config.pose_noise} must not be negative")
    trials = [*all_trials(names, conditions, config.seeds), *further]
    output = output_folder(config.output)
    claim_output(output, trials_identity(task, config, conditions), state)
    folders = run_trials(trials, clip_of, config, config.sampling, metric_suite, output, state, stamps, sampler)
    if state.is_main_process:
        write(folders, output)
        if not config.keep_parts:
            remove_parts(output)
    state.wait_for_everyone()


def trials_identity(task: str, config: Any, conditions: Sequence[Condition]) -> dict[str, Any]:
    """What decides the numbers of a trial: the configuration but for where it runs, and the models' weights.

    What only adds trials is left out, so a finished run goes on when there are more seeds or clips.
    """
    settings = {key: value for key, value in config_dict(config).items() if key not in (*WHERE, *EXTENDABLE)}
    models = {condition.model: _weights_digest(Path(condition.model)) for condition in conditions}
    return {"task": task} | settings | {"weights of models": models}


def _weights_digest(folder: Path) -> str:
    """A digest of names, sizes and first megabytes of a pipeline's files, enough to notice a retrained model."""
    seen = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin", ".json")):
        with path.open("rb") as file:
            seen.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode() + file.read(2**20))
    return seen.hexdigest()[:16]


def numbers_by_seed(
    folders: dict[Trial, Path], metric_suite: MetricSuite, seeds: Sequence[int], chosen: Callable[[Trial], bool]
) -> list[dict[str, Number]]:
    """For every seed all measures over the chosen trials, pooled over clips."""
    return [
        summarise([folder for trial, folder in folders.items() if trial.seed == seed and chosen(trial)], metric_suite)
        for seed in seeds
    ]


def frame_pairs_of(
    result: np.ndarray, clip: EvaluationClip, protocol: Protocol, estimator: PoseEstimator | None
) -> Iterator[FramePair]:
    """The animation beside the truth; persons are compared before the protocol crops and resizes."""
    size = (result.shape[2], result.shape[1])
    truths, masks = clip.truth(size)
    found = [None] * len(result) if estimator is None else [person for _, person in seen_persons(result, estimator)]
    poses = clip.driving.poses.mapped(fit_matrix(clip.driving.poses.size, size), size)
    for number, (generated, truth, mask) in enumerate(zip(result, truths, masks, strict=True)):
        person = None
        if found[number] is not None:
            target = SeenPerson(poses.keypoints[number, 0], poses.scores[number, 0])
            person = person_values(generated, found[number], truth, target)
        yield FramePair(
            generated_to_form(generated, size, protocol),
            brought_to_form(truth, protocol),
            brought_to_form(mask, protocol, nearest=True),
            person,
        )
