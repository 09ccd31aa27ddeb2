"""The diffusion objective: noise, target, loss weight.

Shapes use b = batch, f = frames, c = channels, h, w = latent size, H, W = image size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from models.animators.base import CalibratedImages
from models.attention.context import ReferenceContext
from models.attention.layers import TokenLevel
from models.vae import VAE, vae_encode, vae_posterior
from tpc.augmentation import (
    CalibratedBatch,
    CalibratedTrainingConfig,
    CompositionConfig,
    calibrate_batch,
    compose_references,
    training_visibility,
)
from training.attention_loss import attention_loss, body_points, point_probe, surface_points, with_background
from training.config import AttentionLossConfig, NoiseConfig
from training.noise import Generators, draw
from training.traits import TrainingTraits


@dataclass(frozen=True)
class StepLoss:
    """Loss of one batch of b samples.

    Attributes:
        loss: scalar, the weighted mean that is minimised.
        errors: (b,) mean squared error of each sample's prediction, without weight; detached, for the logs.
        timesteps: (b,) noise level of each sample.
        pointing: loss and accuracy of attention supervision, (2,), detached; None without.
    """

    loss: Tensor
    errors: Tensor
    timesteps: Tensor
    pointing: Tensor | None = None


@torch.no_grad()
def encode_frames(vae: VAE, frames: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Clips (b, 3, f, H, W) in [-1, 1] -> mean and deviation of their scaled latents, (b, c, f, h, w) each.

    Args:
        chunk: images that pass the VAE at a time; its activations are the peak of a step's memory otherwise.
    """
    parts = vae_posterior(vae, frames.transpose(1, 2).flatten(0, 1), chunk)
    mean, deviation = (part.float().unflatten(0, (len(frames), -1)).transpose(1, 2) for part in parts)
    return mean, deviation


@torch.no_grad()
def encode_reference(vae: VAE, images: Tensor, chunk: int | None = None) -> Tensor:
    """References (b, 3, H, W) in [-1, 1] -> scaled latents (b, c, h, w): the posterior's mean, as in inference."""
    return vae_encode(vae, images, chunk).float()


