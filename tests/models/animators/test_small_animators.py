"""The small animators that are shipped: they load, animate, and TPC helps those that look at the reference."""

import numpy as np
import pytest

from evaluation.misaligned_clips import MisalignedClips
from inference.animate import animate
from inference.config import SamplingConfig
from metrics.image import psnr
from models.animators.registry import load_pipeline
from models.config import SMALL_ANIMATORS
from tpc import CalibrationConfig

SIDE = 64


@pytest.fixture(scope="module")
def turned():
    clips = MisalignedClips(["rotation"], 2)
    return [clips.clip(name) for name in clips.names]


def animated(pipeline, clip, attach: str):
    config = SamplingConfig(steps=2, guidance_scale=1.0)
    return animate(
        pipeline, clip.reference, clip.driving, config, CalibrationConfig(attach=attach), show_progress=False
    )


@pytest.mark.parametrize("folder", SMALL_ANIMATORS, ids=lambda folder: folder.name)
def test_small_animator(folder, turned):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 25e6
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    gains = []
    for clip in turned:
        shown = animated(pipeline, clip, "add")
        truth, mask = clip.truth((SIDE, SIDE))
        assert shown.plain.shape == shown.calibrated.shape == truth.shape
        gains.append(psnr(shown.calibrated, truth, mask) - psnr(shown.plain, truth, mask))
        assert (animated(pipeline, clip, "replace").calibrated != shown.calibrated).any()
    if folder.name in ("animate_anyone", "magic_animate", "wan_animate"):
        assert np.mean(gains) > 1  # dB
