"""Animate a reference with a driving clip, without and with TPC, and write the result with its comparison."""

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from core.config import VERSION
from core.errors import UserError
from core.files import complete_file, write_json
from data.inputs import Driving, Reference
from data.poses.drawing import FIGURES
from data.poses.faces import crop_faces
from data.transforms import apply_fit, fit_matrix
from data.video.files import VideoReader, write_video
from data.video.lazy import LazyImages
from inference.comparison import comparison_frames, comparison_strip
from inference.config import SamplingConfig, check_model_sizes
from models.attention.recording import AttentionRecording
from models.images import Words
from models.pipeline import AnimationPipeline
from models.sampling import context_windows
from tpc import Calibration, CalibrationConfig, calibrate
from tpc.calibration import Progress
from tpc.export.segments import segment_config
from tpc.silhouettes import draw_silhouettes
from tpc.warping import Framing, continued, mask_pyramid, quad_mask, warp_mask

LARGEST = 16  # times a model's own pixels that a size may have


@dataclass
class Stopwatch:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 3)


@dataclass(frozen=True)
class ModelInputs:
    """What a model is given for one clip; all images are uint8 RGB at its size."""

    reference: np.ndarray  # (H, W, 3)
    poses: np.ndarray  # (f, H, W, 3)
    mask: np.ndarray | None  # (H, W) bool, any person of the reference
    calibration: Calibration | None
    fps: float  # frames per second
    cuts: tuple[int, ...]  # first frames of the clip's shots after the first
    faces: np.ndarray | None = None  # (f, side, side, 3), of the driving person, for models that take them
    words: Words | None = None  # for models that take them


@dataclass(frozen=True)
class Animation:
    """One animated clip; all images are uint8 RGB at the model's size."""

    reference: np.ndarray  # (H, W, 3), the reference as the model gets it
    poses: np.ndarray  # (f, H, W, 3)
    plain: np.ndarray | None  # (f, H, W, 3), the result without TPC; None when it was not asked for
    calibrated: np.ndarray | None  # (f, H, W, 3), the result with TPC; None when it is off
    calibration: Calibration | None  # what TPC did, or None
    fps: float  # frames per second
    cuts: tuple[int, ...] = ()  # first frames of the clip's shots after the first
    attended: Sequence[np.ndarray] = ()  # (f, H, W, 3), the calibrated image of each frame, see `shown_references`

    @property
    def result(self) -> np.ndarray:
        """The animation: with TPC when it is on."""
        return self.plain if self.calibrated is None else self.calibrated

    def columns(self) -> dict[str, Sequence[np.ndarray]]:
        """The columns of the comparison, in order."""
        columns: dict[str, Sequence[np.ndarray]] = {"reference": [self.reference], "pose": self.poses}
        if self.calibration is not None:
            columns["calibrated reference"] = self.attended
        if self.plain is not None:
            columns["without TPC"] = self.plain
        if self.calibrated is not None:
            columns["with TPC"] = self.calibrated
        return columns


def beside_own_size(pipeline: AnimationPipeline, size: tuple[int, int]) -> tuple[float, str]:
    """Pixels of a (width, height) for one of the model's own size, and that size in words."""
    own = pipeline.default_size(size)
    return prod(size) / prod(own), f"the pixels that the model was made for, about {own[0]}x{own[1]}"


def framing(pipeline: AnimationPipeline, reference: Reference, driving: Driving, sampling: SamplingConfig) -> Framing:
    """The frame that `animate` uses."""
    size = pipeline.default_size(driving.size) if sampling.size is None else tuple(sampling.size)
    check_model_sizes(sampling, pipeline.sizes)
    times, own = beside_own_size(pipeline, size)
    if times > LARGEST:
        raise UserError(
            f"size=[{size[0]},{size[1]}] has more than {LARGEST} times {own}; take a smaller one, and upscale=source"
        )
    reference_map = fit_matrix(reference.image.shape[1::-1], size, sampling.reference_fit)
    return Framing(size, fit_matrix(driving.size, size, "cover"), reference_map)


