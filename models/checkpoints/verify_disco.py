"""Known answers of DisCo's image model."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from models.animators.disco.checkpoint import load_disco
from models.animators.disco.model import SOURCE, DisCo
from models.attention.context import ReferenceContext
from models.checkpoints.fixture import Fixture

FILES = frozenset({"module"})


def outputs(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Pairs of output name and result."""
    weights = load_disco(
        fixture.checkpoint("module"),
        "module",
        fixture.unet_sizes(),
        CLIPVisionConfig(**fixture.config["clip"]),
        fixture.config["vae"].get("norm_num_groups", 32),
    )
    model = DisCo(
        weights.unet,
        weights.pose_control_net,
        weights.background_control_net,
        weights.image_encoder,
        weights.token_projection,
    )
    inputs = fixture.inputs
    latents, timestep = inputs["noisy_latents"], inputs["timestep"]
    tokens, null = model.encode_tokens(inputs["foreground_images"]), model.encode_null()
    yield "image_tokens", tokens
    yield "image_tokens_null", null.expand(len(tokens), -1, -1)

    # One reference may serve several samples.
    seen = ReferenceContext({SOURCE: tokens}, torch.arange(len(latents))[:, None] % len(tokens))
    conditions = (inputs["pose_images"], inputs["background_latents"])
    networks = (model.pose_control_net, model.background_control_net)
    for number, (network, image) in enumerate(zip(networks, conditions, strict=True)):
        yield f"control_mid_net{number}", network(latents, timestep, null, image, **reading(seen))[1]
    for number, residual in enumerate(model.control_residuals(latents, timestep, null, *conditions, seen)):
        yield f"control_residual_{number:02d}", residual
    yield "prediction_without_control", model.unet(latents, timestep, null, **reading(seen))[0]
    yield "guidance_cond", model.predict_frames(latents, timestep, null, *conditions, seen)
    yield "guidance_uncond", model.predict_frames(latents, timestep, null, *conditions, None)
    yield "vae_mean", weights.vae.encode(inputs["vae_images"]).latent_dist.mean
    yield "vae_decoded", weights.vae.decode(inputs["vae_latents"]).sample


def reading(seen: ReferenceContext) -> dict:
    """How a network of diffusers is told what its images see."""
    return {"cross_attention_kwargs": {"reference": seen}, "return_dict": False}
