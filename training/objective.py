"""The diffusion objective: noise, target, loss weight.

Shapes use b = batch, f = frames, c = channels, h, w = latent size, H, W = picture size.
"""

import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from core.errors import UserError
from models.latents import VAE, encode_pictures
from models.reference_attention import ReferenceContext
from tpc.augmentation import CalibratedTrainingConfig, calibrate_batch, training_visibility
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


def calibrated_reference(
    vae: VAE,
    batch: dict[str, Tensor],
    dropped: Tensor,
    grids: list[tuple[int, int]],
    config: CalibratedTrainingConfig,
) -> tuple[Tensor, ReferenceContext]:
    """Calibrated images beside the references, as inference with TPC has them.

    Args:
        dropped: (b,) bool, samples that see neither.
        grids: (h, w) tokens of every self-attention level.

    Returns:
        Latents of the m calibrated images of each clip, (b*m, c, h, w), and index and flags of what the b*f frames
        see of [b references | b*m calibrated images].
    """
    calibrated = calibrate_batch(batch, config)
    flags = training_visibility(batch, calibrated, grids, config)
    batch_size, pictures = calibrated.images.shape[:2]
    frames = calibrated.index.shape[1]
    latents = encode_reference(vae, calibrated.images.flatten(0, 1))
    clip = torch.arange(batch_size, device=latents.device)[:, None].expand(-1, frames)
    index = torch.stack([clip, batch_size + clip * pictures + calibrated.index], dim=-1).flatten(0, 1)
    # One more flag: frames of dropped samples are blind to every key but their own.
    blind = dropped.repeat_interleave(frames).float()[:, None, None].to(latents.device)
    query, key = {}, {}
    for n in flags.query:
        others = torch.ones_like(flags.key[n][..., :1])
        others[:, :n] = 0
        query[n] = torch.cat([flags.query[n], blind.expand(-1, n, -1)], dim=-1)
        key[n] = torch.cat([flags.key[n], others], dim=-1)
    return latents, ReferenceContext({}, index, query, key)


def diffusion_loss(
    model: nn.Module,
    vae: VAE,
    scheduler: DDIMScheduler,
    batch: dict[str, Tensor],
    config: NoiseConfig,
    calibrated: CalibratedTrainingConfig,
    grids: list[tuple[int, int]],
) -> Tensor:
    """Loss of one batch of clips: weighted mean squared error of the prediction.

    Args:
        model: `AnimateAnyone`, possibly wrapped for distributed training.
        batch: "reference" (b, 3, H, W) and "frames" (b, 3, f, H, W) in [-1, 1], "poses" (b, 3, f, H, W) in [0, 1];
            for calibrated training masks and keypoints too, see `data.datasets`.
        calibrated: calibrated training; a probability of 0 leaves every clip its own reference alone.
        grids: (h, w) tokens of every self-attention level, for calibrated training.

    Returns:
        Scalar.
    """
    latents = encode_frames(vae, batch["frames"])
    reference_latents = encode_reference(vae, batch["reference"])
    noise = draw_noise(latents, config.noise_offset)
    batch_size, device = len(latents), latents.device
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), device=device)
    dropped = torch.rand(batch_size, device=device) < config.condition_dropout
    seen = None
    if calibrated.probability > 0:
        calibrated_latents, seen = calibrated_reference(vae, batch, dropped, grids, calibrated)
        reference_latents = torch.cat([reference_latents, calibrated_latents])
    prediction = model(
        scheduler.add_noise(latents, noise, timesteps),
        timesteps,
        reference_latents,
        batch["reference"],
        batch["poses"],
        dropped,
        seen,
    )
    target = prediction_target(scheduler, latents, noise, timesteps)
    error = (prediction.float() - target).square().mean(dim=(1, 2, 3, 4))
    return (snr_weights(scheduler, timesteps, config.snr_gamma) * error).mean()
