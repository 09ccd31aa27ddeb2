"""Known answers of the published code, and the pieces in which it differs from diffusers, from their definitions."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import UserError
from models.animators.animate_anyone.checkpoint import pose_guider_manifest
from models.animators.magic_animate.checkpoint import appearance_encoder_manifest
from models.checkpoints.__main__ import main
from models.checkpoints.loading import module_names
from models.checkpoints.networks import (
    animated_unet_manifest,
    control_net_manifest,
    motion_manifest,
    reference_unet_manifest,
    unet_manifest,
)
from models.checkpoints.verify import (
    Fixture,
    Result,
    compute,
    read_fixture,
    sinusoids,
    synthetic_array,
    synthetic_tensors,
    verify,
)
from models.unets import ClipGroupNorm, MotionModule
from tests.published import fixtures_folder

CONFIG = {
    "block_out_channels": [32, 64, 32],
    "cross_attention_dim": 24,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "num_attention_heads": 4,
    "in_channels": 4,
    "out_channels": 4,
    "motion_num_attention_heads": 2,
    "motion_transformer_layers": 2,
    "motion_group_norm": "per frame",
}
MOORE = CONFIG | {
    "motion_max_seq_length": 9,
    "motion_module_mid_block": True,
    "resnet_group_norm": "per frame",
    "fusion_blocks": "full",
    "reference_timestep": 0,
}
MAGIC = CONFIG | {
    "use_linear_projection": True,
    "motion_max_seq_length": 7,
    "motion_module_mid_block": False,
    "resnet_group_norm": "per clip",
    "conv_norm_out": "per clip",
    "fusion_blocks": "midup",
    "reference_timestep": "same as the denoising UNet",
}


@pytest.mark.parametrize("name", ["moore_tiny", "magic_tiny"])
def test_published_code_is_reproduced(name):
    results = verify(read_fixture(fixtures_folder() / name))
    assert results and all(result.passed for result in results), results


def test_synthetic_weights_are_those_of_the_fixtures():
    """The first numbers of three tensors, as the description beside the fixtures gives them."""
    expected = {
        ("conv_in.weight", (3, 4, 3, 3)): [-0.2547050714492798, -0.011826976202428341, 0.18380486965179443],
        ("conv_norm_out.weight", (3,)): [1.0712604522705078, 0.945585310459137, 0.7723696827888489],
        ("conv_in.bias", (3,)): [-0.03011980839073658, 0.00865946151316166, 0.025938740000128746],
    }
    for (name, shape), numbers in expected.items():
        assert synthetic_array(name, shape, 101).ravel()[:3].tolist() == numbers


def test_synthetic_weights_have_the_stated_spread():
    tensors = synthetic_tensors({"a.weight": (400, 100), "a.bias": (40000,), "norm.weight": (40000,)}, seed=3)
    assert tensors["a.weight"].std().item() == pytest.approx(0.1, rel=0.02)
    assert tensors["a.bias"].std().item() == pytest.approx(0.05, rel=0.02)
    assert tensors["norm.weight"].mean().item() == pytest.approx(1, abs=0.002)
    assert tensors["norm.weight"].std().item() == pytest.approx(0.1, rel=0.02)
    again = synthetic_tensors({"a.bias": (40000,)}, seed=3)["a.bias"]
    assert torch.equal(again, tensors["a.bias"])
    assert not torch.equal(again, synthetic_tensors({"a.bias": (40000,)}, seed=4)["a.bias"])


def published_motion_module(frames: Tensor, tensors: dict[str, Tensor], heads: int, layers: int) -> Tensor:
    """AnimateDiff's motion module on one clip (f, c, h, w), written out from its description."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    count, _, height, width = frames.shape
    root = "temporal_transformer"
    x = F.group_norm(frames, 32, tensors[f"{root}.norm.weight"], tensors[f"{root}.norm.bias"], 1e-6)
    x = linear(x.permute(2, 3, 0, 1).flatten(0, 1), f"{root}.proj_in")  # (h*w, f, c)
    for layer in range(layers):
        block = f"{root}.transformer_blocks.{layer}"
        for number in range(2):
            attention = f"{block}.attention_blocks.{number}"
            entered = norm(x, f"{block}.norms.{number}") + tensors[f"{attention}.pos_encoder.pe"][:, :count]
            query, key, value = (
                linear(entered, f"{attention}.{part}").chunk(heads, -1) for part in ("to_q", "to_k", "to_v")
            )
            parts = []
            for q, k, v in zip(query, key, value, strict=True):
                parts.append((q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v)
            x = x + linear(torch.cat(parts, -1), f"{attention}.to_out.0")
        hidden, gate = linear(norm(x, f"{block}.ff_norm"), f"{block}.ff.net.0.proj").chunk(2, -1)
        x = x + linear(hidden * F.gelu(gate), f"{block}.ff.net.2")
    x = linear(x, f"{root}.proj_out").unflatten(0, (height, width)).permute(2, 3, 0, 1)
    return frames + x


def motion_module_shapes(channels: int, length: int, layers: int) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for layer in range(layers):
        block = f"temporal_transformer.transformer_blocks.{layer}"
        for number in range(2):
            attention = f"{block}.attention_blocks.{number}"
            shapes |= {
                f"{attention}.{part}.weight": (channels, channels) for part in ("to_q", "to_k", "to_v", "to_out.0")
            }
            shapes |= {f"{attention}.to_out.0.bias": (channels,), f"{attention}.pos_encoder.pe": (1, length, channels)}
            shapes |= {f"{block}.norms.{number}.{part}": (channels,) for part in ("weight", "bias")}
        shapes |= {f"{block}.ff_norm.{part}": (channels,) for part in ("weight", "bias")}
        shapes |= {
            f"{block}.ff.net.0.proj.weight": (8 * channels, channels),
            f"{block}.ff.net.0.proj.bias": (8 * channels,),
        }
        shapes |= {f"{block}.ff.net.2.weight": (channels, 4 * channels), f"{block}.ff.net.2.bias": (channels,)}
    for name in ("proj_in", "proj_out"):
        shapes[f"temporal_transformer.{name}.weight"] = (channels, channels)
        shapes[f"temporal_transformer.{name}.bias"] = (channels,)
    return shapes | {f"temporal_transformer.norm.{part}": (channels,) for part in ("weight", "bias")}


@pytest.mark.parametrize(("num_frames", "layers"), [(1, 1), (5, 1), (7, 2)])
def test_motion_module_is_that_of_animatediff(num_frames, layers):
    """Published names and numbers in, published result out; for one frame too, where attention sees one token."""
    published = synthetic_tensors(motion_module_shapes(64, 12, layers), seed=5)
    module = MotionModule(64, 4, layers, 12, norm_num_groups=32, single_frames=True)
    renamed = module_names({f"x.motion_modules.0.{name}": tensor for name, tensor in published.items()})
    missing = module.load_state_dict(
        {name.removeprefix("x.motion_modules.0."): tensor for name, tensor in renamed.items()}, strict=False
    )
    assert not missing.unexpected_keys and all(name.endswith(".pos_embed.pe") for name in missing.missing_keys)
    frames = torch.randn(2 * num_frames, 64, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result = module(frames, num_frames=num_frames)
        clips = [published_motion_module(clip, published, 4, layers) for clip in frames.split(num_frames)]
    assert torch.allclose(result, torch.cat(clips), atol=1e-5)
    assert (result - frames).abs().max() > 0.1


def test_position_tables_are_those_of_diffusers():
    module = MotionModule(64, 4, 1, 24, norm_num_groups=32)
    table = module.transformer_blocks[0].pos_embed.pe
    assert torch.allclose(table[0].double(), torch.from_numpy(sinusoids(24, 64)), atol=1e-5)


def test_clip_norm_takes_its_statistics_over_all_frames():
    frames = (
        torch.randn(5, 8, 3, 4, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)[:, None, None, None]
    )
    norm = ClipGroupNorm(2, 8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    grouped = frames.transpose(0, 1).reshape(2, -1)
    scaled = (grouped - grouped.mean(1, keepdim=True)) / (
        grouped.var(1, unbiased=False, keepdim=True) + norm.eps
    ).sqrt()
    expected = scaled.reshape(8, 5, 3, 4).transpose(0, 1) * norm.weight[:, None, None] + norm.bias[:, None, None]
    assert torch.allclose(norm(frames), expected, atol=1e-5)
    assert not torch.allclose(torch.nn.GroupNorm(2, 8)(frames), ClipGroupNorm(2, 8)(frames), atol=0.1)


def moore_fixture() -> Fixture:
    """Three levels, other widths, heads, norm groups and guider, two clips of one frame on an odd grid."""
    inputs = {
        "ref_latents": torch.randn(2, 4, 5, 7),
        "clip_embeds": torch.randn(2, 1, 24),
        "pose_images": torch.rand(2, 3, 1, 10, 14),
        "noisy_latents": torch.randn(2, 4, 1, 5, 7),
        "timestep": torch.tensor([3, 700]),
        "guidance_timestep": torch.tensor([40]),
    }
    return own_fixture(
        MOORE, inputs, {"reference_tokens_0": "input of down_blocks.1.attentions.0.transformer_blocks.0.attn1 in"}
    )


def magic_fixture() -> Fixture:
    inputs = {
        "ref_latents": torch.randn(1, 4, 6, 4),
        "text_embeds": torch.randn(1, 3, 24),
        "pose_images": torch.rand(3, 3, 12, 8),
        "noisy_latents": torch.randn(2, 4, 3, 6, 4),
        "timestep": torch.tensor([500, 20]),
    }
    return own_fixture(
        MAGIC, inputs, {"reference_tokens_5": "input of mid_block.attentions.0.transformer_blocks.0.attn1"}
    )


def own_fixture(config: dict, inputs: dict[str, Tensor], meanings: dict[str, str]) -> Fixture:
    """A fixture of another configuration whose answers this project gives itself."""
    bare = Fixture(config, {}, {}, meanings, {}, inputs, {})
    sizes, motion = bare.unet_sizes(), bare.motion_sizes()
    width, channels = config["block_out_channels"][0], (8, 24)
    if config is MOORE:
        shapes = {
            "denoising_unet": unet_manifest(sizes),
            "motion_module": motion_manifest(sizes, motion),
            "reference_unet": reference_unet_manifest(sizes),
            "pose_guider": pose_guider_manifest(width, channels),
        }
    else:
        shapes = {
            "appearance_encoder": appearance_encoder_manifest(sizes),
            "densepose_controlnet": control_net_manifest(sizes, channels),
            "temporal_attention": animated_unet_manifest(sizes, motion),
        }
    bare = Fixture(config, shapes, dict.fromkeys(shapes, 7), meanings, {}, inputs, {})
    with torch.inference_mode():
        expected = {name: value.contiguous().clone() for name, value in compute(bare).items()}
    return Fixture(config, shapes, bare.seeds, meanings, dict.fromkeys(expected, 1e-4), inputs, expected)


def write_fixture(fixture: Fixture, stem: Path) -> None:
    description = {
        "config": fixture.config,
        "manifests": fixture.shapes,
        "seeds": fixture.seeds,
        "inputs": dict.fromkeys(fixture.inputs, {}),
        "outputs": {name: {"meaning": fixture.meanings.get(name, "")} for name in fixture.expected},
        "tolerance": 1e-4,
        "tolerances": {"pose_features": 1e-3},
    }
    stem.with_suffix(".json").write_text(json.dumps(description))
    save_file({**fixture.inputs, **fixture.expected}, stem.with_suffix(".safetensors"))


@pytest.fixture(scope="module", params=[moore_fixture, magic_fixture], ids=["moore", "magic"])
def other_fixture(request) -> Fixture:
    torch.manual_seed(0)
    return request.param()


@pytest.fixture
def fixture_stem(other_fixture, tmp_path) -> Path:
    write_fixture(other_fixture, tmp_path / "other")
    return tmp_path / "other"


def run(capsys, *arguments) -> tuple[int, list[str], list[str]]:
    """Exit code of the command, and its lines on standard output and error."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err.splitlines()


def test_verify_command_on_other_configurations(fixture_stem, capsys):
    code, lines, (heads, verdict) = run(capsys, "verify", f"fixture={fixture_stem}")
    assert heads.split() == ["output", "largest", "difference", "tolerance"]
    assert verdict == f"passed: all {len(lines)} outputs are within their tolerances"
    rows = [line.split() for line in lines]
    names = json.loads(fixture_stem.with_suffix(".json").read_text())["outputs"]
    assert code == 0 and [row[0] for row in rows] == list(names)
    assert all(float(row[1]) <= float(row[2]) for row in rows)
    assert any(row[0].startswith("reference_tokens") for row in rows)
    tolerances = {row[0]: float(row[2]) for row in rows}
    assert tolerances.get("pose_features", 1e-3) == 1e-3 and tolerances["guidance_cond"] == 1e-4

    tensors = load_file(fixture_stem.with_suffix(".safetensors"))
    tensors["guidance_cond"] = tensors["guidance_cond"] + 1e-3
    tensors["guidance_uncond"] = tensors["guidance_uncond"][:, :, :, 1:].contiguous()
    save_file(tensors, fixture_stem.with_suffix(".safetensors"))
    description = json.loads(fixture_stem.with_suffix(".json").read_text())
    description["outputs"]["ref_latents"] = {"meaning": "nothing that is computed"}
    fixture_stem.with_suffix(".json").write_text(json.dumps(description))
    code, lines, (_, verdict) = run(capsys, "verify", f"fixture={fixture_stem}.json")
    assert verdict.startswith(f"failed: 3 of {len(lines)} outputs differ: ") and "ref_latents" in verdict
    differences = {line.split()[0]: float(line.split()[1]) for line in lines}
    assert code == 1
    assert differences["guidance_cond"] == pytest.approx(1e-3, rel=0.01)
    assert differences["guidance_uncond"] == math.inf
    assert math.isnan(differences["ref_latents"])
    assert not Result("not computed", math.nan, 1.0).passed


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.pop("config"), "config"),
        (lambda d: d["config"].pop("norm_num_groups"), "norm_num_groups"),
        (lambda d: d["manifests"].pop(next(iter(d["manifests"]))), "known are"),
        (lambda d: d["config"].update(motion_group_norm="per clip"), "per frame"),
        (lambda d: d["config"].update(motion_max_seq_length=5), "position tables"),
    ],
)
def test_fixtures_that_cannot_be_computed_are_named(fixture_stem, change, named):
    description = json.loads(fixture_stem.with_suffix(".json").read_text())
    change(description)
    fixture_stem.with_suffix(".json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=named):
        verify(read_fixture(fixture_stem))


def test_missing_fixture_is_named(tmp_path):
    with pytest.raises(UserError, match="none.json does not exist"):
        read_fixture(tmp_path / "none")
