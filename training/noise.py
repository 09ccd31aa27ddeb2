"""Random numbers of training: a function of the run's seed and of a sample's position in the run, and of nothing else.

A sample so gets the same noise, timestep and dropout in whatever batch and on whatever process it is trained on: two
processes repeat what one does with the doubled batch, and a resumed run repeats an unbroken one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from training.config import NoiseConfig

Generators = Sequence[torch.Generator]


@dataclass(frozen=True)
class Draws:
    """Random values of b samples whose latents are (b, c, f, h, w)."""

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
) -> Draws:
    """Random values of one training step, for latents of shape (c, f, h, w), drawn on the CPU for every device.

    `drop_modes` conditions may be missing, each as often.
    """
    # Every quantity is drawn whether it is used or not, so that switching one off leaves the others as they were.
    steps = torch.cat([torch.randint(config.num_train_timesteps, (1,), generator=g) for g in generators])
    uniform = torch.cat([torch.rand(1, generator=g) for g in generators])
    # The offset is constant in all frames and pixels of a (sample, channel).
    offsets = randn_tensor((len(generators), shape[0], 1, 1, 1), generator=list(generators))
    noise, posterior = (randn_tensor((len(generators), *shape), generator=list(generators)) for _ in range(2))
    dropout = config.condition_dropout
    which = 1 + (uniform * drop_modes / max(dropout, 1e-12)).long().clamp(max=drop_modes - 1)
    return Draws(
        shifted(steps, config.num_train_timesteps, config.timestep_shift).to(device),
        torch.where(uniform < dropout, which, 0).to(device),
        (noise + config.noise_offset * offsets).to(device),
        posterior.to(device),
    )
