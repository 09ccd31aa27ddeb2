"""The pipeline: inputs and outputs of every kind, windows, guidance, calibration, save and load."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import UserError
from data.poses.poses import Poses
from models.animators.registry import load_pipeline
from models.attention.processors import reference_layers
from models.images import REFERENCE, ImageBatch, as_images, as_mask
from models.pipeline import AnimationPipeline
from models.reference_images import ReferenceImages
from models.vae import vae_decode
from tests.published import small_magic_pipeline
from tpc import CalibrationConfig, calibrate

SIZE = (32, 24)


@pytest.fixture
def reference() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


@pytest.fixture
def poses() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (5, 24, 32, 3), dtype=np.uint8)


def run(pipeline, reference, poses, seed=0, output_type="pt", **arguments) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    arguments = {"num_inference_steps": 2, **arguments}
    return pipeline(reference, poses, generator=generator, output_type=output_type, **arguments).frames


def standing_poses(num_frames: int, size=(64, 64), offset=0.0) -> Poses:
    """A standing stick person who shifts to the right frame by frame."""
    x = np.array([0, 1, -1, 2, -2, 6, -6, 9, -9, 9, -9, 4, -4, 4, -4, 4, -4], np.float32) + size[0] / 2
    y = np.array([8, 6, 6, 7, 7, 16, 16, 26, 26, 34, 34, 34, 34, 46, 46, 58, 58], np.float32)
    shift = np.arange(num_frames, dtype=np.float32)[:, None] + offset
    keypoints = np.stack([x + shift, np.broadcast_to(y, (num_frames, 17))], axis=-1)[:, None]
    return Poses(keypoints, np.ones((num_frames, 1, 17), np.float32), size, 25.0)


@pytest.fixture
def calibration():
    """Calibrated images of a noise image for five frames of 32 x 24."""
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    frame_map = np.array([[0.375, 0, 4], [0, 0.375, 0], [0, 0, 1]])

    def make(**config):
        return calibrate(
            image,
            standing_poses(1),
            standing_poses(5, offset=2),
            SIZE,
            CalibrationConfig(**config),
            frame_map=frame_map,
            reference_map=frame_map,
        )

    return make


def test_kinds_of_input_agree(tiny_pipeline, reference, poses):
    arrays = run(tiny_pipeline, reference, poses)
    images = run(tiny_pipeline, Image.fromarray(reference), [Image.fromarray(pose) for pose in poses])
    tensors = run(
        tiny_pipeline,
        torch.from_numpy(reference).permute(2, 0, 1) / 255,
        torch.from_numpy(poses).permute(0, 3, 1, 2) / 255,
    )
    assert arrays.shape == (5, 3, 24, 32)
    assert torch.equal(arrays, images) and torch.allclose(arrays, tensors, atol=1e-4)


def test_kinds_of_output_agree(tiny_pipeline, reference, poses):
    tensor = run(tiny_pipeline, reference, poses)
    array = run(tiny_pipeline, reference, poses, output_type="np")
    images = run(tiny_pipeline, reference, poses, output_type="pil")
    latents = run(tiny_pipeline, reference, poses, output_type="latent")
    numbers = run(tiny_pipeline, reference, poses, output_type="uint8", decode_chunk_size=2)
    assert np.array_equal(numbers, np.stack([np.asarray(image) for image in images]))
    assert np.allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert np.abs(np.stack([np.asarray(i) for i in images]) / 255 - array).max() <= 0.5 / 255 + 1e-6
    assert latents.shape == (1, 4, 5, 6, 8)
    decoded = vae_decode(tiny_pipeline.vae, latents[0].transpose(0, 1), 2)
    assert torch.allclose(decoded.clamp(-1, 1) / 2 + 0.5, tensor, atol=1e-5)


def test_same_seed_same_frames(tiny_pipeline, reference, poses):
    assert torch.equal(run(tiny_pipeline, reference, poses), run(tiny_pipeline, reference, poses))
    assert not torch.equal(run(tiny_pipeline, reference, poses), run(tiny_pipeline, reference, poses, seed=1))


def test_reference_and_poses_matter(tiny_pipeline, reference, poses):
    base = run(tiny_pipeline, reference, poses)
    assert not torch.allclose(base, run(tiny_pipeline, 255 - reference, poses), atol=1e-3)
    assert not torch.allclose(base, run(tiny_pipeline, reference, 255 - poses), atol=1e-3)


@pytest.mark.parametrize("num_frames", [1, 2, 8, 13])
def test_any_length(tiny_pipeline, reference, poses, num_frames):
    clip = np.resize(poses, (num_frames, *poses.shape[1:]))
    assert run(tiny_pipeline, reference, clip, window_overlap=2).shape == (num_frames, 3, 24, 32)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that is made, those of a whole clip's latents left out."""

    def __init__(self, latents: int):
        super().__init__()
        self.latents, self.numel = latents, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel() if tensor.numel() != self.latents else 0)
        return result


