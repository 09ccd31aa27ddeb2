"""DisCo's temporal variant: what it adds, and that it computes what the published networks do."""

import re
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from models.animators.disco.checkpoint import load_disco
from models.animators.disco.model import DisCo
from models.animators.disco.networks import TemporalResnetBlock, TemporalTransformerBlock, is_temporal
from models.checkpoints.verify import synthetic_tensors
from tests.disco_parts import (
    FIXTURES,
    TOKENS,
    disco_shapes,
    frame_inputs,
    randn,
)

pipeline, temporal_pipeline, model = FIXTURES


def silent(model: DisCo) -> DisCo:
    """A temporal model whose additions are zero, as training starts."""
    model = deepcopy(model)
    for name, parameter in model.named_parameters():
        if ".tem_conv." in name or ".tem_attn.to_out." in name:
            parameter.data.zero_()
    return model


@torch.no_grad()
def test_new_temporal_networks_compute_what_the_image_networks_do(model):
    """On one frame, and on equal frames, where statistics over the clip are those of a frame."""
    temporal = deepcopy(model)
    temporal.prepare_stage("motion")
    assert temporal.temporal and not model.temporal and temporal.joint_frames and not model.joint_frames
    latents, poses, background = frame_inputs(1)
    context = randn(1, TOKENS, 16)
    expected = model.predict_frames(latents, 7, context, poses, background, None)
    assert torch.allclose(temporal.predict_frames(latents, 7, context, poses, background, None), expected, atol=1e-5)
    latents, poses = (part.expand(4, -1, -1, -1) for part in (latents, poses))
    result = temporal.predict_frames(latents, 7, context, poses, background, None)
    assert torch.allclose(result, expected.expand(4, -1, -1, -1), atol=1e-5)
    state = temporal.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert {name for name in state if name not in model.state_dict()} == {name for name in state if is_temporal(name)}
    again = temporal.unet
    temporal.prepare_stage("motion")
    assert temporal.unet is again


@torch.no_grad()
def test_single_frames_of_a_silent_temporal_model_are_the_image_models(temporal_pipeline, model):
    still = silent(temporal_pipeline.animator)
    image = deepcopy(model)
    own = still.state_dict()
    image.load_state_dict({name: own[name] for name in image.state_dict()})
    latents, poses, background = frame_inputs(1)
    context = randn(1, TOKENS, 16)
    results = [m.predict_frames(latents, 7, context, poses, background, None) for m in (still, image)]
    assert torch.allclose(*results, atol=1e-5)
    moving = temporal_pipeline.animator.predict_frames(latents, 7, context, poses, background, None)
    assert not torch.allclose(moving, results[0], atol=1e-3)


@torch.no_grad()
def test_frames_see_each_other_and_their_order_only_in_the_temporal_variant(temporal_pipeline, model):
    latents, poses, background = frame_inputs(4)
    context = randn(1, TOKENS, 16)
    changed = latents.clone()
    changed[3] += 1
    order = torch.tensor([2, 0, 3, 1])
    for animator, joint in ((temporal_pipeline.animator, True), (model, False)):
        base = animator.predict_frames(latents, 7, context, poses, background, None)
        beside = animator.predict_frames(changed, 7, context, poses, background, None)
        assert torch.allclose(base[0], beside[0], atol=1e-5) != joint
        shuffled = animator.predict_frames(latents[order], 7, context, poses[order], background, None)
        assert torch.allclose(shuffled, base[order], atol=1e-5) != joint


@torch.no_grad()
def test_temporal_networks_compute_what_the_published_ones_do():
    """Two clips at timesteps of their own. Inputs and outputs are stored, float32 of a run in float64 of the public
    networks of the temporal variant under diffusers 0.14; weights are drawn from the names in the file."""
    known = load_file(Path(__file__).with_name("disco_temporal.safetensors"))
    model = DisCo(*networks_of(synthetic_tensors(disco_shapes(temporal=True), seed=11)))
    for j in range(2):
        latents, poses = known["noisy_latents"][j].transpose(0, 1), known["poses"][j].transpose(0, 1)
        inputs = (latents, known["timestep"][j], known["context"][[j]])
        seen = (poses, known["background"][[j]], None)
        results = {
            "control_mid": model.control_residuals(*inputs, *seen)[-1],
            "prediction_without_control": model.unet(*inputs, return_dict=False)[0],
            "prediction": model.predict_frames(*inputs, *seen),
        }
        for name, result in results.items():
            assert torch.allclose(result, known[name][j].transpose(0, 1), atol=2e-5), name


