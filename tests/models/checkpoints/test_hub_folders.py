"""Folders in every layout that repositories of diffusers and transformers have, read as they are downloaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPVisionModel, CLIPVisionModelWithProjection

from core.errors import UserError
from models.animators.registry import load_pipeline
from models.checkpoints.convert import convert, convert_config
from models.checkpoints.files import read_tensors
from models.checkpoints.loading import load_folder, old_names
from models.vae import load_vae
from tests.published import published_tensors, small_image_encoder, small_text_encoder, small_vae, write_weights

STEM = "diffusion_pytorch_model"  # of diffusers


def write_file(tensors: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def whole(folder: Path, stem: str, suffix: str, tensors: dict[str, Tensor], variant: str = "") -> None:
    write_file(tensors, folder / f"{stem}{variant}.{suffix}")


def shards(
    folder: Path, stem: str, suffix: str, tensors: dict[str, Tensor], variant: str = "", older: bool = False
) -> None:
    """Two shards and their index; diffusers put the variant before the number of a shard once, and behind it today."""
    names, weight_map = list(tensors), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        place = f"-{number:05d}-of-00002"
        file = f"{stem}{variant}{place}.{suffix}" if older else f"{stem}{place}{variant}.{suffix}"
        write_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index{variant}.json").write_text(json.dumps(index))


def half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def index_without_shards(folder: Path, stem: str, suffix: str) -> None:
    index = {"weight_map": {"a": f"{stem}-00001-of-00002.{suffix}", "b": f"{stem}-00002-of-00002.{suffix}"}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


# name -> (writes stem and suffix of tensors into a folder, whether what is read has gone through half precision)
LAYOUTS: dict[str, tuple[Callable[[Path, str, str, dict[str, Tensor]], object], bool]] = {
    "whole": (whole, False),
    "shards": (shards, False),
    "fp16": (lambda f, n, s, t: whole(f, n, s, half(t), ".fp16"), True),
    "fp16 shards": (lambda f, n, s, t: shards(f, n, s, half(t), ".fp16"), True),
    "fp16 shards, older names": (lambda f, n, s, t: shards(f, n, s, half(t), ".fp16", older=True), True),
    "fp16 with the index of all variants": (
        lambda f, n, s, t: (whole(f, n, s, half(t), ".fp16"), index_without_shards(f, n, s)),
        True,
    ),
    "full precision in shards beside fp16": (
        lambda f, n, s, t: (whole(f, n, s, half(t), ".fp16"), shards(f, n, s, t)),
        False,
    ),
    "weights of training beside": (
        lambda f, n, s, t: (whole(f, n, s, {"other": torch.ones(1)}, ".non_ema"), whole(f, n, s, half(t), ".fp16")),
        True,
    ),
}


def same(network: nn.Module, tensors: dict[str, Tensor], halved: bool) -> bool:
    state = network.state_dict()
    expected = {name: half(tensors)[name].float() if halved else tensor for name, tensor in tensors.items()}
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(tmp_path, layout, suffix):
    """A VAE, with attention in the names of old releases, alone and as `model.vae=`; and an image UNet."""
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    tensors = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    write, halved = LAYOUTS[layout]
    vae.save_config(tmp_path)
    write(tmp_path, STEM, suffix, old_names(tensors))
    assert any("proj_attn" in name for name in read_tensors(tmp_path, "vae"))
    for loaded in (load_folder(AutoencoderKL, tmp_path, "vae"), load_vae(tmp_path)):
        assert same(loaded, tensors, halved) and not loaded.training

    unet = published_tensors("pose_guider")
    (tmp_path / "unet").mkdir()
    write(tmp_path / "unet", STEM, suffix, unet)
    read = read_tensors(tmp_path / "unet", "unet")
    assert all(torch.equal(read[name], half(unet)[name] if halved else tensor) for name, tensor in unet.items())


def small_clip() -> CLIPModel:
    torch.manual_seed(0)
    vision, text = small_image_encoder().config.to_dict(), small_text_encoder().config.to_dict()
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).eval()


CLIP_FILES: dict[str, Callable[[], nn.Module]] = {
    "image encoder with projection": small_image_encoder,
    "image encoder": lambda: CLIPVisionModel(small_image_encoder().config).eval(),
    "text encoder": small_text_encoder,
    "all of CLIP": small_clip,
}


@pytest.mark.parametrize(
    ("file", "cls"),
    [
        ("image encoder with projection", CLIPVisionModelWithProjection),
        ("image encoder with projection", CLIPVisionModel),
        ("image encoder", CLIPVisionModel),
        ("text encoder", CLIPTextModel),
        ("all of CLIP", CLIPVisionModelWithProjection),
        ("all of CLIP", CLIPVisionModel),
        ("all of CLIP", CLIPTextModel),
    ],
)
@pytest.mark.parametrize("layout", ["whole", "fp16 shards"])
def test_clip_folders(tmp_path, file, cls, layout):
    """As transformers write them, and with the numbers of positions that older files hold too."""
    CLIP_FILES[file]().save_pretrained(tmp_path)
    expected = cls.from_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    for tower in ("vision_model", "text_model"):
        if any(name.startswith(f"{tower}.") for name in tensors):
            tensors[f"{tower}.embeddings.position_ids"] = torch.arange(7)[None]
    write, halved = LAYOUTS[layout]
    write(tmp_path, "pytorch_model", "bin", tensors)
    loaded = load_folder(cls, tmp_path, "encoder")
    assert same(loaded, expected.state_dict(), halved) and loaded.config.dtype == torch.float32
    for name, buffer in expected.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer)
    if cls is not CLIPTextModel:
        images = torch.rand(1, 3, 16, 16)
        outputs = loaded(images).last_hidden_state, expected(images).last_hidden_state
        assert torch.allclose(*outputs, atol=1e-2 if halved else 0)


def test_an_image_encoder_without_a_projection_is_named_where_one_is_needed(tmp_path):
    CLIP_FILES["image encoder"]().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"image_encoder.* missing 1: visual_projection\.weight"):
        load_folder(CLIPVisionModelWithProjection, tmp_path, "image_encoder")


def relay(folder: Path, layout: str, suffix: str) -> None:
    """Write the weights of a saved network's folder in another layout."""
    file = next(folder.glob("*.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    stem = "pytorch_model" if file.stem == "model" and suffix == "bin" else file.stem
    file.unlink()
    LAYOUTS[layout][0](folder, stem, suffix, tensors)


def test_conversions_and_pipelines_of_hub_folders(tmp_path):
    """All parts of a conversion, and then all of the pipeline's own, in other layouts give the same networks."""
    weights, folder = tmp_path / "weights", tmp_path / "pipeline"
    weights.mkdir()
    write_weights(weights)
    relay(weights / "appearance_encoder", "shards", "safetensors")
    relay(weights / "densepose_controlnet", "shards", "bin")
    relay(weights / "sd-vae-ft-mse", "whole", "bin")
    relay(weights / "text_encoder", "shards", "bin")
    convert(convert_config("magic_animate", str(folder), weights=str(weights)))
    written = {file.parent.name: load_file(file) for file in folder.glob("*/*.safetensors")}
    for file, name in {"appearance_encoder": "reference_net", "densepose_controlnet": "control_net"}.items():
        assert all(torch.equal(written[name][key], tensor) for key, tensor in published_tensors(file).items())
    for number, name in enumerate(written):
        relay(folder / name, *[("shards", "safetensors"), ("whole", "bin"), ("shards", "bin")][number % 3])
    pipeline = load_pipeline(folder)
    assert all(same(getattr(pipeline, name), tensors, False) for name, tensors in written.items())


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (
            lambda f: (f / "diffusion_pytorch_model-00002-of-00002.bin").unlink(),
            r"1 of 2 shards are missing: \S+-00002",
        ),
        (lambda f: [path.unlink() for path in f.glob("*-of-*")], "2 of 2 shards are missing: "),
        (lambda f: next(f.glob("*.index.json")).unlink(), r"shards .*-00001.* not their index, \*\.bin\.index\.json"),
        (lambda f: next(f.glob("*.index.json")).write_text('{"weight_map": {"a": "../x"}}'), "not an index"),
        (lambda f: next(f.glob("*.index.json")).write_text("[1]"), "not an index"),
        (lambda f: [path.unlink() for path in f.glob("*.bin*")], "folder without weights"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("[1]"), "config.json does not hold settings"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "config.json").write_text('{"block_out_channels": "x"}'), "cannot be made a AutoencoderKL"),
        (lambda f: [shutil.move(f, f.with_name("vae")), f.mkdir(), shutil.move(f.with_name("vae"), f)], "in it: vae$"),
        (lambda f: [shutil.move(f, f.with_name("y")), (f / "snapshots").mkdir(parents=True)], "cache of the hub"),
    ],
)
def test_incomplete_folders_say_what_is_missing(tmp_path, spoil, named):
    vae, folder = small_vae(), tmp_path / "folder"
    vae.save_config(folder)
    shards(folder, STEM, "bin", vae.state_dict())
    spoil(folder)
    with pytest.raises(UserError, match=named) as refused:
        load_folder(AutoencoderKL, folder, f"vae={folder}")
    assert "\n" not in str(refused.value)
