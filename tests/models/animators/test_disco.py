"""DisCo: what its networks see, guidance, and calibration in the pipeline."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from core.errors import UserError
from data.poses.poses import Poses
from models.animators.disco.model import SOURCE, DisCo
from models.animators.disco.networks import new_control_net, with_time
from models.animators.registry import load_pipeline
from models.attention.context import same_reference
from models.attention.layers import KeyLayout, token_levels
from models.attention.masking import dense_mask
from tests.disco_parts import (
    FIXTURES,
    FRAMES,
    HEIGHT,
    LATENTS,
    SIDE,
    TOKENS,
    WIDTH,
    frame_inputs,
    randn,
)
from tpc import CalibrationConfig, calibrate
from tpc.attach import frame_visibility

pipeline, temporal_pipeline, model = FIXTURES
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[6:20, 8:22] = True


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    """Reference (24, 32, 3) and pose images (3, 24, 32, 3)."""
    draw = np.random.default_rng(0).integers(0, 256, (1 + FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    return draw[0], draw[1:]


@pytest.fixture(scope="module")
def calibration():
    """Of one person, at the images' size."""
    keypoints = np.random.default_rng(1).uniform((24, 16), (38, 34), (FRAMES, 1, 17, 2)).astype(np.float32)
    driving = Poses(keypoints, np.ones((FRAMES, 1, 17), np.float32), (64, 48), 25.0)
    reference = Poses(keypoints[:1] * 0.7 + 5, np.ones((1, 1, 17), np.float32), (64, 48), 25.0)
    image = np.random.default_rng(2).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return calibrate(image, reference, driving, (WIDTH, HEIGHT), CalibrationConfig(groups=2))


def run(pipeline, reference, poses, **arguments) -> torch.Tensor:
    arguments = {"num_inference_steps": 2, "output_type": "latent", "reference_mask": MASK, **arguments}
    return pipeline(reference, poses, generator=torch.Generator().manual_seed(0), **arguments).frames


def test_first_token_is_the_image_embedding_of_the_encoder_itself(model):
    """With CLIP's own projection, as training starts, the token of the whole image is CLIP's image embedding."""
    started = deepcopy(model)
    started.token_projection.linear.load_state_dict(model.image_encoder.visual_projection.state_dict())
    pixels = randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        tokens = started.encode_tokens(pixels)
        assert tokens.shape == (2, TOKENS, 16)
        assert torch.allclose(tokens[:, 0], model.image_encoder(pixels).image_embeds, atol=1e-6)


@torch.no_grad()
def test_tokens_show_the_person_and_nothing_else(model):
    image, mask = randn(1, 3, SIDE, SIDE).clamp(-1, 1), torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 8:24, 8:24] = 1
    tokens = model.encode_foreground(image, mask)
    outside, inside = image.clone(), image.clone()
    outside[..., 20:, 28:], inside[..., 12, 12] = 1, 1
    assert torch.equal(model.encode_foreground(outside, mask), tokens)
    assert not torch.allclose(model.encode_foreground(inside, mask), tokens, atol=1e-4)
    mean_colour = torch.zeros(1, 3, SIDE, SIDE)
    assert torch.equal(model.encode_foreground(image, 0 * mask), model.encode_tokens(mean_colour))


def test_background_is_grey_where_the_person_is(model):
    image, mask = randn(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., :4, :] = 1
    background = model.vae_images(image, mask)
    assert not background[..., :4, :].any() and torch.equal(background[..., 4:, :], image[..., 4:, :])


@torch.no_grad()
def test_null_tokens_are_those_of_an_empty_image_or_zeros(pipeline, model):
    null = model.encode_null()
    assert torch.equal(null, model.encode_tokens(torch.zeros(1, 3, SIDE, SIDE)))
    zeros = DisCo(*(getattr(model, name) for name, _ in model.named_children()), null_tokens="zeros").encode_null()
    assert zeros.shape == null.shape and not zeros.any()
    with pytest.raises(ValueError, match="null_tokens must be one of empty_image, zeros, got 'none'"):
        DisCo(*(getattr(model, name) for name, _ in model.named_children()), null_tokens="none")


@torch.no_grad()
def test_residuals_of_both_control_nets_are_added(model):
    latents, poses, background = frame_inputs()
    context = randn(1, TOKENS, 16)
    summed = model.control_residuals(latents, 5, context, poses, background, None)
    parts = []
    for network, image in ((model.pose_control_net, poses), (model.background_control_net, background)):
        down, mid = network(latents, 5, context.expand(FRAMES, -1, -1), image, return_dict=False)
        parts.append([*down, mid])
    assert len(summed) == len(parts[0]) == 5
    for total, pose, behind in zip(summed, *parts, strict=True):
        assert torch.allclose(total, pose + behind, atol=1e-5) and not torch.allclose(pose, behind, atol=1e-3)


