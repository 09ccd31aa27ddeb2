"""Pipelines of the smallest networks of every kind, and inputs for them."""

from functools import cache

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from models.animators.registry import animator_class
from models.pipeline import AnimationPipeline
from tests.models.animators.test_animators import calibration
from tests.networks import TINY
from tpc import Calibration
from training.build import make_pipeline
from training.config import NoiseConfig

SIZE, LATENTS, FRAMES = (32, 24), (6, 8), 4


@cache
def small_pipeline(kind: str, temporal: bool = False) -> AnimationPipeline:
    """Every parameter random, so that no path is a no-op; not to be changed.

    Args:
        kind: of `models.animators.registry.ANIMATORS`.
        temporal: with what the stage of clips adds.
    """
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    model = animator_class(kind).small(TINY, 4, 8)
    if temporal:
        model.prepare_stage("motion")
    for parameter in model.parameters():
        if parameter.numel() and parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.05)
    pipeline = make_pipeline(vae.eval(), model.eval(), NoiseConfig())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def images() -> dict[str, np.ndarray]:
    """Arguments of a pipeline: reference, poses, mask of the reference."""
    draw = np.random.default_rng(0)
    mask = np.zeros(SIZE[::-1], bool)
    mask[4:20, 10:20] = True
    return {
        "reference": draw.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8),
        "poses": draw.integers(0, 256, (FRAMES, *SIZE[::-1], 3), dtype=np.uint8),
        "reference_mask": mask,
    }


@cache
def calibrated(attach: str) -> Calibration:
    """For `images`; nobody is calibrated in the first frame."""
    return calibration(attach)


def sample(pipeline: AnimationPipeline, **arguments) -> Tensor:
    """Latents of two guided steps, if nothing else is asked for."""
    arguments = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent", **arguments}
    return pipeline(**images(), generator=torch.Generator().manual_seed(0), **arguments).frames
