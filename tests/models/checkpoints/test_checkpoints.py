"""Names and sizes of published files, and the command that says what a file is."""

import json
from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from core.errors import UserError
from models.animators.animate_anyone.checkpoint import pose_guider_manifest
from models.animators.magic_animate.checkpoint import appearance_encoder_manifest
from models.checkpoints.__main__ import main
from models.checkpoints.inspect import inspect
from models.checkpoints.loading import compare, module_names, published_names, shapes_of
from models.checkpoints.networks import (
    MotionSizes,
    UNetSizes,
    animated_unet_manifest,
    control_net_manifest,
    make_denoising_unet,
    motion_manifest,
    motion_sizes,
    reference_unet_manifest,
    unet_manifest,
    unet_sizes,
)
from tests.published import (
    MANIFESTS,
    MOTION,
    SIZES,
    fixtures_folder,
    published_tensors,
    small_vae,
)

SD15 = UNetSizes()

CHANNELS = (16, 32, 96, 256)
FULL_SIZE = {
    "denoising_unet": (lambda: unet_manifest(SD15), 686, 859_520_964),
    "motion_module": (lambda: motion_manifest(SD15, MotionSizes()), 588, 454_417_600),
    "reference_unet": (lambda: reference_unet_manifest(SD15), 682, 859_508_800),
    "pose_guider": (lambda: pose_guider_manifest(320, CHANNELS), 16, 1_086_480),
    "appearance_encoder": (lambda: appearance_encoder_manifest(SD15), 662, 857_066_560),
    "densepose_controlnet": (lambda: control_net_manifest(SD15, CHANNELS), 340, 361_279_120),
    "temporal_attention": (
        lambda: animated_unet_manifest(SD15, MotionSizes(max_seq_length=24, mid_block=False)),
        1246,
        1_277_503_364,
    ),
}


@cache
def full_size(file: str) -> dict[str, tuple[int, ...]]:
    return FULL_SIZE[file][0]()


@pytest.mark.parametrize("file", FULL_SIZE)
def test_full_size_files_have_the_published_counts(file):
    _, tensors, elements = FULL_SIZE[file]
    shapes = full_size(file)
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == elements


@pytest.mark.parametrize("model", ["moore", "magic_animate"])
def test_full_size_files_have_the_published_names_and_shapes(model):
    path = fixtures_folder() / "full_size_manifests" / f"{model}.json"
    for file, shapes in json.loads(path.read_text())["manifests"].items():
        published = {name: tuple(shape) for name, shape in shapes.items()}
        assert not compare(full_size(file), published), file


@pytest.mark.parametrize(
    ("motion", "tensors"), [(MotionSizes(24, False), 560), (MotionSizes(32, True), 588), (MotionSizes(32, False), 560)]
)
def test_motion_modules_of_each_release(motion, tensors):
    """AnimateDiff v1, v2 and v3 differ in the middle block and in the length of their tables."""
    sizes = UNetSizes(block_out_channels=(32, 32, 32, 32))
    shapes = motion_manifest(sizes, motion)
    assert len(shapes) == tensors
    release = inspect(_empty(shapes), "file")
    assert not release.mismatch
    assert {(24, False): "v1", (32, True): "v2", (32, False): "v3"}[
        motion.max_seq_length, motion.mid_block
    ] in release.kind


def _empty(shapes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_base_names_are_those_of_diffusers():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    assert not compare(shapes_of(unet.state_dict()), unet_manifest(SD15))


def test_names_go_there_and_back():
    with torch.device("meta"):
        state = shapes_of(make_denoising_unet(SIZES, MOTION, "frame").state_dict())
    published = published_names(state)
    back = shapes_of(module_names(_empty(published)))
    assert back == {name: shape for name, shape in state.items() if not name.endswith(".pos_embed.pe")}
    tables = [name for name in published if name.endswith(".pos_encoder.pe")]
    assert len(tables) == 2 * sum(name.endswith(".pos_embed.pe") for name in state)
    assert "mid_block.motion_modules.0.temporal_transformer.transformer_blocks.0.ff_norm.weight" in published


def test_sizes_are_read_from_shapes():
    sizes = UNetSizes(
        in_channels=5,
        out_channels=6,
        block_out_channels=(32, 96, 64),
        attention=(True, True, False),
        layers_per_block=1,
        cross_attention_dim=40,
        use_linear_projection=True,
    )
    motion = MotionSizes(max_seq_length=9, mid_block=False, layers=2)
    published = animated_unet_manifest(sizes, motion)
    assert unet_sizes(published) == sizes
    assert motion_sizes(shapes_of(module_names(_empty(published))), 9) == motion


def test_inspect_says_what_files_are(tmp_path, capsys):
    expected = {
        "denoising_unet": "Stable Diffusion UNet",
        "motion_module": "motion modules (AnimateDiff v2",
        "reference_unet": "AnimateAnyone reference_unet",
        "pose_guider": "pose guider",
        "appearance_encoder": "MagicAnimate appearance_encoder",
        "densepose_controlnet": "ControlNet",
        "temporal_attention": "denoising UNet with motion modules",
    }
    for file, kind in expected.items():
        path = tmp_path / f"{file}.safetensors"
        save_file(published_tensors(file), path)
        main(["inspect", str(path)])
        first, second = capsys.readouterr().out.splitlines()
        assert kind in first and f"{len(MANIFESTS[file]())} tensors" in first and second.strip() == "complete"


def test_inspect_names_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "file.pth"
    tensors = published_tensors("reference_unet")
    del tensors["time_embedding.linear_1.bias"]
    torch.save(tensors | {"stray": torch.ones(1)}, path)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1
    assert "missing 1: time_embedding.linear_1.bias" in lines[1] and "unexpected 1: stray" in lines[2]
    save_file({"something": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "other.safetensors")])
    assert "unknown" in capsys.readouterr().out


def test_inspect_checks_folders_by_their_configuration(tmp_path, capsys):
    small_vae().save_pretrained(tmp_path / "vae")
    main(["inspect", str(tmp_path / "vae")])
    assert "AutoencoderKL\n  complete" in capsys.readouterr().out
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    del tensors["quant_conv.weight"]
    save_file(tensors, path)
    with pytest.raises(UserError, match="missing 1: quant_conv.weight"):
        main(["inspect", str(tmp_path / "vae")])


@pytest.mark.parametrize("arguments", [[], ["load"], ["inspect"]])
def test_wrong_use_is_explained(arguments):
    with pytest.raises(
        UserError, match="inspect needs files|the first argument must be one of inspect, verify, convert"
    ):
        main(arguments)
