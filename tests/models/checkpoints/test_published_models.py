"""From published files to an animation: every source converted by the command, and animated by `infer.py`."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModelWithProjection

import infer
from core.errors import UserError, run_command
from data.video.files import read_video
from models.animators.animate_anyone.checkpoint import (
    MUSEPOSE_LENGTH,
    load_pose_guider,
    pose_guider_from_control_net,
    with_motion,
)
from models.animators.registry import load_pipeline
from models.checkpoints.__main__ import main
from models.checkpoints.convert import Sources, convert, convert_config
from models.checkpoints.inspect import inspect
from models.checkpoints.loading import load_folder, module_names
from models.checkpoints.networks import (
    MotionSizes,
    UNetSizes,
    animated_unet_manifest,
    load_control_net,
    load_denoising_unet,
    load_reference_net,
    motion_manifest,
)
from models.checkpoints.verify import synthetic_tensors
from tests.clips import save_rendered_pair
from tests.published import (
    SIZES,
    fixtures_folder,
    published_tensors,
    small_image_encoder,
    small_vae,
    write_weights,
)

MOTION_FILES = {
    "mm_sd_v15.ckpt": MotionSizes(24, mid_block=False),
    "mm_sd_v15_v2.ckpt": MotionSizes(32, mid_block=True),
    "v3_sd15_mm.ckpt": MotionSizes(32, mid_block=False),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """One folder with the small files of every family, under the names and in the wrappings of the publishers."""
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder)
    for name, motion in MOTION_FILES.items():
        modules = synthetic_tensors(motion_manifest(SIZES, motion), seed=2)
        wrapped = {"state_dict": {f"module.{key}": value for key, value in modules.items()}, "epoch": 1}
        torch.save(wrapped if "v3" not in name else modules, folder / name)
    (folder / "unet").mkdir()
    torch.save(published_tensors("denoising_unet"), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / "control_v11p_sd15_openpose").mkdir()
    half = {name: tensor.half() for name, tensor in published_tensors("densepose_controlnet").items()}
    save_file(half, folder / "control_v11p_sd15_openpose" / "diffusion_pytorch_model.fp16.safetensors")
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_rendered_pair(folder, size=64, frames=3)
    return folder


SOURCES = {
    "AnimateAnyone": ("animate_anyone", {}),
    "MusePose": ("musepose", {}),
    "UNets of Champ, new pose guider": ("animate_anyone", {"pose_guider": None, "controlnet": "densepose_controlnet"}),
    "MagicAnimate": ("magic_animate", {}),
    "Stable Diffusion, AnimateDiff v1": ("stable_diffusion", {"motion_module": "mm_sd_v15.ckpt"}),
    "Stable Diffusion, AnimateDiff v2": ("stable_diffusion", {"motion_module": "mm_sd_v15_v2.ckpt"}),
    "Stable Diffusion, AnimateDiff v3": ("stable_diffusion", {"motion_module": "v3_sd15_mm.ckpt"}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_animates(weights, inputs, tmp_path, source):
    family, files = SOURCES[source]
    main(["convert", f"family={family}", f"output={tmp_path / 'model'}", *convert_arguments(weights, files, tmp_path)])
    pipeline = load_pipeline(tmp_path / "model")
    assert {"animate_anyone": 24, "musepose": 48, "magic_animate": 16}.get(family) == pipeline.config.window_size
    if family == "stable_diffusion":
        motion = MOTION_FILES[files["motion_module"]]
        config = pipeline.denoising_unet.config
        assert (config.motion_max_seq_length, config.use_motion_mid_block) == (motion.max_seq_length, motion.mid_block)
    arguments = [f"reference={inputs / 'reference.png'}", f"reference_poses={inputs / 'reference.npz'}"]
    arguments += [f"driving_poses={inputs / 'driving.npz'}", f"model={tmp_path / 'model'}"]
    if family == "magic_animate":
        arguments.append(f"pose_images={inputs / 'driving.mp4'}")
    infer.main([*arguments, f"output={tmp_path / 'out'}", "steps=1", "num_frames=2", "size=[32,32]"])
    assert read_video(tmp_path / "out" / "animation.mp4").frames.shape == (2, 32, 32, 3)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["calibration"]["calibrated"] == 2


def convert_arguments(weights: Path, files: dict[str, str | None], tmp_path: Path) -> list[str]:
    """Arguments that name these files; where one must be absent, a folder of links to all the others."""
    absent = [f"{key}.pth" for key, value in files.items() if value is None]
    if absent:
        (tmp_path / "links").mkdir()
        for path in weights.iterdir():
            if path.name not in absent:
                (tmp_path / "links" / path.name).symlink_to(path)
        weights = tmp_path / "links"
    return [f"weights={weights}", *(f"{key}={weights / value}" for key, value in files.items() if value is not None)]


def test_musepose_computes_its_position_tables(weights, tmp_path):
    """Its own code deletes those of the file and has 128 frames, whatever the file holds, or does not."""
    motion = {name: value for name, value in published_tensors("motion_module").items() if not name.endswith(".pe")}
    torch.save(motion, tmp_path / "motion.pth")
    arguments = {"weights": str(weights), "motion_module": str(tmp_path / "motion.pth")}
    convert(convert_config("musepose", str(tmp_path / "model"), **arguments))
    unet = load_pipeline(tmp_path / "model").denoising_unet
    assert unet.config.motion_max_seq_length == MUSEPOSE_LENGTH == 128
    assert all(value.shape[1] == 128 for name, value in unet.state_dict().items() if name.endswith(".pe"))
    del motion[next(iter(motion))]
    torch.save(motion, tmp_path / "motion.pth")
    with pytest.raises(UserError, match="missing 1: "):
        convert(convert_config("musepose", str(tmp_path / "again"), **arguments))


def test_musepose_beside_animate_anyone(tmp_path):
    (tmp_path / "MusePose").mkdir()
    for folder in (tmp_path, tmp_path / "MusePose"):
        (folder / "pose_guider.pth").touch()
    (tmp_path / "image_encoder").mkdir()
    for family, expected in (("musepose", "MusePose/pose_guider.pth"), ("animate_anyone", "pose_guider.pth")):
        sources = Sources(convert_config(family, "out", weights=str(tmp_path)))
        assert sources.path("pose_guider") == tmp_path / expected
        assert sources.path("image_encoder") == tmp_path / "image_encoder"


WRAPPINGS = {
    "training state": lambda tensors: {"state_dict": tensors, "optimizer": {"lr": 1.0}},
    "data parallel": lambda tensors: {f"module.{name}": value for name, value in tensors.items()},
    "part of a larger model": lambda tensors: {f"net.unet.{name}": value for name, value in tensors.items()},
    "half precision": lambda tensors: {name: value.half() for name, value in tensors.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_files_give_the_same_networks(weights, tmp_path, wrapping):
    files = {}
    for file in ("denoising_unet", "motion_module", "reference_unet", "pose_guider"):
        files[file] = str(tmp_path / f"{file}.pth")
        torch.save(WRAPPINGS[wrapping](published_tensors(file)), files[file])
    main(["inspect", *files.values()])
    convert(convert_config("animate_anyone", str(tmp_path / "model"), weights=str(weights), **files))
    pipeline = load_pipeline(tmp_path / "model")
    unet = module_names(with_motion(published_tensors("denoising_unet"), published_tensors("motion_module")))
    for network, published in (
        (pipeline.denoising_unet, unet),
        (pipeline.reference_net, published_tensors("reference_unet")),
        (pipeline.pose_guider, published_tensors("pose_guider")),
    ):
        state = network.state_dict()
        for name, value in published.items():
            assert state[name].dtype == torch.float32
            assert torch.allclose(state[name], value, atol=5e-3 if wrapping == "half precision" else 0), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["animate_anyone", "magic_animate"])
def test_half_precision_pipelines_animate(weights, tmp_path, family, dtype):
    convert(convert_config(family, str(tmp_path / "model"), dtype=dtype, weights=str(weights)))
    frames = {}
    for name in (dtype, "float32"):
        pipeline = load_pipeline(tmp_path / "model", getattr(torch, name))
        pipeline.set_progress_bar_config(disable=True)
        draw = torch.Generator().manual_seed(0)
        reference, poses = torch.rand(3, 16, 16, generator=draw), torch.rand(2, 3, 16, 16, generator=draw)
        arguments = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(1)}
        frames[name] = pipeline(reference, poses, **arguments).frames
        assert frames[name].dtype == torch.float32 and frames[name].isfinite().all()
    assert (frames[dtype] - frames["float32"]).abs().mean() < 0.03


class Code:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("make", "kind", "stem"),
    [
        (small_vae, AutoencoderKL, "diffusion_pytorch_model"),
        (small_image_encoder, CLIPVisionModelWithProjection, None),
    ],
)
def test_broken_folders_are_refused_in_one_line(tmp_path, make, kind, stem):
    """A pickle with code, cut files, other files, other shapes: the libraries' own errors would be tracebacks."""
    whole, torch_file = f"{stem or 'model'}.safetensors", f"{stem or 'pytorch_model'}.bin"
    make().save_pretrained(tmp_path / "good")
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "good" / whole).items()}
    name = next(iter(tensors))
    save_file(tensors | {name: torch.ones(3)}, tmp_path / "misshapen", metadata={"format": "pt"})
    torch.save({"a": Code(tmp_path / "trace")}, tmp_path / "code")
    torch.save(tensors, tmp_path / "file")
    broken = {
        "could run code": (torch_file, (tmp_path / "code").read_bytes()),
        "damaged": (torch_file, (tmp_path / "file").read_bytes()[:3000]),
        "no checkpoint": (torch_file, b"<html>"),
        "EOFError": (torch_file, b""),
        "not a complete safetensors": (whole, (tmp_path / "good" / whole).read_bytes()[:-50]),
        rf"misshapen 1: {name} \[3\] instead of": (whole, (tmp_path / "misshapen").read_bytes()),
    }
    (tmp_path / "good" / whole).unlink()
    for number, (message, (file, content)) in enumerate(broken.items()):
        folder = shutil.copytree(tmp_path / "good", tmp_path / str(number))
        (folder / file).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            load_folder(kind, folder, f"vae={folder}")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "trace").exists()


