"""Networks: reference attention against its definition, single frames, gradients, checkpointing, save and load."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from models.animators.animate_anyone.model import AnimateAnyone, image_context
from models.attention.context import ReferenceContext, same_reference
from models.attention.layers import token_levels, unet_layers
from models.attention.masking import Visibility
from models.attention.processors import ReferenceReadProcessor, reference_layers
from models.unets import DenoisingUNet, PoseGuider, ReferenceNet
from tests.networks import TINY
from training.build import set_trainable
from training.config import TrainConfig

BATCH, FRAMES, CHANNELS = 2, 3, 4


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter random, those that start at zero too, so that no layer goes untested."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale


@pytest.fixture(scope="module")
def model() -> AnimateAnyone:
    torch.manual_seed(0)
    built = AnimateAnyone.small(TINY, CHANNELS, 8)
    randomize(built)
    return built.eval()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "noisy_latents": draw(BATCH, CHANNELS, FRAMES, 8, 8),
        "timestep": torch.tensor([10, 900]),
        "reference_latents": draw(BATCH, CHANNELS, 8, 8),
        "reference_image": draw(BATCH, 3, 32, 32).clamp(-1, 1),
        "poses": draw(BATCH, 3, FRAMES, 32, 32).sigmoid(),
        "dropped": torch.tensor([False, True]),
    }


def attention_by_definition(attn, hidden, tokens, index, visible=None):
    """softmax(q k / sqrt(d)) v over the frame's own tokens and those of its images, written out."""
    seen = torch.cat([hidden, tokens[index].flatten(1, 2)], dim=1)
    query, key, value = attn.to_q(hidden), attn.to_k(seen), attn.to_v(seen)
    parts = []
    for q, k, v in zip(*(x.chunk(attn.heads, dim=-1) for x in (query, key, value)), strict=True):
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if visible is not None:
            logits = logits.masked_fill(~visible, -torch.inf)
        parts.append(logits.softmax(-1) @ v)
    return attn.to_out[0](torch.cat(parts, dim=-1))


@pytest.mark.parametrize("masked", [False, True])
def test_reference_attention_is_the_formula(model, masked):
    layer = reference_layers(model.denoising_unet)[0]
    attn = model.denoising_unet.get_submodule(layer)
    channels, n, r = attn.to_q.in_features, 12, 12
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(4, n, channels, generator=generator)
    tokens = torch.randn(3, r, channels, generator=generator)
    index = torch.tensor([[0, 1], [0, 2], [2, 2], [1, 0]])
    query_flags = (torch.rand(4, n, 2, generator=generator) < 0.4).float()
    key_flags = (torch.rand(4, n + 2 * r, 2, generator=generator) < 0.4).float()
    key_flags[:, 0] = 0  # every query keeps one visible key
    context = ReferenceContext({layer: tokens}, index, Visibility({n: query_flags}, {n: key_flags}))
    if not masked:
        context = ReferenceContext({layer: tokens}, index)
    visible = query_flags @ key_flags.transpose(1, 2) == 0 if masked else None
    result = ReferenceReadProcessor(layer)(attn, hidden, reference=context)
    expected = attention_by_definition(attn, hidden, tokens, index, visible)
    assert torch.allclose(result, expected, atol=1e-5)
    half = ReferenceReadProcessor(layer)(attn.to(torch.bfloat16), hidden.bfloat16(), reference=context)
    attn.float()
    assert (half.float() - expected).norm() < 0.03 * expected.norm()


def test_hidden_reference_is_no_reference_sample_by_sample(model, inputs):
    unet, latents = model.denoising_unet, inputs["noisy_latents"]
    context = torch.randn(BATCH, 1, 8, generator=torch.Generator().manual_seed(3))
    pose = model.pose_guider(inputs["poses"])
    tokens = model.reference_net(inputs["reference_latents"], 0, context)
    seen = same_reference(tokens, FRAMES)
    hidden = torch.tensor([True, False]).repeat_interleave(FRAMES)
    blind = seen.drop_images(hidden)
    with torch.no_grad():
        mixed = unet(latents, inputs["timestep"], context, pose, blind)
        without = unet(latents, inputs["timestep"], context, pose)
        with_reference = unet(latents, inputs["timestep"], context, pose, seen)
    assert torch.allclose(mixed[0], without[0], atol=1e-5)
    assert torch.allclose(mixed[1], with_reference[1], atol=1e-5)
    assert (without - with_reference).abs().mean() > 1e-3


def test_an_image_seen_twice_is_seen_once(model, inputs):
    """Doubling a key doubles its weight; hiding the double restores the result."""
    unet, latents = model.denoising_unet, inputs["noisy_latents"][:1]
    context = torch.zeros(1, 1, 8)
    pose = model.pose_guider(inputs["poses"][:1])
    tokens = model.reference_net(inputs["reference_latents"][:1], 0, context)
    grids = [level.queries for level in token_levels(unet_layers(unet, (8, 8)))]
    index = torch.zeros(FRAMES, 2, dtype=torch.long)
    query = {h * w: torch.ones(FRAMES, h * w, 1) for h, w in grids}
    key = {n: torch.cat([torch.zeros(2 * n, 1), torch.ones(n, 1)]).expand(FRAMES, -1, -1) for n in query}
    with torch.no_grad():
        once = unet(latents, 5, context, pose, same_reference(tokens, FRAMES))
        hidden_double = unet(latents, 5, context, pose, ReferenceContext(tokens, index, Visibility(query, key)))
        double = unet(latents, 5, context, pose, ReferenceContext(tokens, index))
    assert torch.allclose(once, hidden_double, atol=1e-5)
    assert (once - double).abs().max() > 1e-4


