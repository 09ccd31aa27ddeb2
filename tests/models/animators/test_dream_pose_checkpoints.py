"""DreamPose's published files: known answers, full-size names, strict loading, recognition, conversion."""

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel

from core.errors import UserError
from models.animators.dream_pose.checkpoint import (
    adapter_manifest,
    dream_pose_unet_manifest,
    load_adapter,
    load_dream_pose_unet,
)
from models.animators.dream_pose.model import DreamPosePipeline
from models.animators.registry import load_pipeline
from models.checkpoints.__main__ import main
from models.checkpoints.convert import convert, convert_config
from models.checkpoints.files import read_tensors
from models.checkpoints.inspect import inspect
from models.checkpoints.loading import old_names, shapes_of
from models.checkpoints.networks import UNetSizes, load_autoencoder, make_autoencoder, unet_arguments
from models.checkpoints.verify import read_fixture, verify
from models.vae import vae_encode
from tests.dream_pose_parts import GRID, SIZES, TOKENS, WIDTH, published, small_image_encoder, write_weights
from tests.published import fixtures_folder, small_text_config

LOADERS = {"unet": load_dream_pose_unet, "adapter": load_adapter, "vae": load_autoencoder}
FULL_SIZE = UNetSizes(in_channels=14)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder)
    return folder


def test_known_answers():
    results = verify(read_fixture(fixtures_folder() / "dreampose_tiny"))
    assert len(results) == 8 and all(result.passed for result in results), results


def full_size_vae():
    widths = {
        f"encoder.down_blocks.{level}.resnets.0.conv1.weight": (w,) for level, w in enumerate((128, 256, 512, 512))
    }
    sizes = widths | {f"encoder.down_blocks.0.resnets.{number}.conv1.weight": (128,) for number in range(2)}
    with torch.device("meta"):
        return old_names(shapes_of(make_autoencoder(sizes).state_dict()))


MANIFESTS = {
    "unet": lambda: dream_pose_unet_manifest(FULL_SIZE),
    "adapter": lambda: adapter_manifest({}),
    "vae": full_size_vae,
}


@pytest.mark.parametrize(
    ("file", "tensors", "elements"), [("unet", 686, 859549764), ("adapter", 4, 986558), ("vae", 248, 83653863)]
)
def test_full_size_networks_hold_what_the_files_do(file, tensors, elements):
    manifest = MANIFESTS[file]()
    assert len(manifest) == tensors
    assert sum(int(np.prod(shape)) for shape in manifest.values()) == elements


@pytest.mark.parametrize("file", MANIFESTS)
def test_full_size_names_and_shapes(file):
    path = fixtures_folder() / "full_size_manifests" / "dreampose.json"
    expected = json.loads(path.read_text(encoding="utf-8"))["manifests"][file]
    assert {name: list(shape) for name, shape in MANIFESTS[file]().items()} == expected


@pytest.mark.parametrize("file", LOADERS)
def test_every_tensor_arrives(file, weights):
    """Under `module.` names, without a copy where the file has the right type."""
    path = next(weights.glob(f"{file}*.pth"))
    network = LOADERS[file](read_tensors(path, file), file)
    state = network.state_dict()
    values = {name.replace("query", "to_q").replace("proj_attn", "to_out.0"): v for name, v in published(file).items()}
    values = {name.replace("attentions.0.key", "attentions.0.to_k"): v for name, v in values.items()}
    values = {name.replace("attentions.0.value", "attentions.0.to_v"): v for name, v in values.items()}
    assert set(state) - set(values) <= {"null_latents"}
    assert all(torch.equal(state[name], value) for name, value in values.items())
    assert not network.training


@pytest.mark.parametrize("file", LOADERS)
def test_wrong_tensors_are_named(file):
    tensors = published(file)
    lost = list(tensors)[-1]
    with pytest.raises(UserError, match=f"file does not fit .* missing 1: {lost.split('.')[0]}"):
        LOADERS[file]({name: value for name, value in tensors.items() if name != lost}, "file")
    with pytest.raises(UserError, match="unexpected 1: extra"):
        LOADERS[file](tensors | {"extra": torch.ones(1)}, "file")


def test_a_plain_unet_is_refused():
    tensors = published("unet")
    narrow = tensors | {"conv_in.weight": tensors["conv_in.weight"][:, :4]}
    with pytest.raises(
        UserError, match="takes 4 input channels; DreamPose's takes 4 of the latents and 5 poses of 2 or 3"
    ):
        load_dream_pose_unet(narrow, "unet")


