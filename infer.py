"""Animate an image with a driving video, with and without test-time Procrustes calibration.

    python infer.py                                                          the shipped samples, see `make demo`
    python infer.py reference=photo.png driving=dance.mp4 output=outputs/run1 [key=value ...]
    python infer.py reference=... driving=... steps=10 solver=dpm++            fewer steps: docs/speed.md
    accelerate launch infer.py pairs=list.jsonl output=outputs/many          a line {"reference": ..., "driving": ...,
                                                                             "output": ...} each; finished ones skipped
Writes to `output`:
    animation.mp4    the result                 comparison.mp4, comparison.png    reference | pose | calibrated
    calibration/     calibration.json, images   reference | result without TPC | result with TPC
    config.yaml      resolved configuration     result.json    configuration, versions, seed, seconds, summary of TPC
"""

import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from core.config import check_choice, config_dict, load_config, save_config
from core.errors import UserError, run_command
from core.files import complete_folder, existing_file, output_folder, read_text
from core.processes import choose_device, process_state
from data.inputs import SAMPLES, load_driving, load_reference
from data.poses.poses import PoseConfig, open_estimator
from inference.animate import SamplingConfig, Stopwatch, animate, write_animation
from models.animators.registry import SHIPPED_MODEL, load_pipeline
from models.pipeline import AnimationPipeline
from tpc import CalibrationConfig


@dataclass
class TPCOptions(CalibrationConfig):
    """Calibration, which `enabled` switches on."""

    enabled: bool = True


@dataclass
class InferConfig(SamplingConfig):
    """Inputs, model and calibration; `SamplingConfig` has everything about sampling."""

    reference: str | None = None  # image; without it and `driving`: the shipped samples
    driving: str | None = None  # video
    output: str = "outputs/demo"
    pairs: str | None = None  # file with a JSON object a line that overrides any of `PAIR_KEYS`
    model: str | None = None  # saved pipeline folder; null: the shipped small model
    lora: str | None = None  # folder of `train.py lora.export=separate`; the model folder's own `lora` needs no name
    lora_scale: float = 1.0  # weight of the adapters; 1 as trained
    reference_poses: str | None = None
    driving_poses: str | None = None
    # Video or folder of pose images as the model takes them, one for each driving frame: DensePose for MagicAnimate,
    # which needs them; null: OpenPose figures are drawn. Without TPC they are enough.
    pose_images: str | None = None
    reference_mask: str | None = None
    driving_masks: str | None = None
    upscale: str | None = None  # "source" brings animation.mp4 to the driving video's size
    cuts: list[int] | None = None  # first frames of new shots, counted as the results'; null: found, []: none
    device: str = "auto"  # or "cpu", "cuda", ...
    dtype: str = "auto"  # bfloat16 on CUDA, float32 elsewhere; or "float32", ...
    pose: PoseConfig = field(default_factory=PoseConfig)
    tpc: TPCOptions = field(default_factory=TPCOptions)

    def check(self) -> None:
        super().check()
        check_choice(self, "upscale", (None, "source"))


PAIR_KEYS = ("reference", "driving", "output", "reference_poses", "driving_poses", "pose_images")
PAIR_KEYS += ("reference_mask", "driving_masks")


def jobs_of(config: InferConfig) -> list[InferConfig]:
    """One configuration for each pair: those of the list, the given one, or the shipped samples."""
    if config.pairs is not None:
        return listed_jobs(config)
    if any((config.reference, config.driving, config.driving_poses, config.pose_images)):
        return [config]
    # A rendered person, turned and small, and a photograph.
    samples, driving = (SAMPLES / "rendered.png", SAMPLES / "photo.jpg"), str(SAMPLES / "dance.mp4")
    outputs = [str(Path(config.output) / file.stem) for file in samples]
    return [
        replace(config, reference=str(file), driving=driving, output=output)
        for file, output in zip(samples, outputs, strict=True)
    ]


