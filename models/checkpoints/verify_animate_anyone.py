"""Known answers of AnimateAnyone as published by Moore Threads."""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.attention.context import fused_layers, same_reference
from models.checkpoints.fixture import Fixture
from models.checkpoints.networks import load_denoising_unet, load_pose_guider, load_reference_net, with_motion

FILES = frozenset({"denoising_unet", "motion_module", "reference_unet", "pose_guider"})


def outputs(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Pairs of output name and result."""
    sizes = fixture.unet_sizes()
    reference_net = load_reference_net(fixture.checkpoint("reference_unet"), "reference_unet", sizes)
    unet = load_denoising_unet(
        with_motion(fixture.checkpoint("denoising_unet"), fixture.checkpoint("motion_module")),
        "denoising_unet and motion_module",
        fixture.norm_scope(),
        sizes,
        fixture.motion_sizes(),
    )
    pose_guider = load_pose_guider(fixture.checkpoint("pose_guider"), "pose_guider")

    inputs = fixture.inputs
    context, latents = inputs["clip_embeds"], inputs["noisy_latents"]
    pose = pose_guider(inputs["pose_images"])
    yield "pose_features", pose
    yield "prediction_without_reference", unet(latents, inputs["timestep"], context, pose)

    tokens = reference_net(inputs["ref_latents"], fixture.config["reference_timestep"], context)
    for name, layer in fixture.reference_layers().items():
        if layer in tokens:
            yield name, tokens[layer]
    tokens = fused_layers(tokens, fixture.config["fusion_blocks"])
    seen = same_reference(tokens, latents.shape[2])
    yield "prediction_with_reference", unet(latents, inputs["timestep"], context, pose, seen)

    timestep, first, pose = inputs["guidance_timestep"], latents[:1], pose[:1]
    yield "guidance_uncond", unet(first, timestep, torch.zeros_like(context[:1]), pose)
    seen = same_reference({layer: value[:1] for layer, value in tokens.items()}, latents.shape[2])
    yield "guidance_cond", unet(first, timestep, context[:1], pose, seen)
