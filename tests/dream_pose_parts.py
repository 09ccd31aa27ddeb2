"""A small DreamPose from files in the published form, drawn from names as known-answer fixtures are."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from models.animators.dream_pose.checkpoint import (
    dream_pose_unet_manifest,
    load_adapter,
    load_dream_pose_unet,
    null_latents,
)
from models.animators.dream_pose.model import DreamPosePipeline
from models.checkpoints.convert import published_scheduler
from models.checkpoints.loading import Shapes, old_names, shapes_of
from models.checkpoints.networks import UNetSizes, load_autoencoder, make_autoencoder
from models.checkpoints.verify import synthetic_tensors

TOKENS, WIDTH, GRID = 5, 16, (5, 4)
FRAMES, SIZE, LATENTS = 6, (20, 16), (10, 8)  # (height, width)
SIZES = UNetSizes(
    in_channels=14,
    block_out_channels=(32, 64),
    attention=(True, False),
    layers_per_block=1,
    cross_attention_dim=WIDTH,
)
ADAPTER = {
    "vae2clip.weight": (WIDTH, GRID[0] * GRID[1]),
    "vae2clip.bias": (WIDTH,),
    "linear1.weight": (TOKENS, TOKENS + 4),
    "linear1.bias": (TOKENS,),
}


def vae_manifest() -> Shapes:
    """A VAE of factor 2 with the names of older releases."""
    sizes = {f"encoder.down_blocks.{level}.resnets.0.conv1.weight": (32, 32, 3, 3) for level in range(2)}
    with torch.device("meta"):
        return old_names(shapes_of(make_autoencoder(sizes).state_dict()))


def published(file: str) -> dict[str, Tensor]:
    """What a small version of a published file holds."""
    manifest = {"unet": lambda: dream_pose_unet_manifest(SIZES), "adapter": lambda: ADAPTER, "vae": vae_manifest}
    return synthetic_tensors(manifest[file](), seed=5)


def small_image_encoder() -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return CLIPVisionModel(config).eval()


def write_weights(folder: Path) -> None:
    """Small files under the names, and with the prefixes, of the publishers."""
    for file, name in (("unet", "unet_epoch_20.pth"), ("adapter", "adapter_20.pth"), ("vae", "vae_1499.pth")):
        torch.save({f"module.{key}": value for key, value in published(file).items()}, folder / name)
    small_image_encoder().save_pretrained(folder / "image_encoder")


def small_pipeline() -> DreamPosePipeline:
    """DreamPose from small published files; images are twice the size of latents."""
    vae = load_autoencoder(published("vae"), "vae")
    adapter = load_adapter(published("adapter"), "adapter")
    adapter.null_latents.data = null_latents(vae, adapter)
    pipeline = DreamPosePipeline(
        vae=vae,
        image_encoder=small_image_encoder(),
        adapter=adapter,
        denoising_unet=load_dream_pose_unet(published("unet"), "unet"),
        scheduler=published_scheduler("dreampose"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline, reference, poses, **arguments) -> torch.Tensor:
    arguments = {"num_inference_steps": 2, "output_type": "latent", **arguments}
    return pipeline(reference, poses, generator=torch.Generator().manual_seed(0), **arguments).frames


def noise(clips: int = 1, frames: int = FRAMES, seed: int = 0) -> torch.Tensor:
    return torch.randn(clips, 4, frames, *LATENTS, generator=torch.Generator().manual_seed(seed))
