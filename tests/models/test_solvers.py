"""Solvers of the same diffusion, against the closed form of Gaussian data."""

import pytest
import torch
from diffusers import DDIMScheduler, SchedulerMixin

from core.errors import UserError
from models.checkpoints.convert import families, published_scheduler
from models.sampling import SOLVERS, with_solver

MEAN, DEVIATION = 1.5, 0.6  # of the data
FAMILIES = sorted(families())


def solver_error(scheduler: SchedulerMixin, own: DDIMScheduler, steps: int) -> float:
    """How far samples end from where the ideal denoiser's flow carries the same noise.

    Of data N(m, s^2) the posterior mean is linear in the noisy sample x = a x0 + b e, and the flow keeps
    (x - a m) / sqrt(a^2 s^2 + b^2).
    """

    def moments(share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return share.sqrt() * MEAN, (share * DEVIATION**2 + 1 - share).sqrt()

    scheduler.set_timesteps(steps)
    start = sample = torch.linspace(-2, 2, 9)[None, None]
    for timestep in scheduler.timesteps:
        share = scheduler.alphas_cumprod[int(timestep)]
        a, b = share.sqrt(), (1 - share).sqrt()
        mean, deviation = moments(share)
        clean = MEAN + DEVIATION**2 * a / deviation**2 * (sample - mean)
        noise = (sample - a * clean) / b
        asked = noise if own.config.prediction_type == "epsilon" else a * noise - b * clean
        sample = scheduler.step(asked, timestep, sample).prev_sample
    first_mean, first_deviation = moments(scheduler.alphas_cumprod[int(scheduler.timesteps[0])])
    last_mean, last_deviation = moments(own.final_alpha_cumprod)
    exact = last_mean + last_deviation / first_deviation * (start - first_mean)
    return float((sample - exact).abs().max())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_many_steps_lead_where_the_flow_does(family, solver):
    own = published_scheduler(family)
    other = with_solver(own, solver)
    assert isinstance(other, SOLVERS[solver]) and other is not own
    # 199 divides no schedule oddly: diffusers spaces "leading" timesteps by 1000 // steps, or 1000 // (steps + 1).
    errors = [solver_error(other, own, steps) for steps in (20, 199)]
    assert errors[1] < 0.025 and errors[1] < errors[0] / 5


@pytest.mark.parametrize("steps", [6, 10, 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_better_solvers_need_fewer_steps(family, steps):
    own = published_scheduler(family)
    plain, *better = (solver_error(with_solver(own, solver), own, steps) for solver in ("ddim", "dpm++", "unipc"))
    assert max(better) < plain * (0.65 if steps == 20 else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_ddim_is_the_models_own(family):
    own = published_scheduler(family)
    again = with_solver(with_solver(own, "unipc"), "ddim")
    for scheduler in (with_solver(own, "ddim"), again):
        scheduler.set_timesteps(7), own.set_timesteps(7)
        assert torch.equal(scheduler.timesteps, own.timesteps)
        assert torch.equal(scheduler.alphas_cumprod, own.alphas_cumprod)
        assert torch.equal(scheduler.final_alpha_cumprod, own.final_alpha_cumprod)
        assert scheduler.config.prediction_type == own.config.prediction_type and not scheduler.config.clip_sample


@pytest.mark.parametrize("solver", ["dpm++", "unipc"])
def test_zero_terminal_snr_and_trailing_steps_are_kept(solver):
    scheduler = with_solver(published_scheduler("stable_diffusion"), solver)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert scheduler.sigmas[0] == pytest.approx(4096, rel=1e-3) and scheduler.sigmas[-1] == 0
    assert scheduler.init_noise_sigma == 1
    last = with_solver(published_scheduler("dreampose"), solver)
    last.set_timesteps(4)
    share = last.alphas_cumprod[0]
    assert last.sigmas[-1] == pytest.approx(float(((1 - share) / share).sqrt()), rel=1e-4)


def test_what_cannot_be_solved_is_refused():
    with pytest.raises(UserError, match="solver=unipc does not clip"):
        with_solver(DDIMScheduler(clip_sample=True), "unipc")
    assert with_solver(DDIMScheduler(clip_sample=True), "ddim").config.clip_sample
    with pytest.raises(ValueError, match="solver must be one of ddim, dpm\\+\\+, unipc, got 'euler'"):
        with_solver(DDIMScheduler(), "euler")
