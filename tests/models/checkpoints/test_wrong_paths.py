"""Paths and folders that are not what they should be: what they are, what is missing and what to do, in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from core.errors import UserError
from models.animators.registry import load_pipeline
from models.checkpoints.convert import convert, convert_config
from models.checkpoints.loading import blank
from tests.published import MANIFESTS, published_tensors, small_image_encoder, small_vae, write_weights
from training.build import open_animator


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder)
    return folder


def moved(weights: Path, folder: Path, *names: str) -> Path:
    """A folder with some of the published files."""
    folder.mkdir()
    for name in names:
        (folder / Path(name).name).symlink_to(weights / name)
    return folder


CONVERT = "python -m models.checkpoints convert family={}"
ANIMATE_ANYONE = ("denoising_unet.pth", "motion_module.pth", "reference_unet.pth", "pose_guider.pth")
# What `model=` is -> what is said of it. Files and folders are below the published weights.
RAW = {
    "denoising_unet.pth": CONVERT.format("animate_anyone"),
    "temporal_attention/temporal_attention.ckpt": CONVERT.format("magic_animate"),
    "appearance_encoder": CONVERT.format("magic_animate"),
    "owner/name": r"nothing is downloaded by itself.* `hf download owner/name --local-dir FOLDER",
    "sd-vae-ft-mse/config.json": "is a file, no pipeline folder",
}


@pytest.mark.parametrize("path", RAW)
def test_raw_weights_as_a_model_name_the_conversion(weights, path):
    given = path if path == "owner/name" else str(weights / path)
    for load, key in ((load_pipeline, "model"), (lambda p: open_animator("model.init", p), r"model\.init")):
        with pytest.raises(UserError, match=f"^{key}={given} .*{RAW[path]}") as refused:
            load(given)
        assert "\n" not in str(refused.value)


def test_folders_of_weights_name_their_family(weights, tmp_path):
    folders = {
        "animate_anyone": moved(weights, tmp_path / "a", *ANIMATE_ANYONE, "image_encoder", "sd-vae-ft-mse"),
        "magic_animate": moved(weights, tmp_path / "m", "appearance_encoder", "densepose_controlnet"),
        "musepose": tmp_path / "p",
        "dreampose": tmp_path / "d",
        "stable_diffusion": tmp_path / "s",
    }
    folders["musepose"].mkdir()
    moved(weights, folders["musepose"] / "MusePose", *ANIMATE_ANYONE)
    folders["dreampose"].mkdir()
    for name in ("unet_epoch_20.pth", "adapter_20.pth"):
        (folders["dreampose"] / name).touch()
    moved(weights, folders["stable_diffusion"], "sd-vae-ft-mse", "image_encoder")
    (folders["stable_diffusion"] / "unet").mkdir()
    (folders["stable_diffusion"] / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    for family, folder in folders.items():
        with pytest.raises(UserError, match=f"{CONVERT.format(family)} weights={folder} output=FOLDER"):
            load_pipeline(folder)


def test_folders_near_a_pipeline_name_it(weights, tmp_path):
    """A component of one, a run that holds one, a checkpoint of training, and one that is incomplete."""
    pipeline = tmp_path / "run" / "pipeline"
    convert(convert_config("magic_animate", str(pipeline), weights=str(weights)))
    (tmp_path / "run" / "checkpoint-2").mkdir()
    (tmp_path / "run" / "checkpoint-2" / "progress.json").touch()
    wrong = {
        pipeline / "vae": f"give model={pipeline}$",
        tmp_path / "run": f"give model={pipeline}$",
        tmp_path / "run" / "checkpoint-2": "checkpoint of training .* training.export checkpoint=",
        tmp_path / "none": "does not exist; give a pipeline folder",
    }
    for path, named in wrong.items():
        with pytest.raises(UserError, match=named):
            load_pipeline(path)
    index = json.loads((pipeline / "model_index.json").read_text())
    assert index["_class_name"] == "MagicAnimatePipeline"
    shutil.rmtree(pipeline / "vae")
    (pipeline / "control_net" / "config.json").unlink()
    with pytest.raises(UserError, match="is incomplete: .* (vae/, control_net/|control_net/, vae/) are missing"):
        load_pipeline(pipeline)


def without(weights: Path, folder: Path, *names: str) -> str:
    """The published files without some."""
    shutil.copytree(weights, folder, ignore=shutil.ignore_patterns(*names))
    return str(folder)


CONVERSIONS = {
    "no folder": (lambda w, t: {"weights": str(t / "none")}, "^weights=.*none does not exist$"),
    "hub name": (lambda w, t: {"weights": "owner/name"}, "^weights=owner/name .*hf download"),
    "part, hub name": (lambda w, t: {"weights": str(w), "vae": "stabilityai/sd-vae-ft-mse"}, "^vae=.*hf download"),
    "file": (lambda w, t: {"weights": str(w / "pose_guider.pth")}, "^weights=.* is a file; give its folder"),
    "part": (lambda w, t: {"weights": str(w), "vae": str(t / "none")}, "^vae=.*none does not exist$"),
    "several missing": (
        lambda w, t: {"weights": without(w, t / "w", "motion_module.pth", "image_encoder")},
        r"motion_module= is required for .* weights=.*; so are image_encoder= \(motion_module.pth or .* image_",
    ),
    "folder without configuration": (
        lambda w, t: {"weights": without(w, t / "w", "config.json")},
        "image_encoder=.* no config.json",
    ),
    "swapped": (
        lambda w, t: {"weights": str(w), "reference_unet": str(w / "denoising_unet.pth")},
        "^reference_unet=.* holds the weights of the denoising UNet",
    ),
    "both swapped": (
        lambda w, t: {
            "weights": str(w),
            "reference_unet": str(w / "denoising_unet.pth"),
            "denoising_unet": str(w / "reference_unet.pth"),
        },
        r"^denoising_unet=.*missing 4: conv_norm_out",
    ),
}


@pytest.mark.parametrize("case", CONVERSIONS)
def test_sources_that_cannot_be_converted(weights, tmp_path, case):
    keys, named = CONVERSIONS[case]
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=named) as refused:
        convert(convert_config("animate_anyone", str(tmp_path / "new" / "p"), **keys(weights, tmp_path)))
    assert "\n" not in str(refused.value) and {path.name for path in set(tmp_path.iterdir()) - before} <= {"w"}


@pytest.mark.parametrize("file", ["denoising_unet.pth", "pose_guider.pth"])
@pytest.mark.parametrize("filled", ["zeros", "half"])
def test_zeros_do_not_pass_as_weights(weights, tmp_path, file, filled):
    """As downloads that broke off after the file had got its length leave them."""
    tensors = published_tensors(Path(file).stem)
    for number, tensor in enumerate(tensors.values()):
        if filled == "zeros" or number > len(tensors) // 4:
            tensor.zero_()
    torch.save(tensors, tmp_path / file)
    keys = {"weights": str(weights), Path(file).stem: str(tmp_path / file)}
    with pytest.raises(UserError, match=f"^{Path(file).stem}=.* holds zeros alone in "):
        convert(convert_config("animate_anyone", str(tmp_path / "p"), **keys))


def test_layers_that_start_as_zero_are_no_fault():
    """Motion modules' projections, a ControlNet's and a pose guider's last convolutions."""
    for file in MANIFESTS:
        tensors = published_tensors(file)
        for name, tensor in tensors.items():
            if name.endswith((".proj_out.weight", "conv_out.weight")) or "controlnet_down_blocks" in name:
                tensor.zero_()
        assert not blank(tensors), file
    assert not blank(small_vae().state_dict()) and not blank(small_image_encoder().state_dict())


