"""What saves work in inference changes no result: each shortcut alone, and all together, against the definition.

`tests/plain.py` is the denoising loop by definition.
"""

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from data.poses.poses import Poses
from models.animators.animate_anyone.model import pose_features
from models.animators.magic_animate.model import ControlCondition, control_residuals
from models.attention.context import ReferenceContext, same_reference
from models.attention.masking import Visibility
from models.attention.processors import ReferenceReadProcessor, ReferenceWriteProcessor, set_reference_processors
from models.images import ImageBatch, ImageSequence, as_images
from models.reference_images import ReferenceImages
from models.sampling import context_windows
from models.vae import vae_decode, vae_encode
from tests.plain import SHORTCUTS, plain_animation, plain_unet
from tests.published import small_magic_pipeline
from tpc import Calibration, CalibrationConfig, calibrate

SIZE, LATENTS, FRAMES, STEPS, GUIDANCE = (32, 24), (6, 8), 5, 2, 3.0
# Persons calibrated, window: without TPC, with it, with two persons of whom one is away at times.
SETTINGS = [(0, 3), (1, 5), (2, 3)]


@pytest.fixture(scope="module")
def magic_pipeline():
    return small_magic_pipeline()


@pytest.fixture(scope="module", params=["animate_anyone", "magic_animate"])
def pipeline(request, tiny_pipeline, magic_pipeline):
    return tiny_pipeline if request.param == "animate_anyone" else magic_pipeline


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    """Reference (24, 32, 3) and poses (5, 24, 32, 3)."""
    draw = np.random.default_rng(0).integers(0, 256, (1 + FRAMES, 24, 32, 3), dtype=np.uint8)
    return draw[0], draw[1:]


def people(num_frames: int, persons: int, offset: float) -> Poses:
    """Standing persons side by side who shift to the right; the second is away in the third frame."""
    x = np.array([0, 1, -1, 2, -2, 6, -6, 9, -9, 9, -9, 4, -4, 4, -4, 4, -4], np.float32)
    y = np.array([8, 6, 6, 7, 7, 16, 16, 26, 26, 34, 34, 34, 34, 46, 46, 58, 58], np.float32)
    keypoints = np.zeros((num_frames, persons, 17, 2), np.float32)
    for person in range(persons):
        centre = 64 * (person + 1) / (persons + 1) + offset + np.arange(num_frames)[:, None]
        keypoints[:, person, :, 0], keypoints[:, person, :, 1] = centre + x, y
    scores = np.ones((num_frames, persons, 17), np.float32)
    scores[2:3, 1:] = 0
    return Poses(keypoints, scores, (64, 64), 25.0)


@cache
def calibration_of(persons: int) -> Calibration | None:
    if not persons:
        return None
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    matrix = np.array([[0.375, 0, 4], [0, 0.375, 0], [0, 0, 1]])
    driving, config = people(FRAMES, persons, 2), CalibrationConfig(groups=2)
    maps = {"frame_map": matrix, "reference_map": matrix}
    return calibrate(image, people(1, persons, 0), driving, SIZE, config, **maps)


def noise(dtype=torch.float32) -> Tensor:
    return torch.randn(1, 4, FRAMES, *LATENTS, generator=torch.Generator().manual_seed(0)).to(dtype)


def run(pipeline, images, persons, window=3, dtype=torch.float32, output_type="latent") -> Tensor:
    return pipeline(
        *images,
        calibration_of(persons),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=noise(dtype),
        output_type=output_type,
        window_size=window,
        window_overlap=1,
    ).frames


@pytest.fixture(scope="module")
def plain(pipeline, images):
    """(persons, window) -> latents of the denoising loop without any shortcut."""

    @cache
    def compute(persons: int, window: int, dtype=torch.float32) -> Tensor:
        model = pipeline if dtype == torch.float32 else deepcopy(pipeline).to(dtype)
        return plain_animation(
            model, *images, calibration_of(persons), noise(dtype), window, 1, STEPS, GUIDANCE, frozenset()
        )

    return compute


@pytest.mark.parametrize(("persons", "window"), [(0, 3), (2, 3)])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_each_shortcut_alone(pipeline, plain, images, shortcut, persons, window):
    """Within 1e-5 of the latents' size, in single precision."""
    calibration = calibration_of(persons)
    with_it = plain_animation(pipeline, *images, calibration, noise(), window, 1, STEPS, GUIDANCE, SHORTCUTS[shortcut])
    expected = plain(persons, window)
    assert (with_it - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("persons", "window"), SETTINGS)
def test_all_shortcuts_together(pipeline, plain, images, persons, window):
    expected = plain(persons, window)
    result = run(pipeline, images, persons, window)
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()
    if persons:
        assert calibration_of(persons).used(STEPS).size > 1
        assert (result - run(pipeline, images, 0, window)).abs().max() > 1e-3


