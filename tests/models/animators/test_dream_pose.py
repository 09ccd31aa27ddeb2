"""DreamPose's networks: poses around a frame, adapter, guidance of three branches, training."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from models.animators.base import Condition
from models.animators.dream_pose.checkpoint import load_dream_pose_unet, widened
from models.animators.dream_pose.model import DROP_BOTH, DROP_IMAGE, DROP_POSE, SOURCE, DreamPose, central_square
from models.animators.dream_pose.networks import (
    DreamPoseUNet,
    ImageAdapter,
    branch_weights,
    consecutive_poses,
    portrait_grid,
)
from models.attention.context import same_reference
from models.checkpoints.networks import unet_arguments
from models.denoising import guided_predictions
from tests.dream_pose_parts import FRAMES, LATENTS, SIZE, SIZES, TOKENS, WIDTH, noise, small_pipeline
from tests.networks import TINY


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline()


# Poses


def numbered(frames: int) -> torch.Tensor:
    """A clip whose frame k has the pose k, (1, f, 1, 1, 1)."""
    return torch.arange(frames).float()[None, :, None, None, None]


def test_five_poses_around_each_frame_and_the_clips_ends_stay():
    around = consecutive_poses(numbered(6), 5)[0, :, :, 0, 0]
    assert around.tolist() == [
        [0, 0, 0, 1, 2],
        [0, 0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [1, 2, 3, 4, 5],
        [2, 3, 4, 5, 5],
        [3, 4, 5, 5, 5],
    ]
    assert consecutive_poses(numbered(1), 5).flatten().tolist() == [0] * 5
    two = torch.stack([numbered(3)[0], 10 + numbered(3)[0]], dim=0).repeat(1, 1, 2, 1, 1)  # two clips of two channels
    assert consecutive_poses(two, 3)[1, 0, :, 0, 0].tolist() == [10, 10, 10, 10, 11, 11]


@given(st.integers(1, 9), st.integers(0, 3), st.integers(0, 8), st.integers(0, 8))
@settings(max_examples=25, deadline=None)
def test_a_window_sees_the_poses_beyond_its_own_ends(frames, reach, start, stop):
    start, stop = sorted((min(start, frames), min(stop, frames)))
    number = 2 * reach + 1
    whole = consecutive_poses(numbered(frames), number)
    assert torch.equal(consecutive_poses(numbered(frames), number, range(start, stop)), whole[:, start:stop])
    assert torch.equal(whole[0, :, reach, 0, 0], torch.arange(frames).float())


def test_pose_images_keep_their_values(pipeline):
    """Nearest pixel, U and V of (part, U, V), [0, 1] -> [-1, 1]: no value is there that the image does not have."""
    unet = pipeline.denoising_unet
    image = torch.zeros(1, 3, 4, 4)
    image[0, :, :, 1:] = torch.tensor([0.9, 0.25, 1.0])[:, None, None]
    found = unet.pose_input(image, (2, 2))
    assert found.tolist() == [[[[-1.0, -0.5], [-1.0, -0.5]], [[-1.0, 1.0], [-1.0, 1.0]]]]


def test_inputs_that_do_not_add_up_are_named(pipeline):
    with pytest.raises(ValueError, match="in_channels must be out_channels \\+ poses \\* pose channels = 19"):
        DreamPoseUNet.from_config(pipeline.denoising_unet.config, pose_channels=(0, 1, 2))


# Networks


def test_new_pose_channels_change_nothing():
    """The UNet that training starts with is Stable Diffusion's, whatever the poses."""
    torch.manual_seed(0)
    plain_sizes = replace(SIZES, in_channels=4)
    stock = UNet2DConditionModel(attention_head_dim=8, **unet_arguments(plain_sizes, "2D")).eval()
    unet = load_dream_pose_unet(widened(stock.state_dict()), "unet")
    context, poses = torch.randn(2, TOKENS, WIDTH), torch.randn(2, 3, 10, *LATENTS)
    clips, timesteps = noise(2, 3), torch.tensor([3, 700])
    with torch.no_grad():
        ours = unet(clips, timesteps, poses, context)
        for j in range(2):
            frames = stock(clips[j].transpose(0, 1), timesteps[j], context[[j]].expand(3, -1, -1)).sample
            assert torch.allclose(ours[j].transpose(0, 1), frames, atol=1e-5)


