"""What `infer.py` does with pairs of a reference and a driving video, one after the other or side by side."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
from tqdm import tqdm

from core.config import check_config, config_dict, save_config
from core.files import complete_folder
from data.inputs import Driving, Reference, load_driving, load_reference
from data.poses.poses import open_estimator
from inference.animate import (
    Animation,
    ModelInputs,
    Stopwatch,
    beside_own_size,
    framing,
    model_inputs,
    sampled,
    sampling_plan,
    write_animation,
)
from inference.config import InferConfig, SamplingConfig
from inference.words import words_of
from models.pipeline import AnimationPipeline
from tpc.calibration import Progress
from tpc.retargeting import retargeted

READING, CALIBRATING = partial(tqdm, desc="estimating poses", unit="frame"), partial(tqdm, desc="calibrating")
LARGER = 1.5  # times a model's own pixels that a size may have without a note


@dataclass(frozen=True)
class Pair:
    """A reference and a driving video as they were read."""

    job: InferConfig
    reference: Reference
    driving: Driving
    plan: tuple[str, ...]  # lines about what will be done
    watch: Stopwatch


def animate_pairs(jobs: Sequence[InferConfig], pipeline: AnimationPipeline, prefetch: bool = False) -> None:
    """Write everything that `infer.py` writes about each pair.

    With `prefetch` a thread reads and calibrates the next pair while the model animates, and another writes the last
    one. Results and errors are the same, those of a pair before those of the next.
    """
    if prefetch and jobs:
        animate_side_by_side(jobs, pipeline)
        return
    for job in jobs:
        animate_pair(job, pipeline)


def animate_pair(job: InferConfig, pipeline: AnimationPipeline) -> None:
    pair = read_pair(job, pipeline)
    say(pair.plan)
    say(write_pair(pair, sampled(pipeline, calibrated(pair, pipeline), pair.job, pair.watch)))


def animate_side_by_side(jobs: Sequence[InferConfig], pipeline: AnimationPipeline) -> None:
    stop = Event()

    def silently(frames: Iterable) -> Iterator:
        for frame in frames:
            if stop.is_set():  # nobody waits for the result any more
                raise CancelledError
            yield frame

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:

        def start(job: InferConfig, *progress: Progress) -> tuple[Future[Pair], Future[ModelInputs]]:
            reading = reader.submit(read_pair, job, pipeline, *progress)
            return reading, reader.submit(lambda: calibrated(reading.result(), pipeline, *progress))

        written: Callable[[], list[str]] = list  # waits for the pair before; nothing at first
        try:
            reading, calibrating = start(jobs[0])
            for following in [*jobs[1:], None]:
                try:
                    pair = reading.result()
                    say(pair.plan)
                    inputs = calibrating.result()
                    if following is not None:
                        reading, calibrating = start(following, silently)
                    animation = sampled(pipeline, inputs, pair.job, pair.watch)
                finally:
                    say(written())
                written = writer.submit(write_pair, pair, animation).result
            say(written())
        finally:
            stop.set()


def say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def read_pair(
    job: InferConfig,
    pipeline: AnimationPipeline,
    progress: Progress = READING,
) -> Pair:
    """Images and poses of a pair; uses no network of the pipeline."""
    job, watch = with_defaults(job, pipeline), Stopwatch()
    estimator = partial(open_estimator, job.pose)
    masked = pipeline.animator_cls.needs_mask and not job.reference_mask
    with watch.stage("reading and poses"):
        reference = load_reference(
            job.reference,
            job.reference_poses,
            job.reference_mask,
            estimator if job.tpc.enabled or masked or job.pose.retarget != "off" else None,
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
            poses_wanted=job.tpc.enabled or shows_faces(job, pipeline),
            cuts=job.cuts,
            progress=progress,
        )
        frame = framing(pipeline, reference, driving, job)
        reference_map = np.linalg.solve(frame.frame_map, frame.reference_map)
        driving, moved = retargeted(reference, driving, job.pose, job.tpc, reference_map)
    size = frame.size
    frames = len(driving.images) if driving.images else driving.poses.frames
    own = size_note(pipeline, size), *unused_notes(pipeline, job)
    notes = filter(None, (*own, driving.note(job.stride, job.num_frames), *moved))
    plan = sampling_plan(pipeline, frames, size, job, job.tpc.enabled, driving.cuts)
    plan = f"{plan}; results in {Path(job.output)}"
    return Pair(job, reference, driving, (*(f"note: {note}" for note in notes), plan), watch)


def calibrated(pair: Pair, pipeline: AnimationPipeline, progress: Progress = CALIBRATING) -> ModelInputs:
    tpc = pair.job.tpc if pair.job.tpc.enabled else None
    inputs = model_inputs(pipeline, pair.reference, pair.driving, pair.job, tpc, pair.watch, progress)
    return replace(inputs, words=words_of(pair.job))


def write_pair(pair: Pair, animation: Animation) -> list[str]:
    """Write the results, and return lines that say where they are."""
    job, watch, calibration = pair.job, pair.watch, animation.calibration
    output = Path(job.output)
    save_config(job, output / "config.yaml")
    lines = []
    if calibration is not None:
        with watch.stage("writing"), complete_folder(output / "calibration") as folder:
            calibration.write(folder)
        lines.append(f"calibration: {calibration.outcome()}; images in {output / 'calibration'}")
    upscale_to = pair.driving.size if job.upscale == "source" else None
    write_animation(animation, output, config_dict(job), watch, pair.driving.sound, upscale_to)
    return [
        *lines,
        f"animation:  {output / 'animation.mp4'}",
        f"comparison: {output / 'comparison.png'} and {output / 'comparison.mp4'}",
        f"settings:   {output / 'config.yaml'}, with times in {output / 'result.json'}",
        *(f"note: {note}" for note in (calibration.notes() if calibration is not None else ())),
    ]


def with_defaults(job: InferConfig, pipeline: AnimationPipeline) -> InferConfig:
    """The configuration with the model's steps and guidance where it has none."""
    own = {"steps": SamplingConfig.steps, "guidance_scale": SamplingConfig.guidance_scale} | pipeline.sampling
    wanted = {name: own[name] for name in ("steps", "guidance_scale") if getattr(job, name) is None}
    job = replace(job, **wanted)
    check_config(job)
    return job


