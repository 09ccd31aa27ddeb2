"""Known answers of DreamPose."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from models.animators.dream_pose.checkpoint import load_adapter, load_dream_pose_unet
from models.animators.dream_pose.networks import branch_weights
from models.checkpoints.autoencoder import load_autoencoder
from models.checkpoints.fixture import Fixture

FILES = frozenset({"unet", "adapter", "vae"})


def outputs(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Pairs of output name and result."""
    inputs, config = fixture.inputs, fixture.config
    unet = load_dream_pose_unet(
        fixture.checkpoint("unet"),
        "unet",
        fixture.unet_sizes(),
        poses=config["poses"],
        channels=tuple(range(config["pose_channels"])),
    )
    rows, columns = inputs["image_latents"].shape[-2:]
    adapter = load_adapter(fixture.checkpoint("adapter"), "adapter", latent_grid=(rows // 2, columns // 2))
    vae = load_autoencoder(
        fixture.checkpoint("vae"), "vae", norm_num_groups=config.get("vae", {}).get("norm_num_groups", 32)
    )

    image = adapter(inputs["clip_tokens"], inputs["image_latents"])
    null = adapter(inputs["clip_tokens_null"], inputs["image_latents_null"])
    yield "image_tokens", image
    yield "image_tokens_null", null

    latents, timestep = inputs["noisy_latents"], inputs["timestep"]
    # The fixture's poses are as the network takes them, five of every frame; clips have one frame here.
    poses = F.interpolate(inputs["poses"], latents.shape[-2:], mode="nearest")[:, None]
    absent = torch.zeros_like(poses)
    branches = {"null": (absent, null), "image": (absent, image), "image_pose": (poses, image)}
    predictions = {name: unet(latents[:, :, None], timestep, *branch)[:, :, 0] for name, branch in branches.items()}
    for name, prediction in predictions.items():
        yield f"prediction_{name}", prediction
    weights = branch_weights(config["guidance_image"], config["guidance_pose"])
    yield "guided", sum(weight * prediction for weight, prediction in zip(weights, predictions.values(), strict=True))

    yield "vae_mean", vae.encode(inputs["vae_images"]).latent_dist.mean
    yield "vae_decoded", vae.decode(inputs["vae_latents"]).sample
