"""MagicAnimate in the animation pipeline: what differs from AnimateAnyone, and that the rest is the same."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from data.poses.poses import Poses
from models.animators.magic_animate.model import MagicAnimate, control_residuals
from models.animators.registry import load_pipeline
from models.attention.context import fused_layers, same_reference
from models.attention.processors import reference_layers
from models.images import ImageBatch, as_images
from models.reference_images import ReferenceImages
from models.unets import DenoisingUNet
from tests.published import published_tensors, small_magic_pipeline
from tpc import CalibrationConfig, calibrate

FRAMES, LATENTS = 5, (6, 8)


@pytest.fixture(scope="module")
def pipeline():
    return small_magic_pipeline()


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    """Reference (24, 32, 3) and DensePose images (5, 24, 32, 3)."""
    draw = np.random.default_rng(0).integers(0, 256, (1 + FRAMES, 24, 32, 3), dtype=np.uint8)
    return draw[0], draw[1:]


def run(pipeline, reference, poses, **arguments) -> torch.Tensor:
    arguments = {"num_inference_steps": 2, "output_type": "latent", **arguments}
    return pipeline(reference, poses, generator=torch.Generator().manual_seed(0), **arguments).frames


def noise(seed: int = 0, clips: int = 1) -> torch.Tensor:
    return torch.randn(clips, 4, FRAMES, *LATENTS, generator=torch.Generator().manual_seed(seed))


def test_reference_and_poses_matter(pipeline, images):
    reference, poses = images
    base = run(pipeline, reference, poses)
    assert base.shape == (1, 4, FRAMES, *LATENTS) and base.isfinite().all()
    assert not torch.allclose(base, run(pipeline, 255 - reference, poses), atol=1e-3)
    assert not torch.allclose(base, run(pipeline, reference, 255 - poses), atol=1e-3)
    assert torch.equal(base, run(pipeline, reference, poses))


def test_only_the_reference_tells_the_halves_of_guidance_apart(pipeline, images):
    """The empty prompt and the pose are in both halves; a scale of almost zero leaves the unconditional one."""
    reference, poses = images
    unconditional = run(pipeline, reference, poses, guidance_scale=1e-12)
    assert torch.allclose(unconditional, run(pipeline, 255 - reference, poses, guidance_scale=1e-12), atol=1e-4)
    assert not torch.allclose(unconditional, run(pipeline, reference, 255 - poses, guidance_scale=1e-12), atol=1e-3)
    image = as_images(reference, "reference")
    conditioning = ReferenceImages(pipeline.animator, ImageBatch(pipeline.vae, image), 1).conditioning
    assert conditioning.shape == (1, 7, 16) and torch.equal(conditioning, pipeline.prompt())


def test_reference_is_encoded_at_every_timestep(pipeline, images):
    animator, reference = pipeline.animator, as_images(images[0], "reference") * 2 - 1
    assert isinstance(animator, MagicAnimate)
    run = ReferenceImages(animator, ImageBatch(pipeline.vae, reference), 2)
    with torch.no_grad():
        first = run.context(0, 961, range(0, 3))
        assert run.context(0, 961, range(2, 5)).tokens is first.tokens
        second = run.context(1, 461, range(0, 3))
    assert second.tokens is not first.tokens
    assert all(not torch.allclose(first.tokens[layer], second.tokens[layer], atol=1e-3) for layer in first.tokens)


def test_frames_see_middle_and_upward_blocks(pipeline):
    unet = pipeline.denoising_unet
    tokens = pipeline.reference_net(torch.randn(1, 4, *LATENTS), 3, torch.randn(1, 7, 16))
    assert set(tokens) == set(reference_layers(unet))
    midup = fused_layers(tokens, "midup")
    assert set(tokens) - set(midup) == {layer for layer in tokens if layer.startswith("down_blocks.")} != set()
    context = torch.randn(1, 7, 16)
    with torch.no_grad():
        results = [
            unet(noise(), 3, context, reference=None if seen is None else same_reference(seen, FRAMES))
            for seen in (None, midup, fused_layers(tokens, "full"))
        ]
    assert not torch.allclose(results[0], results[1], atol=1e-4)
    assert not torch.allclose(results[1], results[2], atol=1e-4)
    with pytest.raises(ValueError, match="full or midup"):
        fused_layers(tokens, "up")


def test_norms_tie_the_frames_of_a_clip_and_nothing_else(pipeline, images):
    """A frame's prediction depends on the others even without motion modules; clips of a batch do not mix."""
    unet, context = deepcopy(pipeline.denoising_unet), torch.randn(2, 7, 16)
    for name, parameter in unet.named_parameters():
        if "motion_modules" in name and "proj_out" in name:
            parameter.data.zero_()
    tokens = pipeline.reference_net(torch.randn(2, 4, *LATENTS), 3, context)
    poses = as_images(images[1], "poses").repeat(2, 1, 1, 1)
    clips, timesteps = noise(clips=2), torch.tensor([3, 700])
    with torch.no_grad():
        residuals = control_residuals(pipeline.control_net, clips, timesteps, context, poses)
        both = unet(clips, timesteps, context, reference=same_reference(tokens, FRAMES), residuals=residuals)
        for j in range(2):
            seen = same_reference({layer: value[[j]] for layer, value in tokens.items()}, FRAMES)
            own = [part[j * FRAMES : (j + 1) * FRAMES] for part in residuals]
            alone = unet(clips[[j]], timesteps[[j]], context[[j]], reference=seen, residuals=own)
            assert torch.allclose(both[[j]], alone, atol=1e-5)
        changed = clips.clone()
        changed[:, :, -1] *= 3
        assert not torch.allclose(unet(changed, 3, context)[:, :, 0], unet(clips, 3, context)[:, :, 0], atol=1e-3)
        by_frame = DenoisingUNet.from_config(unet.config, norm_scope="frame")
        by_frame.load_state_dict(unet.state_dict())
        untouched = [by_frame(sample, 3, context)[:, :, 0] for sample in (changed, clips)]
        assert torch.allclose(*untouched, atol=1e-5)


