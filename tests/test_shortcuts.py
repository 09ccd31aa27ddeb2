"""What saves work in inference changes no result: each shortcut, and all together, against the plain computation.

The plain computation encodes every image again for every frame that sees it, repeats tokens and context over frames,
projects them everywhere, masks densely, and takes the softmax by definition.
"""

from copy import deepcopy

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from data.pose import Poses
from models.animate_anyone import PoseFeatures
from models.latents import encode_pictures
from models.magic_animate import ControlCondition, control_residuals
from models.pictures import PictureSequence, as_pictures
from models.reference_attention import (
    ReferenceContext,
    ReferenceWriteProcessor,
    same_reference,
    set_reference_processors,
)
from models.reference_bank import ReferenceImages
from models.windows import context_windows, window_weights
from tests.published import small_magic_pipeline
from tpc import CalibrationConfig, calibrate
from tpc.attention import frame_visibility

SIZE, LATENTS, FRAMES, STEPS, GUIDANCE = (32, 24), (6, 8), 5, 2, 3.0


class PlainAttention(AttnProcessor2_0):
    """Attention by definition: everything repeated for every frame, a dense mask, a softmax."""

    def __init__(self, layer: str):
        super().__init__()
        self.layer = layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *, reference=None):
        seen, visible = hidden_states, None
        if encoder_hidden_states is not None:
            frames = len(hidden_states) // len(encoder_hidden_states)
            seen = encoder_hidden_states.repeat_interleave(frames, dim=0)
        elif reference is not None and self.layer in reference.tokens:
            seen = torch.cat([hidden_states, reference.tokens[self.layer][reference.index].flatten(1, 2)], dim=1)
            if reference.query_flags is not None:
                tokens = hidden_states.shape[1]
                visible = reference.query_flags[tokens] @ reference.key_flags[tokens].transpose(1, 2) == 0
        parts = (attn.to_q(hidden_states), attn.to_k(seen), attn.to_v(seen))
        heads = []
        for query, key, value in zip(*(part.chunk(attn.heads, dim=-1) for part in parts), strict=True):
            logits = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
            if visible is not None:
                logits = logits.masked_fill(~visible, -torch.inf)
            heads.append(logits.softmax(-1) @ value)
        return attn.to_out[0](torch.cat(heads, dim=-1))


def plain_unet(unet):
    """The same weights with attention by definition."""
    plain = deepcopy(unet)
    processors = plain.attn_processors
    for name in processors:
        if "motion_modules" not in name:
            processors[name] = PlainAttention(name.removesuffix(".processor"))
    plain.set_attn_processor(processors)
    return plain


@torch.no_grad()
def plain_animation(pipeline, reference, poses, calibration, latents, window_size, overlap) -> Tensor:
    """Latents of the denoising loop without any shortcut."""
    animator, dtype = pipeline.animator(), pipeline.denoising_unet.dtype
    animator.denoising_unet = plain_unet(pipeline.denoising_unet)
    reference = as_pictures(reference, "reference").to(dtype) * 2 - 1
    poses = as_pictures(poses, "poses").to(dtype)
    context = animator.encode_context(reference)
    grids = pipeline.denoising_unet.attention_grids(*LATENTS)
    windows = context_windows(FRAMES, window_size, overlap)
    pipeline.scheduler.set_timesteps(STEPS)
    for step, timestep in enumerate(pipeline.scheduler.timesteps):
        total = torch.zeros_like(latents)
        for window, weight in zip(windows, window_weights(windows, FRAMES), strict=True):
            sample = latents[:, :, window.start : window.stop]
            members = np.zeros((FRAMES, 0), int) if calibration is None else calibration.index(step)
            members = members[window.start : window.stop]
            pictures = [reference]
            for image in members.ravel():  # one for every frame and person, however often it occurs
                pictures.append(reference if image < 0 else picture_of(calibration, image).to(reference))
            at = timestep if animator.reference_follows_timestep else 0
            written = [animator.encode_reference(encode_pictures(pipeline.vae, p), at, context) for p in pictures]
            index = 1 + torch.arange(members.size).reshape(members.shape)
            index = torch.cat([torch.zeros(len(window), 1, dtype=torch.long), index], dim=1)
            flags = None
            if calibration is not None:
                flags = frame_visibility(calibration, window, members, LATENTS, grids)
            seen = ReferenceContext(
                tokens={layer: torch.cat([tokens[layer] for tokens in written]) for layer in written[0]},
                index=index,
                query_flags=None if flags is None else flags.query,
                key_flags=None if flags is None else flags.key,
            )
            pose = plain_pose(pipeline, sample, timestep, context, poses[window.start : window.stop])
            conditional = animator.predict(sample, timestep, context, pose, seen)
            unconditional = animator.predict(sample, timestep, animator.null_context(context), pose, None)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            total[:, :, window.start : window.stop] += guided * weight.to(dtype)[:, None, None]
        latents = pipeline.scheduler.step(total, timestep, latents).prev_sample
    return latents


