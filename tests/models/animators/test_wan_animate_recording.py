"""Recording of Wan-Animate's self-attention: frames get what their latents attend to; the run stays as it was."""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from inference.animate import ModelInputs, shown_references
from models.animators.wan_animate.context import Sight, joint_context, latent_probe
from models.attention.context import ReferenceContext
from models.attention.layers import LayerShape, joint_layers
from models.attention.maps import RecordedAttention
from models.attention.masking import hidden_pairs
from models.attention.measures import token_indices
from models.attention.probe import COPIES
from models.attention.recording import AttentionConfig, AttentionRecording, AttentionRun
from models.segments import Segment
from tests.models.test_attention_recording import Largest
from tests.models.test_shortcuts import people
from tests.wan_parts import SEGMENT, SIZE, images, wan_pipeline
from tpc import Calibration, CalibrationConfig, calibrate

FRAMES, GRID, LAYER = 8, (2, 3), "blocks.2.attn1"  # two segments of five frames, a frame more than the clip has
TOKENS = GRID[0] * GRID[1]
SEGMENTS = [Segment(range(5), range(8)), Segment(range(4, 9), range(8), carried=1)]
LATENTS = [[0], [1, 2, 3, 4]], [[0], [1, 2, 3]]  # frames of each latent of a segment, numbered in it


@cache
def calibrated(attach: str | None) -> Calibration | None:
    """Two persons; the first is not calibrated in the first segment, and nobody sees another's image."""
    if attach is None:
        return None
    matrix = np.array([[0.5, 0, 8], [0, 0.5, 0], [0, 0, 1]])
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    driving = people(FRAMES, 2, 4)
    driving.scores[:SEGMENT, 0] = 0
    config = CalibrationConfig(max_gap=0, propagation="off", attach=attach, visibility="exclusive")
    return calibrate(image, people(1, 2, 0), driving, SIZE, config, frame_map=matrix, reference_map=matrix)


def run(attach: str | None = None, frames: int = FRAMES, **arguments) -> np.ndarray:
    arguments = {"num_inference_steps": 1, "guidance_scale": 2.0, "window_size": SEGMENT, **arguments}
    seed = torch.Generator().manual_seed(0)
    given = {**images(frames), "calibration": calibrated(attach), "output_type": "np", "generator": seed}
    return wan_pipeline()(**given, **arguments).frames


def record(config=None, points=None, names=None, **arguments) -> RecordedAttention:
    with AttentionRecording(config, points, names) as recording:
        run(attention=recording, **arguments)
    return recording.result


class Passes(ExitStack):
    """What one layer computes in every pass of a run, by hooks, and who sees whom."""

    def __init__(self):
        super().__init__()
        self.found: list[dict] = []
        network = wan_pipeline().transformer
        attention = network.get_submodule(LAYER)
        begun = network.register_forward_pre_hook(lambda _, given: self.found.append({"sights": given[6]}))
        modules = {"query": attention.norm_q, "key": attention.norm_k, "value": attention.to_v, "out": attention}
        hooks = [
            module.register_forward_hook(lambda _, __, out, name=name: self.found[-1].update({name: out}))
            for name, module in (modules | {"rope": network.rope}).items()
        ]
        for hook in (begun, *hooks):
            self.callback(hook.remove)


def heads(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[0].double().unflatten(-1, (2, -1)).transpose(0, 1)  # (heads, n, d)


def turned(tokens: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], references: int) -> torch.Tensor:
    """Pairs of channels as complex numbers, times those of the positions; references all at the first."""
    angles = torch.complex(*(part[0, :, 0, ::2].double() for part in rope))  # (n, d / 2)
    angles = torch.cat([angles[:TOKENS]] * (references - 1) + [angles])
    pairs = torch.view_as_complex(heads(tokens).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angles).flatten(-2)


def dense(sights: tuple[Sight, ...] | None, tokens: int) -> torch.Tensor:
    """(n, n) bool: who sees whom."""
    visible = torch.full((tokens, tokens), sights is None)
    for sight in sights or ():
        seen = torch.ones(1) > 0 if sight.flags is None else ~hidden_pairs(*sight.flags)[0]
        visible[sight.queries[:, None], sight.keys] = seen
    return visible


