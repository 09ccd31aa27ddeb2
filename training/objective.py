"""The diffusion objective: noise, target, loss weight.

Shapes use b = batch, f = frames, c = channels, h, w = latent size, H, W = picture size.
"""

import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from core.errors import UserError
from models.latents import VAE, encode_pictures
from training.config import NoiseConfig


@torch.no_grad()
def encode_frames(vae: VAE, frames: Tensor) -> Tensor:
    """Clips (b, 3, f, H, W) in [-1, 1] -> scaled latents (b, c, f, h, w), drawn from the VAE's posterior."""
    latents = encode_pictures(vae, frames.transpose(1, 2).flatten(0, 1), sample=True).float()
    return latents.unflatten(0, (len(frames), -1)).transpose(1, 2)


@torch.no_grad()
def encode_reference(vae: VAE, images: Tensor) -> Tensor:
    """References (b, 3, H, W) in [-1, 1] -> scaled latents (b, c, h, w): the posterior's mean, as in inference."""
    return encode_pictures(vae, images).float()


def draw_noise(latents: Tensor, offset: float) -> Tensor:
    """Standard normal noise of the latents' shape, plus a constant of deviation `offset` a (sample, channel)."""
    noise = torch.randn_like(latents)
    if offset:
        noise = noise + offset * torch.randn(*latents.shape[:2], 1, 1, 1, device=latents.device, dtype=latents.dtype)
    return noise


def prediction_target(scheduler: DDIMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet must predict, by the scheduler's prediction type."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return noise if kind == "epsilon" else latents


def snr_weights(scheduler: DDIMScheduler, timesteps: Tensor, gamma: float | None) -> Tensor:
    """Min-SNR weights (Hang et al., ICCV 2023) for each timestep, (b,).

    For velocity prediction min(snr + 1, gamma) / (snr + 1): it is 1 at zero terminal SNR. The form
    min(snr, gamma) / (snr + 1) is 0 there and would never train the step where sampling starts.
    """
    if gamma is None:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = compute_snr(scheduler, timesteps).float()
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return (snr + 1).clamp(max=gamma) / (snr + 1)
    if kind == "epsilon":
        return snr.clamp(max=gamma) / snr.clamp(min=1e-8)
    return snr.clamp(max=gamma)


def check_schedule(config: NoiseConfig) -> None:
    """Refuse a pair that cannot be trained: at zero terminal SNR the noise alone says nothing about the picture."""
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise UserError("noise.prediction_type=epsilon cannot be sampled with noise.rescale_betas_zero_snr=true")


def diffusion_loss(
    model: nn.Module, vae: VAE, scheduler: DDIMScheduler, batch: dict[str, Tensor], config: NoiseConfig
) -> Tensor:
    """Loss of one batch of clips: weighted mean squared error of the prediction.

    Args:
        model: `AnimateAnyone`, possibly wrapped for distributed training.
        batch: "reference" (b, 3, H, W) and "frames" (b, 3, f, H, W) in [-1, 1], "poses" (b, 3, f, H, W) in [0, 1].

    Returns:
        Scalar.
    """
    latents = encode_frames(vae, batch["frames"])
    reference_latents = encode_reference(vae, batch["reference"])
    noise = draw_noise(latents, config.noise_offset)
    batch_size, device = len(latents), latents.device
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), device=device)
    dropped = torch.rand(batch_size, device=device) < config.condition_dropout
    prediction = model(
        scheduler.add_noise(latents, noise, timesteps),
        timesteps,
        reference_latents,
        batch["reference"],
        batch["poses"],
        dropped,
    )
    target = prediction_target(scheduler, latents, noise, timesteps)
    error = (prediction.float() - target).square().mean(dim=(1, 2, 3, 4))
    return (snr_weights(scheduler, timesteps, config.snr_gamma) * error).mean()