def test_all_shortcuts_together_in_double_precision(pipeline, plain, images):
    """Where rounding hides nothing but that of the flags' softmax."""
    expected = plain(2, 3, torch.float64)
    result = run(deepcopy(pipeline).to(torch.float64), images, 2, 3, torch.float64)
    assert (result - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("tokens", [1, 7])
def test_context_is_projected_once_a_clip(pipeline, tokens):
    """One token is a vector added everywhere; several are projected before they are repeated over frames."""
    unet = pipeline.denoising_unet
    channels = unet.config.cross_attention_dim
    context = torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(1))
    pose = torch.zeros(1, unet.config.block_out_channels[0], FRAMES, *LATENTS)
    with torch.no_grad():
        ours = unet(noise(), 7, context, pose)
        assert torch.allclose(ours, plain_unet(unet)(noise(), 7, context, pose), atol=1e-5)
        assert not torch.allclose(ours, unet(noise(), 7, context + 1, pose), atol=1e-3)
    with torch.enable_grad():
        assert torch.allclose(ours, unet(noise(), 7, context, pose), atol=1e-5)


def test_reference_is_projected_once_a_run(pipeline):
    unet = pipeline.denoising_unet
    context = torch.randn(1, 3, unet.config.cross_attention_dim)
    tokens = pipeline.reference_net(torch.randn(1, 4, *LATENTS), 0, context)
    kept = dict(tokens)
    shared = same_reference(kept, FRAMES)
    memory = ReferenceContext(kept, shared.index, projected={})
    with torch.no_grad():
        plain = plain_unet(unet)(noise(), 7, context, reference=same_reference(tokens, FRAMES))
        first = unet(noise(), 7, context, reference=memory)
        assert memory.projected.keys() == tokens.keys()
        kept.clear()
        second = unet(noise(), 7, context, reference=memory)
        alone = unet(noise(), 7, context)
    assert torch.allclose(first, plain, atol=1e-5) and torch.equal(first, second)
    assert not torch.allclose(first, alone, atol=1e-3)


def test_nothing_after_the_last_write_matters(pipeline):
    complete = deepcopy(pipeline.reference_net)
    set_reference_processors(complete, ReferenceWriteProcessor)
    latents, context = torch.randn(2, 4, *LATENTS), torch.randn(2, 1, complete.config.cross_attention_dim)
    with torch.no_grad():
        short, full = pipeline.reference_net(latents, 5, context), complete(latents, 5, context)
        for name in complete.unused_parameters():
            complete.get_parameter(name).mul_(3)
        changed = complete(latents, 5, context)
    assert short.keys() == full.keys() == changed.keys()
    assert all(torch.equal(short[layer], full[layer]) for layer in full)
    assert all(torch.equal(short[layer], changed[layer]) for layer in full)


@pytest.mark.parametrize("max_images", [1, 4, 100])
def test_few_kept_images_give_the_same_tokens(pipeline, images, max_images):
    """Too many images for one bank: those of one step, or of one window, or of two together."""
    pipeline = deepcopy(pipeline).to(torch.float64)  # images in other company are rounded otherwise
    calibration, reference = calibration_of(2), as_images(images[0], "reference").double() * 2 - 1
    animator = pipeline.animator
    seen = {}
    with torch.no_grad():
        for limit in (max_images, 1000):
            batch = ImageBatch(pipeline.vae, reference, calibration=calibration)
            run = ReferenceImages(animator, batch, STEPS, max_images=limit)
            for step, timestep in enumerate((900, 100)):
                for windows in ([range(0, 3)], [range(2, 5)], [range(0, 3), range(2, 5)]):
                    contexts = run.contexts(step, timestep, windows)
                    for window, got in zip(windows, contexts, strict=True):
                        tokens = {n: value[got.index] for n, value in got.tokens.items()}
                        seen[limit, step, window, len(windows)] = tokens
                    assert len(run.rows) - 1 <= max(limit, 6 * len(windows))
    for (limit, step, window, _), tokens in seen.items():
        for layer, value in tokens.items():
            assert torch.allclose(value, seen[1000, step, window, 1][layer], atol=1e-9), (limit, layer)


