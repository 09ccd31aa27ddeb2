"""An image animated with a clip, without and with TPC, and the recorded attention of both results.

run = record_both(pipeline, *load_inputs("photo.png", "dance.mp4", sampling), sampling, CalibrationConfig())
run.calibrated.recorded.query_map(layer, (64.0, 40.0), step=5, frame=0)
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from core.errors import UserError
from data.config import PoseConfig
from data.inputs import Driving, Reference, load_driving, load_reference
from data.poses.poses import open_estimator
from data.transforms import apply_fit
from evaluation.attention.maps import body_points
from inference.animate import Animation, Stopwatch, animate, framing
from inference.config import SamplingConfig
from models.attention.maps import RecordedAttention
from models.attention.recording import AttentionConfig, AttentionRecording
from models.pipeline import AnimationPipeline
from tpc import Calibration, CalibrationConfig


@dataclass(frozen=True)
class RecordedSide:
    frames: np.ndarray  # (f, H, W, 3) uint8 RGB
    recorded: RecordedAttention  # heads averaged
    calibration: Calibration | None  # as frames attend to its images; None: the result is without TPC


@dataclass(frozen=True)
class RecordedRun:
    """Both results of the same image, clip and noise."""

    reference: np.ndarray  # (H, W, 3) uint8 RGB, as the model gets it
    poses: np.ndarray  # (f, H, W, 3), the pose images
    driving: np.ndarray  # (f, H, W, 3), the clip in the model's frame; the pose images where only poses were given
    keypoints: np.ndarray  # (f, p, 2), see `evaluation.attention.maps.body_points`
    plain: RecordedSide  # without TPC
    calibrated: RecordedSide  # with TPC

    @property
    def sides(self) -> dict[str, RecordedSide]:
        """Both results by their names in figures."""
        return {"without TPC": self.plain, "with TPC": self.calibrated}


def load_inputs(
    image: str | Path, clip: str | Path, sampling: SamplingConfig, pose: PoseConfig | None = None
) -> tuple[Reference, Driving]:
    """An image and a clip with estimated poses and masks."""
    pose = pose or PoseConfig()
    estimator = cache(lambda: open_estimator(pose))
    reference = load_reference(image, None, None, estimator, pose.max_persons)
    frames = sampling.num_frames, sampling.stride
    return reference, load_driving(clip, None, None, estimator, pose.max_persons, *frames, pose.smoothing)


def record_both(
    pipeline: AnimationPipeline,
    reference: Reference,
    driving: Driving,
    sampling: SamplingConfig,
    tpc: CalibrationConfig,
    config: AttentionConfig | None = None,  # None: every step and layer, heads averaged
    keypoints_only: bool = False,  # record the persons' keypoints, under their names, in place of every token
    watch: Stopwatch | None = None,
    show_progress: bool = False,
) -> RecordedRun:
    """Animate without and with TPC and record the attention of both.

    Where `tpc.start` is left open, both begin from noise, so that their steps are at the same noise levels; where
    `tpc.attach` is, calibrated images stand beside the reference.
    """
    tpc = replace(tpc, start=-1 if tpc.start is None else tpc.start, attach=tpc.attach or "add")
    config = config or AttentionConfig(mean=["heads"])
    alone = replace(sampling, compare=False)
    frame = framing(pipeline, reference, driving, sampling)
    names, keypoints = body_points(driving.poses, frame.frame_map, frame.size)
    asked = (keypoints, names) if keypoints_only else ()

    def side(tpc: CalibrationConfig | None) -> tuple[Animation, RecordedSide]:
        with AttentionRecording(config, *asked) as recording:
            animation = animate(pipeline, reference, driving, alone, tpc, watch, show_progress, recording)
        calibration = animation.calibration
        if calibration is not None:
            window = alone.window_size, alone.window_overlap
            calibration = pipeline.attended_calibration(calibration, *window, animation.cuts)
        return animation, RecordedSide(animation.result, recording.result, calibration)

    animation, plain = side(None)
    shown = animation.poses
    if driving.frames is not None:
        shown = np.stack([apply_fit(image, frame.frame_map, frame.size) for image in driving.frames])
    return RecordedRun(animation.reference, animation.poses, shown, keypoints, plain, side(tpc)[1])


def affordable_steps(
    pipeline: AnimationPipeline, reference: Reference, driving: Driving, sampling: SamplingConfig, limit_bytes: int
) -> list[int]:
    """The most denoising steps, spread evenly to the last one, that `record_both` can keep of every query token."""
    size = framing(pipeline, reference, driving, sampling).size
    run = pipeline.attention_run(driving.poses.frames, size, sampling.steps, window_size=sampling.window_size)
    both = run, replace(run, images=1 + reference.poses.persons)
    for count in range(sampling.steps, 0, -1):
        steps = spread_steps(sampling.steps, count)
        recording = AttentionRecording(AttentionConfig(steps=steps, mean=["heads"]))
        needed = sum(recording.estimate(run).total_bytes for run in both)
        if needed <= limit_bytes:
            return steps
    raise UserError(
        f"recording one step of {driving.poses.frames} frames would take {needed / 2**20:.0f} MiB, "
        f"the limit is {limit_bytes / 2**20:.0f}; use fewer frames"
    )


def spread_steps(steps: int, count: int) -> list[int]:
    """`count` of a run's steps, evenly spread; the last one is always there."""
    return [] if count < 1 else sorted({round(n) for n in np.linspace(steps - 1, 0, count)})
