"""The objective of training: what is drawn for a batch, what the model sees of it, and its loss.

Random numbers follow from the run's seed and a sample's position in the run alone: two processes repeat what one does
with the doubled batch, and a resumed run repeats an unbroken one.

Shapes use b = batch, f = frames, t = latent frames, which are f but of video VAEs, c = channels, h, w = latent size,
H, W = image size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from core.errors import UserError
from core.processes import to_device
from models.animators.base import Animator, CalibratedImages
from models.attention.context import ReferenceContext
from models.attention.layers import KeyLayout, TokenLevel, token_levels
from models.config import SCHEDULE
from models.noise import NOISES, Noise
from models.vae import VAE, VideoVAE, clip_encode, vae_encode, vae_posterior, vae_scale_factor
from tpc.augmentation import CalibratedBatch, calibrate_batch, compose_references, training_visibility
from tpc.config import CalibratedTrainingConfig, CompositionConfig
from training.attention_loss import attention_loss, body_points, point_probe, surface_points, with_background
from training.build import make_scheduler
from training.config import NoiseConfig, TrainConfig

Batch = dict[str, Tensor]
Generators = Sequence[torch.Generator]  # one for each sample of a batch
# Nearer to the clean image the noise that leads from a calibrated one to the truth would be many times the usual.
MOST_SIGNAL = 0.95


@dataclass(frozen=True)
class Draws:
    """Random values of b samples whose latents are (b, c, t, h, w), with those of the reference where it is one."""

    timesteps: Tensor  # (b,) long
    dropped: Tensor  # (b,) long, condition that a sample is trained without: 0 none, or which, from 1
    noise: Tensor  # (b, c, f, h, w) added to the latents, offset included
    posterior: Tensor  # (b, c, f, h, w) standard normal, for the VAE's posterior


def sample_generators(seed: int, positions: Sequence[int]) -> list[torch.Generator]:
    """CPU generators, one a sample; positions count over all steps and processes of the run."""
    # A CPU generator takes 32 bits of its seed; hashing keeps neighbouring positions of neighbouring seeds apart.
    states = [np.random.SeedSequence([seed, position]).generate_state(1)[0] for position in positions]
    return [torch.Generator().manual_seed(int(state)) for state in states]


def shifted(steps: Tensor, timesteps: int, shift: float) -> Tensor:
    """Timesteps (b,) drawn evenly, moved towards noise: u becomes s u / (1 + (s - 1) u) with the shift s.

    Esser et al., "Scaling Rectified Flow Transformers" (ICML 2024), section 5.3.2; u is 0 without noise.
    """
    u = (steps.double() + 0.5) / timesteps
    return (timesteps * shift * u / (1 + (shift - 1) * u)).long().clamp(max=timesteps - 1)


def draw(
    shape: Sequence[int],
    config: NoiseConfig,
    generators: Generators,
    device: torch.device | str = "cpu",
    drop_modes: int = 1,
    timesteps: int = SCHEDULE["num_train_timesteps"],
) -> Draws:
    """Random values of one training step, for latents of shape (c, f, h, w), drawn on the CPU for every device.

    `drop_modes` conditions may be missing, each as often.
    """
    # Every quantity is drawn whether it is used or not, so that switching one off leaves the others as they were.
    steps = torch.cat([torch.randint(timesteps, (1,), generator=g) for g in generators])
    uniform = torch.cat([torch.rand(1, generator=g) for g in generators])
    # The offset is constant in all frames and pixels of a (sample, channel).
    offsets = randn_tensor((len(generators), shape[0], 1, 1, 1), generator=list(generators))
    noise, posterior = (randn_tensor((len(generators), *shape), generator=list(generators)) for _ in range(2))
    dropout, device = config.condition_dropout, torch.device(device)
    which = 1 + (uniform * drop_modes / max(dropout, 1e-12)).long().clamp(max=drop_modes - 1)
    return Draws(
        to_device(shifted(steps, timesteps, config.timestep_shift), device),
        to_device(torch.where(uniform < dropout, which, 0), device),
        to_device(noise + config.noise_offset * offsets, device),
        to_device(posterior, device),
    )


@dataclass(frozen=True)
class StepLoss:
    """Loss of one batch of b samples."""

    loss: Tensor  # scalar, the weighted mean that is minimised
    errors: Tensor  # (b,) mean squared error of each sample's prediction, without weight; detached, for the logs
    timesteps: Tensor  # (b,) noise level of each sample
    pointing: Tensor | None = None  # loss and accuracy of attention supervision, (2,), detached; None without


@dataclass
class Objective:
    """The objective of a run."""

    animator: Animator  # the bare one, whose attributes say what it needs; the wrapped one is an argument of `loss`
    vae: VAE | VideoVAE
    config: TrainConfig
    # Of `Animator.constant_inputs`
    constant: Mapping[str, Tensor] = field(default_factory=dict)
    scheduler: DDIMScheduler | UniPCMultistepScheduler = field(init=False)
    levels: list[TokenLevel] = field(init=False)  # of the layers in which frames attend to images

    def __post_init__(self) -> None:
        factor, (width, height) = vae_scale_factor(self.vae), self.config.data.size
        self.scheduler = make_scheduler(self.config.noise, self.config.model.init, self.animator.noise)
        self.levels = token_levels(self.animator.attention_layers((height // factor, width // factor)))
        if self.config.attention.weight > 0:
            check_supervised(self.levels)

    @property
    def noise(self) -> Noise:
        return NOISES[self.animator.noise](self.scheduler)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(h, w) of the frames' tokens at every level."""
        return [level.queries for level in self.levels]

    @property
    def most_tokens(self) -> int:
        """Tokens of a frame, or of all frames of a segment, in the finest layer that attends to images."""
        animator, joint = self.animator, 1
        if animator.segment_frames is not None:
            joint = animator.latent_frames(self.config.data.num_frames)
        return max((height * width * joint for height, width in self.grids), default=0)

    def loss(self, model: nn.Module, batch: Batch, generators: Generators) -> StepLoss:
        """Weighted mean squared error of the model's prediction for one batch of clips.

        The batch has "reference" (b, 3, H, W) and "frames" (b, 3, f, H, W) in [-1, 1], or their cached features, and
        "poses" (b, 3, f, H, W) in [0, 1]; for calibration and supervision also masks and keypoints, see
        `data.clips.rendered`. `model` may be wrapped for distributed training.
        """
        animator, config = self.animator, self.config
        noise, calibrated, attention = config.noise, config.augmentation.calibrated, config.attention
        mean, deviation, reference_latents = batch_latents(self.vae, batch, animator, config.vae_chunk)
        if animator.context_latents:  # the reference is denoised before the clip, as in inference
            first = reference_latents[:, :, None]
            mean, deviation = torch.cat([first, mean], dim=2), torch.cat([torch.zeros_like(first), deviation], dim=2)
        drawn = draw(mean.shape[1:], noise, generators, mean.device, animator.drop_modes, self.noise.levels)
        latents, added = mean + deviation * drawn.posterior, drawn.noise
        context = images = None
        if calibrated.probability > 0:
            placed = calibrated_samples(batch, calibrated, generators)
            images, context = calibrated_reference(batch, placed, self.levels, calibrated)
            encoded = None
            if animator.calibrated_latents:
                shown = animator.vae_images(images.pixels, images.masks)
                encoded = encode_reference(self.vae, shown, config.vae_chunk)
                reference_latents = torch.cat([reference_latents, encoded])
            if calibrated.start > 0:
                if encoded is None or animator.alters_reference:
                    encoded = encode_reference(self.vae, images.pixels, config.vae_chunk)
                started = placed.present & drawn_with(calibrated.start, placed.present, generators)
                signal = self.scheduler.alphas_cumprod.to(latents)[drawn.timesteps]
                added = started_noise(added, latents, encoded, placed.index, started, signal)
        points = probe = None
        if attention.weight > 0:
            if attention.surface:
                points = surface_points(batch, attention.surface, generators)
            else:
                points = body_points(batch, attention.score_threshold)
            if attention.background:
                points = with_background(points, batch, attention.background, generators)
            probe = point_probe(points, self.grids)
        inputs = None
        if self.constant:
            share = config.augmentation.carried
            carried = [bool(torch.rand(1, generator=g) < share) for g in generators]
            inputs = {**self.constant, **animator.clip_inputs(self.vae, batch, carried, self.constant)}
        prediction = model(
            noisy_latents=self.noise.added(latents, added, drawn.timesteps),
            timestep=self.noise.timesteps(drawn.timesteps),
            reference_latents=reference_latents,
            reference_image=batch["reference_context"] if "reference_context" in batch else batch["reference"],
            poses=batch["poses"],
            dropped=drawn.dropped,
            reference=context,
            probe=probe,
            reference_mask=batch["reference_mask"] if animator.needs_mask else None,
            calibrated=images,
            inputs=inputs,
        )
        target = self.noise.target(latents, added, drawn.timesteps)
        squares = (prediction.float() - target).square()  # (b, c, f, h, w)
        errors = squares.mean(dim=(1, 2, 3, 4))
        weighted = errors
        if noise.person_weight != 1:
            weights = person_weights(latent_masks(batch, animator), latents.shape[-2:], noise.person_weight)
            weighted = (weights * squares).mean(dim=(1, 2, 3, 4))
        loss = (self.noise.weights(drawn.timesteps, noise.snr_gamma) * weighted).mean()
        if probe is None:
            return StepLoss(loss, errors.detach(), drawn.timesteps)
        pointing, accuracy = attention_loss(probe, points, self.grids, attention)
        return StepLoss(
            loss + attention.weight * pointing,
            errors.detach(),
            drawn.timesteps,
            torch.stack([pointing.detach(), accuracy]),
        )


