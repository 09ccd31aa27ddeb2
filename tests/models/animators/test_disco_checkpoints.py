"""DisCo's published files: what they hold, how they load, and what conversion makes of them."""

import json
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from core.errors import UserError
from models.animators.disco.checkpoint import BACKGROUND, CLIP, POSE, UNET, disco_manifest, load_disco, make_networks
from models.animators.registry import load_pipeline
from models.checkpoints.__main__ import main
from models.checkpoints.convert import published_scheduler
from models.checkpoints.files import read_tensors
from models.checkpoints.inspect import inspect
from models.checkpoints.loading import current_names, is_position_table, old_names, shapes_of
from models.checkpoints.verify import Fixture, synthetic_tensors, verify
from tests.disco_parts import attribute_tensors, disco_tensors, small_disco_pipeline
from tests.published import fixtures_folder, published_tensors, small_image_encoder, small_vae

MODELS = ("image", "temporal")


@cache
def module(temporal: bool = False) -> dict[str, torch.Tensor]:
    return disco_tensors(temporal)


def write_file(path, tensors) -> None:
    """As DeepSpeed saves it, counters, sets and settings beside the tensors."""
    extra = {"global_steps": 3, "ds_config": {"fp16": {"enabled": True}}, "sparse_tensor_module_names": set()}
    torch.save({"module": tensors, "optimizer": None, "lr_scheduler": None, **extra}, path)


def test_known_answers(capsys):
    main(["verify", f"fixture={fixtures_folder() / 'disco_tiny'}"])
    assert len(capsys.readouterr().out.splitlines()) == 22


@pytest.mark.parametrize("model", MODELS)
def test_full_size_tensors_are_those_of_the_published_files(model):
    listed = json.loads((fixtures_folder() / "full_size_manifests" / "disco.json").read_text())["manifests"][model]
    listed = {name: tuple(shape) for name, shape in listed.items()}
    assert disco_manifest(listed) == listed


@pytest.mark.parametrize(
    ("model", "tensors", "elements"), [("image", 1993, 1969411067), ("temporal", 2371, 2198465147)]
)
def test_full_size_counts(model, tensors, elements):
    """Of the published files; a name is enough to say which model it is, the sizes are those of Stable Diffusion 1."""
    names = ["unet.conv_in.weight", f"{POSE}controlnet_cond_embedding.conv_in.weight"]
    shapes = {names[0]: (320, 4, 3, 3), names[1]: (16, 3, 3, 3)}
    if model == "temporal":
        shapes["unet.mid_block.resnets.0.tem_conv.bias"] = (1280,)
    wanted = disco_manifest(shapes)
    assert len(wanted) == tensors
    assert sum(torch.Size(shape).numel() for shape in wanted.values()) == elements


def test_full_size_operations():
    """Of an image of 256 x 256 in the published networks, 10^12 operations."""
    with torch.device("meta"):
        networks = make_networks({UNET: {"conv_in.weight": (320, 4, 3, 3)}, POSE: {}, BACKGROUND: {}, CLIP: {}})
        latents, context, timestep = torch.empty(1, 4, 32, 32), torch.empty(1, 257, 768), torch.empty(1)
        images = {POSE: torch.empty(1, 3, 256, 256), BACKGROUND: latents}
    counted = {}
    for prefix in (UNET, POSE, BACKGROUND):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            condition = (images[prefix],) if prefix in images else ()
            networks[prefix](latents, timestep, context, *condition)
        counted[prefix] = counter.get_total_flops() / 1e12
    assert counted[UNET] == pytest.approx(0.189, abs=5e-4) and counted[POSE] == pytest.approx(0.067, abs=5e-4)
    assert counted[BACKGROUND] < counted[POSE]


