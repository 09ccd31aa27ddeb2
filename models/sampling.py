"""Solvers of the noise schedule, guidance in an interval of noise levels, and context windows of long clips.

Windows overlap and their predictions are blended. They are open-ended: none wraps from the last frame to the first.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from core.errors import UserError
from models.config import EVERY_LEVEL, SOLVER_NAMES

SCHEDULERS = (DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)
SOLVERS = dict(zip(SOLVER_NAMES, SCHEDULERS, strict=True))


def with_solver(scheduler: SchedulerMixin, solver: str) -> SchedulerMixin:
    """A solver, one of `SOLVERS`, of the same diffusion: noise levels, prediction type, spacing and last level.

    UserError for a scheduler whose diffusion the solvers do not know.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    config = scheduler.config
    if is_flow(scheduler):
        if solver == "ddim":
            raise UserError(
                f"solver=ddim knows no flow matching, which the model's {type(scheduler).__name__} is of; the other "
                "solvers do"
            )
        return SOLVERS[solver](
            config.num_train_timesteps,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=config.get("flow_shift") or config.shift,
        )
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:
        raise UserError(f"solver={solver} cannot take the place of the model's {type(scheduler).__name__}")
    # The last step goes to no noise or to the lowest trained level, where the given scheduler's does (DDIM's
    # `set_alpha_to_one`). Spacing "leading" differs by a step between diffusers' DDIM and the others.
    last = config.get("final_sigmas_type") or ("zero" if config.get("set_alpha_to_one", True) else "sigma_min")
    clips = config.get("clip_sample", False)
    if solver == "ddim":
        return DDIMScheduler.from_config(config, set_alpha_to_one=last == "zero", clip_sample=clips)
    if clips:
        raise UserError(f"solver={solver} does not clip predictions, which the model's scheduler does; use ddim")
    # DPM-Solver++ would end in a step of second order over the widest interval of all, where that goes to some noise.
    further = {"euler_at_final": True} if solver == "dpm++" else {}
    return SOLVERS[solver].from_config(config, solver_order=2, final_sigmas_type=last, **further)


def is_flow(scheduler: SchedulerMixin) -> bool:
    """True for flow matching, whose noisy latents are (1 - s) latents + s noise at a timestep s of all that are
    trained; False for a diffusion with betas."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.get("use_flow_sigmas", False)


def guidance_at(
    scales: tuple[float, ...], interval: Sequence[float], scheduler: SchedulerMixin, timestep: Tensor
) -> tuple[float, ...]:
    """Guidance scales at a timestep: `scales` for noise levels in (low, high], 1 elsewhere."""
    # Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
    # Diffusion Models", 2024; its levels s are s / sqrt(1 + s^2) here.
    low, high = interval
    # The whole range includes the level 0, and asks no scheduler for its levels.
    if (low, high) == EVERY_LEVEL or low < noise_level(scheduler, timestep) <= high:
        return scales
    return (1.0,) * len(scales)


def noise_level(scheduler: SchedulerMixin, timestep: Tensor) -> float:
    """Share of noise in the noisy latents at a timestep of the CPU, in [0, 1]."""
    if is_flow(scheduler):
        noise = float(timestep) / scheduler.config.num_train_timesteps
        return noise / math.hypot(noise, 1 - noise)
    return float((1 - scheduler.alphas_cumprod[timestep]).sqrt())


# Fractions of a distance between windows by which successive steps shift them: multiples of the golden ratio spread
# evenly however many there are.
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def context_windows(
    num_frames: int, size: int, overlap: int, shift: float = 0.0, cuts: Sequence[int] = ()
) -> list[range]:
    """Ranges of `size` frames that cover a clip, neighbours sharing at least `overlap` frames.

    Starts are spread evenly and the last window ends with the clip. `shift` in [0, 1) moves all but the first and the
    last window by this fraction of their distance, and adds one. `cuts` are the first frames of shots, each of which
    has windows of its own. ValueError for numbers that cannot be.
    """
    if cuts:
        parts = pairwise([0, *cuts, num_frames])
        each = [(start, context_windows(stop - start, size, overlap, shift)) for start, stop in parts]
        return [range(start + w.start, start + w.stop) for start, windows in each for w in windows]
    if num_frames < 1 or size < 1:
        raise ValueError(f"num_frames and size must be at least 1, got {num_frames} and {size}")
    if not 0 <= overlap < size:
        raise ValueError(f"overlap must be at least 0 and smaller than the window of {size} frames, got {overlap}")
    if num_frames <= size:
        return [range(num_frames)]
    if not 0 <= shift < 1:
        raise ValueError(f"shift must be at least 0 and below 1, got {shift}")
    last = num_frames - size
    steps = -(-last // (size - overlap))
    # Rounding halves up keeps the distance of two starts within the rounded-up distance before rounding.
    inner = [math.floor((k + shift) * last / steps + 0.5) for k in range(steps)]
    return [range(start, start + size) for start in dict.fromkeys([0, *inner, last])]


def step_shift(step: int) -> float:
    """A shift for each denoising step, so that no frame is always at a window's end."""
    return step * GOLDEN_RATIO % 1


def window_weights(windows: list[range], num_frames: int) -> list[Tensor]:
    """Blending weights of each window's frames, (size,) float32, which sum to 1 over the windows of every frame."""
    # Largest in the middle, where motion modules see context on both sides, tapered linearly to ends that are shared.
    weights = []
    for window in windows:
        size = len(window)
        from_start = torch.arange(1, size + 1, dtype=torch.float32)
        from_end = from_start.flip(0)
        if not any(other.start < window.start < other.stop for other in windows):
            from_start = torch.full((size,), float(size))
        if not any(other.start < window.stop < other.stop for other in windows):
            from_end = torch.full((size,), float(size))
        weights.append(torch.minimum(from_start, from_end))
    total = torch.zeros(num_frames)
    for window, weight in zip(windows, weights, strict=True):
        total[window.start : window.stop] += weight
    return [weight / total[window.start : window.stop] for window, weight in zip(windows, weights, strict=True)]
