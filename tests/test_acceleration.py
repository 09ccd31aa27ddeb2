"""Accelerations that change results: off by default, one by one on all animators, and what is refused."""

import numpy as np
import pytest
import torch

import infer
from core.config import load_config
from core.errors import UserError
from inference.animate import SamplingConfig
from models.acceleration import AccelerationConfig
from models.attention.recording import AttentionRecording
from models.attention.run import AttentionConfig
from models.schedules import noise_level
from tests.small_animators import LATENTS, calibrated, sample, small_pipeline
from training.kinds import KINDS

STEPS = 4
SETTINGS = {
    "guidance": {"guidance_interval": [0.9, 1.0]},
    "broadcast": {"broadcast": 2, "broadcast_interval": [0.0, 1.0]},
    "dpm++": {"solver": "dpm++"},
    "unipc": {"solver": "unipc"},
}


def has_reference_tokens(pipeline) -> bool:
    return all(shape.keys is None for shape in pipeline.animator().attention_layers(LATENTS).values())


@pytest.fixture(scope="module", params=sorted(KINDS))
def pipeline(request):
    return small_pipeline(request.param)


def levels(pipeline, steps=STEPS) -> list[float]:
    pipeline.scheduler.set_timesteps(steps)
    return [noise_level(pipeline.scheduler, timestep) for timestep in pipeline.scheduler.timesteps]


def test_nothing_is_left_out_by_default(pipeline):
    arguments = {"calibration": calibrated("add"), "window_size": 3, "window_overlap": 1, "shift_windows": True}
    expected = sample(pipeline, **arguments)
    # What means something only beside a setting that is off changes nothing either.
    for config in (AccelerationConfig(), AccelerationConfig(broadcast_kinds=["temporal"], merge_levels=3)):
        assert torch.equal(sample(pipeline, acceleration=config, **arguments), expected)


def test_each_setting_changes_every_animator_and_leaves_nothing_behind(pipeline):
    arguments = {"calibration": calibrated("add"), "num_inference_steps": STEPS}
    expected, own = sample(pipeline, **arguments), pipeline.scheduler
    for name, setting in SETTINGS.items():
        result = sample(pipeline, acceleration=AccelerationConfig(**setting), **arguments)
        assert result.isfinite().all() and not torch.allclose(result, expected, atol=1e-4), name
    assert pipeline.scheduler is own
    assert torch.equal(sample(pipeline, **arguments), expected)


def test_all_settings_together_with_images_in_the_references_place(pipeline):
    setting = {"guidance_interval": [0.5, 0.99], "broadcast": 3, "broadcast_interval": [0.2, 1.0], "solver": "unipc"}
    if has_reference_tokens(pipeline):
        setting["merge_reference"] = 2
    arguments = {"num_inference_steps": STEPS, "acceleration": AccelerationConfig(**setting)}
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
    first, last = (
        after_steps(acceleration=AccelerationConfig(guidance_interval=interval)) for interval in ([low, 1], [0, low])
    )
    assert low < high
    assert torch.equal(first[0], guided[0]) and not torch.equal(first[1], guided[1])
    assert torch.equal(last[0], alone[0]) and not torch.equal(last[1], alone[1])
    nowhere = AccelerationConfig(guidance_interval=[0.0, low / 2])
    assert torch.equal(after_steps(acceleration=nowhere)[1], alone[1])


def test_half_the_passes_outside_the_interval():
    pipeline, passes = small_pipeline("animate_anyone"), []
    inside = levels(pipeline)
    handle = pipeline.denoising_unet.register_forward_pre_hook(lambda *_: passes.append(1))
    config = AccelerationConfig(guidance_interval=[inside[2], 1.0])
    sample(pipeline, num_inference_steps=STEPS, acceleration=config)
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


