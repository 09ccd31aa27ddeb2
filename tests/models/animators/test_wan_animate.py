"""Wan-Animate against diffusers' own pipeline with the same weights."""

from copy import deepcopy
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import nn

from core.errors import UserError
from data.poses.person import PackedMasks
from models.animators.wan_animate.context import joint_context
from models.animators.wan_animate.model import WanAnimatePipeline
from models.animators.wan_animate.text import image_tokens
from models.attention.context import ReferenceContext
from models.attention.masking import Visibility, hidden_pairs
from models.compiling import compile_networks, use_channels_last
from models.images import Words
from models.sampling import noise_level
from tests.models.test_pipeline import standing_poses
from tests.second_device import SECOND, second_device
from tests.small_animators import small_pipeline
from tests.wan_parts import SEGMENT, SIZE, TRANSFORMER, components, images, wan_pipeline
from tpc import Calibration, CalibrationConfig, calibrate


def pictures(array: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(image) for image in array]


@pytest.fixture(scope="module")
def doubles() -> dict[str, WanAnimatePipeline | diffusers.WanAnimatePipeline]:
    """Our pipeline and diffusers' own, with the same weights in double precision.

    In single precision either differs from itself in double by up to 6e-5: attention that reaches magnifies rounding.
    """
    parts = {n: c.double() if isinstance(c, nn.Module) else c for n, c in deepcopy(components()).items()}
    stock = diffusers.WanAnimateTransformer3DModel(**TRANSFORMER).double()
    stock.load_state_dict(parts["transformer"].state_dict())
    pipelines = {
        "ours": WanAnimatePipeline(**parts),
        "published": diffusers.WanAnimatePipeline(**parts | {"transformer": stock.eval()}),
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def our_frames(given: dict, words: Words, **arguments) -> np.ndarray:
    arguments = {"num_inference_steps": 3, "window_size": SEGMENT, "output_type": "np", **arguments}
    return wan_pipeline()(**given, words=words, generator=torch.Generator().manual_seed(1), **arguments).frames


@torch.no_grad()
def embedding(text: str, pipeline: diffusers.WanAnimatePipeline) -> torch.Tensor:
    """(1, 512, c), of the prompt's own tokens without padding."""
    hidden = pipeline.text_encoder(pipeline.tokenizer(text, return_tensors="pt").input_ids).last_hidden_state
    return torch.cat([hidden, hidden.new_zeros(1, 512 - hidden.shape[1], hidden.shape[2])], dim=1)


@pytest.mark.slow  # torch traces thousands of operations
def test_compiled_or_with_channels_last_it_computes_the_same(calibration):
    """One graph for steps, segments and halves of guidance; with images beside the reference one an arrangement."""
    pipeline = deepcopy(wan_pipeline())
    given = {**images(2 * SEGMENT - 1), "num_inference_steps": 2, "guidance_scale": 2.0, "window_size": SEGMENT}

    def run(attach: str | None) -> np.ndarray:
        attached = attach and replace(calibration, config=replace(calibration.config, attach=attach))
        seed = torch.Generator().manual_seed(1)
        return pipeline(**given, calibration=attached, generator=seed, output_type="np").frames

    expected = {attach: run(attach) for attach in (None, "replace", "add")}
    use_channels_last(pipeline.animator, pipeline.vae)
    for attach, frames in expected.items():
        np.testing.assert_allclose(run(attach), frames, atol=1e-4)
    weight = pipeline.transformer.patch_embedding.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compile_networks(pipeline.animator, backend=backend)
    for attach, count in {None: 1, "replace": 1, "add": 2}.items():
        np.testing.assert_allclose(run(attach), expected[attach], atol=1e-4)
        assert len(graphs) == count, attach


# Frames, guidance, frames of a segment, and those that the next one carries on from.
PARITY = {
    "one segment": (SEGMENT, 1.0, SEGMENT, 1),
    "one, guided": (SEGMENT, 3.0, SEGMENT, 1),
    "two": (2 * SEGMENT - 2, 1.0, SEGMENT, 1),
    "two, guided": (2 * SEGMENT - 2, 3.0, SEGMENT, 1),
    "two that share five frames": (19, 2.0, 13, 5),
}


@pytest.mark.parametrize("case", PARITY)
def test_frames_are_those_of_diffusers(doubles, case):
    frames, scale, segment, carried = PARITY[case]
    given, published = images(frames), doubles["published"]
    expected = published(
        image=Image.fromarray(given["reference"]),
        pose_video=pictures(given["poses"]),
        face_video=pictures(given["faces"]),
        width=SIZE[0],
        height=SIZE[1],
        # Without its cleaning of text, which wants a package more.
        prompt_embeds=embedding("a fan", published),
        negative_prompt_embeds=embedding("bad", published),
        guidance_scale=scale,
        segment_frame_length=segment,
        prev_segment_conditioning_frames=carried,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).frames[0]
    draw, segments = torch.Generator().manual_seed(1), 1 if frames <= segment else 2
    noise = [torch.randn((1, 8, 2 + segment // 4, 4, 6), generator=draw) for _ in range(segments)]
    found = doubles["ours"](
        **given,
        words=Words(" a  &#102;an", "bad"),
        guidance_scale=scale,
        window_size=segment,
        window_overlap=carried,
        num_inference_steps=2,
        latents=torch.cat(noise, dim=2),
        output_type="np",
    ).frames
    assert found.shape == expected.shape == (frames, *SIZE[::-1], 3)
    assert expected.std() > 0.02, "the comparison would show nothing"
    assert np.abs(found - expected).max() < 1e-5


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """For two segments."""
    frames, matrix = 2 * SEGMENT - 1, np.array([[0.5, 0, 8], [0, 0.5, 0], [0, 0, 1]])
    config = CalibrationConfig(max_gap=0, propagation="off", attach="replace")
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    maps = {"frame_map": matrix, "reference_map": matrix}
    return calibrate(image, standing_poses(1), standing_poses(frames, offset=4), SIZE, config, **maps)


def unseen(calibration: Calibration, frames: int) -> Calibration:
    """Nobody is calibrated in the first frames."""
    member = calibration.member.copy()
    member[:frames] = -1
    return replace(calibration, member=member)


def test_a_segment_sees_its_calibrated_image_in_place_of_the_reference(calibration):
    given = images(2 * SEGMENT - 1)
    noise = torch.randn((1, 8, 6, 4, 6), generator=torch.Generator().manual_seed(2))

    def run(calibration: Calibration | None = None, words: Words | None = None, **others) -> np.ndarray:
        arguments = {"latents": noise, "guidance_scale": 1.0, "calibration": calibration, "num_inference_steps": 2}
        return our_frames(given | others, words, **arguments)

    plain, nobody = run(), run(unseen(calibration, 2 * SEGMENT - 1))
    assert np.abs(nobody - plain).max() < 1e-5
    late = run(unseen(calibration, SEGMENT))  # seen in the second segment alone
    assert np.abs(late[:SEGMENT] - plain[:SEGMENT]).max() < 1e-5
    assert np.abs(late[SEGMENT:] - plain[SEGMENT:]).mean() > 3e-4
    # The image of a segment is a reference as any other, but that CLIP has seen the original.
    shown = calibration.segment_image(range(SEGMENT))
    original = torch.from_numpy(given["reference"]).permute(2, 0, 1)[None] / 127.5 - 1
    clip = wan_pipeline().image_encoder, wan_pipeline().image_processor
    words = Words(embeddings={"image": image_tokens(original, *clip)})
    expected, found = run(None, words, reference=shown), run(calibration)
    assert np.abs(found[:SEGMENT] - expected[:SEGMENT]).max() < 1e-6
    assert np.abs(found[:SEGMENT] - plain[:SEGMENT]).mean() > 3e-4


def test_calibrated_images_beside_the_reference(calibration):
    given = images(2 * SEGMENT - 1)
    noise = torch.randn((1, 8, 6, 4, 6), generator=torch.Generator().manual_seed(2))
    added = replace(calibration, config=replace(calibration.config, attach="add"))

    def run(calibration: Calibration | None = None) -> np.ndarray:
        arguments = {"latents": noise, "guidance_scale": 1.0, "num_inference_steps": 2}
        return our_frames(given, None, calibration=calibration, **arguments)

    plain, nobody, late = run(), run(unseen(added, 2 * SEGMENT - 1)), run(unseen(added, SEGMENT))
    assert np.abs(nobody - plain).max() < 1e-5
    assert np.abs(late[:SEGMENT] - plain[:SEGMENT]).max() < 1e-5
    assert np.abs(late[SEGMENT:] - plain[SEGMENT:]).max() > 1e-3
    # Nobody stands anywhere in the driving frames, so that nobody sees what is there.
    exclusive = replace(added.config, visibility="exclusive")
    hidden = replace(added, config=exclusive, target_masks=PackedMasks.zeros((added.frames, 1), SIZE))
    assert np.abs(run(hidden) - plain).max() < 1e-5
    assert np.abs(run(replace(added, config=exclusive)) - plain).max() > 1e-3


def test_a_second_device_gives_the_same_and_no_pass_waits_for_it(calibration):
    added = replace(calibration, config=replace(calibration.config, attach="add"))
    arguments = {"num_inference_steps": 2, "guidance_scale": 2.0, "calibration": added, "window_size": SEGMENT}
    expected = wan_pipeline()(**images(added.frames), generator=torch.Generator().manual_seed(0), **arguments)
    with second_device(double=False) as waits:
        moved = deepcopy(wan_pipeline()).to(SECOND)
        found = moved(**images(added.frames), generator=torch.Generator().manual_seed(0), **arguments)
    assert all(np.array_equal(*pair) for pair in zip(found.frames, expected.frames, strict=True))
    places = {wait.place for wait in waits}
    assert not [place for place in places if "networks.py" in place or "predict" in place]


def frame_contexts(frames: int, n: int, draw: np.random.Generator) -> ReferenceContext:
    """Two persons in two groups of frames, one not calibrated in the second; random flags of three channels."""
    index = torch.tensor([[0, 1, 2]] * (frames // 2) + [[0, 3, 0]] * (frames - frames // 2))
    query = torch.from_numpy(draw.integers(0, 2, (frames, n, 3))).float()
    keys = torch.from_numpy(draw.integers(0, 2, (2, 3 * n, 3))).float()
    keys = torch.cat([torch.zeros(2, n, 3), keys], dim=1)[(index[:, 1] == 3).long()]
    return ReferenceContext({}, index, Visibility({n: query}, {n: keys}))


def test_a_token_of_four_frames_sees_what_one_of_them_sees():
    frames, n, images_seen = 9, 2, [0, 1, 2, 3]
    context = frame_contexts(frames, n, np.random.default_rng(0))
    joint = joint_context(context, n, 4)
    assert joint.index.tolist() == [images_seen]
    visible = torch.zeros(7 * n, 7 * n, dtype=torch.bool)
    for sight in joint.sights:
        seen = torch.ones(len(sight.queries), len(sight.keys), dtype=torch.bool)
        if sight.flags is not None:
            seen = ~hidden_pairs(*sight.flags)[0]
        visible[sight.queries[:, None], sight.keys] = seen
    visible = visible.unflatten(0, (7, n)).unflatten(2, (7, n))  # (7, n, 7, n)
    assert visible[0, :, [0, 4, 5, 6]].all() and not visible[0, :, 1:4].any(), "the reference: itself and the clip"
    for image in (1, 2, 3):
        seen = [number for number in range(7) if visible[image, :, number].all()]
        assert seen == [0, image] and visible[image].sum() == 2 * n * n
    query, key = context.flags(n)
    for latent, (middle, members) in enumerate([(0, [0]), (3, [1, 2, 3, 4]), (7, [5, 6, 7, 8])]):
        assert visible[4 + latent, :, 4:].all()
        row = context.index[middle].tolist()
        union = query[members].amin(dim=0)  # in no frame of these is it shown
        hidden = torch.einsum("qg,kg->qk", union, key[middle, n:]) > 0
        for slot, image in enumerate(row):
            if slot == 0 or image:
                found = visible[4 + latent, :, image]
                assert torch.equal(found, ~hidden[:, slot * n : (slot + 1) * n])
        for image in {1, 2, 3} - set(row):
            assert not visible[4 + latent, :, image].any()


def test_what_segments_cannot_be():
    pipeline, given = wan_pipeline(), images(SEGMENT)
    refused = {
        "solver=ddim knows no flow matching": {"solver": "ddim"},
        "faces are 3 images, poses 5": {"faces": given["faces"][:3]},
        "window_overlap=5 must be 0 to 4": {"window_overlap": 5},
        "window_overlap=-1 must be 0 to 4": {"window_overlap": -1},
        "size must be multiples of 16": {"width": 40, "height": 32},
    }
    for told, arguments in refused.items():
        with pytest.raises((ValueError, UserError), match=told):
            pipeline(**given | {"window_size": SEGMENT} | arguments)
    with pytest.raises(ValueError, match="faces are of no use to AnimateAnyone"):
        small_pipeline("animate_anyone")(images(1)["reference"], images(1)["poses"], faces=images(1)["faces"])


def test_segments_are_of_whole_latents():
    window = wan_pipeline().default_window
    assert window(200, None, None) == (77, 1) and window(20, None, None) == (21, 1) and window(1, None, None) == (1, 0)
    assert window(200, 80, 4) == (81, 5) and window(200, 79, 0) == (77, 0)
    # There is always something new in a segment.
    assert window(200, 5, 4) == (5, 1) and window(200, 9, 8) == (9, 5)
    given = {**images(9), "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"}
    assert len(wan_pipeline()(**given, window_size=SEGMENT, window_overlap=SEGMENT - 1).frames) == 9


def test_solvers_of_flow_matching_lead_to_one_image():
    """From the same noise they come the closer to it the more steps they take."""
    pipeline, given = wan_pipeline(), images(1)
    euler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)
    others = {
        "unipc": pipeline,
        "dpm++": pipeline,
        "euler": WanAnimatePipeline(**components() | {"scheduler": euler}),
    }
    others["euler"].set_progress_bar_config(disable=True)

    def run(solver: str, steps: int) -> np.ndarray:
        solver, pipeline = None if solver == "euler" else solver, others[solver]
        arguments = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
        return pipeline(**given, solver=solver, generator=torch.Generator().manual_seed(1), **arguments).frames

    known = run("unipc", 30)
    for name in others:
        few, many = ((run(name, steps) - known).abs().mean() for steps in (2, 12))
        assert many < 0.05 and many < 0.5 * few, name


def test_guidance_of_an_interval_asks_flow_matching_for_its_levels():
    scheduler = wan_pipeline().scheduler
    scheduler.set_timesteps(4)
    levels = [noise_level(scheduler, timestep) for timestep in scheduler.timesteps]
    shares = scheduler.sigmas[:-1].double()  # of noise, and the rest of the image
    expected = shares / (shares**2 + (1 - shares) ** 2).sqrt()
    assert np.allclose(levels, expected, atol=2e-3)  # timesteps are whole numbers