def shows_faces(job: InferConfig, pipeline: AnimationPipeline) -> bool:
    """The model takes faces, and they are cut out of the driving video by poses that are given."""
    return pipeline.animator.face_size is not None and None not in (job.driving, job.driving_poses)


def unused_notes(pipeline: AnimationPipeline, job: InferConfig) -> list[str]:
    """What was given and changes nothing."""
    notes = []
    scales = pipeline.animator.guidance_scales(job.guidance_scales or job.guidance_scale)
    if job.negative_prompt is not None and all(scale == 1 for scale in scales):
        notes.append("negative_prompt: of no use without guidance; guidance_scale=3 leads away from it")
    poses_unread = job.pose_images is not None and not job.tpc.enabled
    if poses_unread and pipeline.animator.face_size is not None and job.driving and not shows_faces(job, pipeline):
        notes.append("driving: the face is not shown to the model, as nothing says where it is; driving_poses= does")
    given = {
        "tpc.propagation": job.tpc.propagation is not None,
        "tpc.groups": job.tpc.groups is not None,
        "shift_windows": job.shift_windows,
        "passes_at_a_time": job.passes_at_a_time > 1,
    }
    unused = [name for name, is_given in given.items() if is_given]
    if unused and pipeline.animator.segment_frames is not None:
        notes.append(f"{', '.join(unused)}: of no use to a model that animates in segments")
    return notes


def size_note(pipeline: AnimationPipeline, size: tuple[int, int]) -> str | None:
    """A warning about a size (width, height) far beyond what the model was trained on."""
    times, own = beside_own_size(pipeline, size)
    if times <= LARGER:
        return None
    return f"size={size[0]}x{size[1]} has {times:.1f} times {own}; people may come out doubled or blurred"