def test_merged_references_run_where_there_are_reference_tokens(pipeline):
    config = AccelerationConfig(merge_reference=2)
    if has_reference_tokens(pipeline):
        result = sample(pipeline, calibration=calibrated("add"), acceleration=config)
        assert not torch.allclose(result, sample(pipeline, calibration=calibrated("add")), atol=1e-5)
        assert (result - sample(pipeline, acceleration=config)).abs().max() > 1e-3
    else:
        with pytest.raises(UserError, match="merge_reference=2: .* sees images as a few tokens of an image encoder"):
            sample(pipeline, acceleration=config)


def test_recording_sees_merged_grids_and_only_computed_steps():
    pipeline = small_pipeline("animate_anyone")
    config = AccelerationConfig(broadcast=2, broadcast_interval=[0.0, 1.0], merge_reference=2)
    arguments = {"calibration": calibrated("add"), "acceleration": config, "num_inference_steps": STEPS}
    expected = sample(pipeline, **arguments)
    with AttentionRecording(AttentionConfig(steps=[0, 2], mean=["heads"])) as recording:
        assert torch.equal(sample(pipeline, attention=recording, **arguments), expected)
    recorded = recording.result
    for layer, shape in pipeline.animator().attention_layers(LATENTS).items():
        assert recorded.grid(layer) == (3, 4) and shape.grid in (LATENTS, (3, 4)), "the finest level alone is merged"
        total = recorded.own[layer] + recorded.maps[layer].sum((-1, -2))
        assert np.abs(total - 1).max() < 1e-5, "every recorded step was looked at"
    with (
        pytest.raises(UserError, match=r"steps: \[1, 3\] re-use"),
        AttentionRecording(AttentionConfig(mean=["heads"])) as recording,
    ):
        sample(pipeline, attention=recording, **arguments)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"guidance_interval": [0.5]}, r"guidance_interval=\[0.5\]"),
        ({"guidance_interval": [0.5, 0.2]}, r"guidance_interval=\[0.5, 0.2\]"),
        ({"guidance_interval": [0.5, 2.0]}, "guidance_interval="),
        ({"broadcast": 0}, "broadcast=0"),
        ({"broadcast_interval": [-1.0, 1.0]}, "broadcast_interval="),
        ({"broadcast_kinds": ["sideways"]}, "broadcast_kinds="),
        ({"broadcast_kinds": []}, "broadcast_kinds="),
        ({"merge_reference": 3}, "merge_reference=3"),
        ({"merge_levels": 0}, "merge_levels=0"),
        ({"solver": "euler"}, "solver=euler must be one of ddim, dpm\\+\\+, unipc"),
        ({"broadcast": 2, "broadcast_kinds": ["temporal"]}, "temporal attention of AnimateAnyone cannot be re-used"),
    ],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(UserError, match=message):
        sample(small_pipeline("animate_anyone"), acceleration=AccelerationConfig(**setting))


def test_windows_that_move_cannot_re_use_attention():
    pipeline, config = small_pipeline("animate_anyone"), AccelerationConfig(broadcast=2)
    with pytest.raises(UserError, match="broadcast=2 .* shift_windows"):
        sample(pipeline, acceleration=config, window_size=3, window_overlap=1, shift_windows=True)
    assert sample(pipeline, acceleration=config, shift_windows=True).isfinite().all(), "one window does not move"


def test_settings_of_commands():
    arguments = ["acceleration.solver=dpm++", "acceleration.guidance_interval=[0.2,0.9]", "acceleration.broadcast=2"]
    config = load_config(infer.InferConfig, arguments)
    assert config.acceleration == AccelerationConfig([0.2, 0.9], 2, solver="dpm++")
    config.check()
    with pytest.raises(UserError, match="acceleration.merge_reference=5"):
        SamplingConfig(acceleration=AccelerationConfig(merge_reference=5)).check()
    with pytest.raises(UserError, match="unknown key 'acceleration.solvr'.*acceleration.solver"):
        load_config(infer.InferConfig, ["acceleration.solvr=ddim"])