def check_supervised(levels: list[TokenLevel]) -> None:
    """Refuse attention supervision where queries have no counterpart among the keys."""
    if any(level.keys != KeyLayout(level.queries, own=True) for level in levels):
        raise UserError(
            "attention.weight= needs a model whose frames see the reference on the layers' own grids; set it to 0"
        )


@torch.no_grad()
def encode_frames(vae: VAE | VideoVAE, frames: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and deviation of scaled latents (b, c, t, h, w) of clips (b, 3, f, H, W) in [-1, 1]."""
    if isinstance(vae, VideoVAE):  # whose latents are the mean, as everybody takes them
        latents = torch.cat([clip_encode(vae, clip[None]) for clip in frames]).float()
        return latents, torch.zeros_like(latents)
    parts = vae_posterior(vae, frames.transpose(1, 2).flatten(0, 1), chunk)  # (b*f, c, h, w) each
    mean, deviation = (part.float().unflatten(0, (len(frames), -1)).transpose(1, 2) for part in parts)
    return mean, deviation


@torch.no_grad()
def encode_reference(vae: VAE | VideoVAE, images: Tensor, chunk: int | None = None) -> Tensor:
    """Scaled latents (b, c, h, w) of images (b, 3, H, W) in [-1, 1]: the posterior's mean."""
    return vae_encode(vae, images, chunk).float()


def batch_latents(
    vae: VAE | VideoVAE, batch: Batch, animator: Animator, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviation of the frames' latents (b, c, t, h, w), and the references' latents (b, c, h, w).

    Latents from `prepare.py latents` are taken as they are.
    """
    if "latent_mean" in batch:
        mean, deviation = batch["latent_mean"], batch["latent_deviation"]
    else:
        mean, deviation = encode_frames(vae, batch["frames"], chunk)
    if "reference_latents" in batch and not animator.alters_reference:
        return mean, deviation, batch["reference_latents"]
    images = animator.vae_images(batch["reference"], batch.get("reference_mask"))
    return mean, deviation, encode_reference(vae, images, chunk)


def latent_masks(batch: Batch, animator: Animator) -> Tensor:
    """Masks (b, 1, t, H, W) in [0, 1] of latent frames: means of those of their frames, the reference's first."""
    masks, step = batch["masks"].float(), animator.frames_per_latent
    if step > 1:
        masks = torch.cat([masks[:, :, :1], masks[:, :, 1:].unflatten(2, (-1, step)).mean(dim=3)], dim=2)
    return torch.cat([batch["reference_mask"].float()[:, :, None]] * animator.context_latents + [masks], dim=2)


def person_weights(masks: Tensor, size: tuple[int, int], weight: float) -> Tensor:
    """Weights (b, 1, f, h, w), mean 1: `weight` on the person in masks (b, 1, f, H, W), 1 elsewhere."""
    share = F.adaptive_avg_pool2d(masks.transpose(1, 2).flatten(0, 1).float(), size)  # (b*f, 1, h, w)
    weights = 1 + (weight - 1) * share.unflatten(0, (len(masks), -1)).transpose(1, 2)
    return weights / weights.mean(dim=(1, 2, 3, 4), keepdim=True)


def compose_samples(batch: Batch, config: CompositionConfig, step: int, generators: Generators) -> Batch:
    """`compose_references` with a generator for each sample."""
    if config.probability == 0:
        return batch
    # Cached latents are of the reference as it was.
    batch = {name: value for name, value in batch.items() if name != "reference_latents"}
    return compose_references(batch, config, step, generators)


def calibrated_samples(batch: Batch, config: CalibratedTrainingConfig, generators: Generators) -> CalibratedBatch:
    """Calibrated images of every sample, those of the loader where they are bent by body part."""
    if config.transform == "articulated":
        return CalibratedBatch(**{field.name: batch[f"calibrated_{field.name}"] for field in fields(CalibratedBatch)})
    return calibrate_batch(batch, config, generators)


def calibrated_reference(
    batch: Batch, calibrated: CalibratedBatch, levels: list[TokenLevel], config: CalibratedTrainingConfig
) -> tuple[CalibratedImages, ReferenceContext]:
    """The m calibrated images of each clip; index and visibility for b*f frames of [b references | b*m images]."""
    flags = training_visibility(batch, calibrated, levels, config)
    batch_size, images = calibrated.images.shape[:2]
    frames = calibrated.index.shape[1]
    found = CalibratedImages(calibrated.images.flatten(0, 1), calibrated.masks.flatten(0, 1))
    clip = torch.arange(batch_size, device=found.pixels.device)[:, None].expand(-1, frames)
    index = torch.stack([clip, batch_size + clip * images + calibrated.index], dim=-1).flatten(0, 1)  # (b*f, 2)
    return found, ReferenceContext({}, index, flags)


def drawn_with(probability: float, present: Tensor, generators: Generators) -> Tensor:
    """(b, 1) bool, drawn for each sample, on the device of `present`."""
    uniform = torch.stack([torch.rand(1, generator=g) for g in generators])
    return to_device(uniform < probability, present.device)


def started_noise(
    noise: Tensor, latents: Tensor, calibrated: Tensor, index: Tensor, started: Tensor, signal: Tensor
) -> Tensor:
    """Noise (b, c, f, h, w) with which `latents` become, in `started` frames (b, f), noised calibrated images.

    a z' + s e = a z + s e' with e' = e + (z' - z) a / s: whatever a model predicts of (z, e') leads from the noised
    calibrated latents z', where `tpc.start` begins, to those of the truth, z. `calibrated` is (b*m, c, h, w), `index`
    (b, f) says which of a sample's m, and `signal` is a^2 of each sample, (b,).
    """
    rows = torch.arange(len(index), device=index.device)[:, None]
    shown = calibrated.unflatten(0, (len(index), -1))[rows, index].transpose(1, 2)  # (b, c, f, h, w)
    ratio = (signal / (1 - signal)).sqrt()[:, None, None, None, None]
    moved = started & (signal < MOST_SIGNAL)[:, None]
    return torch.where(moved[:, None, :, None, None], noise + ratio * (shown - latents), noise)