def test_single_frames_equal_the_image_model(model):
    """Motion modules are the identity for one frame, whatever their weights."""
    unet = model.denoising_unet
    config = unet.config
    image_unet = UNet2DConditionModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=config.block_out_channels,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()
    state = {name: value for name, value in unet.state_dict().items() if "motion_modules" not in name}
    image_unet.load_state_dict(state)
    latents, context = torch.randn(2, CHANNELS, 8, 8), torch.randn(2, 1, 8)
    pose = torch.zeros(2, config.block_out_channels[0], 1, 8, 8)
    with torch.no_grad():
        frame = unet(latents[:, :, None], 7, context, pose)[:, :, 0]
        assert torch.allclose(frame, image_unet(latents, 7, context).sample, atol=1e-5)


def test_new_motion_modules_change_nothing(inputs):
    fresh = AnimateAnyone.small(TINY, CHANNELS, 8).eval()
    latents, context = inputs["noisy_latents"], torch.zeros(BATCH, 1, 8)
    pose = fresh.pose_guider(inputs["poses"])
    assert pose.abs().max() == 0
    with torch.no_grad():
        clip = fresh.denoising_unet(latents, 3, context, pose)
        frames = [fresh.denoising_unet(latents[:, :, [i]], 3, context, pose[:, :, [i]]) for i in range(FRAMES)]
    assert torch.allclose(clip, torch.cat(frames, dim=2), atol=1e-5)


def test_pose_guider_works_frame_by_frame(model, inputs):
    features = model.pose_guider(inputs["poses"])
    assert features.shape == (BATCH, 16, FRAMES, 8, 8)
    alone = model.pose_guider(inputs["poses"][:, :, [1]])
    assert torch.allclose(features[:, :, [1]], alone, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (16, 6)])
def test_attention_grids_are_those_the_layers_see(model, size):
    """Odd latents too: the grids must match the token counts that the ReferenceNet writes."""
    tokens = model.reference_net(torch.randn(1, CHANNELS, *size), 0, torch.zeros(1, 1, 8))
    written = {value.shape[1] for value in tokens.values()}
    levels = token_levels(unet_layers(model.denoising_unet, size))
    assert {level.tokens for level in levels} == written
    assert set(tokens) == set(reference_layers(model.denoising_unet))


@pytest.mark.parametrize("stage", ["image", "motion"])
def test_every_trainable_parameter_gets_a_gradient(inputs, stage):
    model = AnimateAnyone.small(TINY, CHANNELS, 8)
    randomize(model)
    config = TrainConfig(stage=stage, output="", model=TINY)
    trainable = set_trainable(model, config)
    if stage == "image":
        inputs = {k: v[:, :, :1] if k in ("noisy_latents", "poses") else v for k, v in inputs.items()}
    model(**inputs).square().mean().backward()
    # With one context token cross-attention's softmax is constant: its queries and keys get a gradient of zero.
    assert trainable and all(parameter.grad is not None for parameter in trainable)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("motion_modules" in name for name in names) == (stage == "motion")
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert all(parameter.grad is None for parameter in frozen)


def test_gradient_checkpointing_changes_nothing(inputs):
    gradients = []
    for checkpointing in (False, True):
        model = AnimateAnyone.small(TINY, CHANNELS, 8)
        randomize(model)
        if checkpointing:
            model.reference_net.enable_gradient_checkpointing()
            model.denoising_unet.enable_gradient_checkpointing()
        model.train()
        model(**inputs).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name


def test_a_batch_of_two_is_two_batches_of_one(model, inputs):
    with torch.no_grad():
        both = model(**inputs)
        alone = [model(**{name: value[[i]] for name, value in inputs.items()}) for i in range(2)]
    assert torch.allclose(both, torch.cat(alone), atol=1e-5)


def test_image_context_is_one_token_of_the_whole_image(model):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 40, 24, generator=generator) * 2 - 1
    context = image_context(model.image_encoder, image)
    squashed = F.interpolate(image, (16, 16), mode="bicubic", antialias=True)
    assert context.shape == (1, 1, 8)
    assert torch.allclose(context, image_context(model.image_encoder, squashed), atol=1e-2)


def test_networks_save_and_load(model, tmp_path):
    for name, kind in (
        ("reference_net", ReferenceNet),
        ("denoising_unet", DenoisingUNet),
        ("pose_guider", PoseGuider),
    ):
        part = getattr(model, name)
        part.save_pretrained(tmp_path / name)
        loaded = kind.from_pretrained(tmp_path / name)
        before, after = part.state_dict(), loaded.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
