"""Denoising that begins from noised images: timesteps, every solver, every animator, frames without an image."""

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from models.attention.recording import AttentionConfig, AttentionRecording
from models.checkpoints.convert import families, published_scheduler
from models.sampling import SOLVERS, with_solver
from models.start import StartedSolver, started_timesteps, with_timesteps
from models.vae import vae_encode
from tests.models.animators.test_animators import calibration
from tests.networks import TRAINABLE
from tests.small_animators import FRAMES, LATENTS, calibrated, sample, small_pipeline
from tpc import Calibration

TRAINED = 1000


@cache
def of_everybody() -> Calibration:
    return calibration("add", unseen=0)


def started(start: int, attach: str = "add", everybody: bool = False, **choices) -> Calibration:
    """For the small animators' images; unless `everybody`, nobody is calibrated in the first frame."""
    made = of_everybody() if everybody else calibrated(attach)
    return dataclasses.replace(made, config=dataclasses.replace(made.config, start=start, **choices))


@given(st.integers(0, TRAINED - 1), st.integers(1, 60))
def test_timesteps_begin_at_the_start_and_are_even(start, steps):
    alone = started_timesteps(start, steps, TRAINED, everywhere=True)
    assert alone[0] == start and len(alone) == min(steps, start + 1) and alone[-1] >= 0
    distances = -np.diff([*alone, -1])
    assert distances.min() >= 1 and np.ptp(distances) <= 1
    further = started_timesteps(start, steps, TRAINED, everywhere=False)
    above = further[: -len(alone)]
    assert further[-len(alone) :] == alone and (start == TRAINED - 1 or further[0] == TRAINED - 1)
    # Above as far apart as without a start, or a little closer: never coarser than that by more than rounding.
    assert len(above) <= steps and len(above) >= round(steps * (TRAINED - 1 - start) / TRAINED)
    assert (np.diff(further) < 0).all()


def test_all_timesteps_are_what_is_run_without_a_start():
    scheduler = published_scheduler("stable_diffusion")
    for steps in (1, 2, 4, 20):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == started_timesteps(999, steps, TRAINED, everywhere=False)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("family", sorted(families()))
