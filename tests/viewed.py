"""A recorded run of the smallest networks on a rendered pair, for tests of what is drawn from it."""

from pathlib import Path

from data.inputs import Driving, Reference, load_driving, load_reference
from evaluation.attention.recorded_runs import RecordedRun, record_both
from inference.config import SamplingConfig
from models.attention.recording import AttentionConfig
from models.pipeline import AnimationPipeline
from tests.clips import save_rendered_pair
from tpc import CalibrationConfig

SAMPLING = SamplingConfig(size=[32, 32], num_frames=3, steps=3, guidance_scale=1.0)


def rendered_inputs(folder: Path) -> tuple[Reference, Driving]:
    """A rendered person and clip with exact poses and masks."""
    save_rendered_pair(folder)
    reference = load_reference(
        folder / "reference.png", folder / "reference.npz", folder / "reference_mask.png", estimator=None
    )
    driving = load_driving(
        folder / "driving.mp4", folder / "driving.npz", folder / "driving_masks", lambda: None, max_frames=3
    )
    return reference, driving


def recorded_run(
    pipeline: AnimationPipeline,
    inputs: tuple[Reference, Driving],
    config: AttentionConfig | None = None,
    keypoints_only: bool = False,
) -> RecordedRun:
    """Both sides of three frames in three steps."""
    return record_both(pipeline, *inputs, SAMPLING, CalibrationConfig(), config, keypoints_only)
