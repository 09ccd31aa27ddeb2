"""Inference on a second device: the CPU's results to the bit, and denoising steps that do not wait for it.

Every animator goes through every case; together the cases have every preset of TPC, both attachments, every solver,
one window and several, one pass at a time and several, one person and two of whom one is away at times. The device
has no float64, as mps has none.
"""

from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from models.attention.recording import AttentionConfig, AttentionRecording
from models.compiling import use_channels_last
from models.lora import add_lora, load_lora, save_lora
from models.pipeline import AnimationPipeline
from tests.models.test_shortcuts import people
from tests.networks import TRAINABLE
from tests.second_device import SECOND, Wait, second_device
from tests.small_animators import SIZE, small_pipeline
from tpc import Calibration, CalibrationConfig, calibrate

SOLVER = "models/start.py StartedSolver.step"
# Persons of the reference and frames of the clip: what waits must not grow with either.
CLIPS = {"animate_anyone": (2, 4), "magic_animate": (1, 4), "disco": (2, 4), "dream_pose": (1, 5)}


@dataclass(frozen=True)
class Case:
    """One run of every animator, guided, in two steps or more."""

    tpc: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    recorded: bool = False  # attention of a few points in the first step
    # What steps after the first wait for: numbers that diffusers' solver has to do with, kind -> how often.
    waits: tuple[dict[str, int], ...] = ()


CASES = {
    # Windows that move, and share frames; the VAE's images; DisCo's temporal variant.
    "best": Case(
        {"preset": "best"},
        {"window_size": 3, "window_overlap": 1, "shift_windows": True, "output_type": "uint8", "decode_chunk_size": 2},
    ),
    # Other images at every step, in the reference's place; guidance in a part of the steps.
    "paper": Case(
        {"preset": "paper", "groups": 2, "attach": "replace"},
        {"solver": "dpm++", "guidance_interval": [0.0, 0.99], "passes_at_a_time": 2},
        recorded=True,
    ),
    # Frames that begin from their images, and one that does not.
    "release": Case(
        {"preset": "release", "fill": "scene", "start": 300},
        {"solver": "unipc"},
        waits=({"to device": 7}, {"to device": 9, "read": 1}),
    ),
    "without": Case(
        {}, {"window_size": 2, "window_overlap": 1, "cuts": [2], "guidance_scale": 1.0, "passes_at_a_time": 3}
    ),
}


@cache
def calibrated(persons: int, frames: int, **choices) -> Calibration:
    matrix = np.array([[0.375, 0, 4], [0, 0.375, 0], [0, 0, 1]])
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    driving = people(frames, persons, 2)
    driving.scores[0] = 0
    maps = {"frame_map": matrix, "reference_map": matrix}
    return calibrate(image, people(1, persons, 0), driving, SIZE, CalibrationConfig(max_gap=0, **choices), **maps)


@cache
def moved(kind: str, temporal: bool = False) -> AnimationPipeline:
    with second_device(double=False):
        return deepcopy(small_pipeline(kind, temporal)).to(SECOND)


def animated(
    pipeline: AnimationPipeline, kind: str, case: Case, waits: list[Wait] | None = None
) -> tuple[dict[str, Any], list[Counter]]:
    """Frames and recorded maps of a run, and what each step after the first waited for."""
    persons, frames = CLIPS[kind]
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (1 + frames, *SIZE[::-1], 3), dtype=np.uint8)
    mask = images[0, ..., 0] > 128
    points = draw.uniform(0, 24, (frames, 3, 2)).astype(np.float32) if case.recorded else None
    marks: list[int] = []

    def mark(_: Any, step: int, timestep: int, tensors: dict) -> dict:
        marks.append(len(waits or ()))
        return tensors

    arguments = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent", **case.arguments}
    recording = AttentionRecording(AttentionConfig(steps=[0]), points) if case.recorded else None
    with recording or nullcontext():
        result = pipeline(
            *(images[0], images[1:], calibrated(persons, frames, **case.tpc) if case.tpc else None),
            reference_mask=mask,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=mark,
            attention=recording,
            **arguments,
        ).frames
    found = {"frames": result.cpu() if isinstance(result, torch.Tensor) else torch.from_numpy(result)}
    if recording is not None:
        found |= {layer: torch.from_numpy(maps) for layer, maps in recording.result.maps.items()}
    steps = zip(marks[:-1], marks[1:], strict=True)
    return found, [Counter((wait.kind, wait.place) for wait in (waits or [])[a:b]) for a, b in steps]


@pytest.mark.parametrize("kind", TRAINABLE)
@pytest.mark.parametrize("name", CASES)
def test_every_animator(kind, name):
    case, temporal = CASES[name], name == "best"
    expected, _ = animated(small_pipeline(kind, temporal), kind, case)
    with second_device(double=False) as waits:
        found, steps = animated(moved(kind, temporal), kind, case, waits)
    assert found.keys() == expected.keys()
    different = [part for part, value in expected.items() if not torch.equal(value, found[part])]
    assert not different
    allowed = case.waits or ({},) * len(steps)
    assert steps == [Counter({(kind, SOLVER): number for kind, number in each.items()}) for each in allowed]


@pytest.mark.parametrize("kind", TRAINABLE)
def test_networks_that_wait_on_the_cpu(kind):
    """Diffusers' offloading of networks that are not at work; that of layers cannot be had on this device.

    With channels last in memory, which changes results by rounding.
    """
    case = Case({"preset": "best"}, {"num_inference_steps": 1})
    usual, _ = animated(small_pipeline(kind), kind, case)
    pipeline = deepcopy(small_pipeline(kind))
    use_channels_last(pipeline.animator, pipeline.vae)
    expected, _ = animated(pipeline, kind, case)
    torch.testing.assert_close(expected["frames"], usual["frames"], atol=2e-5, rtol=1e-4)
    with second_device(double=False):
        pipeline.enable_model_cpu_offload(device=SECOND)
        found, _ = animated(pipeline, kind, case)
    assert torch.equal(found["frames"], expected["frames"])
    for network in (pipeline.animator.half(), pipeline.vae):
        weights = [p for name, p in network.named_parameters() if p.ndim == 4 and "null" not in name]
        assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_adapters_are_merged_where_the_networks_are(tmp_path):
    with_adapters = deepcopy(small_pipeline("animate_anyone"))
    add_lora(with_adapters.animator, rank=2, alpha=2.0, motion=True)
    for name, parameter in with_adapters.animator.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_lora(with_adapters, tmp_path)
    plain = deepcopy(small_pipeline("animate_anyone"))
    load_lora(plain, tmp_path)
    case = Case({"preset": "best"}, {"num_inference_steps": 1})
    expected, _ = animated(plain, "animate_anyone", case)
    with second_device(double=False):
        pipeline = deepcopy(small_pipeline("animate_anyone")).to(SECOND)
        load_lora(pipeline, tmp_path)
        found, _ = animated(pipeline, "animate_anyone", case)
    assert torch.equal(found["frames"], expected["frames"])
