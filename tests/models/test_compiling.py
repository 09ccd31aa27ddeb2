"""Compiled networks: one graph for each kind of call of a run, whatever the step and window, and the same results."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from core.errors import UserError
from models.animators.registry import animator_class
from models.compiling import compile_networks
from tests.models.test_pipeline import standing_poses
from tests.networks import TINY
from tests.published import small_vae
from tpc import CalibrationConfig, calibrate
from training.build import make_pipeline
from training.config import NoiseConfig

SIZE = (32, 28)  # not a multiple of what the UNets halve it by
FRAMES = 10  # 3 windows
IMAGES = 11  # of the reference net, more than it encodes at a time


@pytest.mark.slow  # torch traces thousands of operations
@pytest.mark.parametrize(
    ("kind", "sizes", "guidance", "count"),
    [
        # reference net, and denoising UNet with and without images
        ("animate_anyone", {"attention": ["none", "both"]}, 2.0, 3),
        # the reference net runs at every step
        ("magic_animate", {"block_out_channels": [16]}, 1.0, 2),
    ],
)
def test_steps_and_windows_share_their_graphs(kind, sizes, guidance, count):
    vae = small_vae()  # seeds what follows
    model = animator_class(kind).small(replace(TINY, **sizes), 4, 8).eval()
    for parameter in model.parameters():
        if parameter.numel() and parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    pipeline = make_pipeline(vae, model, NoiseConfig())
    pipeline.set_progress_bar_config(disable=True)
    draw = np.random.default_rng(0)
    frame_map = np.array([[0.375, 0, 4], [0, 0.375, 0], [0, 0, 1]])
    calibration = calibrate(
        draw.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        standing_poses(1),
        standing_poses(FRAMES, offset=2),
        SIZE,
        CalibrationConfig(),
        frame_map=frame_map,
        reference_map=frame_map,
    )
    assert 1 + len(calibration.used(1)) == IMAGES
    images = draw.integers(0, 256, (1 + FRAMES, *SIZE[::-1], 3), dtype=np.uint8)

    def run() -> torch.Tensor:
        return pipeline(
            images[0],
            images[1:],
            calibration,
            num_inference_steps=4,
            guidance_scale=guidance,
            window_size=4,
            window_overlap=1,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames

    expected, graphs = run(), []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compile_networks(pipeline.animator, backend=backend)  # an error where a graph would break
    torch.testing.assert_close(run(), expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) == count


def test_without_a_compiler(tiny_pipeline, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UserError, match="compile=true needs a compiler of C; none of cc, gcc"):
        compile_networks(tiny_pipeline.animator)
    assert not tiny_pipeline.animator.compiled