@torch.no_grad()
def test_tokens_of_a_reference_reach_all_three_networks(model):
    """Keys of a `ReferenceContext` are what plain cross-attention to the same tokens sees."""
    latents, poses, background = frame_inputs()
    tokens, other = randn(1, TOKENS, 16), randn(1, TOKENS, 16, seed=9)
    seen = same_reference({SOURCE: tokens}, FRAMES)
    reading = model.predict_frames(latents, 5, other, poses, background, seen)
    plain = model.predict_frames(latents, 5, tokens, poses, background, None)
    assert torch.allclose(reading, plain, atol=1e-5)
    layers = model.attention_layers(LATENTS)
    projected = {}
    model.predict_frames(latents, 5, other, poses, background, replace(seen, projected=projected))
    assert list(projected) == list(layers)
    assert {name.split(".")[0] for name in layers} == {
        *("pose_control_net", "background_control_net", "down_blocks", "up_blocks", "mid_block"),
    }
    assert {shape.keys for shape in layers.values()} == {KeyLayout((4, 4), whole=1)}


def test_new_control_nets_start_with_the_unets_weights_and_no_effect(model):
    for latent in (False, True):
        network = new_control_net(model.unet, latent, (8, 16, 16))
        assert torch.equal(network.mid_block.resnets[0].conv1.weight, model.unet.mid_block.resnets[0].conv1.weight)
        assert network.conv_in.weight.data_ptr() != model.unet.conv_in.weight.data_ptr()
        assert not any(layer.weight.any() for layer in network.controlnet_down_blocks)
    assert torch.equal(network.controlnet_cond_embedding.conv_in.weight, model.unet.conv_in.weight)
    half = with_time(new_control_net(deepcopy(model.unet).half(), True))
    assert half.dtype == torch.float16 and half.config.temporal and half.config.latent_conditioning
    assert all(parameter.dtype == torch.float16 for parameter in half.parameters())


# Guidance and calibration in the pipeline.


def test_reference_poses_and_mask_matter(pipeline, images):
    reference, poses = images
    base = run(pipeline, reference, poses)
    assert base.shape == (1, 4, FRAMES, *LATENTS) and base.isfinite().all()
    assert torch.equal(base, run(pipeline, reference, poses))
    for changed in ((255 - reference, poses, MASK), (reference, 255 - poses, MASK), (reference, poses, MASK.T.copy())):
        other = run(pipeline, *changed[:2], reference_mask=np.resize(changed[2], MASK.shape))
        assert not torch.allclose(base, other, atol=1e-3)


def test_unconditional_half_sees_pose_and_background_but_nobody(pipeline, images):
    """A scale of almost zero leaves the unconditional half: the person's own pixels have no effect there."""
    reference, poses = images
    person, behind = reference.copy(), reference.copy()
    person[MASK], behind[~MASK] = 0, 0
    base = run(pipeline, reference, poses, guidance_scale=1e-12)
    assert torch.allclose(base, run(pipeline, person, poses, guidance_scale=1e-12), atol=1e-4)
    assert not torch.allclose(base, run(pipeline, behind, poses, guidance_scale=1e-12), atol=1e-3)
    assert not torch.allclose(base, run(pipeline, reference, 255 - poses, guidance_scale=1e-12), atol=1e-3)
    assert not torch.allclose(
        run(pipeline, reference, poses, guidance_scale=1), run(pipeline, person, poses, guidance_scale=1), atol=1e-3
    )


def test_frames_of_the_image_model_do_not_depend_on_windows(pipeline, images):
    reference, poses = images
    assert torch.allclose(
        run(pipeline, reference, poses), run(pipeline, reference, poses, window_size=2, window_overlap=1), atol=1e-4
    )


