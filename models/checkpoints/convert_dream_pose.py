"""DreamPose as a pipeline: from its own files, or from Stable Diffusion's to start training with."""

import re

import torch
from diffusers import AutoencoderKL
from transformers import CLIPVisionModel

from core.errors import UserError
from models.animators.dream_pose.checkpoint import load_adapter, load_dream_pose_unet, widened
from models.animators.dream_pose.model import DreamPosePipeline
from models.animators.dream_pose.networks import ImageAdapter
from models.checkpoints.autoencoder import load_autoencoder
from models.checkpoints.files import read_tensors
from models.checkpoints.folders import load_folder
from models.checkpoints.loading import shapes_of
from models.checkpoints.sizes import unet_sizes
from models.checkpoints.sources import Sources
from models.schedules import published_scheduler
from models.vae import vae_encode, vae_scale_factor

# A folder of all of CLIP serves as well; this is what the image's tokens do not need of it.
OTHER_CLIP_PARTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


def dream_pose(sources: Sources) -> DreamPosePipeline:
    """DreamPose as published; or, from a UNet without pose channels, the weights that its training starts with."""
    tensors, what = sources.tensors("unet")
    sizes = unet_sizes(shapes_of(tensors))
    image_encoder = load_image_encoder(sources)
    if sizes.in_channels == sizes.out_channels:
        tensors, adapter = widened(tensors), new_adapter(image_encoder, sizes.out_channels).to(sources.dtype)
        sources.notes.append(
            "the UNet's pose channels and the adapter are new: until they are trained, poses and the "
            "VAE's view of the reference have no effect"
        )
    else:
        check_epochs(sources)
        adapter = sources.load("adapter", load_adapter)
    denoising_unet = load_dream_pose_unet(tensors, what, dtype=sources.dtype)
    vae = load_vae(sources)
    check_fit(denoising_unet, adapter, image_encoder, vae)
    adapter.null_latents.data = null_latents(vae, adapter)
    return DreamPosePipeline(
        vae=vae.to(sources.dtype),
        image_encoder=image_encoder,
        adapter=adapter,
        denoising_unet=denoising_unet,
        scheduler=published_scheduler("dreampose"),
    )


def check_epochs(sources: Sources) -> None:
    """Refuse a UNet and an adapter that were found in `weights=` and are not of the same epoch."""
    found = [sources.path(name).name for name in ("unet", "adapter")]
    numbers = {re.findall(r"\d+", name)[-1] for name in found if re.findall(r"\d+", name)}
    if sources.config.unet is None and sources.config.adapter is None and len(numbers) > 1:
        raise UserError(
            f"{' and '.join(found)} in weights={sources.config.weights} are not of the same epoch; "
            "give unet= and adapter="
        )


def load_image_encoder(sources: Sources) -> CLIPVisionModel:
    """CLIP's vision model, from its own folder or from one of all of CLIP."""
    path = sources.path("image_encoder")
    return load_folder(CLIPVisionModel, path, f"image_encoder={path}", sources.dtype, OTHER_CLIP_PARTS)


def load_vae(sources: Sources) -> AutoencoderKL:
    """The VAE in float32, from `vae_<n>.pth` or a folder."""
    path = sources.path("vae")
    if path.is_dir():
        return load_folder(AutoencoderKL, path, f"vae={path}")
    return load_autoencoder(read_tensors(path, "vae"), f"vae={path}")


def new_adapter(image_encoder: CLIPVisionModel, latent_channels: int) -> ImageAdapter:
    """An untrained adapter for the tokens of an image encoder."""
    config = image_encoder.config
    return ImageAdapter(clip_token_count(image_encoder), config.hidden_size, latent_channels).eval()


@torch.no_grad()
def null_latents(vae: AutoencoderKL, adapter: ImageAdapter) -> torch.Tensor:
    """What the adapter pools of the empty image, grey; (latent channels, rows, columns) in the adapter's dtype."""
    height, width = (2 * vae_scale_factor(vae) * cells for cells in adapter.config.latent_grid)
    grey = torch.zeros(1, vae.config.in_channels, height, width)
    return adapter.pooled(vae_encode(vae, grey))[0].to(adapter.dtype)


def clip_token_count(image_encoder: CLIPVisionModel) -> int:
    """Tokens of an image: its patches and one for all of it."""
    return (image_encoder.config.image_size // image_encoder.config.patch_size) ** 2 + 1


def check_fit(
    denoising_unet: torch.nn.Module, adapter: ImageAdapter, image_encoder: CLIPVisionModel, vae: AutoencoderKL
) -> None:
    """Refuse networks that do not belong together."""
    tokens, channels = adapter.config.clip_tokens, adapter.config.channels
    if (clip_token_count(image_encoder), image_encoder.config.hidden_size) != (tokens, channels):
        found = f"{clip_token_count(image_encoder)} tokens of {image_encoder.config.hidden_size}"
        raise UserError(f"image_encoder= gives {found} channels, the adapter takes {tokens} of {channels}")
    if denoising_unet.config.cross_attention_dim != channels:
        wanted = denoising_unet.config.cross_attention_dim
        raise UserError(f"the adapter gives {channels} channels, the UNet's cross-attention takes {wanted}")
    latents = vae.config.latent_channels
    for name, wanted in (("UNet", denoising_unet.config.out_channels), ("adapter", adapter.config.latent_channels)):
        if latents != wanted:
            raise UserError(f"vae= has {latents} latent channels, the {name} takes {wanted}")