@pytest.mark.parametrize(("animator", "lengths"), [("animate_anyone", (258, 282)), ("magic_animate", (34, 58))])
def test_memory_does_not_grow_with_the_clip(tiny_pipeline, reference, poses, animator, lengths):
    """Beyond its latents, and beyond the 256 frames up to which pose features are kept."""
    pipeline = tiny_pipeline if animator == "animate_anyone" else small_magic_pipeline()
    largest = []
    for num_frames in lengths:
        clip = np.resize(poses, (num_frames, *poses.shape[1:]))
        with LargestTensor(num_frames * 4 * 6 * 8) as seen:
            run(pipeline, reference, clip, 0, "uint8", num_inference_steps=1, window_size=8, guidance_scale=1)
        largest.append(seen.numel)
    assert largest[0] == largest[1] > 1000


def test_one_window_of_all_frames_is_no_window(tiny_pipeline, reference, poses):
    whole = run(tiny_pipeline, reference, poses)
    windowed = run(tiny_pipeline, reference, poses, window_size=5)
    pieces = run(tiny_pipeline, reference, poses, window_size=3, window_overlap=1)
    assert torch.equal(whole, windowed)
    assert not torch.allclose(whole, pieces, atol=1e-4)


def test_guidance_one_is_the_conditional_half(tiny_pipeline, reference, poses):
    """guided = u + s (c - u) is linear in s: with one step, latents at s = 0, 1, 2 are evenly spaced."""
    latents = [
        run(tiny_pipeline, reference, poses, output_type="latent", guidance_scale=s, num_inference_steps=1)
        for s in (1e-12, 1, 2)
    ]
    assert torch.allclose(latents[0] + latents[2], 2 * latents[1], atol=1e-3)
    assert not torch.allclose(latents[0], latents[2], atol=1e-3)


def test_unconditional_half_sees_neither_reference_nor_calibration(tiny_pipeline, reference, poses, calibration):
    # A scale of nearly zero leaves the unconditional half alone.
    kept = {"guidance_scale": 1e-12, "output_type": "latent"}
    base = run(tiny_pipeline, reference, poses, **kept)
    assert torch.allclose(base, run(tiny_pipeline, 255 - reference, poses, **kept), atol=1e-4)
    assert torch.allclose(base, run(tiny_pipeline, reference, poses, calibration=calibration(), **kept), atol=1e-4)


def test_callback_sees_every_step_and_may_replace_latents(tiny_pipeline, reference, poses):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, timestep))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = run(tiny_pipeline, reference, poses, output_type="latent", callback_on_step_end=callback)
    assert [step for step, _ in seen] == [0, 1] and seen[0][1] == 999
    assert latents.abs().max() == 0