@pytest.mark.parametrize("attach", [None, "replace", "add"])
def test_it_is_the_softmax_of_the_layer(attach):
    """Computed apart in double precision, and checked against what the layer makes of it."""
    with Passes() as passes:
        recorded = record(attach=attach, guidance_scale=2.0)
    calibration = calibrated(attach)
    names = {None: ("reference",), "replace": ("calibrated 0",), "add": ("reference", "calibrated 0", "calibrated 1")}
    assert recorded.images == names[attach]
    attention = wan_pipeline().transformer.get_submodule(LAYER)
    seen, hidden = set(), 0
    for number, (segment, latents) in enumerate(zip(SEGMENTS, LATENTS, strict=True)):
        computed = passes.found[2 * number]  # of two branches the first
        slots = [0]  # position among a frame's images, of each image of the sequence
        if attach == "add":
            held = calibration.held(segment.inside, 4)
            slots += [1 + int(np.argwhere(held.index(0) == image)[0, 1]) for image in held.used(1)]
        query, key = (turned(computed[name], computed["rope"], len(slots)) for name in ("query", "key"))
        visible = dense(computed["sights"], query.shape[1])
        logits = (query @ key.transpose(1, 2) * 12**-0.5).masked_fill(~visible, -torch.inf)
        weights = torch.softmax(logits, dim=-1)
        given = (weights @ heads(computed["value"])).transpose(0, 1).flatten(1)[None].float()
        assert (attention.to_out[0](given) - computed["out"]).abs().max() < 1e-4
        weights = weights.unflatten(1, (-1, TOKENS)).unflatten(3, (-1, TOKENS)).numpy()  # (heads, l, n, l, n)
        for latent, members in enumerate(latents):
            row = weights[:, len(slots) + latent]  # (heads, n, l, n)
            for frame in sorted({segment.frames[member] for member in members} & set(segment.new)):
                found, own = recorded.maps[LAYER][0, frame], recorded.own[LAYER][0, frame]
                assert np.abs(own - row[:, :, len(slots) :].sum((2, 3))).max() < 1e-6
                for slot in range(len(recorded.images)):
                    of_slot = [image for image, s in enumerate(slots) if s == slot]
                    expected = row[:, :, of_slot].sum(2)
                    assert np.abs(found[:, :, slot] - expected).max() < 1e-6
                    assert ((found[:, :, slot] == 0) == (expected == 0)).all(), "hidden tokens get exactly nothing"
                    seen |= {(number, slot)} if expected.any() else set()
                    hidden += (expected == 0).sum()
    if attach == "add":  # the first person is not calibrated in the first segment
        assert seen == {(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)} and hidden > 100
    assert recorded.maps[LAYER].std() > 1e-2, "a case that tells maps apart"


@pytest.mark.parametrize(
    "arguments",
    [
        {"attach": "add", "num_inference_steps": 2, "cuts": [3]},
        {"attach": "replace", "window_overlap": 0},
        {"frames": 1, "guidance_scale": 1.0},
        {"guidance_scale": 1.0, "window_size": 9, "cuts": [2, 3]},
    ],
    ids=lambda arguments: str(arguments.get("attach", arguments.get("frames", "cuts"))),
)
def test_the_run_stays_as_it_was(arguments):
    expected = run(**arguments)
    with AttentionRecording() as recording:
        assert np.array_equal(expected, run(attention=recording, **arguments))
    recorded = recording.result
    assert recorded.layers == tuple(f"blocks.{i}.attn1" for i in range(4))
    for layer, maps in recorded.maps.items():
        total = recorded.own[layer] + maps.sum((-1, -2))
        shape = arguments.get("num_inference_steps", 1), arguments.get("frames", FRAMES), 2, TOKENS
        assert recorded.grid(layer) == GRID and total.shape == shape and np.abs(total - 1).max() < 1e-5


POINTS = np.random.default_rng(0).uniform(0, 31, (FRAMES, 3, 2)).astype(np.float32)
POINTS[2, 1] = np.nan