def test_long_clips_compute_pose_features_by_window(tiny_pipeline, images):
    poses = ImageSequence(torch.from_numpy(images[1]).permute(0, 3, 1, 2), SIZE, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        calls = []
        handle = tiny_pipeline.pose_guider.register_forward_hook(lambda *_: calls.append(1))
        kept = pose_features(tiny_pipeline.pose_guider, poses)
        assert calls
        calls.clear()
        computed = pose_features(tiny_pipeline.pose_guider, poses, kept_frames=2)
        assert not calls
        handle.remove()
        for window in context_windows(FRAMES, 3, 1):
            arguments = window, noise(), torch.tensor(40)
            assert torch.allclose(kept(*arguments), computed(*arguments), atol=1e-5)


def test_overlapping_windows_share_control_residuals(magic_pipeline, images):
    """Each frame passes the ControlNet once a step, whatever the windows."""
    poses = ImageSequence(torch.from_numpy(images[1]).permute(0, 3, 1, 2), SIZE, torch.device("cpu"), torch.float32)
    context, timestep = torch.randn(1, 7, 16), torch.tensor(40)
    counts = []

    def count(module, inputs) -> None:
        counts.append(len(inputs[0]))

    windows = (range(0, 3), range(1, 4), range(2, 5))
    with torch.no_grad():
        handle = magic_pipeline.control_net.register_forward_pre_hook(count)
        condition, latents = ControlCondition(magic_pipeline.control_net, poses, context), noise()
        shared = [condition(window, latents, timestep) for window in windows]
        handle.remove()
        assert sum(counts) == FRAMES
        for window, got in zip(windows, shared, strict=True):
            sample = noise()[:, :, window.start : window.stop]
            expected = control_residuals(magic_pipeline.control_net, sample, timestep, context, poses[window])
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


def test_chunks_of_the_vae_change_nothing(pipeline):
    """Images and latents pass the VAE a few at a time."""
    draw = torch.Generator().manual_seed(0)
    latents, images = torch.randn(5, 4, *LATENTS, generator=draw), torch.rand(5, 3, 24, 32, generator=draw) * 2 - 1
    with torch.no_grad():
        whole = vae_decode(pipeline.vae, latents), vae_encode(pipeline.vae, images)
        for chunk in (1, 2, 5):
            parts = vae_decode(pipeline.vae, latents, chunk), vae_encode(pipeline.vae, images, chunk)
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(parts, whole, strict=True))


@pytest.mark.parametrize("mode", ["leaf_level", "block_level", "model"])
def test_offloading_of_diffusers_changes_nothing(pipeline, images, mode):
    """From CPU to CPU, images and all, with calibration and windows."""
    saver = deepcopy(pipeline)
    if mode == "model":
        saver.enable_model_cpu_offload(device="cpu")
    else:
        blocks = 1 if mode == "block_level" else None
        saver.enable_group_offload(torch.device("cpu"), offload_type=mode, num_blocks_per_group=blocks)
    expected = run(pipeline, images, 2, output_type="pt")
    assert torch.allclose(run(saver, images, 2, output_type="pt"), expected, atol=1e-5)


def test_tiles_of_the_vae(pipeline, images):
    """The images are those of diffusers' own tiled decoding, which differ a little where tiles meet."""
    saver = deepcopy(pipeline)
    saver.vae.enable_tiling()
    saver.vae.tile_sample_min_size, saver.vae.tile_latent_min_size = 16, 4
    latents, images_ = (run(saver, images, 1, output_type=kind) for kind in ("latent", "pt"))
    with torch.no_grad():
        frames = latents[0].transpose(0, 1) / saver.vae.config.scaling_factor
        expected = saver.vae.tiled_decode(frames).sample
    assert torch.allclose(images_, (expected / 2 + 0.5).clamp(0, 1), atol=1e-5)
    assert not torch.allclose(images_, run(pipeline, images, 1, output_type="pt"), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_hold_in_half_precision(dtype):
    """At the widest heads of Stable Diffusion, 160 channels, where a large penalty would overflow."""
    unet = UNet2DConditionModel(
        block_out_channels=(320,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=8,
    )
    layer = next(name for name in unet.attn_processors if "attn1" in name).removesuffix(".processor")
    attention, processor = unet.get_submodule(layer).to(dtype), ReferenceReadProcessor(layer)
    assert attention.inner_dim // attention.heads == 160
    draw = torch.Generator().manual_seed(0)
    own, seen, hidden = (torch.randn(1, 12, 320, generator=draw).to(dtype) for _ in range(3))
    index = torch.tensor([[0, 1]])
    flags = {12: torch.ones(1, 12, 1)}, {12: torch.cat([torch.zeros(1, 24, 1), torch.ones(1, 12, 1)], dim=1)}
    masked = ReferenceContext({layer: torch.cat([seen, 100 * hidden])}, index, Visibility(*flags))
    alone = ReferenceContext({layer: seen}, index[:, :1])
    with torch.no_grad():
        result, expected = (processor(attention, own, reference=context) for context in (masked, alone))
    assert result.isfinite().all() and torch.allclose(result.float(), expected.float(), atol=0.02)
