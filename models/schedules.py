"""Solvers of a noise schedule, which a pipeline folder carries, so that sampling uses the right one."""

from collections.abc import Sequence

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from torch import Tensor

from core.errors import UserError

SOLVERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}

EVERY_LEVEL = (0.0, 1.0)  # of noise


def with_solver(scheduler: SchedulerMixin, solver: str) -> SchedulerMixin:
    """Another solver of the same diffusion: its noise levels, prediction type, spacing and last noise level.

    The last step goes where the given scheduler's does, to no noise or to the lowest level that was trained
    (`set_alpha_to_one` of DDIM). Spacing "leading" differs by a step between diffusers' DDIM and the others.

    Args:
        solver: "ddim"; "dpm++", DPM-Solver++ of second order with multisteps (Lu et al., 2022); or "unipc", UniPC of
            second order (Zhao et al., 2023).

    Raises:
        UserError: a scheduler whose diffusion the solvers do not know.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    config = scheduler.config
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:
        raise UserError(f"solver={solver} cannot take the place of the model's {type(scheduler).__name__}")
    last = config.get("final_sigmas_type") or ("zero" if config.get("set_alpha_to_one", True) else "sigma_min")
    clips = config.get("clip_sample", False)
    if solver == "ddim":
        return DDIMScheduler.from_config(config, set_alpha_to_one=last == "zero", clip_sample=clips)
    if clips:
        raise UserError(f"solver={solver} does not clip predictions, which the model's scheduler does; use ddim")
    # DPM-Solver++ would end in a step of second order over the widest interval of all, where that goes to some noise.
    further = {"euler_at_final": True} if solver == "dpm++" else {}
    return SOLVERS[solver].from_config(config, solver_order=2, final_sigmas_type=last, **further)


def check_sampling(guidance_interval: Sequence[float], solver: str | None) -> None:
    """Refuse an interval of noise levels or a solver that does not exist.

    Raises:
        UserError: naming it.
    """
    interval = list(guidance_interval)
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(f"guidance_interval={interval} must be two numbers, 0 <= first < second <= 1")
    if solver is not None and solver not in SOLVERS:
        raise UserError(f"solver={solver} must be one of {', '.join(SOLVERS)}")


def guidance_at(
    scales: tuple[float, ...], interval: Sequence[float], scheduler: SchedulerMixin, timestep: Tensor
) -> tuple[float, ...]:
    """Scales of guidance at one step: as they are for noise levels in (low, high], all 1 elsewhere.

    Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
    Models", 2024; its levels s are s / sqrt(1 + s^2) here.
    """
    low, high = interval
    # The whole range includes the level 0, and asks no scheduler for its levels.
    if (low, high) == EVERY_LEVEL or low < noise_level(scheduler, timestep) <= high:
        return scales
    return (1.0,) * len(scales)


def noise_level(scheduler: SchedulerMixin, timestep: Tensor) -> float:
    """Share of noise in the noisy latents at a timestep, their standard deviation of it, in [0, 1].

    It is s / sqrt(1 + s^2) of the noise level s that is counted against latents of unchanged size.
    """
    return float((1 - scheduler.alphas_cumprod[timestep.cpu()]).sqrt())