def test_a_part_of_it(tmp_path):
    """Frames of one latent at their own points; what is not asked for is left out."""
    whole = record(attach="add")
    some = record(None, POINTS, ["a", "b", "c"], attach="add")
    numbers = token_indices(torch.tensor(POINTS).nan_to_num(), SIZE[::-1], GRID).numpy()
    expected = {}
    for layer in whole.layers:
        expected[layer] = np.stack(
            [whole.maps[layer][:, frame][:, :, numbers[frame]] for frame in range(FRAMES)], axis=1
        )
        expected[layer][:, 2, :, 1] = np.nan
        assert np.allclose(some.maps[layer], expected[layer], atol=1e-6, equal_nan=True)
    assert (numbers[1] != numbers[3]).any(), "a latent's frames have other points"
    config = AttentionConfig(
        layers=[LAYER], steps=[0], frames=[1, 2, 6], heads=[1], mean=["frames"], folder=tmp_path / "r", windows="mean"
    )
    mean = record(config, POINTS, attach="add")
    chosen = np.ma.masked_invalid(expected[LAYER][:, [1, 2, 6]][:, :, [1]]).mean(axis=1, keepdims=True).filled(np.nan)
    assert mean.layers == (LAYER,) and isinstance(mean.maps[LAYER], np.memmap)
    assert np.allclose(mean.maps[LAYER], chosen, atol=1e-6)
    assert mean.selection == RecordedAttention.load(tmp_path / "r").selection


@pytest.mark.parametrize(("attach", "window", "latents"), [("add", SEGMENT, 2), ("replace", None, 3)])
def test_what_is_stored_is_estimated(attach, window, latents):
    run_of = wan_pipeline().attention_run(FRAMES, SIZE, 1, calibrated(attach), window)
    assert {shape.layout.own for shape in run_of.layers.values()} == {latents}
    needed = AttentionRecording(AttentionConfig(mean=["heads"])).estimate(run_of)
    recorded = record(AttentionConfig(mean=["heads"]), attach=attach, window_size=window)
    assert recorded.nbytes < needed.stored_bytes < 1.1 * recorded.nbytes + 4096


def test_sequences_are_looked_at_in_pieces():
    """Three latents of 20 x 20 tokens, nine frames, two images: all probabilities at once would take 72 MB."""
    run_of = AttentionRun(joint_layers({"a": LayerShape((20, 20), 4, 32)}, 3), (320, 320), 9, 1, images=2)
    rows = Segment(range(9), range(9)).latents(4)
    context = joint_context(ReferenceContext({}, torch.tensor([[0, 1]] * 9)), 400, 4)
    with AttentionRecording(AttentionConfig(mean=["heads"])) as recording:
        needed = recording.estimate(run_of)
        recording.begin(run_of)
        probe = latent_probe(replace(context, probe=recording.row_probe(0, 999, range(9), rows)), 3, 400)
        with Largest() as seen:
            probe.record("a", torch.zeros(1, 4, 2000, 8), torch.zeros(1, 4, 2000, 8))
    assert 2**20 < seen.bytes * COPIES <= needed.working_bytes < 64 * 2**20
    assert recording.result.own["a"] == pytest.approx(3 / 5, rel=1e-4)


def test_the_calibration_that_frames_attend_to():
    """The frame in the middle of a latent decides, of the images that a segment holds."""
    calibration = calibrated("add")
    shown = wan_pipeline().attended_calibration(calibration, SEGMENT)
    for segment, latents in zip(SEGMENTS, LATENTS, strict=True):
        held = calibration.held(segment.inside, 4).index(0)
        for members in latents:
            middle = min(segment.frames[members[0] + 2 * (len(members) > 1)], FRAMES - 1)  # of four frames
            for frame in {segment.frames[member] for member in members} & set(segment.new):
                assert shown.index(3)[frame].tolist() == held[middle].tolist()
    assert (shown.index(0)[:SEGMENT, 0] == -1).all() and (shown.index(0)[SEGMENT:, 0] >= 0).all()
    assert np.array_equal(shown.member, calibration.member)
    replaced = calibrated("replace")
    assert wan_pipeline().attended_calibration(replaced, SEGMENT) is replaced


def test_a_comparison_shows_what_frames_attend_to():
    """Of a segment its image, or the one in the middle of a frame's latent, and not each frame's own."""
    given, shown = images(FRAMES), {}
    for attach in ("replace", "add"):
        inputs = ModelInputs(given["reference"], given["poses"], None, calibrated(attach), 24.0, ())
        shown[attach] = np.asarray(shown_references(wan_pipeline(), inputs, inputs.calibration, (SEGMENT, 1)))
    first, second = (calibrated("replace").segment_image(segment.inside) for segment in SEGMENTS)
    np.testing.assert_array_equal(shown["replace"], [first] * 5 + [second] * 3)
    own = [calibrated("add").frame_image(frame) for frame in range(FRAMES)]
    np.testing.assert_array_equal(shown["add"][1:], [own[3]] * 4 + [own[7]] * 3)
    assert len({image.tobytes() for image in own}) == FRAMES, "a case that tells frames apart"