def test_adapter_starts_as_clip_alone():
    adapter, clip = ImageAdapter(TOKENS, WIDTH, 4, (5, 4)), torch.randn(2, TOKENS, WIDTH)
    assert torch.allclose(adapter(clip, torch.randn(2, 4, 10, 8)), clip, atol=1e-6)
    adapter(clip, torch.randn(2, 4, 10, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_adapter_pools_latents_of_any_size(pipeline):
    adapter = pipeline.adapter
    latents = torch.randn(1, 4, 10, 8)
    assert torch.equal(adapter.pooled(latents), F.max_pool2d(latents, 2))  # the published size
    clip = torch.randn(1, TOKENS, WIDTH)
    flat = torch.tensor([0.3, -1.0, 2.0, 0.0])[None, :, None, None]
    tokens = [adapter(clip, flat.expand(1, 4, *size)) for size in ((10, 8), (16, 16), (3, 7))]
    assert tokens[0].shape == (1, TOKENS, WIDTH) and torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


@pytest.mark.parametrize(
    ("cells", "grid"), [(1280, (40, 32)), (320, (20, 16)), (20, (5, 4)), (256, (16, 16)), (1, (1, 1))]
)
def test_grid_of_a_files_cells(cells, grid):
    assert portrait_grid(cells) == grid


def test_clip_sees_the_middle_square():
    image = torch.arange(5.0)[None, None, :, None].expand(1, 3, 5, 3)
    assert central_square(image)[0, 0, :, 0].tolist() == [1, 2, 3]
    assert central_square(image.transpose(2, 3))[0, 0, 0].tolist() == [1, 2, 3]


# Guidance


def branches(pipeline, sample: torch.Tensor, pose: torch.Tensor, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three predictions by the networks alone."""
    animator = pipeline.animator
    null = animator.null_context()
    predict, seen = pipeline.denoising_unet, same_reference({SOURCE: images}, sample.shape[2])
    return {
        "null": predict(sample, 401, torch.zeros_like(pose), null),
        "image": predict(sample, 401, torch.zeros_like(pose), null, seen),
        "both": predict(sample, 401, pose, null, seen),
    }


@torch.no_grad()
def guided_and_parts(pipeline, scales):
    animator = pipeline.animator
    images, pose = torch.randn(1, TOKENS, WIDTH), torch.randn(1, FRAMES, 10, *LATENTS)
    parts = branches(pipeline, noise(), pose, images)
    conditioning = type("Conditioning", (), {"null": animator.null_context()})
    seen = same_reference({SOURCE: images}, FRAMES)
    condition = Condition(conditioning, pose, seen)
    return guided_predictions(animator, [noise()], torch.tensor(401), [condition], scales)[0], parts


def test_guidance_of_three_branches(pipeline):
    found, parts = guided_and_parts(pipeline, (8.0, 3.0))
    image, pose = parts["image"] - parts["null"], parts["both"] - parts["image"]
    assert torch.allclose(found, parts["null"] + 8 * image + 3 * pose, atol=1e-5)
    assert pose.abs().max() > 1e-2 and image.abs().max() > 1e-2


def test_equal_scales_are_plain_guidance_and_one_is_none(pipeline):
    found, parts = guided_and_parts(pipeline, (4.0, 4.0))
    assert torch.allclose(found, parts["null"] + 4 * (parts["both"] - parts["null"]), atol=1e-5)
    found, parts = guided_and_parts(pipeline, (1.0, 1.0))
    assert torch.equal(found, parts["both"])


def test_branches_without_weight_are_not_computed(pipeline):
    calls = []
    hook = pipeline.denoising_unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        for scales, number in (((8.0, 3.0), 3), ((4.0, 4.0), 2), ((1.0, 3.0), 2), ((1.0, 1.0), 1), ((0.0, 0.0), 1)):
            calls.clear()
            guided_and_parts(pipeline, scales)
            assert len(calls) - 3 == number  # three are made by hand, to compare
    finally:
        hook.remove()


@torch.no_grad()
def test_frames_are_asked_once_what_they_look_at(pipeline):
    """Two branches see the images; what is recorded is the one with every condition."""

    class Asked:
        def __init__(self):
            self.layers = []

        def record(self, layer, query, key, flags, scale):
            self.layers.append(layer)

    animator, asked = pipeline.animator, Asked()
    seen = replace(same_reference({SOURCE: torch.randn(1, TOKENS, WIDTH)}, FRAMES), probe=asked)
    conditioning = type("Conditioning", (), {"null": animator.null_context()})
    pose = torch.randn(1, FRAMES, 10, *LATENTS)
    condition = Condition(conditioning, pose, seen)
    guided_predictions(animator, [noise()], torch.tensor(401), [condition], (8.0, 3.0))
    assert asked.layers == list(animator.attention_layers(LATENTS))


def test_one_number_stands_for_both_scales(pipeline):
    animator = pipeline.animator
    assert animator.guidance_scales(8) == pytest.approx((8, 3))
    assert animator.guidance_scales(1.0) == (1, 1)
    assert animator.guidance_scales([5, 2]) == (5, 2)
    with pytest.raises(ValueError, match="one for each of image, pose"):
        animator.guidance_scales((1, 2, 3))
    assert sum(branch_weights(8, 3)) == 1


# Training


def training_batch(clips: int = 2, frames: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "noisy_latents": noise(clips, frames),
        "timestep": torch.tensor([3, 700])[:clips],
        "reference_latents": torch.randn(clips, 4, *LATENTS, generator=generator),
        "reference_image": torch.rand(clips, 3, *SIZE, generator=generator) * 2 - 1,
        "poses": torch.rand(clips, 3, frames, *SIZE, generator=generator),
    }


@torch.no_grad()
def test_training_predicts_what_sampling_does(pipeline):
    """Each kind of dropout is a branch of guidance: the null condition is the same in training and sampling."""
    animator, batch = pipeline.animator, training_batch(clips=1)
    images = animator.image_context(batch["reference_image"], batch["reference_latents"])
    unet = pipeline.denoising_unet
    pose = consecutive_poses(unet.pose_input(batch["poses"][0].transpose(0, 1), LATENTS)[None], 5)
    null, seen = animator.null_context(), same_reference({SOURCE: images}, 3)
    absent = torch.zeros_like(pose)
    assert {DROP_IMAGE, DROP_POSE, DROP_BOTH} == set(range(1, 1 + animator.drop_modes))  # as they are drawn
    expected = {0: (pose, seen), DROP_IMAGE: (pose, None), DROP_POSE: (absent, seen), DROP_BOTH: (absent, None)}
    for kind, (poses, context) in expected.items():
        found = animator(**batch, dropped=torch.tensor([kind]))
        assert torch.allclose(found, unet(batch["noisy_latents"], 3, poses, null, context), atol=1e-5), kind


@torch.no_grad()
def test_samples_of_a_batch_do_not_mix(pipeline):
    animator, batch = pipeline.animator, training_batch()
    both = animator(**batch, dropped=torch.tensor([0, DROP_BOTH]))
    for j, kind in enumerate((0, DROP_BOTH)):
        alone = animator(**{name: value[[j]] for name, value in batch.items()}, dropped=torch.tensor([kind]))
        assert torch.allclose(both[[j]], alone, atol=1e-5)


@pytest.mark.parametrize("choice", ["full", "adapter"])
def test_what_is_trained_gets_gradients(pipeline, choice):
    animator = DreamPose(
        **{name: deepcopy(getattr(pipeline, name)) for name in ("denoising_unet", "adapter", "image_encoder")}
    )
    trained = animator.trained_parameters(choice, "motion", image_encoder=choice == "full")
    for name, parameter in animator.named_parameters():
        parameter.requires_grad_(name in trained)
    animator(**training_batch(), dropped=torch.tensor([0, DROP_POSE])).square().mean().backward()
    without = [name for name, parameter in animator.named_parameters() if parameter.grad is None]
    assert set(without) == {name for name, _ in animator.named_parameters()} - trained
    assert any(name.startswith("adapter.") for name in trained)
    assert any(name.startswith("denoising_unet.") for name in trained) == (choice == "full")


def test_small_networks_go_together():
    """New ones take figures, of which all three channels count, and start from CLIP's tokens alone."""
    sizes = replace(TINY, image_encoder_width=12, attention=["up", "both"])
    animator = DreamPose.small(sizes, latent_channels=4, latent_side=8)
    unet = animator.denoising_unet.config
    assert (unet.in_channels, unet.out_channels, unet.cross_attention_dim) == (4 + 5 * 3, 4, 12)
    assert unet.pose_kind == "OpenPose" and animator.latent_side == 8
    batch = {name: value for name, value in training_batch().items() if name != "reference_image"}
    found = animator(**batch, reference_image=torch.zeros(2, 3, 32, 32), dropped=torch.tensor([0, 1]))
    assert found.shape == batch["noisy_latents"].shape