@pytest.mark.parametrize(
    ("file", "kind", "detail"),
    [
        ("unet", "DreamPose unet_epoch", "5 poses of 2 channels"),
        ("adapter", "DreamPose adapter", f"{TOKENS} tokens, latents of {GRID[0]} x {GRID[1]}"),
        ("vae", "autoencoder", "names of older releases"),
    ],
)
def test_files_are_recognised(file, kind, detail):
    found = inspect(published(file), file)
    assert found.kind == kind and detail in found.detail and not found.mismatch
    lost = list(published(file))[-1]
    broken = inspect({name: value for name, value in published(file).items() if name != lost}, file)
    assert broken.kind == kind and broken.mismatch.missing == (lost,)


def test_unets_for_inpainting_are_none():
    """Their nine input channels are not four and five poses of one."""
    tensors = published("unet")
    found = inspect(tensors | {"conv_in.weight": torch.zeros(32, 9, 3, 3)}, "file")
    assert "Stable Diffusion UNet" in found.kind


def test_files_become_a_pipeline(weights, tmp_path, capsys):
    main(["convert", "family=dreampose", f"weights={weights}", f"output={tmp_path / 'p'}"])
    assert capsys.readouterr().out.count("\n") == 1  # nothing is new, nothing to say
    pipeline = load_pipeline(tmp_path / "p")
    assert type(pipeline) is DreamPosePipeline and pipeline.pose_kind == "DensePose"
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    for file, network in (("unet", pipeline.denoising_unet), ("adapter", pipeline.adapter)):
        state = network.state_dict()
        assert all(torch.equal(state[name], value) for name, value in published(file).items())
    grey = vae_encode(pipeline.vae, torch.zeros(1, 3, 4 * GRID[0], 4 * GRID[1]))
    assert torch.allclose(pipeline.adapter.null_latents, torch.nn.functional.max_pool2d(grey, 2)[0], atol=1e-6)


def test_half_precision_folder_loads(weights, tmp_path):
    convert(convert_config("dreampose", str(tmp_path / "p"), dtype="float16", weights=str(weights)))
    pipeline = load_pipeline(tmp_path / "p", torch.float32)
    assert pipeline.denoising_unet.dtype == torch.float32 and pipeline.adapter.null_latents.isfinite().all()


def test_the_last_epoch_is_taken_and_epochs_must_agree(weights, tmp_path):
    folder = tmp_path / "more"
    folder.mkdir()
    for path in weights.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "unet_epoch_9.pth").write_bytes(b"never opened")
    convert(convert_config("dreampose", str(tmp_path / "p"), weights=str(folder)))
    (folder / "adapter_119.pth").symlink_to(weights / "adapter_20.pth")
    with pytest.raises(UserError, match="unet_epoch_20.pth and adapter_119.pth .* not of the same epoch"):
        convert(convert_config("dreampose", str(tmp_path / "q"), weights=str(folder)))
    given = {"unet": str(folder / "unet_epoch_20.pth"), "adapter": str(folder / "adapter_119.pth")}
    convert(convert_config("dreampose", str(tmp_path / "r"), weights=str(folder), **given))


def test_stable_diffusion_is_a_start_for_training(weights, tmp_path):
    sizes = UNetSizes(**{**vars(SIZES), "in_channels": 4})
    torch.manual_seed(0)
    unet = UNet2DConditionModel(attention_head_dim=8, **unet_arguments(sizes, "2D"))
    unet.save_pretrained(tmp_path / "unet")
    full_clip().save_pretrained(tmp_path / "clip-vit-base-patch32")
    notes = convert(
        convert_config(
            "dreampose",
            str(tmp_path / "p"),
            weights=str(tmp_path),
            vae=str(weights / "vae_1499.pth"),
        )
    )
    assert any("are new" in note for note in notes)
    pipeline = load_pipeline(tmp_path / "p")
    kernel = pipeline.denoising_unet.conv_in.weight
    assert torch.equal(kernel[:, :4], unet.conv_in.weight) and not kernel[:, 4:].any()
    clip = torch.randn(1, TOKENS, WIDTH)
    assert torch.allclose(pipeline.adapter(clip, torch.randn(1, 4, 8, 8)), clip, atol=1e-6)


def full_clip() -> CLIPModel:
    """CLIP with its text half, as it is published."""
    vision = small_image_encoder()
    text = small_text_config()
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.config.to_dict(), projection_dim=16))


def test_networks_that_do_not_fit_are_named(weights, tmp_path):
    wide = small_image_encoder().config
    wide.patch_size = 4
    type(small_image_encoder())(wide).save_pretrained(tmp_path / "wide")
    config = convert_config(
        "dreampose", str(tmp_path / "p"), weights=str(weights), image_encoder=str(tmp_path / "wide")
    )
    with pytest.raises(UserError, match="image_encoder= gives 17 tokens of 16 channels, the adapter takes 5 of 16"):
        convert(config)
