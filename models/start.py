"""Denoising that begins part of the way, in frames that have an image to begin from; in the others from noise.

Shapes use f = frames, c = channels, h, w = latent size.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import Tensor

from core.errors import UserError
from models.images import ENCODE_CHUNK, CalibratedClip, ImageBatch
from models.sampling import SOLVERS

# Options of diffusers' solvers that space timesteps by other rules.
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def started_frames(calibration: CalibratedClip | None) -> np.ndarray | None:
    """(f,) bool: the frames that begin from their calibrated images; None where there are none."""
    if calibration is None or calibration.start_timestep is None:
        return None
    started = calibration.shows_everybody
    return started if started.any() else None


def started_timesteps(start: int, steps: int, trained: int, everywhere: bool) -> list[int]:
    """Timesteps of a run that begins at `start`, descending: `steps` of them, at most one for each that is trained.

    Unless frames begin `everywhere`, further ones lead from the last of the `trained` timesteps to `start`, as far
    apart as `steps` would be over all.
    """
    if not 0 <= start < trained:
        raise UserError(f"start={start} must be a timestep of the model's, 0 to {trained - 1}")
    count = min(steps, start + 1)
    timesteps = [math.floor((start + 1) * k / count + 0.5) - 1 for k in range(count, 0, -1)]
    left = trained - 1 - start
    count = 0 if everywhere else min(max(1, round(steps * left / trained)), left)
    return [start + math.floor(left * k / count + 0.5) for k in range(count, 0, -1)] + timesteps


def with_timesteps(scheduler: SchedulerMixin, timesteps: Sequence[int]) -> SchedulerMixin:
    """The solver of a diffusion that has these timesteps alone, descending; its own are len(timesteps) - 1 ... 0.

    It ends without noise. UserError for a scheduler that is none of `SOLVERS`.
    """
    if not isinstance(scheduler, tuple(SOLVERS.values())):
        raise UserError(
            f"the model's {type(scheduler).__name__} cannot begin at a timestep of choice; set solver= to one of "
            f"{', '.join(SOLVERS)}"
        )
    signal = scheduler.alphas_cumprod[list(reversed(timesteps))].double()
    betas = 1 - signal / torch.cat([signal.new_ones(1), signal[:-1]])
    last = {"set_alpha_to_one": True} if isinstance(scheduler, DDIMScheduler) else {"final_sigmas_type": "zero"}
    solver = type(scheduler).from_config(
        scheduler.config,
        num_train_timesteps=len(timesteps),
        trained_betas=betas.tolist(),
        rescale_betas_zero_snr=False,  # as `signal` is already, where it is to be
        timestep_spacing="trailing",
        **{name: False for name in SPACINGS if name in scheduler.config},
        **last,
    )
    solver.set_timesteps(len(timesteps))
    return solver


class StartedSolver:
    """Takes a scheduler's place where `started` frames, (f,) bool, begin at a timestep from noised images.

    At the timesteps above, which only the other frames need, these images are shown at the noise of the timestep. All
    frames are then denoised together; a started frame's solver knows nothing of the timesteps above.
    """

    init_noise_sigma = 1.0

    def __init__(self, scheduler: SchedulerMixin, start: int, steps: int, started: np.ndarray, device: torch.device):
        trained = len(scheduler.alphas_cumprod)
        self.steps = started_timesteps(start, steps, trained, everywhere=bool(started.all()))
        self.timesteps = torch.tensor(self.steps, device=device)
        self.alphas_cumprod = scheduler.alphas_cumprod.to(device)
        # Indices, because a GPU's program waits to hear how many frames a mask leaves.
        self.started, others = (torch.from_numpy(np.flatnonzero(part)).to(device) for part in (started, ~started))
        self.solvers = [(self.started, with_timesteps(scheduler, [t for t in self.steps if t <= start]))]
        if len(others):
            self.solvers.append((others, with_timesteps(scheduler, self.steps)))

    def begin(self, latents: Tensor, noise: Tensor, images: Tensor) -> Tensor:
        """Latents (1, c, f, h, w) of the first timestep: the given ones, but for started frames.

        `images` are these frames' latents, (1, c, n, h, w).
        """
        self.images, self.noise = images.to(noise), noise[:, :, self.started]
        latents = latents.clone()
        latents[:, :, self.started] = self.add_noise(self.images, self.noise, self.steps[0])
        return latents

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        return latents

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor | int) -> Tensor:
        signal = self.alphas_cumprod.to(latents.dtype)[timestep]
        return signal.sqrt() * latents + (1 - signal).sqrt() * noise

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> SimpleNamespace:
        left = len(self.steps) - self.steps.index(int(timestep)) - 1  # steps after this one
        after = torch.empty_like(latents)
        for frames, solver in self.solvers:
            if left < len(solver.timesteps):
                stepped = solver.step(prediction[:, :, frames], left, latents[:, :, frames]).prev_sample
            else:
                stepped = self.add_noise(self.images, self.noise, self.steps[-left])
            after[:, :, frames] = stepped
        return SimpleNamespace(prev_sample=after)


def start_latents(images: ImageBatch, started: np.ndarray) -> Tensor:
    """Latents (1, c, n, h, w) of the calibrated images of the n frames that are `started`, (f,) bool."""
    parts = []
    frames = np.flatnonzero(started)
    for first in range(0, len(frames), ENCODE_CHUNK):
        shown = np.stack([images.calibration.frame_image(frame) for frame in frames[first : first + ENCODE_CHUNK]])
        pixels = torch.from_numpy(shown).permute(0, 3, 1, 2).to(images.reference) / 127.5 - 1
        parts.append(images.encode(pixels))
    return torch.cat(parts).transpose(0, 1)[None]