def test_solvers_walk_the_trained_noise_levels_to_the_image(family, solver):
    """With an ideal denoiser of one image every solver stays on the line from noise to it, and ends there."""
    own = with_solver(published_scheduler(family), solver)
    timesteps = [t for t in (999, 500, 300, 137, 20, 0) if own.alphas_cumprod[t] > 0 or t < 999]
    reduced = with_timesteps(own, timesteps)
    levels = own.alphas_cumprod[timesteps]
    torch.testing.assert_close(reduced.alphas_cumprod.flip(0), levels, rtol=1e-4, atol=1e-6)
    image, noise = torch.tensor([[[1.5, -0.5, 0.0]]]), torch.tensor([[[0.3, -2.0, 1.0]]])
    signal, spread = levels.sqrt(), (1 - levels).sqrt()
    latents = signal[0] * image + spread[0] * noise
    for k, index in enumerate(reduced.timesteps):
        torch.testing.assert_close(latents, signal[k] * image + spread[k] * noise, atol=2e-3, rtol=0)
        velocity = signal[k] * noise - spread[k] * image
        asked = noise if own.config.prediction_type == "epsilon" else velocity
        latents = reduced.step(asked, index, latents).prev_sample
    torch.testing.assert_close(latents, image, atol=2e-3, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_at_the_last_timestep_is_none(solver):
    """Exactly so where that is pure noise, steps divide the schedule and the last one goes to no noise."""
    pipeline = small_pipeline("animate_anyone", temporal=True)
    made = started(TRAINED - 1)
    expected = sample(pipeline, calibration=calibrated("add"), num_inference_steps=4, solver=solver)
    result = sample(pipeline, calibration=made, num_inference_steps=4, solver=solver)
    torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", TRAINABLE)
def test_a_start_at_no_noise_is_the_calibrated_image_through_the_vae(kind):
    pipeline, made = small_pipeline(kind), started(0, attach="replace")
    result = sample(pipeline, calibration=made)
    shown = np.stack([made.frame_image(frame) for frame in range(1, FRAMES)])
    pixels = torch.from_numpy(shown).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = vae_encode(pipeline.vae, pixels).transpose(0, 1)[None]
    noise = 2 * (1 - pipeline.scheduler.alphas_cumprod[0]).sqrt()
    assert (result[:, :, 1:] - expected).abs().median() < noise
    assert (result[:, :, :1] - expected).abs().median() > 4 * noise, "the first frame is drawn from noise"


@pytest.mark.parametrize("kind", ["disco", "dream_pose"])
def test_frames_that_do_not_attend_to_each_other_do_not_depend_on_each_other(kind):
    """Neither on windows, nor on whether another frame of the clip begins from noise."""
    pipeline = small_pipeline(kind)
    noise = torch.randn((1, 4, FRAMES, *LATENTS), generator=torch.Generator().manual_seed(1))
    arguments = {"latents": noise, "solver": "dpm++", "guidance_scale": 1.0}
    mixed, whole = started(400), started(400, everybody=True)
    assert mixed.shows_everybody.tolist() == [False, True, True, True] and whole.shows_everybody.all()
    result = sample(pipeline, calibration=mixed, **arguments)
    apart = sample(pipeline, calibration=mixed, window_size=1, window_overlap=0, **arguments)
    torch.testing.assert_close(result, apart, atol=1e-4, rtol=1e-4)
    together = sample(pipeline, calibration=whole, **arguments)
    torch.testing.assert_close(result[:, :, 1:], together[:, :, 1:], atol=1e-4, rtol=1e-4)
    off = sample(pipeline, calibration=dataclasses.replace(mixed, config=calibrated("add").config), **arguments)
    assert not torch.allclose(result[:, :, 1:], off[:, :, 1:], atol=1e-2)


def test_clips_propagate_are_recorded_and_count_their_steps():
    """In windows, with motion modules, and a callback of every step."""
    pipeline = small_pipeline("animate_anyone", temporal=True)
    made, seen = started(300, propagation="iterative", groups=2), []

    def note(_, step, timestep, tensors):
        seen.append(timestep)
        return tensors

    with AttentionRecording(AttentionConfig(steps=[0, 4], mean=["heads"])) as recording:
        result = sample(
            pipeline,
            calibration=made,
            num_inference_steps=3,
            window_size=3,
            window_overlap=1,
            attention=recording,
            callback_on_step_end=note,
        )
    assert result.isfinite().all() and seen == [999, 650, 300, 200, 99]
    assert recording.result.timesteps == (999, 99)
    assert pipeline.denoising_steps(3, made) == 5 and pipeline.denoising_steps(3, started(300, everybody=True)) == 3
    nobody = dataclasses.replace(made, member=np.full_like(made.member, -1))
    assert pipeline.denoising_steps(3, nobody) == pipeline.denoising_steps(3) == 3


def test_waiting_frames_show_their_image_at_every_noise_level():
    solver = StartedSolver(
        published_scheduler("stable_diffusion"), 200, 2, np.array([True, False]), torch.device("cpu")
    )
    noise, image = torch.randn((1, 1, 2, 1, 1)), torch.full((1, 1, 1, 1, 1), 3.0)
    latents = solver.begin(noise.clone(), noise, image)
    for timestep in solver.timesteps:
        signal = solver.alphas_cumprod[timestep]
        if timestep >= 200:
            expected = signal.sqrt() * 3 + (1 - signal).sqrt() * noise[0, 0, 0]
            torch.testing.assert_close(latents[0, 0, 0], expected)
        latents = solver.step(torch.zeros_like(latents), timestep, latents).prev_sample


@pytest.mark.parametrize(
    ("scheduler", "start", "message"),
    [
        (None, 1000, "start=1000 must be a timestep of the model's, 0 to 999"),
        (EulerDiscreteScheduler(), 300, "EulerDiscreteScheduler cannot begin.*solver= to one of ddim"),
    ],
)
def test_what_cannot_start_is_named(scheduler, start, message):
    scheduler = scheduler or published_scheduler("stable_diffusion")
    with pytest.raises(UserError, match=message):
        StartedSolver(scheduler, start, 2, np.ones(2, bool), torch.device("cpu"))


def test_timesteps_are_even_whatever_the_models_own_spacing():
    plain, spaced = (with_timesteps(SOLVERS["dpm++"](use_karras_sigmas=karras), [300, 200, 99]) for karras in (0, 1))
    assert torch.equal(plain.sigmas, spaced.sigmas) and plain.timesteps.tolist() == [2, 1, 0]
