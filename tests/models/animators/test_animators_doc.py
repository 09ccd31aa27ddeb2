"""The worked example of docs/animators.md: the code on the page, run on the smallest networks."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from models.animators.base import Animator
from models.attention.recording import AttentionConfig, AttentionRecording
from tests.models.test_pipeline import standing_poses
from tests.published import small_vae
from tpc import CalibrationConfig, calibrate

PAGE = Path(__file__).parents[3] / "docs" / "animators.md"
SIZE, FRAMES, STEPS = (32, 24), 10, 2
CONTROL_LAYER = "control_net.mid_block.attentions.0.transformer_blocks.0.attn2"


def example() -> tuple[str, dict]:
    """The code of the fifth animator, and what it defines."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "class " in block)
    defined: dict = {}
    exec(compile(code, str(PAGE), "exec"), defined)
    return code, defined


def networks() -> dict[str, torch.nn.Module]:
    """Its smallest networks, every parameter random, and a VAE of factor 4."""
    vae = small_vae()  # seeds what follows
    sizes = {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    unet = UNet2DConditionModel(sample_size=8, up_block_types=("CrossAttnUpBlock2D",) * 2, **sizes)
    control_net = ControlNetModel(conditioning_embedding_out_channels=(8, 8, 8), **sizes)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            projection_dim=8,
        )
    )
    for network in (unet, control_net):
        for parameter in network.parameters():
            if parameter.abs().max() == 0:
                torch.nn.init.normal_(parameter, std=0.05)
    parts = {"vae": vae, "denoising_unet": unet, "control_net": control_net, "image_encoder": encoder}
    return {name: network.eval() for name, network in parts.items()}


@pytest.fixture(scope="module")
def pipeline():
    made = example()[1]["TokenPipeline"](**networks(), scheduler=DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return (
        generator.integers(0, 256, (24, 32, 3), dtype=np.uint8),
        generator.integers(0, 256, (FRAMES, 24, 32, 3), dtype=np.uint8),
    )


def calibration(**config):
    matrix = np.array([[0.375, 0, 4], [0, 0.375, 0], [0, 0, 1]])
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    driving = standing_poses(FRAMES, offset=2)
    driving.scores[0] = 0  # nobody is seen in the first frame
    settings = {"max_gap": 0, "propagation": "off", **config}
    maps = {"frame_map": matrix, "reference_map": matrix}
    return calibrate(image, standing_poses(1), driving, SIZE, CalibrationConfig(**settings), **maps)


def run(pipeline, images, calibrated=None, **arguments) -> torch.Tensor:
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "output_type": "latent", **arguments}
    return pipeline(*images, calibrated, generator=torch.Generator().manual_seed(0), **arguments).frames


def test_it_is_short_and_an_animator():
    code, defined = example()
    assert len(code.splitlines()) < 100
    assert issubclass(defined["TokenAnimator"], Animator)


def test_it_animates_without_tpc(pipeline, images):
    reference, poses = images
    base = run(pipeline, images)
    assert base.shape == (1, 4, FRAMES, 6, 8) and base.isfinite().all()
    for changed in ((255 - reference, poses), (reference, 255 - poses)):
        assert not torch.allclose(base, run(pipeline, changed), atol=1e-4)
    assert not torch.allclose(base, run(pipeline, images, guidance_scale=1), atol=1e-4)


def test_frames_are_independent(pipeline, images):
    """Chunks of any size give what one batch gives."""
    assert torch.allclose(run(pipeline, images, window_size=3), run(pipeline, images, window_size=10), atol=1e-4)


@pytest.mark.parametrize("attach", ["add", "replace"])
@pytest.mark.parametrize("preset", ["best", "paper"])
def test_it_animates_with_tpc(pipeline, images, attach, preset):
    made = calibration(preset=preset, attach=attach)
    assert (made.member[0] < 0).all() and (made.member[1:] >= 0).all()
    base, result = run(pipeline, images), run(pipeline, images, made)
    assert torch.allclose(base[:, :, 0], result[:, :, 0], atol=1e-5), "an uncalibrated frame is as without TPC"
    assert all(not torch.allclose(base[:, :, f], result[:, :, f], atol=1e-4) for f in range(1, FRAMES))


@pytest.mark.parametrize("attach", ["add", "replace"])
def test_its_attention_is_recorded(pipeline, images, attach):
    made = calibration(attach=attach)
    expected = run(pipeline, images, made)
    with AttentionRecording(AttentionConfig(steps=[1])) as recording:
        assert torch.equal(expected, run(pipeline, images, made, attention=recording))
    recorded = recording.result
    names = ("calibrated 0",) if attach == "replace" else ("reference", "calibrated 0")
    assert recorded.images == names and CONTROL_LAYER in recorded.layers
    for layer in recorded.layers:
        assert recorded.grid(layer) == (4, 4) and recorded.maps[layer].shape[-2:] == (len(names), 16)
        total = recorded.own[layer] + recorded.maps[layer].sum((-1, -2))
        assert np.abs(total - 1).max() < 1e-5 and (recorded.own[layer] > 0).all(), "class tokens are never hidden"
    look = recorded.query_map(CONTROL_LAYER, (10.0, 10.0), frame=3)
    assert look.maps.shape == (len(names), 4, 4)
