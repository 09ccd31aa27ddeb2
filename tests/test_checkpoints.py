"""Checkpoint files: strict loading, honest errors, names, sizes, conversion to a pipeline folder."""

import json
import os
import pickle
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from core.errors import UserError
from models.checkpoints.__main__ import main
from models.checkpoints.convert import ConvertConfig, convert, empty_prompt
from models.checkpoints.files import read_tensors
from models.checkpoints.kinds import inspect
from models.checkpoints.manifests import (
    animated_unet_manifest,
    appearance_encoder_manifest,
    control_net_manifest,
    motion_manifest,
    pose_guider_manifest,
    reference_unet_manifest,
    unet_manifest,
)
from models.checkpoints.names import module_names, position_length, published_names
from models.checkpoints.networks import (
    load_control_net,
    load_denoising_unet,
    load_image_unet,
    load_pose_guider,
    load_reference_net,
    pose_guider_from_control_net,
    with_motion,
)
from models.checkpoints.sizes import MotionSizes, UNetSizes, make_denoising_unet, motion_sizes, unet_sizes
from models.checkpoints.strict import compare, shapes_of
from models.checkpoints.synthetic import synthetic_tensors
from models.magic_animate import MagicAnimatePipeline
from models.pipeline import AnimationPipeline
from models.pipeline_folder import load_pipeline
from models.schedules import SCHEDULES, published_scheduler
from tests.published import (
    GUIDER_CHANNELS,
    MANIFESTS,
    MOTION,
    SIZES,
    fixtures_folder,
    published_tensors,
    small_image_encoder,
    small_text_encoder,
    small_vae,
)
from training.build import make_scheduler
from training.config import NoiseConfig

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


# Names and sizes


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


# Reading files


@pytest.fixture
def tensors():
    return published_tensors("pose_guider")