def listed_jobs(config: InferConfig) -> list[InferConfig]:
    jobs = []
    path = existing_file(config.pairs, "pairs")
    try:
        lines = read_text(path).splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"pairs={path} is not text in UTF-8: {error}") from None
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
        except ValueError:
            raise UserError(f"pairs={path}, line {row}: not valid JSON") from None
        unknown = set(pair) - set(PAIR_KEYS) if isinstance(pair, dict) else {"the line"}
        if unknown:
            raise UserError(f"pairs={path}, line {row}: {sorted(unknown)[0]} is none of {', '.join(PAIR_KEYS)}")
        for key, value in pair.items():
            if not isinstance(value, str | None):
                raise UserError(f"pairs={path}, line {row}: {key}={value!r} is not text; give a path in quotes")
        pair["output"] = pair.get("output") or str(Path(config.output) / f"{row:04d}")
        jobs.append(replace(config, pairs=None, **pair))
    if not jobs:
        raise UserError(f"pairs={path} holds no line")
    if len({job.output for job in jobs}) < len(jobs):
        raise UserError(f"pairs={path}: two lines have the same output")
    return jobs


def check_inputs(job: InferConfig) -> None:
    """Refuse missing inputs, as far as they are known before the model is loaded."""
    if job.reference is None:
        raise UserError("reference= is required beside driving=")
    existing_file(job.reference, "reference")
    if job.driving is None and job.driving_poses is None:
        if job.pose_images is None:
            raise UserError("driving= is required beside reference=")
        if job.tpc.enabled:
            raise UserError("TPC needs driving= or driving_poses= beside pose_images=; tpc.enabled=false does not")
    output_folder(job.output)


def run(job: InferConfig, pipeline: AnimationPipeline) -> None:
    output, watch = Path(job.output), Stopwatch()
    estimator = partial(open_estimator, job.pose)
    masked = pipeline.animator_cls.needs_mask and not job.reference_mask
    with watch.stage("reading and poses"):
        reference = load_reference(
            job.reference,
            job.reference_poses,
            job.reference_mask,
            estimator if job.tpc.enabled or masked else None,
            job.pose.max_persons,
        )
        driving = load_driving(
            job.driving,
            job.driving_poses,
            job.driving_masks,
            estimator,
            job.pose.max_persons,
            job.num_frames,
            job.stride,
            job.pose.smoothing,
            images=job.pose_images,
            poses_wanted=job.tpc.enabled,
            cuts=job.cuts,
        )
    animation = animate(pipeline, reference, driving, job, job.tpc if job.tpc.enabled else None, watch)
    save_config(job, output / "config.yaml")
    if animation.calibration is not None:
        with watch.stage("writing"), complete_folder(output / "calibration") as folder:
            animation.calibration.write(folder)
    upscale_to = driving.size if job.upscale == "source" else None
    write_animation(animation, output, config_dict(job), watch, driving.sound, upscale_to)
    if animation.calibration is not None:
        print(f"calibration: {animation.calibration.outcome()}")
    print(f"animation:  {output / 'animation.mp4'}")
    print(f"comparison: {output / 'comparison.png'} and {output / 'comparison.mp4'}")
    for note in animation.calibration.notes() if animation.calibration is not None else ():
        print(f"note: {note}")


def main(arguments: list[str]) -> None:
    config = load_config(InferConfig, arguments)
    state = process_state(config.device)
    jobs = jobs_of(config)
    for job in jobs:
        check_inputs(job)
    device, dtype = choose_device(config.device, config.dtype, state.local_process_index)
    pipeline = load_pipeline(config.model or SHIPPED_MODEL, dtype, config.lora, config.lora_scale).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for job in jobs:
        if job.pose_images is None and pipeline.pose_kind != "OpenPose":
            kind = f"model={job.model} reads {pipeline.pose_kind} images"
            raise UserError(f"pose_images= is required, a video or a folder of images: {kind}")
    with state.split_between_processes(jobs) as mine:
        for job in mine:
            if config.pairs is not None and (Path(job.output) / "result.json").is_file():
                continue  # finished by an earlier run
            run(job, pipeline)


if __name__ == "__main__":
    run_command(main)