@pytest.mark.parametrize("temporal", [False, True])
def test_files_are_recognised(temporal):
    found = inspect(module(temporal), "file")
    assert found.kind == ("DisCo (temporal variant)" if temporal else "DisCo (image model)")
    assert found.detail == "widths 32 64, context 16" and not found.mismatch
    assert found.dtypes == ("float16", "float32", "int64")
    broken = dict(module(temporal))
    del broken["unet.conv_in.bias"]
    broken["controlnet.nets.0.extra"] = torch.zeros(1)
    mismatch = inspect(broken, "file").mismatch
    assert mismatch.missing == ("unet.conv_in.bias",) and mismatch.unexpected == ("controlnet.nets.0.extra",)


def test_attribute_files_are_recognised():
    found = inspect(attribute_tensors(), "file")
    assert found.kind == "DisCo (attribute pre-training, no pose ControlNet)" and not found.mismatch


def test_inspect_command(tmp_path, capsys):
    write_file(tmp_path / "mp_rank_00_model_states.pt", module())
    main(["inspect", str(tmp_path / "mp_rank_00_model_states.pt")])
    assert "DisCo (image model)" in capsys.readouterr().out


@pytest.mark.parametrize("temporal", [False, True])
def test_networks_have_the_tensors_of_the_file(temporal):
    weights = load_disco(module(temporal), "file")
    networks = {
        UNET: weights.unet,
        POSE: weights.pose_control_net,
        BACKGROUND: weights.background_control_net,
        CLIP: weights.image_encoder,
    }
    for prefix, network in networks.items():
        for name, tensor in network.state_dict().items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, module(temporal)[prefix + name].float())
    assert torch.equal(weights.token_projection.linear.weight, module(temporal)["refer_clip_proj.weight"].float())
    old = module(temporal)["vae.decoder.mid_block.attentions.0.query.weight"].float()
    assert torch.equal(weights.vae.decoder.mid_block.attentions[0].to_q.weight, old)
    assert weights.unet.config.temporal == temporal and weights.background_control_net.config.latent_conditioning
    assert not any(parameter.is_meta for network in networks.values() for parameter in network.parameters())
    assert not any(buffer.is_meta for buffer in weights.image_encoder.buffers())


def test_only_the_unused_norm_of_temporal_transformers_is_left_out():
    weights = load_disco(module(True), "file")
    left = {name for name in module(True) if name.startswith(UNET)} - {UNET + n for n in weights.unet.state_dict()}
    assert left and all(".transformer_blocks.0.tem_norm." in name for name in left)
    assert not any(is_position_table(name) for name in module(True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("unet.conv_in.bias"), ["unet.*", "missing 1: conv_in.bias"]),
        (lambda t: t.pop(f"{CLIP}visual_projection.weight"), ["clip_image_encoder.*", "missing 1"]),
        (lambda t: t.update({f"{POSE}what": torch.zeros(1)}), ["controlnet.nets.0.*", "unexpected 1: what"]),
        (lambda t: t.update({"refer_clip_proj.weight": torch.zeros(16, 32)}), ["refer_clip_proj", "misshapen"]),
        (lambda t: t.update({"discriminator.weight": torch.zeros(1)}), ["not DisCo's", "discriminator.weight"]),
        (lambda t: t.pop("unet.mid_block.resnets.0.tem_conv.bias"), ["unet.*", "tem_conv.bias"]),
    ],
    ids=["unet", "clip", "unexpected", "shape", "stranger", "temporal"],
)
def test_what_does_not_fit_is_named(change, words):
    tensors = dict(module(True))
    change(tensors)
    with pytest.raises(UserError) as error:
        load_disco(tensors, "file")
    assert all(word in str(error.value) for word in words), error.value


def test_other_files_are_refused():
    with pytest.raises(UserError, match="not DisCo's"):
        load_disco({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(8, 4, 3, 3)}, "file")