@pytest.mark.parametrize(
    "dtype, advice",
    [(torch.float16, "dtype=bfloat16 or"), (torch.bfloat16, "dtype=float32"), (torch.float32, "weights")],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_results_that_are_not_finite_are_refused_with_their_step(
    tiny_pipeline, reference, poses, dtype, advice, value
):
    pipeline = deepcopy(tiny_pipeline).to(dtype)

    def callback(pipeline, step, timestep, tensors):
        latents = tensors["latents"].clone()
        if step == 1:
            latents[0, 0, 2, 1, 1] = value
        return {"latents": latents}

    arguments = {"num_inference_steps": 3, "output_type": "latent", "callback_on_step_end": callback}
    with pytest.raises(UserError, match=f"not finite from step 2 of 3 on; .*{advice}"):
        run(pipeline, reference, poses, **arguments)


@pytest.mark.parametrize("output_type", ["pil", "np", "uint8", "pt"])
def test_images_that_are_not_finite_are_refused(tiny_pipeline, reference, poses, output_type):
    pipeline = deepcopy(tiny_pipeline)
    torch.nn.init.constant_(pipeline.vae.decoder.conv_in.bias, float("nan"))
    with pytest.raises(UserError, match="the VAE's images are not finite"):
        run(pipeline, reference, poses, output_type=output_type)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_latents_in_single(tiny_pipeline, reference, poses, dtype):
    """Networks compute in the pipeline's number format, the scheduler in single precision, from the same noise."""
    half, started = deepcopy(tiny_pipeline).to(dtype), []

    def callback(pipeline, step, timestep, tensors):
        started.append(tensors["latents"])
        return tensors

    arguments = {"output_type": "latent", "num_inference_steps": 4}
    latents = run(half, reference, poses, **arguments, callback_on_step_end=callback)
    assert latents.dtype == torch.float32 and {value.dtype for value in started} == {torch.float32}
    expected = run(tiny_pipeline, reference, poses, **arguments)
    assert (latents - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert run(half, reference, poses, output_type="uint8").dtype == np.uint8


def test_given_latents_are_used(tiny_pipeline, reference, poses):
    latents = torch.randn(1, 4, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(tiny_pipeline, reference, poses, latents=latents), run(tiny_pipeline, reference, poses))


@pytest.mark.parametrize("preset", ["paper", "release", "best"])
def test_calibration_changes_the_result(tiny_pipeline, reference, poses, calibration, preset):
    made = calibration(preset=preset)
    assert len(made.used(2)) > 0
    base = run(tiny_pipeline, reference, poses)
    assert not torch.allclose(base, run(tiny_pipeline, reference, poses, calibration=made), atol=1e-4)


def image_batch(pipeline, reference, calibration, mask=None) -> ImageBatch:
    return ImageBatch(pipeline.vae, as_images(reference, "reference") * 2 - 1, mask, calibration)


def reference_images(pipeline, reference, calibration, steps) -> ReferenceImages:
    return ReferenceImages(pipeline.animator, image_batch(pipeline, reference, calibration), steps)


def test_windows_agree_on_the_calibrated_image(tiny_pipeline, reference, calibration):
    """Frame 3 gets the same calibrated image in whichever window it falls."""
    images = reference_images(tiny_pipeline, reference, calibration(), 3)
    tokens = images.context(0, 999, range(0, 4)).tokens
    for step in range(3):
        first = images.context(step, 0, range(0, 4))
        second = images.context(step, 0, range(3, 5))
        assert first.tokens is tokens and second.tokens is tokens
        assert torch.equal(first.index[3], second.index[0])
        for n in first.visibility.query:
            assert torch.equal(first.visibility.query[n][3], second.visibility.query[n][0])
            assert torch.equal(first.visibility.key[n][3], second.visibility.key[n][0])


def test_only_drawn_images_are_encoded_and_once(tiny_pipeline, reference, calibration):
    made = calibration()
    images = reference_images(tiny_pipeline, reference, made, 2)
    encoded = images.context(0, 999, range(0, 4)).tokens
    count = 1 + len(made.used(2))
    assert {len(tokens) for tokens in encoded.values()} == {count}
    assert set(encoded) == set(reference_layers(tiny_pipeline.denoising_unet))
    drawn = {int(member) for step in range(2) for member in made.index(step).ravel() if member >= 0}
    assert set(images.rows) == drawn | {REFERENCE}


def test_replacing_shows_the_calibrated_image_in_place_of_the_reference(tiny_pipeline, reference, poses, calibration):
    made = calibration(attach="replace", propagation="off")
    images = reference_images(tiny_pipeline, reference, made, 2)
    seen = images.context(0, 999, range(0, 5))
    assert seen.visibility is None
    assert seen.index[:, 0].tolist() == [images.rows[int(member)] for member in made.member[:, 0]]
    latents = images.start_latents()
    for frame, member in enumerate(made.member[:, 0]):
        assert torch.equal(latents[0, :, frame], images.images.select([int(member)]).latents[0])
    added = run(tiny_pipeline, reference, poses, calibration=calibration(propagation="off"))
    result = run(tiny_pipeline, reference, poses, calibration=made)
    for other in (added, run(tiny_pipeline, reference, poses)):
        assert not torch.allclose(result, other, atol=1e-4)
    with pytest.raises(UserError, match="tpc.attach=.* must be one of add, replace"):
        calibration(attach="stack")


def test_masks_of_images_are_the_given_one_and_those_of_the_calibration(tiny_pipeline, reference, calibration):
    made, given = calibration(), torch.zeros(1, 1, 24, 32)
    given[..., 3:9, 4:7] = 1
    for mask, expected in ((given, given[0, 0]), (None, torch.from_numpy(made.reference_masks.any(0)).float())):
        images = image_batch(tiny_pipeline, reference, made, mask).select([REFERENCE, 0])
        assert len(images) == 2 and images.pixels.shape == (2, 3, 24, 32)
        assert torch.equal(images.masks[0, 0], expected)
        assert torch.equal(images.masks[1, 0], torch.from_numpy(made.masks[0]).float())
    assert image_batch(tiny_pipeline, reference, None).masks is None


def test_kinds_of_masks_agree():
    mask = np.zeros((24, 32), bool)
    mask[4:20, 8:16] = True
    expected = as_mask(mask, 32, 24)
    assert expected.shape == (1, 1, 24, 32) and torch.equal(expected[0, 0] > 0, torch.from_numpy(mask))
    for other in (mask.astype(np.uint8) * 255, torch.from_numpy(mask).float(), Image.fromarray(mask)):
        assert torch.equal(as_mask(other, 32, 24), expected)
    assert as_mask(mask, 16, 12).sum() == expected.sum() / 4
    with pytest.raises(ValueError, match="reference_mask"):
        as_mask(mask[None], 32, 24)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"width": 30, "height": 24}, "size"),
        ({"window_size": 9}, "window_size"),
        ({"guidance_scale": [2.0, 3.0]}, "guidance_scale"),
        ({"output_type": "gif"}, "output_type"),
        ({"decode_chunk_size": 0}, "decode_chunk_size"),
        ({"latents": torch.zeros(1, 4, 5, 6, 7)}, "latents"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback"),
    ],
)
def test_wrong_arguments_are_named(tiny_pipeline, reference, poses, arguments, named):
    with pytest.raises(ValueError, match=named):
        run(tiny_pipeline, reference, poses, **arguments)


