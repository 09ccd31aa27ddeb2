"""AnimateAnyone with random weights, from sizes for tests to those of Stable Diffusion 1.5."""

from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKL
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from core.errors import UserError
from models.animators.animate_anyone.checkpoint import make_pose_guider
from models.animators.registry import load_pipeline
from models.checkpoints.convert import published_scheduler
from models.checkpoints.networks import MotionSizes, UNetSizes, make_denoising_unet, make_reference_net
from models.pipeline import AnimationPipeline

POSE_CHANNELS = (16, 32, 96, 256)
PIXELS = 8  # of an image's side per latent


@dataclass(frozen=True)
class SpeedSizes:
    """Widths of the networks, and what they are measured on."""

    unet: UNetSizes  # of both UNets; motion modules are those of AnimateDiff v2 at any width
    vae: tuple[int, ...]  # widths of the levels
    image_encoder: tuple[int, int, int]  # width, layers and heads of a CLIP vision encoder with patches of 14 pixels
    image_size: int  # pixels, of the image encoder
    side: int  # pixels, of the animation
    frames: int  # of a clip that is denoised in one window
    batch: int  # images of a training step in stage=image
    clip_frames: int  # of the one clip of a training step in stage=motion
    steps: int = 4


TINY_UNET = UNetSizes(block_out_channels=(32, 64, 128, 128), cross_attention_dim=64)
HALF_UNET = UNetSizes(block_out_channels=(160, 320, 640, 640))
SIZES = {
    "tiny": SpeedSizes(TINY_UNET, (32, 32, 32, 32), (64, 2, 4), 56, side=64, frames=4, batch=2, clip_frames=4),
    "half": SpeedSizes(HALF_UNET, (64, 128, 256, 256), (512, 12, 8), 224, side=256, frames=8, batch=2, clip_frames=8),
    "sd15": SpeedSizes(
        UNetSizes(), (128, 256, 512, 512), (1024, 24, 16), 224, side=512, frames=24, batch=1, clip_frames=24
    ),
}


def chosen_sizes(name: str, **given: int | None) -> SpeedSizes:
    """Sizes by name, with those of the `given` entries that are not None."""
    if name not in SIZES:
        raise UserError(f"size={name} is not one of {', '.join(SIZES)}")
    return replace(SIZES[name], **{key: value for key, value in given.items() if value is not None})


def make_vae(sizes: SpeedSizes) -> AutoencoderKL:
    levels = len(sizes.vae)
    return AutoencoderKL(
        block_out_channels=sizes.vae,
        layers_per_block=2,
        latent_channels=sizes.unet.in_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=sizes.side,
    )


def make_image_encoder(sizes: SpeedSizes, image_size: int) -> CLIPVisionModelWithProjection:
    width, layers, heads = sizes.image_encoder
    settings = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=14,
        projection_dim=sizes.unet.cross_attention_dim,
    )
    return CLIPVisionModelWithProjection(settings)


def make_pipeline(sizes: SpeedSizes, seed: int = 0, device: torch.device | str = "cpu") -> AnimationPipeline:
    """A pipeline with random weights in float32, drawn by the device, which takes a GPU no time."""
    torch.manual_seed(seed)
    with torch.device(device):
        networks = {
            "vae": make_vae(sizes),
            "image_encoder": make_image_encoder(sizes, sizes.image_size),
            "reference_net": make_reference_net(sizes.unet),
            "denoising_unet": make_denoising_unet(sizes.unet, MotionSizes(), "frame"),
            "pose_guider": make_pose_guider(sizes.unet.block_out_channels[0], POSE_CHANNELS),
        }
    pipeline = AnimationPipeline(**networks, scheduler=published_scheduler("animate_anyone"))
    for network in networks_of(pipeline):
        network.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def networks_of(pipeline: AnimationPipeline) -> list[torch.nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def open_pipeline(model: str | None, sizes: SpeedSizes, device: torch.device, dtype: torch.dtype) -> AnimationPipeline:
    """The pipeline folder `model`, or one of `sizes` with random weights where there is none."""
    pipeline = load_pipeline(model) if model else make_pipeline(sizes, device=device)
    pipeline.set_progress_bar_config(disable=True)
    for network in networks_of(pipeline):
        torch.nn.Module.to(network, device, dtype)  # without the warning that diffusers has for loading
    return pipeline