WRAPPINGS = {
    "flat": lambda t: t,
    "state_dict": lambda t: {"state_dict": t, "global_step": 7},
    "module": lambda t: {"module": {f"module.{name}": value for name, value in t.items()}},
    "deep": lambda t: {"model": {"state_dict": {f"module._orig_mod.{name}": value for name, value in t.items()}}},
    "extras": lambda t: {**t, "animatediff_config": {"layers": 1}, "epoch": 3},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torch_files_in_every_wrapping(tmp_path, tensors, wrapping, legacy):
    path = tmp_path / "file.ckpt"
    torch.save(WRAPPINGS[wrapping](tensors), path, _use_new_zipfile_serialization=not legacy)
    read = read_tensors(path, "file")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_folders_and_shards(tmp_path, tensors):
    names = list(tensors)
    parts = {"a-00001.safetensors": names[:5], "a-00002.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert read_tensors(tmp_path, "file").keys() == tensors.keys()
    save_file({"one": torch.ones(2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert list(read_tensors(tmp_path, "file")) == ["one"]  # the complete file comes before its shards


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_loading_holds_no_copy(tmp_path, suffix):
    """The parameters of the network are the mapped file itself."""
    path = tmp_path / f"unet.{suffix}"
    tensors = published_tensors("reference_unet")
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    network = load_reference_net(read_tensors(path, "file"), "file")
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            mapped.append([int(address, 16) for address in line.split()[0].split("-")])
    assert mapped
    for name, parameter in network.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in mapped), name
        assert torch.equal(parameter, tensors[name])


class Sentinel:
    """Unpickling it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path, save):
    path, trace = tmp_path / "file.pth", tmp_path / "trace"
    content = {"conv_in.weight": Sentinel(trace)}
    if save == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match="could run code"):
        read_tensors(path, "file")
    assert not trace.exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_truncated_files(tmp_path, tensors, suffix):
    path = tmp_path / f"file.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="file=.*(damaged|not a complete)"):
        read_tensors(path, "file")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "file=.*damaged"),
        (b"<!doctype html><html>not found</html>", "file=.*no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_that_are_no_checkpoints(tmp_path, content, named, suffix):
    path = tmp_path / f"file.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=named if suffix == "pth" or b"lfs" in content else "safetensors"):
        read_tensors(path, "file")


def test_files_without_tensors_or_at_all(tmp_path):
    torch.save({"step": 3}, tmp_path / "a.pth")
    torch.save([torch.ones(1)], tmp_path / "b.pth")
    torch.save({"x": torch.ones(1), "module.x": torch.ones(1)}, tmp_path / "c.pth")
    (tmp_path / "folder").mkdir()
    for name, named in {
        "a.pth": "no tensors; its entries are step",
        "b.pth": "holds a list",
        "c.pth": "names x twice",
        "folder": "folder without weights",
        "none.pth": "does not exist",
    }.items():
        with pytest.raises(UserError, match=named):
            read_tensors(tmp_path / name, "file")


# Strict loading

LOADERS = {
    "reference_unet": lambda t: load_reference_net(t, "file"),
    "appearance_encoder": lambda t: load_reference_net(t, "file"),
    "pose_guider": lambda t: load_pose_guider(t, "file"),
    "densepose_controlnet": lambda t: load_control_net(t, "file"),
    "temporal_attention": lambda t: load_denoising_unet(t, "file", "clip"),
}


@pytest.mark.parametrize("file", LOADERS)
def test_every_tensor_arrives(file):
    tensors = published_tensors(file)
    network = LOADERS[file](tensors)
    state = network.state_dict()
    renamed = module_names(tensors)
    assert all(torch.equal(state[name], tensor) for name, tensor in renamed.items())
    others = [value for name, value in state.items() if name not in renamed]
    assert all(not value.is_meta for value in state.values())
    if file == "appearance_encoder":
        assert len(others) == 20 and all(not value.any() for value in others)
    assert not network.training


@pytest.mark.parametrize("file", LOADERS)
def test_wrong_tensors_are_named_and_counted(file):
    tensors = published_tensors(file)
    norms = [name for name in tensors if name.endswith(("norm1.bias", "conv_out.bias", "blocks.1.bias"))]
    missing = dict(tensors)
    del missing[norms[0]]
    with pytest.raises(UserError, match="missing 1: "):
        LOADERS[file](missing)
    extra = tensors | {f"extra_{number}.weight": torch.ones(1) for number in range(8)}
    with pytest.raises(UserError, match=r"unexpected 8: extra_0.weight, .*extra_4.weight, \.\.\."):
        LOADERS[file](extra)
    misshapen = tensors | {norms[0]: torch.ones(3)}
    with pytest.raises(UserError, match=r"misshapen 1: .*\[3\] instead of"):
        LOADERS[file](misshapen)
    integers = tensors | {norms[0]: tensors[norms[0]].int()}
    with pytest.raises(UserError, match="not floating point"):
        LOADERS[file](integers)


def test_files_of_another_family_are_refused():
    with pytest.raises(UserError, match="does not fit DenoisingUNet|position tables"):
        load_denoising_unet(published_tensors("denoising_unet"), "file", "frame")
    with pytest.raises(UserError, match="does not fit PoseGuider"):
        load_pose_guider(published_tensors("reference_unet"), "file")
    with pytest.raises(UserError, match="does not fit ReferenceNet"):
        load_reference_net(published_tensors("pose_guider"), "file")
    with pytest.raises(UserError, match="does not fit ControlNetModel"):
        load_control_net(published_tensors("denoising_unet"), "file")


def test_missing_motion_modules_are_an_error():
    base, motion = published_tensors("denoising_unet"), published_tensors("motion_module")
    with pytest.raises(UserError, match="motion modules are missing"):
        load_denoising_unet(base, "file", "frame")
    partial = {name: tensor for name, tensor in motion.items() if not name.startswith("up_blocks.1.")}
    with pytest.raises(UserError, match=r"missing \d+: up_blocks.1.motion_modules"):
        load_denoising_unet(with_motion(base, partial), "file", "frame")


def test_half_precision_is_converted():
    half = {name: tensor.half() for name, tensor in published_tensors("temporal_attention").items()}
    network = load_denoising_unet({f"module.unet.{name}": tensor for name, tensor in half.items()}, "file", "clip")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    network = load_denoising_unet(half, "file", "clip", dtype=torch.float16)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float16}


def test_position_tables_are_checked_not_trusted():
    motion = published_tensors("motion_module")
    assert position_length(motion, "file") == 32
    name = next(name for name in motion if name.endswith("pos_encoder.pe"))
    with pytest.raises(UserError, match="not the sinusoidal table"):
        position_length(motion | {name: motion[name] + 0.1}, "file")
    with pytest.raises(UserError, match="different lengths"):
        position_length(motion | {name: motion[name][:, :24]}, "file")


def test_complete_unets_serve_as_reference_nets():
    """A Stable Diffusion UNet has output layers, which a reference net leaves out."""
    full = synthetic_tensors(MANIFESTS["denoising_unet"](), seed=1)
    network = load_reference_net(full, "file")
    assert all(torch.equal(value, full[name]) for name, value in network.state_dict().items())


def test_new_motion_modules_change_nothing():
    unet = load_image_unet(published_tensors("denoising_unet"), "file")
    latents, context = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 1, 16)
    with torch.no_grad():
        clip = unet(latents, 3, context)
        frames = torch.cat([unet(latents[:, :, [frame]], 3, context) for frame in range(3)], dim=2)
    assert torch.allclose(clip, frames, atol=1e-5)
    assert all(not parameter.is_meta for parameter in unet.parameters())
    assert sum(parameter.abs().sum() > 0 for parameter in unet.motion_parameters()) > 10


def test_pose_guider_starts_from_a_control_net():
    tensors = published_tensors("densepose_controlnet")
    guider = pose_guider_from_control_net(tensors, "file")
    assert guider.config.block_out_channels == GUIDER_CHANNELS
    for name, value in guider.state_dict().items():
        expected = tensors[f"controlnet_cond_embedding.{name}"]
        assert torch.equal(value, torch.zeros_like(expected) if name.startswith("conv_out.") else expected)


# Commands


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
    with pytest.raises(UserError, match="python -m models.checkpoints"):
        main(arguments)


# Conversion


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """Folders as the publishers' instructions lead to."""
    folder = tmp_path_factory.mktemp("weights")
    for file in ("denoising_unet", "motion_module", "reference_unet", "pose_guider"):
        torch.save(published_tensors(file), folder / f"{file}.pth")
    for file in ("appearance_encoder", "densepose_controlnet"):
        (folder / file).mkdir()
        save_file(published_tensors(file), folder / file / "diffusion_pytorch_model.safetensors")
    (folder / "temporal_attention").mkdir()
    unet = {f"module.{name}": tensor for name, tensor in published_tensors("temporal_attention").items()}
    torch.save({"state_dict": unet}, folder / "temporal_attention" / "temporal_attention.ckpt")
    small_image_encoder().save_pretrained(folder / "image_encoder")
    small_text_encoder().save_pretrained(folder / "text_encoder")
    small_vae().save_pretrained(folder / "sd-vae-ft-mse")
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
    convert(ConvertConfig("magic_animate", str(tmp_path / "p"), weights=str(weights)))
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
    assert {name: pipeline.scheduler.config[name] for name in SCHEDULES[family]} == SCHEDULES[family]


def test_stable_diffusion_becomes_a_start_for_training(weights, tmp_path):
    arguments = {
        "unet": str(weights / "denoising_unet.pth"),
        "controlnet": str(weights / "densepose_controlnet"),
        "weights": str(weights),
    }
    convert(ConvertConfig("stable_diffusion", str(tmp_path / "p"), **arguments))
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
        convert(ConvertConfig("magic_animate", str(tmp_path / dtype), dtype, str(weights)))
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
        convert(ConvertConfig(**arguments))
    assert not list(tmp_path.iterdir())


def test_networks_that_do_not_belong_together(weights, tmp_path):
    sizes = UNetSizes(block_out_channels=(32, 32), attention=(True, False), layers_per_block=1, cross_attention_dim=16)
    torch.save(synthetic_tensors(reference_unet_manifest(sizes), 1), tmp_path / "narrow.pth")
    arguments = {"weights": str(weights), "reference_unet": str(tmp_path / "narrow.pth")}
    with pytest.raises(UserError, match="block_out_channels"):
        convert(ConvertConfig("animate_anyone", str(tmp_path / "p"), **arguments))


@pytest.mark.parametrize("change", ["lost", "stray"])
def test_pipeline_folders_are_strict_too(weights, tmp_path, change):
    """The libraries would give a lost motion module random numbers and go on."""
    convert(ConvertConfig("animate_anyone", str(tmp_path / "p"), weights=str(weights)))
    path = tmp_path / "p" / "denoising_unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    if change == "lost":
        del tensors["up_blocks.0.motion_modules.0.proj_out.weight"]
    else:
        tensors["stray.weight"] = torch.ones(1)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="component denoising_unet.* (missing|unexpected) 1: "):
        load_pipeline(tmp_path / "p")