def test_pipeline_folders_of_zeros_and_cut_ones_are_refused(weights, tmp_path):
    folder = tmp_path / "p"
    convert(convert_config("magic_animate", str(folder), weights=str(weights)))
    path = folder / "reference_net" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    for spoiled, named in {
        whole[: len(whole) // 2]: "not a complete safetensors file",
        whole[: len(whole) // 2] + b"\0" * (len(whole) - len(whole) // 2): "holds zeros alone",
    }.items():
        path.write_bytes(spoiled)
        with pytest.raises(UserError, match=f"^model={folder}: component reference_net.*{named}"):
            load_pipeline(folder)


def test_everything_is_looked_at_before_anything_is_converted(weights, tmp_path):
    """A fault of any file is found before the UNets, which take minutes at full size, are read."""
    keys = {"denoising_unet": str(weights / "pose_guider.pth")}  # found last
    faults = {
        "vae": (lambda f: (f / "diffusion_pytorch_model.safetensors").write_bytes(b"{}"), "sd-vae-ft-mse"),
        "image_encoder": (lambda f: (f / "model.safetensors").unlink(), "image_encoder"),
        "pose_guider": (lambda f: f.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "pose_guider.pth"),
        "motion_module": (lambda f: f.write_bytes(f.read_bytes()[:1000]), "motion_module.pth"),
    }
    for number, (key, (spoil, name)) in enumerate(faults.items()):
        folder = Path(without(weights, tmp_path / str(number)))
        spoil(folder / name)
        with pytest.raises(UserError, match=f"^{key}="):
            convert(convert_config("animate_anyone", str(tmp_path / "p"), weights=str(folder), **keys))


@pytest.mark.parametrize("place", ["file/p", "x" * 300])
def test_outputs_that_cannot_be_made(weights, tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="^output=.* could not be written: "):
        convert(convert_config("animate_anyone", str(tmp_path / place), weights=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_converted_files_can_be_read_by_others(weights, tmp_path):
    convert(convert_config("magic_animate", str(tmp_path / "p"), weights=str(weights)))
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "p").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "p").stat().st_mode & 0o666}