def in_frame(image: np.ndarray, reference_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The reference (h, w, 3) as the model is shown it, a frame of (width, height), its scene painted on around it."""
    beyond = ~quad_mask(reference_map, image.shape[1::-1], size)
    return continued(apply_fit(image, reference_map, size), beyond)


def with_own_start(tpc: CalibrationConfig, pipeline: AnimationPipeline, masked: bool) -> CalibrationConfig:
    """The calibration that begins where the model is best begun, if the preset `best` is left to choose.

    Only with masks of the reference: without, silhouettes are drawn, which cut clothes and hair off its person, and
    frames that begin so stay so.
    """
    if not masked or tpc.start is not None or tpc.preset != "best" or tpc.fill not in (None, "scene"):
        return tpc
    return replace(tpc, start=pipeline.sampling.get("start"))


def for_segments(
    tpc: CalibrationConfig, pipeline: AnimationPipeline, window: int | None, frames: int, persons: int
) -> CalibrationConfig:
    """The calibration for a model of segments: what it leaves open is as one image for many frames wants it.

    `window`: frames of a segment.
    """
    if pipeline.animator.segment_frames is None:
        return tpc
    length, _ = pipeline.default_window(frames, window, None)
    return replace(segment_config(tpc, length, frames, persons), attach=tpc.attach or "replace")


def animate(
    pipeline: AnimationPipeline,
    reference: Reference,  # with poses when `tpc` is given
    driving: Driving,
    sampling: SamplingConfig,
    tpc: CalibrationConfig | None,
    watch: Stopwatch | None = None,
    show_progress: bool = True,
    attention: AttentionRecording | None = None,
) -> Animation:
    """Animate a reference with a driving clip; `attention` records the run that `Animation.result` is of."""
    watch = watch or Stopwatch()
    progress = partial(tqdm, desc="calibrating", disable=not show_progress)
    inputs = model_inputs(pipeline, reference, driving, sampling, tpc, watch, progress)
    return sampled(pipeline, inputs, sampling, watch, show_progress, attention)


def model_inputs(
    pipeline: AnimationPipeline,
    reference: Reference,
    driving: Driving,
    sampling: SamplingConfig,
    tpc: CalibrationConfig | None,
    watch: Stopwatch,
    progress: Progress,
) -> ModelInputs:
    """Images and calibration for `sampled`; computes with no network of the pipeline."""
    if driving.images is None and pipeline.pose_kind not in FIGURES:
        raise UserError(f"the model reads {pipeline.pose_kind} images, which cannot be drawn from keypoints")
    frame = framing(pipeline, reference, driving, sampling)
    size = frame.size
    image = in_frame(reference.image, frame.reference_map, size)
    poses = pose_images(driving, frame.frame_map, size, pipeline.pose_kind)
    faces, side = None, pipeline.animator.face_size
    if side is not None and driving.frames is not None and driving.poses is not None:
        faces = crop_faces(driving.frames, driving.filmed or driving.drawn or driving.poses, side)

    calibration = None
    if tpc is not None:
        frames, persons = driving.poses.frames, reference.poses.persons
        tpc = for_segments(tpc, pipeline, sampling.window_size, frames, persons)
        with watch.stage("calibration"):
            calibration = calibrate(
                reference.image,
                reference.poses,
                driving.poses,
                size,
                with_own_start(tpc, pipeline, reference.masks is not None),
                reference_masks=reference.masks,
                driving_masks=driving.masks,
                frame_map=frame.frame_map,
                reference_map=frame.reference_map,
                cuts=driving.cuts,
                progress=progress,
            )

    mask = None  # (H, W) bool, any person of the reference
    if reference.masks is not None:
        mask = warp_mask(mask_pyramid(reference.masks.any(axis=0)), frame.reference_map, size)
    elif calibration is not None and calibration.persons:
        mask = calibration.reference_masks.any(axis=0)
    elif pipeline.animator.needs_mask and reference.poses is not None:
        mask = warp_mask(mask_pyramid(draw_silhouettes(reference.poses)[0].any(axis=0)), frame.reference_map, size)

    return ModelInputs(image, poses, mask, calibration, driving.fps, driving.cuts, faces)


def sampled(
    pipeline: AnimationPipeline,
    inputs: ModelInputs,
    sampling: SamplingConfig,
    watch: Stopwatch,
    show_progress: bool = True,
    attention: AttentionRecording | None = None,
) -> Animation:
    """The model's animation of its inputs; see `animate`."""

    window = pipeline.default_window(len(inputs.poses), sampling.window_size, sampling.window_overlap)
    segments = pipeline.segments(len(inputs.poses), *window, inputs.cuts)

    def sample(name: str, calibration: Calibration | None, attention: AttentionRecording | None) -> np.ndarray:
        with (
            watch.stage(name),
            tqdm(
                total=pipeline.denoising_steps(sampling.steps, calibration) * len(segments),
                desc=name,
                disable=not show_progress,
            ) as progress,
        ):

            def count_step(pipeline: AnimationPipeline, step: int, timestep: int, tensors: dict) -> dict:
                progress.update()
                return tensors

            return pipeline(
                inputs.reference,
                inputs.poses,
                calibration,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance_scales or sampling.guidance_scale,
                window_size=sampling.window_size,
                window_overlap=sampling.window_overlap,
                shift_windows=sampling.shift_windows,
                passes_at_a_time=sampling.passes_at_a_time,
                generator=torch.Generator().manual_seed(sampling.seed),
                output_type="uint8",
                callback_on_step_end=count_step,
                attention=attention,
                reference_mask=inputs.mask,
                guidance_interval=sampling.guidance_interval,
                solver=sampling.solver,
                cuts=inputs.cuts,
                words=inputs.words,
                faces=inputs.faces,
            ).frames

    calibration, plain, calibrated, attended = inputs.calibration, None, None, ()
    if calibration is None or sampling.compare:
        plain = sample("sampling without TPC", None, attention if calibration is None else None)
    if calibration is not None:
        calibrated = sample("sampling with TPC", calibration, attention)
        attended = shown_references(pipeline, inputs, calibration, window)
    return Animation(inputs.reference, inputs.poses, plain, calibrated, calibration, inputs.fps, inputs.cuts, attended)


def shown_references(
    pipeline: AnimationPipeline, inputs: ModelInputs, calibration: Calibration, window: tuple[int, int]
) -> Sequence[np.ndarray]:
    """The calibrated image that each frame attends to, (f, H, W, 3) uint8: its own, or one for many of a segment."""
    if pipeline.animator.segment_frames is None or not calibration.replaces_reference:
        attended = pipeline.attended_calibration(calibration, *window, inputs.cuts)
        return LazyImages(attended.frames, attended.size, attended.frame_image)
    segments = pipeline.segments(calibration.frames, *window, inputs.cuts)
    of_frame = [number for number, segment in enumerate(segments) for _ in segment.new]

    @lru_cache(maxsize=1)
    def of_segment(number: int) -> np.ndarray:
        image = calibration.segment_image(segments[number].inside)
        return inputs.reference if image is None else image

    return LazyImages(len(of_frame), calibration.size, lambda frame: of_segment(of_frame[frame]))


def sampling_plan(
    pipeline: AnimationPipeline,
    frames: int,
    size: tuple[int, int],
    sampling: SamplingConfig,
    calibrated: bool,
    cuts: Sequence[int] = (),
) -> str:
    """What will be sampled, in a line; `calibrated`: with TPC."""
    window = pipeline.default_window(frames, sampling.window_size, sampling.window_overlap)
    segments = pipeline.animator.segment_frames is not None
    windows = len(
        pipeline.segments(frames, *window, cuts) if segments else context_windows(frames, *window, cuts=cuts)
    )
    scales = pipeline.animator.guidance_scales(sampling.guidance_scales or sampling.guidance_scale)
    parts = 1 + sum(scale != 1 for scale in scales)
    counts = {f"{sampling.steps} steps": sampling.steps}
    counts |= {f"{parts} (guidance {' and '.join(f'{scale:.3g}' for scale in scales)})": parts} if parts > 1 else {}
    word = "segments" if segments else "windows"
    counts |= {f"{windows} {word} of {window[0]} frames": windows} if windows > 1 else {}
    counts |= {"2 (without and with TPC)": 2} if calibrated and sampling.compare else {}
    width, height = size
    asked = sampling.window_size, sampling.window_overlap
    wanted = zip(("window_size", "window_overlap"), asked, window, strict=True)
    rounded = [f"{name}={given} becomes {found}" for name, given, found in wanted if given not in (None, found)]
    passes = f"{' x '.join(counts)} = {prod(counts.values())} passes"
    told = f" ({', '.join(rounded)})" if segments and rounded else ""
    return f"{frames} frames of {width} x {height} pixels; {passes}{told}"


def pose_images(driving: Driving, frame_map: np.ndarray, size: tuple[int, int], kind: str = "OpenPose") -> np.ndarray:
    """Pose images in the model's frame, (f, H, W, 3) uint8: those given, or figures of a kind, of the poses."""
    if driving.images is not None:
        matrix = fit_matrix(driving.images.size, size, "cover")
        return np.stack([apply_fit(image, matrix, size) for image in driving.images])
    poses = (driving.drawn or driving.poses).mapped(frame_map, size)
    return np.stack([FIGURES[kind](k, s, size) for k, s in zip(poses.keypoints, poses.scores, strict=True)])


def upscaled(frames: np.ndarray, source: tuple[int, int]) -> Iterator[np.ndarray]:
    """Frames (h, w, 3) uint8 at a video's (width, height), by Lanczos' filter, a little of the longer side cut off.

    Frames of another shape, which showed the model a part of the video, come at the video's resolution.
    """
    size = frames.shape[2:0:-1]
    scale = min(source[0] / size[0], source[1] / size[1])
    shown = [round(scale * side) for side in size]
    target = tuple(source) if min(shown[0] / source[0], shown[1] / source[1]) > 0.9 else tuple(shown)
    matrix = fit_matrix(size, target, "cover")
    return (apply_fit(frame, matrix, target, enlarging=cv2.INTER_LANCZOS4) for frame in frames)


def generated_by(configuration: dict[str, Any]) -> dict[str, Any]:
    """Metadata of every video: that it is generated, by what and with which settings."""
    return {"generator": f"TPC-Animate {VERSION}", "generated": True, "configuration": configuration}


def settings_line(animation: Animation, configuration: dict[str, Any]) -> str:
    """Size and settings in a line, for the comparison."""
    height, width = animation.reference.shape[:2]
    guidance = configuration["guidance_scales"] or configuration["guidance_scale"]
    words = [f"{width} x {height} pixels", f"{configuration['steps']} steps", f"guidance {guidance}"]
    words += [f"seed {configuration['seed']}"]
    if (calibration := animation.calibration) is not None:
        words += [f"TPC {calibration.config.preset} ({calibration.config.transform})"]
    return ", ".join(words)


def write_animation(
    animation: Animation,
    output: Path,
    configuration: dict[str, Any],
    watch: Stopwatch,
    sound: VideoReader | None = None,
    upscale_to: tuple[int, int] | None = None,
) -> None:
    """Write animation.mp4, comparison.mp4, comparison.png and result.json; the last one when all is there.

    `sound`: the video whose sound both videos carry. `upscale_to`: (width, height) for `upscaled`.
    """
    settings, fps = generated_by(configuration), animation.fps
    columns = animation.columns()
    result = animation.result if upscale_to is None else upscaled(animation.result, upscale_to)
    with watch.stage("writing"):
        write_video(output / "animation.mp4", result, fps, settings, sound=sound)
        write_video(output / "comparison.mp4", comparison_frames(columns), fps, settings, sound=sound)
        with complete_file(output / "comparison.png") as path:
            Image.fromarray(comparison_strip(columns, caption=settings_line(animation, configuration))).save(path)
    calibration = animation.calibration
    result = {
        "generated": True,
        "configuration": configuration,
        "versions": {"tpc-animate": VERSION, "torch": torch.__version__, "python": platform.python_version()},
        "seed": configuration["seed"],
        "frames": len(animation.poses),
        "size": list(animation.poses.shape[2:0:-1]),
        "fps": animation.fps,
        "cuts": list(animation.cuts),
        "seconds": watch.seconds,
        "calibration": calibration.summary() if calibration is not None else None,
    }
    write_json(output / "result.json", result)
