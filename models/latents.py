"""Pictures to latents and back, for both of diffusers' image autoencoders."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

VAE = AutoencoderKL | AutoencoderTiny


def encode_pictures(vae: VAE, pictures: Tensor, chunk: int | None = None, sample: bool = False) -> Tensor:
    """Pictures (n, 3, H, W) in [-1, 1] -> latents (n, c, h, w), scaled to about unit variance.

    Args:
        chunk: pictures at a time; None: all at once.
        sample: draw from the posterior of an AutoencoderKL instead of taking its mean.
    """
    parts = []
    for part in pictures.split(chunk or len(pictures)):
        encoded = vae.encode(part)
        if isinstance(vae, AutoencoderTiny):
            parts.append(encoded.latents)
        else:
            parts.append(encoded.latent_dist.sample() if sample else encoded.latent_dist.mean)
    return torch.cat(parts) * vae.config.scaling_factor


def decode_pictures(vae: VAE, latents: Tensor, chunk: int | None = None) -> Tensor:
    """Scaled latents (n, c, h, w) -> pictures (n, 3, H, W) in about [-1, 1], float32 on the CPU."""
    parts = (latents / vae.config.scaling_factor).split(chunk or len(latents))
    return torch.cat([vae.decode(part).sample.float().cpu() for part in parts])


def vae_factor(vae: VAE) -> int:
    """Pixels of a picture's side per latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
