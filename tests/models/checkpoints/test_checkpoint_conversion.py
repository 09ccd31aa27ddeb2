"""Conversion of published files to a pipeline folder, with its schedule, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import UserError
from models.animators.animate_anyone.checkpoint import with_motion
from models.animators.magic_animate.checkpoint import empty_prompt
from models.animators.magic_animate.model import MagicAnimatePipeline
from models.animators.registry import load_pipeline
from models.checkpoints.__main__ import main
from models.checkpoints.convert import convert, convert_config, families, published_scheduler
from models.checkpoints.loading import module_names
from models.checkpoints.networks import UNetSizes, reference_unet_manifest
from models.checkpoints.verify import synthetic_tensors
from models.pipeline import AnimationPipeline
from tests.published import (
    published_tensors,
    small_text_encoder,
    write_weights,
)
from training.build import make_scheduler
from training.config import NoiseConfig

SD15 = UNetSizes()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder)
    return folder


def test_animate_anyone_becomes_a_pipeline(weights, tmp_path):
    main(["convert", "family=animate_anyone", f"weights={weights}", f"output={tmp_path / 'p'}"])
    pipeline = load_pipeline(tmp_path / "p")
    assert type(pipeline) is AnimationPipeline and pipeline.config.window_size == 24
    assert pipeline.denoising_unet.config.motion_on_single_frames
    tensors = with_motion(published_tensors("denoising_unet"), published_tensors("motion_module"))
    state = pipeline.denoising_unet.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in module_names(tensors).items())
    assert_same_schedule(pipeline, "animate_anyone")


def test_magic_animate_becomes_a_pipeline(weights, tmp_path):
    convert(convert_config("magic_animate", str(tmp_path / "p"), weights=str(weights)))
    pipeline = load_pipeline(tmp_path / "p")
    assert type(pipeline) is MagicAnimatePipeline and pipeline.config.window_size == 16
    assert pipeline.denoising_unet.config.norm_scope == "clip" and pipeline.config.fusion_blocks == "midup"
    prompt = empty_prompt(small_text_encoder())
    assert torch.equal(pipeline.prompt.embedding, prompt.embedding)
    assert_same_schedule(pipeline, "magic_animate")


def assert_same_schedule(pipeline, family) -> None:
    """A pipeline folder samples with its family's own table."""
    expected = published_scheduler(family)
    assert torch.equal(pipeline.scheduler.alphas_cumprod, expected.alphas_cumprod)
    assert {name: pipeline.scheduler.config[name] for name in families()[family].schedule} == families()[
        family
    ].schedule


def test_what_is_new_is_said(weights, tmp_path, capsys):
    """Animating with untrained motion modules would flicker: the command says so."""
    (tmp_path / "base").mkdir()
    for name in ("denoising_unet.pth", "image_encoder", "sd-vae-ft-mse", "densepose_controlnet"):
        (tmp_path / "base" / name).symlink_to(weights / name)
    files = [f"unet={weights / 'denoising_unet.pth'}", f"controlnet={weights / 'densepose_controlnet'}"]
    main(["convert", "family=stable_diffusion", f"weights={tmp_path / 'base'}", f"output={tmp_path / 'p'}", *files])
    printed = capsys.readouterr().out
    assert "the motion modules are new" in printed and "the pose guider is new" in printed


def test_stable_diffusion_becomes_a_start_for_training(weights, tmp_path):
    arguments = {
        "unet": str(weights / "denoising_unet.pth"),
        "controlnet": str(weights / "densepose_controlnet"),
        "weights": str(weights),
    }
    convert(convert_config("stable_diffusion", str(tmp_path / "p"), **arguments))
    pipeline = load_pipeline(tmp_path / "p")
    reference, unet = pipeline.reference_net.state_dict(), pipeline.denoising_unet.state_dict()
    assert all(torch.equal(value, unet[name]) for name, value in reference.items())
    assert not pipeline.denoising_unet.config.motion_on_single_frames
    one = torch.randn(1, 4, 1, 8, 8), 3, torch.randn(1, 1, 16)
    with torch.no_grad():
        image = pipeline.denoising_unet(*one)
        pipeline.denoising_unet.use_motion_on_single_frames(True)
        assert not torch.allclose(image, pipeline.denoising_unet(*one), atol=1e-3)
    assert not pipeline.pose_guider.conv_out.weight.any() and pipeline.pose_guider.conv_in.weight.any()
    motion = published_tensors("motion_module")
    name = "mid_block.motion_modules.0.{}proj_out.weight"
    assert torch.equal(unet[name.format("")], motion[name.format("temporal_transformer.")])


@pytest.mark.parametrize(
    ("family", "row"),
    [
        ("animate_anyone", "linear | yes | velocity | trailing | 24"),
        ("musepose", "linear | yes | velocity | trailing | 48"),
        ("magic_animate", "linear | no | noise | leading | 16"),
        ("stable_diffusion", "scaled linear | yes | velocity | trailing | all the motion modules know"),
    ],
)
def test_schedules_are_those_of_the_table_in_the_notes(family, row):
    """What each published sampler uses; betas from their formula."""
    notes = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    assert f"| `{family}` | {row} |" in notes
    betas, zero_snr, prediction, spacing, window = row.split(" | ")
    scheduler = published_scheduler(family)
    assert scheduler.config.prediction_type == {"velocity": "v_prediction", "noise": "epsilon"}[prediction]
    assert scheduler.config.timestep_spacing == spacing and scheduler.config.steps_offset == 1
    assert (
        str(families()[family].window or "all the motion modules know") == window and not scheduler.config.clip_sample
    )
    power = 2 if betas == "scaled linear" else 1
    ramp = np.linspace(0.00085 ** (1 / power), 0.012 ** (1 / power), 1000) ** power
    roots = np.sqrt(np.cumprod(1 - ramp))
    if zero_snr == "yes":
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), roots**2, atol=1e-5)


