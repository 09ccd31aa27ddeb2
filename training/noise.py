"""Random numbers of training: a function of the run's seed and of a sample's position in the run, and of nothing else.

A sample so gets the same noise, timestep and dropout in whatever batch and on whatever process it is trained on: two
processes repeat what one does with the doubled batch, and a resumed run repeats an unbroken one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Generators = Sequence[torch.Generator]


@dataclass(frozen=True)
class Draws:
    """What is drawn for b samples whose latents are (b, c, f, h, w).

    Attributes:
        timesteps: (b,) long.
        dropped: (b,) long, samples that are trained without some condition: 0 none, or which kind, from 1.
        noise: (b, c, f, h, w) what is added to the latents, offset included.
        posterior: (b, c, f, h, w) standard normal, for the VAE's posterior.
    """

    timesteps: Tensor
    dropped: Tensor
    noise: Tensor
    posterior: Tensor


def sample_generators(seed: int, positions: Sequence[int]) -> list[torch.Generator]:
    """One generator on the CPU for each sample.

    Args:
        seed: of the run.
        positions: numbers of the samples, counted over all steps and processes of the run.
    """
    # A CPU generator takes 32 bits of its seed; hashing keeps neighbouring positions of neighbouring seeds apart.
    states = [np.random.SeedSequence([seed, position]).generate_state(1)[0] for position in positions]
    return [torch.Generator().manual_seed(int(state)) for state in states]


def shifted(steps: Tensor, timesteps: int, shift: float) -> Tensor:
    """Timesteps drawn evenly, (b,) long, moved towards noise: a share u of the way becomes s u / (1 + (s - 1) u).

    The shift of Esser et al., "Scaling Rectified Flow Transformers" (ICML 2024), section 5.3.2, with s = `shift`; 1
    changes nothing.
    """
    share = (steps.double() + 0.5) / timesteps
    return (timesteps * shift * share / (1 + (shift - 1) * share)).long().clamp(max=timesteps - 1)


def draw(
    shape: Sequence[int],
    timesteps: int,
    dropout: float,
    noise_offset: float,
    generators: Generators,
    device: torch.device | str = "cpu",
    kinds: int = 1,
    shift: float = 1.0,
) -> Draws:
    """Draw everything that one training step needs, sample by sample; on the CPU, so every device gets the same.

    Args:
        shape: (c, f, h, w) of one sample's latents.
        timesteps: number of timesteps to choose from, evenly.
        dropout: share of samples without some condition.
        noise_offset: deviation of a constant a (sample, channel), the same in all frames and places, added to the
            noise and with it to what the model must predict.
        kinds: of conditions that may be missing, each as often.
        shift: of the timesteps, see `shifted`.
    """
    # Every quantity is drawn whether it is used or not, so that switching one off leaves the others as they were.
    steps = torch.cat([torch.randint(timesteps, (1,), generator=g) for g in generators])
    lots = torch.cat([torch.rand(1, generator=g) for g in generators])
    offsets = torch.stack([torch.randn(shape[0], 1, 1, 1, generator=g) for g in generators])
    noise = torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])
    posterior = torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])
    dropped = torch.where(lots < dropout, 1 + (lots * kinds / max(dropout, 1e-12)).long().clamp(max=kinds - 1), 0)
    return Draws(
        shifted(steps, timesteps, shift).to(device),
        dropped.to(device),
        (noise + noise_offset * offsets).to(device),
        posterior.to(device),
    )