def test_unknown_norm_scope_is_named(pipeline):
    with pytest.raises(ValueError, match="norm_scope must be frame or clip"):
        DenoisingUNet.from_config(pipeline.denoising_unet.config, norm_scope="batch")


def test_long_clips_take_the_trained_window(pipeline, images):
    """20 frames are more than the 16 that the model was trained on, and fewer than the 24 its tables hold."""
    reference, poses = images
    clip = np.resize(poses, (20, *poses.shape[1:]))
    windowed = run(pipeline, reference, clip, num_inference_steps=1)
    assert torch.equal(windowed, run(pipeline, reference, clip, num_inference_steps=1, window_size=16))
    assert not torch.allclose(
        windowed, run(pipeline, reference, clip, num_inference_steps=1, window_size=20), atol=1e-3
    )
    steady, shifted = (run(pipeline, reference, clip, shift_windows=shift) for shift in (False, True))
    assert shifted.isfinite().all() and not torch.allclose(steady, shifted, atol=1e-3)
    with pytest.raises(ValueError, match="window_size must be 1 to 24"):
        run(pipeline, reference, clip, window_size=25)


def test_calibration_attaches_as_to_any_animator(pipeline, images):
    keypoints = np.random.default_rng(1).uniform(12, 52, (FRAMES, 1, 17, 2)).astype(np.float32)
    driving = Poses(keypoints, np.ones((FRAMES, 1, 17), np.float32), (64, 64), 25.0)
    reference = Poses(keypoints[:1] * 0.7 + 5, np.ones((1, 1, 17), np.float32), (64, 64), 25.0)
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    calibration = calibrate(image, reference, driving, (32, 24), CalibrationConfig(groups=2))
    assert len(calibration.used(2))
    plain = run(pipeline, *images)
    calibrated = run(pipeline, *images, calibration=calibration)
    assert calibrated.isfinite().all() and not torch.allclose(plain, calibrated, atol=1e-3)
    kept = run(pipeline, *images, calibration=calibration, guidance_scale=1e-12)
    assert torch.allclose(kept, run(pipeline, *images, guidance_scale=1e-12), atol=1e-4)


def test_save_and_load_give_the_same_frames(pipeline, images, tmp_path):
    pipeline.save_pretrained(tmp_path / "p")
    loaded = load_pipeline(tmp_path / "p")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipeline)
    assert loaded.config.window_size == 16 and loaded.config.fusion_blocks == "midup"
    assert torch.equal(run(pipeline, *images), run(loaded, *images))


def test_appearance_encoder_has_what_is_read_and_zeros_elsewhere(pipeline):
    published = published_tensors("appearance_encoder")
    network = pipeline.reference_net
    assert set(network.state_dict()) - set(published) == set(network.unused_parameters())
    assert all(not network.get_parameter(name).any() for name in network.unused_parameters())