@pytest.mark.parametrize("kind", ["pipeline", "temporal_pipeline"])
def test_calibrated_tokens_change_their_frames(kind, images, calibration, request):
    pipeline = request.getfixturevalue(kind)
    arguments = {"reference_mask": None, "guidance_scale": 2.0, "num_inference_steps": 1}
    masks = calibration.reference_masks.any(0)
    plain = run(pipeline, *images, **{**arguments, "reference_mask": masks})
    added = run(pipeline, *images, calibration=calibration, **arguments)
    swapped = replace(calibration, config=replace(calibration.config, attach="replace"))
    replaced = run(pipeline, *images, calibration=swapped, **arguments)
    for one, other in ((plain, added), (plain, replaced), (added, replaced)):
        assert one.isfinite().all() and not torch.allclose(one, other, atol=1e-4)
    nobody = replace(calibration, member=np.full_like(calibration.member, -1))
    hidden = run(pipeline, *images, calibration=nobody, **arguments)
    assert torch.allclose(hidden, plain, atol=1e-5)
    one_frame = replace(calibration, member=np.where(np.arange(FRAMES)[:, None] == 1, calibration.member, -1))
    partly = run(pipeline, *images, calibration=one_frame, **arguments)
    if kind == "pipeline":
        assert torch.allclose(partly[:, :, [0, 2]], plain[:, :, [0, 2]], atol=1e-5)
    assert not torch.allclose(partly[:, :, 1], plain[:, :, 1], atol=1e-4)


def test_masks_hide_patches_of_clips_grid(model, calibration):
    """A pixel of the person makes a patch the person's, on 4 x 4 patches of 6 x 8 pixels whatever the latents' grid;
    the token of the whole image goes with its image."""
    levels = token_levels(model.attention_layers(LATENTS))
    assert {level.keys.grid for level in levels} == {(4, 4)} and len({level.queries for level in levels}) == 2
    members = calibration.index(0)
    seen = frame_visibility(calibration, range(FRAMES), members, levels, "exclusive")
    for level in levels:
        visible = dense_mask(seen, level.tokens)
        assert visible.shape == (FRAMES, level.tokens, 2 * TOKENS)
        rows, columns = level.queries
        for frame in range(FRAMES):
            blocks = calibration.target_masks[frame, 0].reshape(rows, HEIGHT // rows, columns, WIDTH // columns)
            person = blocks.any(axis=(1, 3)).ravel()
            patches = calibration.masks[members[frame, 0]].reshape(4, 6, 4, 8).any(axis=(1, 3)).ravel()
            expected = np.concatenate([[True], patches])
            assert person.any() and not patches.all()
            assert (visible[frame, person, TOKENS:].numpy() == expected).all()
            assert not visible[frame, ~person, TOKENS:].any()
            assert visible[frame, ~person, :TOKENS].all()


def test_calibration_leaves_the_unconditional_half_alone(pipeline, images, calibration):
    masks = calibration.reference_masks.any(0)
    kept = run(pipeline, *images, calibration=calibration, guidance_scale=1e-12, reference_mask=None)
    assert torch.allclose(kept, run(pipeline, *images, guidance_scale=1e-12, reference_mask=masks), atol=1e-4)


def test_a_image_without_mask_is_refused(pipeline, images):
    with pytest.raises(UserError, match="give reference_mask="):
        run(pipeline, *images, reference_mask=None)


@pytest.mark.parametrize("kind", ["pipeline", "temporal_pipeline"])
def test_save_and_load_give_the_same_frames(kind, images, tmp_path, request):
    pipeline = request.getfixturevalue(kind)
    pipeline.save_pretrained(tmp_path / "p")
    loaded = load_pipeline(tmp_path / "p")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipeline) and loaded.config.null_tokens == "empty_image"
    assert torch.equal(run(pipeline, *images, num_inference_steps=1), run(loaded, *images, num_inference_steps=1))


@pytest.mark.parametrize("mode", ["leaf_level", "block_level", "model"])
def test_offloading_of_diffusers_changes_nothing(pipeline, images, calibration, mode):
    """From CPU to CPU, with calibration."""
    saver = deepcopy(pipeline)
    if mode == "model":
        saver.enable_model_cpu_offload(device="cpu")
    else:
        blocks = 1 if mode == "block_level" else None
        saver.enable_group_offload(torch.device("cpu"), offload_type=mode, num_blocks_per_group=blocks)
    arguments = {"calibration": calibration, "reference_mask": None, "num_inference_steps": 1}
    expected = run(pipeline, *images, **arguments)
    assert torch.allclose(run(saver, *images, **arguments), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_animates(pipeline, images, calibration, dtype):
    arguments = {"calibration": calibration, "reference_mask": None, "num_inference_steps": 1, "guidance_scale": 1.5}
    expected = run(pipeline, *images, **arguments)
    half = run(deepcopy(pipeline).to(dtype), *images, **arguments)
    assert half.dtype == torch.float32 and torch.allclose(half, expected, atol=0.1, rtol=0.05)