def test_released_steps_are_those_of_the_published_samplers():
    scheduler = published_scheduler("animate_anyone")
    scheduler.set_timesteps(30)
    assert scheduler.timesteps[:3].tolist() == [999, 966, 932]
    assert scheduler.alphas_cumprod[-1] == pytest.approx(0, abs=1e-6)
    scheduler = published_scheduler("magic_animate")
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[:2].tolist() == [961, 921]
    with pytest.raises(ValueError, match="family must be one of"):
        published_scheduler("moore")


def test_training_and_inference_use_the_same_table(tiny_pipeline, tmp_path):
    """What a model was trained with is what its folder samples with."""
    tiny_pipeline.save_pretrained(tmp_path / "p")
    trained, loaded = make_scheduler(NoiseConfig()), load_pipeline(tmp_path / "p").scheduler
    assert torch.equal(trained.alphas_cumprod, loaded.alphas_cumprod)
    names = ("prediction_type", "timestep_spacing", "rescale_betas_zero_snr", "num_train_timesteps", "clip_sample")
    assert {name: trained.config[name] for name in names} == {name: loaded.config[name] for name in names}
    start = published_scheduler("stable_diffusion")
    assert torch.allclose(start.alphas_cumprod, trained.alphas_cumprod)


def test_half_precision_pipelines_are_half_the_size(weights, tmp_path):
    for dtype in ("float32", "float16"):
        convert(convert_config("magic_animate", str(tmp_path / dtype), dtype=dtype, weights=str(weights)))
    path = Path("denoising_unet") / "diffusion_pytorch_model.safetensors"
    sizes = [(tmp_path / dtype / path).stat().st_size for dtype in ("float32", "float16")]
    assert 1.9 < sizes[0] / sizes[1] < 2.1
    assert load_pipeline(tmp_path / "float16").denoising_unet.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"family": "moore"}, "family=moore is not one of"),
        ({"dtype": "int8"}, "dtype=int8"),
        ({"weights": None}, "motion_module= is required|denoising_unet= is required"),
        ({"motion_module": "denoising_unet.pth"}, "holds no motion modules"),
        ({"reference_unet": "pose_guider.pth"}, "does not fit ReferenceNet"),
        ({"vae": "image_encoder"}, "vae="),
        ({"image_encoder": "sd-vae-ft-mse"}, "image_encoder="),
        ({"pose_guider": "none.pth"}, "does not exist"),
    ],
)
def test_conversions_that_cannot_be_done(weights, tmp_path, changes, named):
    files = {
        key: str(weights / value) if value and "." in value or key in ("vae", "image_encoder") else value
        for key, value in changes.items()
    }
    arguments = {"family": "animate_anyone", "weights": str(weights), "output": str(tmp_path / "p")} | files
    with pytest.raises(UserError, match=named):
        convert(convert_config(**arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("holds", ["weights", "other pipeline", "file"])
def test_folders_of_something_else_are_not_replaced(weights, tmp_path, holds):
    output = tmp_path / "p"
    if holds == "file":
        output.write_text("kept")
    else:
        output.mkdir()
        kept = output / ("model_index.json" if holds == "other pipeline" else "motion_module.pth")
        kept.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="output=.* is no pipeline folder of this project"):
        convert(convert_config("magic_animate", str(output), weights=str(weights)))
    assert output.read_text() == "kept" if holds == "file" else kept.is_file()


def test_single_file_checkpoints_are_named(weights, tmp_path):
    path = tmp_path / "v1-5-pruned.safetensors"
    save_file(
        {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2), "first_stage_model.x": torch.ones(2)}, path
    )
    with pytest.raises(UserError, match="unet=.* is single-file Stable Diffusion; convert it"):
        convert(convert_config("stable_diffusion", str(tmp_path / "p"), weights=str(weights), unet=str(path)))


def test_the_same_conversion_again_replaces_the_first(weights, tmp_path):
    for dtype in ("float32", "float16"):
        notes = convert(convert_config("animate_anyone", str(tmp_path / "p"), dtype=dtype, weights=str(weights)))
    path = tmp_path / "p" / "reference_net" / "diffusion_pytorch_model.safetensors"
    assert notes == [] and {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}


def test_networks_that_do_not_belong_together(weights, tmp_path):
    sizes = UNetSizes(block_out_channels=(32, 32), attention=(True, False), layers_per_block=1, cross_attention_dim=16)
    torch.save(synthetic_tensors(reference_unet_manifest(sizes), 1), tmp_path / "narrow.pth")
    arguments = {"weights": str(weights), "reference_unet": str(tmp_path / "narrow.pth")}
    with pytest.raises(UserError, match="block_out_channels"):
        convert(convert_config("animate_anyone", str(tmp_path / "p"), **arguments))


@pytest.mark.parametrize("change", ["lost", "stray"])
def test_pipeline_folders_are_strict_too(weights, tmp_path, change):
    """The libraries would give a lost motion module random numbers and go on."""
    convert(convert_config("animate_anyone", str(tmp_path / "p"), weights=str(weights)))
    path = tmp_path / "p" / "denoising_unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    if change == "lost":
        del tensors["up_blocks.0.motion_modules.0.proj_out.weight"]
    else:
        tensors["stray.weight"] = torch.ones(1)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="component denoising_unet.* (missing|unexpected) 1: "):
        load_pipeline(tmp_path / "p")