def test_a_broken_file_ends_the_command_with_one_line(weights, tmp_path, monkeypatch, capsys):
    (tmp_path / "cut.pth").write_bytes((weights / "denoising_unet.pth").read_bytes()[:5000])
    command = ["convert", "family=animate_anyone", f"weights={weights}", f"output={tmp_path / 'model'}"]
    monkeypatch.setattr(sys, "argv", ["checkpoints", *command, f"denoising_unet={tmp_path / 'cut.pth'}"])
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(lines) == 1 and "denoising_unet=" in lines[0] and "damaged" in lines[0]
    assert not (tmp_path / "model").exists()


FULL_SIZE_LOADERS = {
    "denoising_unet": None,  # together with its motion modules
    "motion_module": None,
    "reference_unet": load_reference_net,
    "pose_guider": load_pose_guider,
    "appearance_encoder": load_reference_net,
    "densepose_controlnet": load_control_net,
    "temporal_attention": lambda tensors, what: load_denoising_unet(tensors, what, "clip"),
}


@pytest.mark.parametrize("model", ["moore", "magic_animate"])
def test_full_size_files_load_and_are_recognised(model):
    """Every published file at its full size, on the meta device."""
    path = fixtures_folder() / "full_size_manifests" / f"{model}.json"
    files = {
        file: {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        for file, shapes in json.loads(path.read_text())["manifests"].items()
    }
    for file, tensors in files.items():
        found = inspect(tensors, file)
        assert found.known and not found.mismatch, (file, found.kind)
        if FULL_SIZE_LOADERS[file] is not None:
            FULL_SIZE_LOADERS[file](tensors, file)
    if model == "moore":
        unet = load_denoising_unet(with_motion(files["denoising_unet"], files["motion_module"]), "both", "frame")
        assert unet.config.motion_max_seq_length == 32 and unet.config.use_motion_mid_block
    else:
        guider = pose_guider_from_control_net(files["densepose_controlnet"], "densepose_controlnet")
        assert guider.config.block_out_channels == (16, 32, 96, 256)


@pytest.mark.parametrize("motion", MOTION_FILES.values(), ids=MOTION_FILES)
def test_full_size_motion_modules_of_animatediff(motion):
    manifest = animated_unet_manifest(UNetSizes(), motion)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in manifest.items()}
    modules = {name: tensor for name, tensor in tensors.items() if ".motion_modules." in name}
    assert len(modules) == (588 if motion.mid_block else 560) and not inspect(modules, "file").mismatch
    unet = load_denoising_unet(with_motion(tensors, modules), "file", "frame")
    assert unet.config.motion_max_seq_length == motion.max_seq_length
