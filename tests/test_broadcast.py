"""Attention broadcast: which steps compute attention, and what the others use."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st

from models.acceleration import AccelerationConfig
from models.broadcast import BroadcastSchedule
from tests.small_animators import FRAMES, LATENTS, calibrated, images, sample, small_pipeline
from training.kinds import KINDS

STEPS = 5
EVERY_OTHER = {"broadcast": 2, "broadcast_interval": [0.2, 1.0]}  # attention of the steps 0, 1, 1, 3, 3


def test_the_middle_of_a_run():
    schedule = BroadcastSchedule(20, 2)
    assert [schedule.source(step) for step in range(20)] == [
        0,
        1,
        2,
        *(3 + 2 * (k // 2) for k in range(14)),
        17,
        18,
        19,
    ]
    assert [step for step in range(20) if schedule.is_used_again(step)] == list(range(3, 17, 2))
    assert [BroadcastSchedule(5, 1).source(step) for step in range(5)] == list(range(5))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(0, 19), st.integers(1, 20))
def test_sources_are_recent_and_computed(steps, every, start, length):
    interval = start / 20, min(20, start + length) / 20
    schedule = BroadcastSchedule(steps, every, interval)
    for step in range(steps):
        source = schedule.source(step)
        assert 0 <= step - source < every and schedule.source(source) == source
        assert source == step or interval[0] * steps <= source + 1e-6 and step < interval[1] * steps
        if source < step:
            assert schedule.is_used_again(source)


def outputs(pipeline, networks, **arguments) -> dict[str, list[torch.Tensor]]:
    """What every attention layer of some networks gave, call after call."""
    found: dict[str, list[torch.Tensor]] = {}
    handles = []
    for network in networks:
        for name, module in getattr(pipeline, network).named_modules():
            if isinstance(module, Attention) and "motion_modules" not in name:
                key = f"{network}.{name}"
                found[key] = []
                handles.append(module.register_forward_hook(lambda *a, key=key: found[key].append(a[2].clone())))
    sample(pipeline, num_inference_steps=STEPS, **arguments)
    for handle in handles:
        handle.remove()
    return found


READING = {
    "animate_anyone": ("denoising_unet",),
    "magic_animate": ("denoising_unet",),
    "disco": ("unet", "pose_control_net", "background_control_net"),
    "dream_pose": ("denoising_unet",),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("again", [["spatial"], ["cross"]])
def test_layers_give_what_they_gave_before(kind, again):
    """In both halves of guidance, or all three branches, and in both windows by themselves."""
    config = AccelerationConfig(broadcast_kinds=again, **EVERY_OTHER)
    arguments = {"window_size": 3, "window_overlap": 1, "calibration": calibrated("add"), "acceleration": config}
    found = outputs(small_pipeline(kind), READING[kind], **arguments)
    between_branches = between_windows = 0
    for layer, calls in found.items():
        steps = [calls[number * len(calls) // STEPS : (number + 1) * len(calls) // STEPS] for number in range(STEPS)]
        assert len(steps[0]) in (4, 6)
        used = ("attn1" in layer) == (again == ["spatial"])
        # Context of one token is the same at all steps, and so is what attention to it gives.
        constant = "attn2" in layer and calls[0].shape[1] == 1
        for before, after, same in ((0, 1, False), (1, 2, used), (2, 3, False), (3, 4, used)):
            for first, second in zip(steps[before], steps[after], strict=True):
                assert torch.equal(first, second) == (same or constant), (layer, before)
        # The first layers get the same in all branches, before anything tells these apart.
        between_branches += used and not torch.equal(steps[1][0], steps[1][1])
        between_windows += used and not torch.equal(steps[1][0], steps[1][len(steps[1]) // 2])
    assert between_branches and (between_windows or again == ["cross"]), "each has its own"


def test_attention_between_frames_where_arguments_reach_it():
    pipeline = small_pipeline("disco", temporal=True)
    config = AccelerationConfig(broadcast_kinds=["temporal"], **EVERY_OTHER)
    found = outputs(pipeline, ("unet",), acceleration=config)
    assert any("tem_attn" in layer for layer in found)
    for layer, calls in found.items():  # in both halves of guidance
        assert len(calls) == 2 * (3 if "tem_attn" in layer else STEPS)
    every = AccelerationConfig(broadcast_kinds=["temporal"], broadcast=STEPS, broadcast_interval=[0.0, 1.0])
    two, one = (sample(pipeline, num_inference_steps=2, acceleration=config) for config in (every, None))
    assert (two - one).abs().max() > 1e-4


def test_images_that_nobody_looks_at_are_not_encoded():
    """MagicAnimate encodes them at every step; which were drawn stays as at the step whose attention is used."""
    pipeline, encoded = small_pipeline("magic_animate"), []
    handle = pipeline.reference_net.register_forward_pre_hook(lambda _, inputs: encoded.append(int(inputs[1])))
    sample(pipeline, num_inference_steps=STEPS, acceleration=AccelerationConfig(**EVERY_OTHER))
    crossed = AccelerationConfig(broadcast_kinds=["cross"], **EVERY_OTHER)
    sample(pipeline, num_inference_steps=STEPS, acceleration=crossed)
    handle.remove()
    assert encoded[:3] == [999, 799, 399] and len(encoded) == 3 + STEPS


@pytest.mark.parametrize("windows", [1, 2])
def test_memory_is_what_is_kept(windows):
    """Every layer's output for both halves of guidance and every window: numbers of four bytes."""
    pipeline = small_pipeline("animate_anyone")
    animator = pipeline.animator()
    shapes = animator.attention_layers(LATENTS)
    frames = FRAMES if windows == 1 else 2 * 3
    spatial = sum(shape.tokens * shape.channels for shape in shapes.values())
    cross = sum(shape.channels for shape in shapes.values())  # of one token, whatever the query
    arguments = {"num_inference_steps": STEPS, "output_type": "latent", "window_size": None if windows == 1 else 3}
    runs = {}
    for name, setting in {
        "both": EVERY_OTHER,
        "spatial": EVERY_OTHER | {"broadcast_kinds": ["spatial"]},
        "none": {},
    }.items():
        config = AccelerationConfig(**setting)
        runs[name] = pipeline(**images(), acceleration=config, window_overlap=1, **arguments).attention_cache_bytes
    assert runs == {"both": 2 * 4 * frames * (spatial + cross), "spatial": 2 * 4 * frames * spatial, "none": 0}


def test_a_half_that_starts_late_computes_its_own():
    """Guidance begins at a step that re-uses attention: its unconditional half has none to re-use."""
    pipeline = small_pipeline("animate_anyone")
    pipeline.scheduler.set_timesteps(STEPS)
    level = float((1 - pipeline.scheduler.alphas_cumprod[pipeline.scheduler.timesteps[2]]).sqrt())
    config = AccelerationConfig(guidance_interval=[0.0, level], **EVERY_OTHER)
    found = outputs(pipeline, ("denoising_unet",), acceleration=config)
    for layer, calls in found.items():
        if "attn1" in layer:
            conditional, blind = [calls[k] for k in (0, 1, 2, 4, 6)], [calls[k] for k in (3, 5, 7)]
            assert torch.equal(conditional[1], conditional[2]) and torch.equal(conditional[3], conditional[4])
            assert not torch.equal(blind[0], conditional[2])
            assert not torch.equal(blind[0], blind[1]) and torch.equal(blind[1], blind[2])
