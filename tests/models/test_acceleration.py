"""Guidance in an interval and other solvers: off by default, one by one on all animators, and what is refused."""

import pytest
import torch

import infer
from core.config import load_config
from core.errors import UserError
from inference.config import SamplingConfig
from models.sampling import noise_level
from tests.networks import TRAINABLE
from tests.small_animators import calibrated, sample, small_pipeline

STEPS = 4
SETTINGS = {
    "guidance": {"guidance_interval": [0.9, 1.0]},
    "dpm++": {"solver": "dpm++"},
    "unipc": {"solver": "unipc"},
}


@pytest.fixture(scope="module", params=TRAINABLE)
def pipeline(request):
    return small_pipeline(request.param)


def levels(pipeline, steps=STEPS) -> list[float]:
    pipeline.scheduler.set_timesteps(steps)
    return [noise_level(pipeline.scheduler, timestep) for timestep in pipeline.scheduler.timesteps]


def test_nothing_is_left_out_by_default(pipeline):
    arguments = {"calibration": calibrated("add"), "window_size": 3, "window_overlap": 1, "shift_windows": True}
    expected = sample(pipeline, **arguments)
    assert torch.equal(sample(pipeline, guidance_interval=[0.0, 1.0], solver=None, **arguments), expected)


def test_each_setting_changes_every_animator_and_leaves_nothing_behind(pipeline):
    arguments = {"calibration": calibrated("add"), "num_inference_steps": STEPS}
    expected, own = sample(pipeline, **arguments), pipeline.scheduler
    for name, setting in SETTINGS.items():
        result = sample(pipeline, **setting, **arguments)
        assert result.isfinite().all() and not torch.allclose(result, expected, atol=1e-4), name
    assert pipeline.scheduler is own
    assert torch.equal(sample(pipeline, **arguments), expected)


def test_all_settings_together_with_images_in_the_references_place(pipeline):
    arguments = {"num_inference_steps": STEPS, "guidance_interval": [0.5, 0.99], "solver": "unipc"}
    windows = {"window_size": 3, "window_overlap": 1}
    result, alone = (
        sample(pipeline, calibration=made, **windows, **arguments) for made in (calibrated("replace"), None)
    )
    assert result.isfinite().all() and not torch.allclose(result, alone, atol=1e-4)


def test_no_guidance_outside_the_interval(pipeline):
    """Latents after the first step tell what guided it."""
    low, high = levels(pipeline, 2)[::-1]

    def after_steps(**arguments) -> list[torch.Tensor]:
        kept = []

        def keep(_, step, timestep, tensors):
            kept.append(tensors["latents"])
            return tensors

        sample(pipeline, callback_on_step_end=keep, **arguments)
        return kept

    guided, alone = after_steps(), after_steps(guidance_scale=1.0)
    first, last = (after_steps(guidance_interval=interval) for interval in ([low, 1], [0, low]))
    assert low < high
    assert torch.equal(first[0], guided[0]) and not torch.equal(first[1], guided[1])
    assert torch.equal(last[0], alone[0]) and not torch.equal(last[1], alone[1])
    assert torch.equal(after_steps(guidance_interval=[0.0, low / 2])[1], alone[1])


def test_half_the_passes_outside_the_interval():
    pipeline, passes = small_pipeline("animate_anyone"), []
    inside = levels(pipeline)
    handle = pipeline.denoising_unet.register_forward_pre_hook(lambda *_: passes.append(1))
    sample(pipeline, num_inference_steps=STEPS, guidance_interval=[inside[2], 1.0])
    handle.remove()
    assert len(passes) == 2 * 2 + 2


def test_noise_levels_are_those_of_the_paper(pipeline):
    """The level s / sqrt(1 + s^2) of noise s that is added to unscaled latents; all of it at zero terminal SNR."""
    scheduler = pipeline.scheduler
    share = scheduler.alphas_cumprod[[0, 300, 998]]
    noise = ((1 - share) / share).sqrt()
    expected = noise / (1 + noise**2).sqrt()
    assert [noise_level(scheduler, torch.tensor(t)) for t in (0, 300, 998)] == pytest.approx(expected.tolist())
    assert noise_level(scheduler, torch.tensor(999)) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"guidance_interval": [0.5]}, r"guidance_interval=\[0.5\]"),
        ({"guidance_interval": [0.5, 0.2]}, r"guidance_interval=\[0.5, 0.2\]"),
        ({"guidance_interval": [0.5, 2.0]}, "guidance_interval="),
        ({"solver": "euler"}, "solver=euler must be one of ddim, dpm\\+\\+, unipc"),
    ],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(UserError, match=message):
        sample(small_pipeline("animate_anyone"), **setting)


def test_settings_of_commands():
    config = load_config(infer.InferConfig, ["solver=dpm++", "guidance_interval=[0.2,0.9]"])
    assert (config.guidance_interval, config.solver) == ([0.2, 0.9], "dpm++")
    config.check()
    with pytest.raises(UserError, match=r"guidance_interval=\[0.5, 0.2\]"):
        SamplingConfig(guidance_interval=[0.5, 0.2]).check()
    with pytest.raises(UserError, match="solver=euler"):
        SamplingConfig(solver="euler").check()
    old = ["acceleration.solver=dpm++", "acceleration.guidance_interval=[0.2,0.9]", "acceleration.broadcast=1"]
    assert load_config(infer.InferConfig, [*old, "acceleration.broadcast_kinds=[spatial,cross]"]) == config
    with pytest.raises(UserError, match="unknown key 'acceleration.broadcast'"):
        load_config(infer.InferConfig, ["acceleration.broadcast=2"])
    with pytest.raises(UserError, match="unknown key 'solvr'.*solver"):
        load_config(infer.InferConfig, ["solvr=ddim"])
