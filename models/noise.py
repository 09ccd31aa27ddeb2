"""Noise that training adds to latents, and what a model learns to predict from them: diffusion, or flow matching.

Shapes use b = batch, c = channels, f = frames, h, w = latent size.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor


class Noise(Protocol):
    """Noise of levels 0, nearly none, to `levels` - 1."""

    levels: int

    def added(self, latents: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Noisy latents of latents and standard normal noise (b, c, f, h, w), at levels (b,)."""

    def timesteps(self, level: Tensor) -> Tensor:
        """What the model is told of levels (b,)."""

    def target(self, latents: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """What is to be predicted, (b, c, f, h, w)."""

    def weights(self, level: Tensor, snr_gamma: float | None) -> Tensor:
        """Weights of the squared errors, (b,)."""


@dataclass(frozen=True)
class DiffusionNoise:
    """That of a schedule of betas, for models that predict velocity, noise or latents."""

    scheduler: DDIMScheduler

    @property
    def levels(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def added(self, latents: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, level)

    def timesteps(self, level: Tensor) -> Tensor:
        return level

    def target(self, latents: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        predicted = self.scheduler.config.prediction_type
        if predicted == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, level)
        return noise if predicted == "epsilon" else latents

    def weights(self, level: Tensor, snr_gamma: float | None) -> Tensor:
        """Min-SNR weights (Hang et al., ICCV 2023).

        For velocity min(snr + 1, gamma) / (snr + 1): 1 at zero terminal SNR, where min(snr, gamma) / (snr + 1) would
        be 0.
        """
        if snr_gamma is None:
            return torch.ones_like(level, dtype=torch.float32)
        snr = compute_snr(self.scheduler, level).float()
        predicted = self.scheduler.config.prediction_type
        if predicted == "v_prediction":
            return (snr + 1).clamp(max=snr_gamma) / (snr + 1)
        if predicted == "epsilon":
            return snr.clamp(max=snr_gamma) / snr.clamp(min=1e-8)
        return snr.clamp(max=snr_gamma)


@dataclass(frozen=True)
class FlowNoise:
    """Flow matching (Lipman et al., ICLR 2023) along straight lines: (1 - s) latents + s noise, with s in (0, 1].

    The model predicts where the line leads, noise - latents; every level counts alike.
    """

    scheduler: UniPCMultistepScheduler

    @property
    def levels(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def share(self, level: Tensor) -> Tensor:
        """s of levels (b,), (b, 1, 1, 1, 1)."""
        return ((level + 1) / self.levels).view(-1, 1, 1, 1, 1)

    def added(self, latents: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        share = self.share(level)
        return (1 - share) * latents + share * noise

    def timesteps(self, level: Tensor) -> Tensor:
        return level + 1  # as samplers count, s times the number of levels

    def target(self, latents: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return noise - latents

    def weights(self, level: Tensor, snr_gamma: float | None) -> Tensor:
        return torch.ones_like(level, dtype=torch.float32)


NOISES: dict[str, Any] = {"diffusion": DiffusionNoise, "flow": FlowNoise}  # by `Animator.noise`