def networks_of(tensors: dict[str, torch.Tensor]) -> tuple:
    """The networks of a file in the order of `DisCo`'s arguments."""
    weights = load_disco(tensors, "drawn")
    names = ("unet", "pose_control_net", "background_control_net", "image_encoder", "token_projection")
    return tuple(getattr(weights, name) for name in names)


@torch.no_grad()
def test_temporal_resnet_is_the_published_one():
    """Written out with clips as (1, c, f, h, w): norms over the clip, the convolution inside the residual branch."""
    torch.manual_seed(0)
    block = TemporalResnetBlock(32, 64, 16, 32, 1e-5)
    torch.nn.init.normal_(block.tem_conv.weight, std=0.1)
    frames, temb = torch.randn(5, 32, 3, 4), torch.randn(5, 16)

    def norm(clip: torch.Tensor, layer: torch.nn.GroupNorm) -> torch.Tensor:
        return F.silu(F.group_norm(clip, 32, layer.weight, layer.bias, 1e-5))

    def convolved(clip: torch.Tensor, layer: torch.nn.Conv2d) -> torch.Tensor:
        return F.conv3d(clip, layer.weight[:, :, None], layer.bias, padding=(0, *layer.padding))

    clip = frames.transpose(0, 1)[None]
    hidden = convolved(norm(clip, block.norm1), block.conv1)
    hidden = hidden + block.time_emb_proj(F.silu(temb)).T[None, :, :, None, None]
    hidden = convolved(norm(hidden, block.norm2), block.conv2)
    kernel = block.tem_conv.weight[..., None, None]
    hidden = hidden + F.conv3d(norm(hidden, block.tem_norm), kernel, block.tem_conv.bias, padding=(1, 0, 0))
    expected = convolved(clip, block.conv_shortcut) + hidden
    assert torch.allclose(block(frames, temb), expected[0].transpose(0, 1), atol=1e-5)


@torch.no_grad()
def test_temporal_attention_is_between_self_and_cross_attention_with_the_norm_of_the_latter():
    torch.manual_seed(0)
    block = TemporalTransformerBlock(16, 2, 8, 12).eval()
    for part in (block.tem_attn.to_out[0], block.norm1, block.norm2, block.norm3):
        torch.nn.init.normal_(part.weight, std=0.3)
    tokens, context = torch.randn(3, 5, 16), torch.randn(3, 4, 12)
    hidden = tokens + block.attn1(block.norm1(tokens))
    added = torch.zeros_like(hidden)
    for place in range(5):
        clip = block.norm2(hidden[None, :, place])
        query, key, value = (
            projection(clip)[0].unflatten(-1, (2, 8)).transpose(0, 1)
            for projection in (block.tem_attn.to_q, block.tem_attn.to_k, block.tem_attn.to_v)
        )
        attended = torch.softmax(query @ key.transpose(1, 2) / 8**0.5, dim=-1) @ value
        added[:, place] = block.tem_attn.to_out[0](attended.transpose(0, 1).flatten(1))
    assert added.abs().max() > 0.1
    hidden = hidden + added
    hidden = hidden + block.attn2(block.norm2(hidden), context)
    expected = hidden + block.ff(block.norm3(hidden))
    assert torch.allclose(block(tokens, encoder_hidden_states=context), expected, atol=1e-5)


def test_norms_of_temporal_networks_are_over_the_clip_but_in_front_of_transformers(temporal_pipeline):
    model = temporal_pipeline.animator
    for network in (model.unet, model.pose_control_net, model.background_control_net):
        norms = {name: type(part) for name, part in network.named_modules() if isinstance(part, torch.nn.GroupNorm)}
        by_frame = {name for name, kind in norms.items() if kind is torch.nn.GroupNorm}
        assert by_frame == {name for name in norms if re.search(r"\.attentions\.\d+\.norm$", name)} != set()