def picture_of(calibration, image: int) -> Tensor:
    return torch.from_numpy(calibration.images[int(image)]).permute(2, 0, 1)[None].double() / 127.5 - 1


def plain_pose(pipeline, sample, timestep, context, poses):
    """Pose features, or ControlNet residuals, of these frames one by one."""
    if hasattr(pipeline, "pose_guider"):
        return torch.cat([pipeline.pose_guider(pose[None, :, None]) for pose in poses], dim=2)
    frames = [
        control_residuals(pipeline.control_net, sample[:, :, [i]], timestep, context, pose[None])
        for i, pose in enumerate(poses)
    ]
    return [torch.cat(parts) for parts in zip(*frames, strict=True)]


@pytest.fixture(scope="module")
def magic_pipeline():
    return small_magic_pipeline()


@pytest.fixture(params=["animate_anyone", "magic_animate"])
def pipeline(request, tiny_pipeline, magic_pipeline):
    return tiny_pipeline if request.param == "animate_anyone" else magic_pipeline


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
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


def calibration_of(persons: int, **config):
    if not persons:
        return None
    picture = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    matrix = np.array([[0.375, 0, 4], [0, 0.375, 0], [0, 0, 1]])
    config = CalibrationConfig(groups=2, **config)
    return calibrate(
        picture,
        people(1, persons, 0),
        people(FRAMES, persons, 2),
        SIZE,
        config,
        frame_map=matrix,
        reference_map=matrix,
    )


def noise(dtype=torch.float32) -> Tensor:
    return torch.randn(1, 4, FRAMES, *LATENTS, generator=torch.Generator().manual_seed(0)).to(dtype)


def run(pipeline, pictures, calibration, latents, **arguments) -> Tensor:
    return pipeline(
        *pictures,
        calibration,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=latents,
        output_type="latent",
        **arguments,
    ).frames


@pytest.mark.parametrize("persons", [0, 1, 2])
@pytest.mark.parametrize("window", [5, 3])
def test_all_shortcuts_together(pipeline, pictures, persons, window):
    """In double precision, where rounding hides nothing; in single precision within 1e-5 of the latents' size."""
    calibration = calibration_of(persons)
    if persons:
        assert calibration.used(STEPS).size > 1
    plain = plain_animation(
        deepcopy(pipeline).to(torch.float64), *pictures, calibration, noise(torch.float64), window, 1
    )
    double = deepcopy(pipeline).to(torch.float64)
    ours = run(double, pictures, calibration, noise(torch.float64), window_size=window, window_overlap=1)
    scale = plain.abs().max()
    assert (ours - plain).abs().max() < 1e-6 * scale
    single = run(pipeline, pictures, calibration, noise(), window_size=window, window_overlap=1)
    assert (single - plain).abs().max() < 1e-5 * scale
    if persons:
        without = run(pipeline, pictures, None, noise(), window_size=window, window_overlap=1)
        assert (single - without).abs().max() > 1e-3


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
    tokens = pipeline.animator().encode_reference(torch.randn(1, 4, *LATENTS), 0, context)
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
        for name in complete.unread_parameters():
            complete.get_parameter(name).mul_(3)
        changed = complete(latents, 5, context)
    assert short.keys() == full.keys() == changed.keys()
    assert all(torch.equal(short[layer], full[layer]) for layer in full)
    assert all(torch.equal(short[layer], changed[layer]) for layer in full)


@pytest.mark.parametrize("max_images", [1, 4, 100])
def test_few_kept_images_give_the_same_tokens(pipeline, pictures, max_images):
    """Too many images for one bank: those of one step, or of one window."""
    calibration, reference = calibration_of(2), as_pictures(pictures[0], "reference") * 2 - 1
    animator = pipeline.animator()
    context, grids = animator.encode_context(reference), pipeline.denoising_unet.attention_grids(*LATENTS)
    seen = {}
    with torch.no_grad():
        for limit in (max_images, 1000):
            images = ReferenceImages(animator, pipeline.vae, reference, context, calibration, STEPS, limit)
            for step, timestep in enumerate((900, 100)):
                for window in (range(0, 3), range(2, 5)):
                    bank = images.bank(step, timestep, window)
                    got = images.seen_by(bank, window, step, LATENTS, grids)
                    seen[limit, step, window] = {n: value[got.index] for n, value in got.tokens.items()}
                    assert len(bank.slots) <= max(limit, 6)
    for (limit, step, window), tokens in seen.items():
        for layer, value in tokens.items():
            assert torch.allclose(value, seen[1000, step, window][layer], atol=1e-5), (limit, layer)