def test_calibration_of_another_clip_is_refused(tiny_pipeline, reference, poses, calibration):
    with pytest.raises(ValueError, match="calibration has 5 frames"):
        run(tiny_pipeline, reference, poses[:3], calibration=calibration())
    with pytest.raises(ValueError, match="calibration is for"):
        run(tiny_pipeline, reference, poses, calibration=calibration(), width=24, height=24)


def test_save_and_load_give_the_same_frames(tiny_pipeline, reference, poses, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "p")
    loaded = load_pipeline(tmp_path / "p")
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded, AnimationPipeline)
    assert loaded.scheduler.config.rescale_betas_zero_snr
    assert torch.allclose(run(tiny_pipeline, reference, poses), run(loaded, reference, poses), atol=1e-4)


@pytest.mark.parametrize(
    "component", ["vae", "image_encoder", "reference_net", "denoising_unet", "pose_guider", "scheduler"]
)
def test_missing_component_is_named(tiny_pipeline, tmp_path, component):
    tiny_pipeline.save_pretrained(tmp_path / "p")
    for file in (tmp_path / "p" / component).iterdir():
        file.unlink()
    with pytest.raises(UserError, match=component):
        load_pipeline(tmp_path / "p")


def test_weights_that_are_not_finite_are_named_while_loading(tiny_pipeline, tmp_path):
    pipeline = deepcopy(tiny_pipeline)
    torch.nn.init.constant_(pipeline.denoising_unet.conv_out.bias, float("nan"))
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="component denoising_unet holds NaN or infinity in 1 tensors.*conv_out.bias"):
        load_pipeline(tmp_path)


def test_folders_that_are_no_pipelines(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_pipeline(tmp_path / "none")
    with pytest.raises(UserError, match="no pipeline folder"):
        load_pipeline(tmp_path)
