"""Recording of reference attention: the run stays as it was, the numbers are right, memory is bounded."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import UserError
from data.poses.poses import Poses
from models.attention.layers import LayerShape, token_levels, unet_layers
from models.attention.maps import RecordedAttention
from models.attention.measures import token_indices
from models.attention.probe import COPIES
from models.attention.processors import reference_layers
from models.attention.recording import AttentionConfig, AttentionRecording, AttentionRun
from models.sampling import window_weights
from tests.published import small_magic_pipeline
from tpc import CalibrationConfig, calibrate
from tpc.attach import frame_visibility

SIZE, LATENTS, FRAMES = (32, 24), (6, 8), 5
LAYER = "up_blocks.0.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0).integers(0, 256, (1 + FRAMES, 24, 32, 3), dtype=np.uint8)
    return draw[0], draw[1:]


@pytest.fixture(scope="module")
def magic():
    return small_magic_pipeline()


@pytest.fixture(scope="module")
def calibration():
    """Two persons who stand beside each other and move apart."""
    x = np.array([0, 1, -1, 2, -2, 6, -6, 9, -9, 9, -9, 4, -4, 4, -4, 4, -4], np.float32)
    y = np.array([8, 6, 6, 7, 7, 16, 16, 26, 26, 34, 34, 34, 34, 46, 46, 58, 58], np.float32)

    def poses(shifts) -> Poses:
        people = [[np.stack([x + 18 - s, y], -1), np.stack([x + 46 + s, y], -1)] for s in shifts]
        return Poses(np.array(people), np.ones((len(people), 2, 17)), (64, 64), 25.0)

    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    frame_map = np.array([[0.375, 0, 4], [0, 0.375, 0], [0, 0, 1]])
    maps = {"frame_map": frame_map, "reference_map": frame_map}
    return calibrate(image, poses([0]), poses(range(FRAMES)), SIZE, CalibrationConfig(preset="release"), **maps)


def run(pipeline, images, **arguments) -> torch.Tensor:
    arguments = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 2.0, **arguments}
    return pipeline(*images, generator=torch.Generator().manual_seed(0), **arguments).frames


def record(pipeline, images, config=None, points=None, names=None, **arguments) -> RecordedAttention:
    with AttentionRecording(config, points, names) as recording:
        run(pipeline, images, attention=recording, **arguments)
    return recording.result


@pytest.mark.parametrize("animator", ["animate_anyone", "magic_animate"])
@pytest.mark.parametrize("windows", [{}, {"window_size": 3, "window_overlap": 1, "shift_windows": True}])
def test_the_run_stays_as_it_was(tiny_pipeline, magic, images, calibration, animator, windows):
    pipeline = tiny_pipeline if animator == "animate_anyone" else magic
    processors = pipeline.denoising_unet.attn_processors
    state = {name: set(vars(module)) for name, module in pipeline.denoising_unet.named_modules()}
    for seen in (None, calibration):
        base = run(pipeline, images, calibration=seen, **windows)
        with AttentionRecording() as recording:
            assert torch.equal(base, run(pipeline, images, calibration=seen, attention=recording, **windows))
        recorded = recording.result
        assert recorded.images == ("reference", "calibrated 0", "calibrated 1")[: 1 if seen is None else 3]
        assert set(recorded.layers) == set(pipeline.animator.attention_layers(LATENTS))
        for layer, maps in recorded.maps.items():
            total = recorded.own[layer] + maps.sum((-1, -2))
            assert total.shape[:2] == (2, FRAMES) and np.abs(total - 1).max() < 1e-5
            assert maps.shape[-1] == np.prod(recorded.grid(layer)) == maps.shape[3]
    after = pipeline.denoising_unet.attn_processors
    assert all(after[name] is processor for name, processor in processors.items()) and len(after) == len(processors)
    assert state == {name: set(vars(module)) for name, module in pipeline.denoising_unet.named_modules()}


def test_it_is_the_plain_softmax(tiny_pipeline, images):
    """Computed apart, from what the layer's own projections gave, in double precision."""
    unet, outputs = tiny_pipeline.denoising_unet, {"to_q": [], "to_k": []}
    attention = unet.get_submodule(LAYER)
    hooks = [
        getattr(attention, name).register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
        for name, kept in outputs.items()
    ]
    recorded = record(tiny_pipeline, images, num_inference_steps=1, guidance_scale=1.0)
    for hook in hooks:
        hook.remove()
    (query,), (reference, own) = outputs["to_q"], sorted(outputs["to_k"], key=len)

    def heads(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.double().unflatten(2, (attention.heads, -1)).transpose(1, 2)

    keys = heads(torch.cat([own, reference.expand(FRAMES, -1, -1)], 1))
    expected = torch.softmax(heads(query) @ keys.transpose(2, 3) * attention.scale, -1).numpy()
    tokens = own.shape[1]
    assert np.abs(recorded.maps[LAYER][0, :, :, :, 0] - expected[..., tokens:]).max() < 1e-5
    assert np.abs(recorded.own[LAYER][0] - expected[..., :tokens].sum(-1)).max() < 1e-5
    assert expected[..., tokens:].sum(-1).std() > 1e-4, "a case that tells maps apart"


def test_masked_tokens_get_exactly_nothing(tiny_pipeline, images, calibration):
    recorded = record(tiny_pipeline, images, calibration=calibration)
    levels = token_levels(unet_layers(tiny_pipeline.denoising_unet, LATENTS))
    counts = np.zeros(2)
    for place, step in enumerate(recorded.selection.steps):
        flags = frame_visibility(calibration, range(FRAMES), calibration.index(step), levels)
        for layer in recorded.layers:
            n = recorded.maps[layer].shape[-1]
            hidden = (flags.query[n] @ flags.key[n].transpose(1, 2) > 0)[..., n:].unflatten(-1, (3, n)).numpy()
            maps = recorded.maps[layer][place].min(axis=1), recorded.maps[layer][place].max(axis=1)
            assert (maps[1][hidden] == 0).all() and (maps[0][~hidden] > 0).all()
            counts += hidden.sum(), (~hidden).sum()
    assert (counts > 100).all()


def test_mixed_precision_does_not_round_the_maps():
    run = AttentionRun({"a": LayerShape((2, 2), 1, 4)}, (8, 8), 1, 1)
    query, key = (torch.randn(1, 1, n, 4, generator=torch.Generator().manual_seed(n)) * 3 for n in (4, 8))
    with torch.autocast("cpu", torch.bfloat16), AttentionRecording() as recording:
        recording.begin(run)
        recording.probe(0, 999, [range(1)], 0).record("a", query, key, None, 1.0)
    expected = torch.softmax(query.double() @ key.double().transpose(2, 3), -1)
    assert np.abs(recording.result.maps["a"][0, 0, 0, :, 0] - expected[0, 0, :, 4:].numpy()).max() < 1e-6


class TestChoices:
    def test_layers_steps_frames_and_heads(self, tiny_pipeline, images):
        whole = record(tiny_pipeline, images, num_inference_steps=3)
        config = AttentionConfig(layers=[LAYER], steps=[2, 0], frames=[1, 4], heads=[1])
        part = record(tiny_pipeline, images, config, num_inference_steps=3)
        assert part.layers == (LAYER,) and part.timesteps == (whole.timesteps[0], whole.timesteps[2])
        assert np.array_equal(part.maps[LAYER], whole.maps[LAYER][[0, 2]][:, [1, 4]][:, :, [1]])

    def test_points(self, tiny_pipeline, images):
        points = np.random.default_rng(0).uniform(0, 23, (FRAMES, 3, 2))
        points[2, 1] = np.nan
        whole, some = record(tiny_pipeline, images), record(tiny_pipeline, images, None, points, ["a", "b", "c"])
        for layer in whole.layers:
            numbers = token_indices(torch.tensor(points).nan_to_num(), (24, 32), whole.grid(layer)).numpy()
            for frame in range(FRAMES):
                expected = whole.maps[layer][:, frame][:, :, numbers[frame]].copy()
                if frame == 2:
                    expected[:, :, 1] = np.nan
                assert np.allclose(some.maps[layer][:, frame], expected, atol=1e-6, equal_nan=True)
        x, y = points[3, 2]
        look = some.query_map(LAYER, "c", step=1, frame=3)
        same = whole.query_map(LAYER, (x, y), step=1, frame=3)
        assert np.allclose(look.maps, same.maps, atol=1e-6) and look.maps.sum() + look.own == pytest.approx(
            1, abs=1e-5
        )

    def test_running_means(self, tiny_pipeline, images):
        points = np.random.default_rng(0).uniform(0, 23, (FRAMES, 3, 2))
        points[2, 1] = np.nan
        whole = record(tiny_pipeline, images, None, points)
        for axes in (["heads"], ["steps"], ["frames", "heads"], ["steps", "frames", "heads"]):
            mean = record(tiny_pipeline, images, AttentionConfig(mean=axes), points)
            where = tuple({"steps": 0, "frames": 1, "heads": 2}[axis] for axis in axes)
            for layer in whole.layers:
                expected = np.ma.masked_invalid(whole.maps[layer]).mean(axis=where, keepdims=True).filled(np.nan)
                assert np.allclose(mean.maps[layer], expected, atol=1e-6, equal_nan=True)

    def test_on_disk(self, tiny_pipeline, images, tmp_path):
        points = np.random.default_rng(0).uniform(0, 23, (FRAMES, 2, 2))
        memory = record(tiny_pipeline, images, None, points, ["a", "b"])
        disk = record(tiny_pipeline, images, AttentionConfig(folder=tmp_path / "r"), points, ["a", "b"])
        memory.save(tmp_path / "s")
        for other in (disk, RecordedAttention.load(tmp_path / "r"), RecordedAttention.load(tmp_path / "s")):
            assert isinstance(other.maps[LAYER], np.memmap)
            assert (other.selection, other.timesteps, other.names) == (memory.selection, memory.timesteps, ("a", "b"))
            assert np.array_equal(other.points, memory.points)
            for layer in memory.layers:
                assert np.array_equal(other.maps[layer], memory.maps[layer])
                assert np.array_equal(other.own[layer], memory.own[layer])


class TestWindows:
    """Frame 2 of five lies in two windows, nearer to the middle of the second."""

    WINDOWS = [range(0, 3), range(1, 5)]

    def passes(self, config) -> RecordedAttention:
        """In window j every query gives the part 1 / (2 + j) to the one reference token."""
        run = AttentionRun({"a": LayerShape((1, 1), 1, 1)}, (8, 8), FRAMES, 1)
        with AttentionRecording(config) as recording:
            recording.begin(run)
            for number, window in enumerate(self.WINDOWS):
                key = torch.zeros(len(window), 1, 2, 1)
                key[:, :, 0] = np.log(1 + number)
                probe = recording.probe(0, 999, self.WINDOWS, number)
                for _ in range(0 if probe is None else 2):  # twice, as with gradient checkpointing
                    probe.record("a", torch.ones(len(window), 1, 1, 1), key, None, 1.0)
        return recording.result

    def test_the_nearest(self):
        assert self.passes(AttentionConfig()).maps["a"].ravel() == pytest.approx([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])
        assert self.passes(AttentionConfig(frames=[2], mean=["frames"])).maps["a"].ravel() == pytest.approx([1 / 3])

    def test_the_mean(self):
        first, second = (weight.numpy() for weight in window_weights(self.WINDOWS, FRAMES))
        part = np.array([1, *first[1:], 0, 0])
        assert 0 < part[2] < part[1] < 1 and part[2] == pytest.approx(1 - second[1])
        expected = part / 2 + (1 - part) / 3
        assert self.passes(AttentionConfig(windows="mean")).maps["a"].ravel() == pytest.approx(expected)

    def test_in_a_run(self, tiny_pipeline, images):
        """A frame of one window alone is the same in both; one that windows share is not."""
        parts = {"window_size": 3, "window_overlap": 1}
        nearest, mean = (
            record(tiny_pipeline, images, AttentionConfig(windows=w), **parts) for w in ("nearest", "mean")
        )
        apart = np.abs(nearest.maps[LAYER] - mean.maps[LAYER]).max(axis=(0, 2, 3, 4, 5))
        assert (apart[[0, 1, 3, 4]] < 1e-6).all() and apart[2] > 1e-6
        assert np.abs(mean.maps[LAYER].sum((-1, -2)) + mean.own[LAYER] - 1).max() < 1e-5


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return result


class TestMemory:
    @pytest.mark.parametrize("config", [AttentionConfig(), AttentionConfig(mean=["heads", "frames"], frames=[1, 3])])
    def test_the_estimate_is_what_is_stored(self, tiny_pipeline, images, calibration, config, tmp_path):
        recording = AttentionRecording(config)
        needed = recording.estimate(tiny_pipeline.attention_run(FRAMES, SIZE, 2, calibration))
        recorded = record(tiny_pipeline, images, config, calibration=calibration)
        assert recorded.nbytes < needed.stored_bytes < 1.1 * recorded.nbytes + 4096
        assert needed.memory_bytes == needed.total_bytes == needed.stored_bytes + needed.working_bytes
        on_disk = AttentionRecording(AttentionConfig(folder=tmp_path / "r"))
        needed = on_disk.estimate(tiny_pipeline.attention_run(FRAMES, SIZE, 2))
        assert needed.on_disk and needed.memory_bytes == needed.working_bytes

    @pytest.mark.parametrize("queries", [None, 7])
    def test_large_layers_are_looked_at_in_pieces(self, queries):
        """A layer of 40 x 40 tokens, whose whole maps would take 330 MB."""
        run = AttentionRun({"a": LayerShape((40, 40), 4, 32)}, (320, 320), 2, 1, images=2)
        points = None if queries is None else np.full((2, queries, 2), 100.0)
        with AttentionRecording(AttentionConfig(mean=["heads", "frames"]), points) as recording:
            needed = recording.estimate(run)
            recording.begin(run)
            query, key = torch.zeros(2, 4, 1600, 8), torch.zeros(2, 4, 4800, 8)
            with Largest() as seen:
                recording.probe(0, 999, [range(2)], 0).record("a", query, key, None, 1.0)
        assert 2**20 < seen.bytes * COPIES <= needed.working_bytes < 64 * 2**20
        maps = recording.result.maps["a"]
        assert maps == pytest.approx(1 / 4800, rel=1e-4) and recording.result.own["a"] == pytest.approx(
            1 / 3, rel=1e-4
        )

    def test_a_limit_refuses_before_the_run(self, tiny_pipeline, images, tmp_path):
        with pytest.raises(UserError, match=r"would take .* MiB, limit_bytes allows 1.0; record fewer"):
            record(tiny_pipeline, images, AttentionConfig(limit_bytes=2**20, folder=tmp_path / "r"))
        assert not list(tmp_path.iterdir())


class TestLifetime:
    def test_nothing_stays_behind(self, tiny_pipeline, images):
        recording = AttentionRecording()
        with recording:
            run(tiny_pipeline, images, attention=recording)
        gone = weakref.ref(recording)
        del recording
        gc.collect()
        assert gone() is None

    def test_a_run_that_fails_leaves_nothing(self, tiny_pipeline, images, tmp_path):
        def stop(*_):
            raise RuntimeError("stopped")

        recording = AttentionRecording(AttentionConfig(folder=tmp_path / "r"))
        with pytest.raises(RuntimeError, match="stopped"), recording:
            run(tiny_pipeline, images, attention=recording, callback_on_step_end=stop)
        assert not list(tmp_path.iterdir())
        with pytest.raises(ValueError, match="no result"):
            _ = recording.result

    def test_one_run_and_inside_the_block(self, tiny_pipeline, images, tmp_path):
        with pytest.raises(ValueError, match="not open"):
            run(tiny_pipeline, images, attention=AttentionRecording())
        with pytest.raises(ValueError, match="one run"), AttentionRecording() as recording:
            for _ in range(2):
                run(tiny_pipeline, images, attention=recording)
        with (
            pytest.raises(ValueError, match="no run was recorded"),
            AttentionRecording(AttentionConfig(folder=tmp_path / "r")),
        ):
            pass
        assert not list(tmp_path.iterdir())


class TestBadInput:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (AttentionConfig(layers=["up_blocks.0.attn"]), r"layers: 'up_blocks.0.attn' does not .*'up_blocks.0.att"),
            (AttentionConfig(layers=[]), "leaves nothing"),
            (AttentionConfig(steps=[2]), "steps: 2 is out of range; there are steps 0 to 1"),
            (AttentionConfig(frames=[-1]), "frames: -1 is out of range; there are frames 0 to 4"),
            (AttentionConfig(heads=[7]), "heads: 7 is out of range; there are heads 0 to 1 of"),
        ],
    )
    def test_choices_that_are_not_there(self, tiny_pipeline, images, config, message):
        with pytest.raises(UserError, match=message):
            record(tiny_pipeline, images, config)

    def test_a_layer_that_is_blind_to_the_reference(self, magic, images):
        """MagicAnimate's downward blocks do not see it."""
        layer = next(name for name in reference_layers(magic.denoising_unet) if name.startswith("down_blocks"))
        with pytest.raises(UserError, match="does not read the reference"):
            record(magic, images, AttentionConfig(layers=[layer]))

    def test_words_and_points(self, tiny_pipeline, images, tmp_path):
        with pytest.raises(UserError, match="mean=layers is not one of steps, frames, heads"):
            AttentionRecording(AttentionConfig(mean=["layers"]))
        with pytest.raises(UserError, match="windows=all"):
            AttentionRecording(AttentionConfig(windows="all"))
        with pytest.raises(ValueError, match=r"shape \(frames, points, 2\)"):
            AttentionRecording(points=np.zeros((3, 2)))
        with pytest.raises(UserError, match="points are of 3 frames, the run has 5"):
            record(tiny_pipeline, images, points=np.zeros((3, 1, 2)))
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("")
        with pytest.raises(UserError, match="does not hold recorded attention; give a new folder"):
            record(tiny_pipeline, images, AttentionConfig(folder=tmp_path / "mine"))
        with pytest.raises(UserError, match="does not hold recorded attention"):
            RecordedAttention.load(tmp_path / "mine")

    def test_questions_that_were_not_recorded(self, tiny_pipeline, images):
        points = np.full((FRAMES, 2, 2), 5.0)
        points[1:, 1] = np.nan
        config = AttentionConfig(steps=[1], mean=["heads"])
        some = record(tiny_pipeline, images, config, points, ["nose", "hip"])
        for arguments, message in [
            ({"point": "nose", "step": 0}, "step=0 was not recorded; there are 1"),
            ({"point": "nose", "head": 0}, "only the mean over heads"),
            ({"point": "hip", "frame": 3}, "point=hip is not visible in frame 3"),
            ({"point": "knee"}, "point=knee was not recorded; there are nose, hip"),
            ({"point": 2}, "point=2 is out of range; there are points 0 to 1"),
            ({"point": (3, 4)}, "need all query tokens"),
            ({"point": 0, "layer": "a"}, "layer=a was not recorded"),
        ]:
            with pytest.raises(UserError, match=message):
                some.query_map(**{"layer": LAYER, **arguments})
        whole = record(tiny_pipeline, images, config)
        with pytest.raises(UserError, match="outside the image of 32x24"):
            whole.query_map(LAYER, (32, 3))
        assert whole.query_index(LAYER, (31.4, 23.4)) == whole.maps[LAYER].shape[3] - 1