def test_long_clips_compute_pose_features_by_window(tiny_pipeline, pictures):
    poses = PictureSequence(
        torch.from_numpy(pictures[1]).permute(0, 3, 1, 2), SIZE, torch.device("cpu"), torch.float32
    )
    with torch.no_grad():
        kept = PoseFeatures(tiny_pipeline.pose_guider, poses)
        computed = PoseFeatures(tiny_pipeline.pose_guider, poses, kept_frames=2)
    assert kept.features is not None and computed.features is None
    for window in context_windows(FRAMES, 3, 1):
        assert torch.allclose(kept.window(window), computed.window(window), atol=1e-5)


def test_overlapping_windows_share_control_residuals(magic_pipeline, pictures):
    """Each frame passes the ControlNet once a step, whatever the windows."""
    poses = PictureSequence(
        torch.from_numpy(pictures[1]).permute(0, 3, 1, 2), SIZE, torch.device("cpu"), torch.float32
    )
    context, timestep = torch.randn(1, 7, 16), torch.tensor(40)
    counts = []

    def count(module, inputs) -> None:
        counts.append(len(inputs[0]))

    windows = (range(0, 3), range(1, 4), range(2, 5))
    with torch.no_grad():
        handle = magic_pipeline.control_net.register_forward_pre_hook(count)
        at_step = ControlCondition(magic_pipeline.control_net, poses, context).at_step(noise(), timestep)
        shared = [at_step.window(window) for window in windows]
        handle.remove()
        assert sum(counts) == FRAMES
        for window, got in zip(windows, shared, strict=True):
            sample = noise()[:, :, window.start : window.stop]
            expected = control_residuals(magic_pipeline.control_net, sample, timestep, context, poses[window])
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("mode", ["leaf_level", "block_level", "model", "tiling"])
def test_memory_savers_of_diffusers_change_nothing(pipeline, pictures, mode):
    calibration, saver = calibration_of(1), deepcopy(pipeline)
    arguments = {"window_size": 3, "window_overlap": 1}
    if mode == "model":
        saver.enable_model_cpu_offload(device="cpu")
    elif mode == "tiling":
        saver.vae.enable_tiling()
    else:
        blocks = 1 if mode == "block_level" else None
        saver.enable_group_offload(torch.device("cpu"), offload_type=mode, num_blocks_per_group=blocks)
    expected = run(pipeline, pictures, calibration, noise(), **arguments)
    assert torch.allclose(run(saver, pictures, calibration, noise(), **arguments), expected, atol=1e-5)


def test_compilation_has_no_graph_breaks(tiny_pipeline):
    unet = tiny_pipeline.denoising_unet
    context, latents = torch.randn(1, 1, unet.config.cross_attention_dim), torch.randn(1, 4, *LATENTS)
    reference_net = torch.compile(tiny_pipeline.reference_net, backend="eager", fullgraph=True)
    with torch.no_grad():
        tokens, plain = reference_net(latents, 3, context), tiny_pipeline.reference_net(latents, 3, context)
        assert all(torch.allclose(tokens[layer], plain[layer], atol=1e-5) for layer in plain)
        sizes = [h * w for h, w in unet.attention_grids(*LATENTS)]
        query = {n: torch.ones(FRAMES, n, 1) for n in sizes}
        key = {n: torch.cat([torch.zeros(2 * n, 1), torch.ones(n, 1)]).expand(FRAMES, -1, -1) for n in sizes}
        seen = ReferenceContext(tokens, torch.zeros(FRAMES, 2, dtype=torch.long), query, key, projected={})
        expected = unet(noise(), 7, context, reference=seen)
        compiled = torch.compile(unet, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(noise(), 7, context, reference=seen), expected, atol=1e-5)


def test_norms_over_clips_compile_too(magic_pipeline, pictures):
    unet, context = magic_pipeline.denoising_unet, torch.randn(1, 7, 16)
    poses = as_pictures(pictures[1], "poses")
    with torch.no_grad():
        residuals = control_residuals(magic_pipeline.control_net, noise(), 7, context, poses)
        compiled = torch.compile(unet, backend="eager", fullgraph=True)
        result = compiled(noise(), 7, context, residuals=residuals)
        assert torch.allclose(result, unet(noise(), 7, context, residuals=residuals), atol=1e-5)