def batch_latents(
    vae: VAE, batch: dict[str, Tensor], traits: TrainingTraits, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviation of the frames' latents (b, c, f, h, w), and the references' latents (b, c, h, w).

    What a batch brings from `prepare.py latents` is taken as it is, the rest is encoded.
    """
    if "latent_mean" in batch:
        mean, deviation = batch["latent_mean"], batch["latent_deviation"]
    else:
        mean, deviation = encode_frames(vae, batch["frames"], chunk)
    if "reference_latents" in batch and not traits.alters_reference:
        return mean, deviation, batch["reference_latents"]
    images = traits.vae_images(batch["reference"], batch.get("reference_mask"))
    return mean, deviation, encode_reference(vae, images, chunk)


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


def person_weights(masks: Tensor, size: tuple[int, int], weight: float) -> Tensor:
    """Weights of the latents' places whose mean over a sample is 1.

    Args:
        masks: (b, 1, f, H, W), 1 where the person is.
        size: (h, w) of the latents.
        weight: of the person, against 1 elsewhere.

    Returns:
        (b, 1, f, h, w).
    """
    share = F.adaptive_avg_pool2d(masks.transpose(1, 2).flatten(0, 1).float(), size)
    weights = 1 + (weight - 1) * share.unflatten(0, (len(masks), -1)).transpose(1, 2)
    return weights / weights.mean(dim=(1, 2, 3, 4), keepdim=True)


def compose_samples(
    batch: dict[str, Tensor], config: CompositionConfig, step: int, generators: Generators
) -> dict[str, Tensor]:
    """`compose_references` with a generator a sample, so that a sample's composition does not depend on its batch."""
    if config.probability == 0:
        return batch
    # Cached latents are of the reference as it was.
    batch = {name: value for name, value in batch.items() if name != "reference_latents"}
    parts = [compose_references(sample(batch, j), config, step, g) for j, g in enumerate(generators)]
    return {name: torch.cat([part[name] for part in parts]) for name in batch}


def calibrate_samples(
    batch: dict[str, Tensor], config: CalibratedTrainingConfig, generators: Generators
) -> CalibratedBatch:
    """`calibrate_batch` with a generator a sample."""
    parts = [calibrate_batch(sample(batch, j), config, g) for j, g in enumerate(generators)]
    fields = ("images", "masks", "index", "present")
    return CalibratedBatch(**{name: torch.cat([getattr(part, name) for part in parts]) for name in fields})


def sample(batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """A batch of one sample."""
    return {name: value[number : number + 1] for name, value in batch.items()}


def calibrated_reference(
    batch: dict[str, Tensor],
    levels: list[TokenLevel],
    config: CalibratedTrainingConfig,
    generators: Generators,
) -> tuple[CalibratedImages, ReferenceContext]:
    """Calibrated images beside the references, as inference with TPC has them.

    Args:
        levels: of the layers in which frames see images.
        generators: one a sample.

    Returns:
        The m calibrated images of each clip, and index and flags of what the b*f frames see of [b references | b*m
        calibrated images].
    """
    calibrated = calibrate_samples(batch, config, generators)
    flags = training_visibility(batch, calibrated, levels, config)
    batch_size, images = calibrated.images.shape[:2]
    frames = calibrated.index.shape[1]
    found = CalibratedImages(calibrated.images.flatten(0, 1), calibrated.masks.flatten(0, 1))
    clip = torch.arange(batch_size, device=found.pixels.device)[:, None].expand(-1, frames)
    index = torch.stack([clip, batch_size + clip * images + calibrated.index], dim=-1).flatten(0, 1)
    return found, ReferenceContext({}, index, flags)


def diffusion_loss(
    model: nn.Module,
    vae: VAE,
    scheduler: DDIMScheduler,
    batch: dict[str, Tensor],
    config: NoiseConfig,
    calibrated: CalibratedTrainingConfig,
    traits: TrainingTraits,
    generators: Generators,
    chunk: int | None = None,
    attention: AttentionLossConfig | None = None,
) -> StepLoss:
    """Loss of one batch of clips: weighted mean squared error of the prediction.

    Args:
        model: an `Animator`, possibly wrapped for distributed training.
        batch: "reference" (b, 3, H, W) and "frames" (b, 3, f, H, W) in [-1, 1], "poses" (b, 3, f, H, W) in [0, 1];
            for calibrated training masks and keypoints too, see `data.clips.rendered`; cached features in place of
            images, see `data.video_folder`.
        calibrated: calibrated training; a probability of 0 leaves every clip its own reference alone.
        traits: of the model.
        generators: one a sample, see `training.noise`.
        chunk: images that pass the VAE at a time.
        attention: attention supervision; None or a weight of 0: none.
    """
    mean, deviation, reference_latents = batch_latents(vae, batch, traits, chunk)
    drawn = draw(
        mean.shape[1:],
        scheduler.config.num_train_timesteps,
        config.condition_dropout,
        config.noise_offset,
        generators,
        mean.device,
        traits.drop_modes,
        config.timestep_shift,
    )
    latents = mean + deviation * drawn.posterior
    seen = found = None
    if calibrated.probability > 0:
        found, seen = calibrated_reference(batch, traits.levels, calibrated, generators)
        if traits.calibrated_latents:
            images = traits.vae_images(found.pixels, found.masks)
            reference_latents = torch.cat([reference_latents, encode_reference(vae, images, chunk)])
    points = probe = None
    if attention is not None and attention.weight > 0:
        if attention.surface:
            points = surface_points(batch, attention.surface, generators)
        else:
            points = body_points(batch, attention.score_threshold)
        if attention.background:
            points = with_background(points, batch, attention.background, generators)
        probe = point_probe(points, traits.grids)
    prediction = model(
        noisy_latents=scheduler.add_noise(latents, drawn.noise, drawn.timesteps),
        timestep=drawn.timesteps,
        reference_latents=reference_latents,
        reference_image=batch["reference_context"] if "reference_context" in batch else batch["reference"],
        poses=batch["poses"],
        dropped=drawn.dropped,
        reference=seen,
        probe=probe,
        reference_mask=batch["reference_mask"] if traits.needs_mask else None,
        calibrated=found,
    )
    target = prediction_target(scheduler, latents, drawn.noise, drawn.timesteps)
    squares = (prediction.float() - target).square()
    errors = squares.mean(dim=(1, 2, 3, 4))
    weighted = errors
    if config.person_weight != 1:
        weights = person_weights(batch["masks"], latents.shape[-2:], config.person_weight)
        weighted = (weights * squares).mean(dim=(1, 2, 3, 4))
    loss = (snr_weights(scheduler, drawn.timesteps, config.snr_gamma) * weighted).mean()
    if probe is None:
        return StepLoss(loss, errors.detach(), drawn.timesteps)
    pointing, accuracy = attention_loss(probe, points, traits.grids, attention)
    return StepLoss(
        loss + attention.weight * pointing,
        errors.detach(),
        drawn.timesteps,
        torch.stack([pointing.detach(), accuracy]),
    )