@pytest.mark.parametrize("temporal", [False, True])
def test_file_becomes_a_pipeline(temporal, tmp_path):
    write_file(tmp_path / "mp_rank_00_model_states.pt", module(temporal))
    main(["convert", "family=disco", f"weights={tmp_path}", f"output={tmp_path / 'p'}", "null_tokens=zeros"])
    loaded, small = load_pipeline(tmp_path / "p"), small_disco_pipeline(temporal)
    assert type(loaded) is type(small)
    assert loaded.config.null_tokens == "zeros" and loaded.config.window_size == 16
    assert torch.equal(loaded.scheduler.alphas_cumprod, published_scheduler("disco").alphas_cumprod)
    for name in ("unet", "pose_control_net", "background_control_net", "image_encoder", "token_projection", "vae"):
        ours, theirs = getattr(loaded, name).state_dict(), getattr(small, name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert loaded.animator.temporal == temporal


def test_attribute_file_becomes_a_pipeline_whose_poses_have_no_effect(tmp_path, capsys):
    torch.save({"module": attribute_tensors()}, tmp_path / "file.pt")
    main(["convert", "family=disco", f"checkpoint={tmp_path / 'file.pt'}", f"output={tmp_path / 'p'}"])
    assert "pose ControlNet is new" in capsys.readouterr().out
    pipeline = load_pipeline(tmp_path / "p")
    assert torch.equal(
        pipeline.background_control_net.conv_in.weight, attribute_tensors()["controlnet.conv_in.weight"].float()
    )
    network = pipeline.pose_control_net
    context = torch.randn(1, 17, 16)
    with torch.no_grad():
        down, mid = network(torch.randn(1, 4, 8, 8), 3, context, torch.rand(1, 3, 32, 32), return_dict=False)
    assert not mid.any() and not any(part.any() for part in down)
    assert torch.equal(
        network.down_blocks[0].resnets[0].conv1.weight, pipeline.unet.down_blocks[0].resnets[0].conv1.weight
    )


def test_base_weights_become_a_pipeline_to_train(tmp_path, capsys):
    """ControlNets are made of the UNet and have no effect yet; the projection is CLIP's own."""
    torch.save(published_tensors("denoising_unet"), tmp_path / "unet.pth")
    small_image_encoder().save_pretrained(tmp_path / "image_encoder")
    small_vae().save_pretrained(tmp_path / "vae")
    files = [f"unet={tmp_path / 'unet.pth'}", f"weights={tmp_path}", f"output={tmp_path / 'p'}"]
    main(["convert", "family=disco", *files])
    printed = capsys.readouterr().out
    assert "pose ControlNet is new" in printed and "background ControlNet is new" in printed
    pipeline = load_pipeline(tmp_path / "p")
    unet = published_tensors("denoising_unet")
    assert all(torch.equal(value, unet[name]) for name, value in pipeline.unet.state_dict().items())
    assert torch.equal(pipeline.token_projection.linear.weight, pipeline.image_encoder.visual_projection.weight)
    for network in (pipeline.pose_control_net, pipeline.background_control_net):
        assert torch.equal(network.mid_block.resnets[0].conv1.weight, unet["mid_block.resnets.0.conv1.weight"])
        assert not network.controlnet_mid_block.weight.any()
    image, poses = torch.rand(3, 16, 16), torch.rand(2, 3, 16, 16)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 1, "output_type": "latent", "reference_mask": torch.ones(16, 16, dtype=bool)}
    assert pipeline(image, poses, **arguments).frames.isfinite().all()


def test_unknown_null_tokens_are_named(tmp_path):
    with pytest.raises(UserError, match="null_tokens=nothing must be one of empty_image, zeros"):
        main(["convert", "family=disco", "checkpoint=x", f"output={tmp_path / 'p'}", "null_tokens=nothing"])


def test_code_in_a_file_is_refused(tmp_path):
    """Optimiser classes and the like are not run; the message says what is in the way."""
    torch.save({"module": module(), "lr_scheduler": UserError("an object")}, tmp_path / "file.pt")
    with pytest.raises(UserError, match="objects other than tensors"):
        read_tensors(tmp_path / "file.pt", "checkpoint")


def other_fixture() -> Fixture:
    """Three levels, other heads, groups and patches; outputs from the stock networks of diffusers and transformers."""
    unet_config = {"block_out_channels": [16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8}
    config = {
        **unet_config,
        **{"num_attention_heads": 4, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 24},
        "clip": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"patch_size": 8, "image_size": 24, "projection_dim": 24, "hidden_act": "quick_gelu"},
        "vae": {"norm_num_groups": 8},
    }
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",), "attention_head_dim": 4}
    shared = {**unet_config, **blocks, "cross_attention_dim": 24}
    unet = UNet2DConditionModel(up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2, **shared)
    pose = ControlNetModel(conditioning_embedding_out_channels=(8, 16, 16), **shared)
    behind = ControlNetModel(conditioning_channels=4, **shared)
    behind.controlnet_cond_embedding = torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(4, 16, 3, padding=1)})
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**config["clip"]))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 32),
        norm_num_groups=8,
    )
    networks = {UNET: unet, POSE: pose, BACKGROUND: behind, CLIP: clip}
    shapes = {
        f"{prefix}{name}": shape for prefix, n in networks.items() for name, shape in shapes_of(n.state_dict()).items()
    }
    shapes |= {f"vae.{name}": shape for name, shape in old_names(shapes_of(vae.state_dict())).items()}
    shapes["refer_clip_proj.weight"] = (24, 32)
    tensors = synthetic_tensors(shapes, 5)
    for prefix, network in networks.items():
        part = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        network.eval().load_state_dict(part)
    vae.eval().load_state_dict(current_names({n[4:]: t for n, t in tensors.items() if n.startswith("vae.")}))
    # The stock ControlNet gives its condition to the embedding as to a function.
    behind.controlnet_cond_embedding = behind.controlnet_cond_embedding["conv_in"]

    draw = torch.Generator().manual_seed(0)
    sizes = {"foreground_images": (2, 3, 24, 24), "background_latents": (2, 4, 8, 6), "noisy_latents": (2, 4, 8, 6)}
    sizes |= {"pose_images": (2, 3, 32, 24), "vae_images": (1, 3, 16, 16), "vae_latents": (1, 4, 4, 4)}
    inputs = {name: torch.randn(size, generator=draw) for name, size in sizes.items()}
    inputs["timestep"] = torch.tensor([20, 900])
    expected = {}
    hidden = clip(inputs["foreground_images"]).last_hidden_state
    expected["image_tokens"] = clip.vision_model.post_layernorm(hidden) @ tensors["refer_clip_proj.weight"].T
    seen = (inputs["noisy_latents"], inputs["timestep"], expected["image_tokens"])
    first, second = (
        network(*seen, condition, return_dict=False)
        for network, condition in ((pose, inputs["pose_images"]), (behind, inputs["background_latents"]))
    )
    down, mid = [one + other for one, other in zip(first[0], second[0], strict=True)], first[1] + second[1]
    expected["control_mid_net1"] = second[1]
    expected |= {f"control_residual_{number:02d}": part for number, part in enumerate([*down, mid])}
    expected["prediction_without_control"] = unet(*seen, return_dict=False)[0]
    added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    expected["guidance_cond"] = unet(*seen, **added, return_dict=False)[0]
    expected["vae_mean"] = vae.encode(inputs["vae_images"]).latent_dist.mean
    expected["vae_decoded"] = vae.decode(inputs["vae_latents"]).sample
    shapes = {"module": {name: list(shape) for name, shape in shapes.items()}}
    return Fixture(config, shapes, {"module": 5}, {}, dict.fromkeys(expected, 1e-4), inputs, expected)


@torch.no_grad()
def test_known_answers_of_another_configuration():
    results = verify(other_fixture())
    assert len(results) == 13
    assert all(result.passed for result in results), results
