"""Image tokens in cross-attention: what is seen, what flags hide, what replaces the reference, and guidance scales."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from evaluation.attention.maps import require_reference
from models.animators.base import Animator
from models.attention.context import ReferenceContext, same_reference
from models.attention.layers import KeyLayout, LayerShape, TokenLevel, image_token_layers, token_levels
from models.attention.maps import RecordedAttention
from models.attention.masking import Visibility, dense_mask
from models.attention.probe import AttentionProbe
from models.attention.processors import set_image_processors
from models.attention.recording import AttentionConfig, AttentionRecording, AttentionRun
from models.reference_images import attended_images
from tests.models.test_shortcuts import calibration_of
from tpc.attach import frame_visibility, gate_flags, replacement_visibility, visibility_flags

FRAMES, LATENTS, TOKENS = 3, (6, 5), 7
KEYS = KeyLayout((2, 3), whole=1)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()
    set_image_processors(network)
    return network


def predict(unet, context: torch.Tensor, seen: ReferenceContext | None) -> torch.Tensor:
    latents = torch.randn(len(context), 4, *LATENTS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return unet(latents, 30, context, cross_attention_kwargs={"reference": seen}).sample


def test_seen_images_are_context(unet):
    """Every frame sees the images of its row, one after the other, whatever the context."""
    images = torch.randn(4, TOKENS, 8)
    index = torch.tensor([[0, 1], [0, 3], [2, 2]])
    expected = predict(unet, images[index].flatten(1, 2), None)
    nothing = torch.zeros(FRAMES, TOKENS, 8)
    memory = ReferenceContext({"images": images}, index, projected={})
    for seen in (ReferenceContext({"images": images}, index), memory, memory):
        assert torch.allclose(predict(unet, nothing, seen), expected, atol=1e-5)
    assert memory.projected.keys() == image_token_layers(unet, LATENTS, KEYS).keys()
    assert not torch.allclose(predict(unet, nothing, None), expected, atol=1e-3)


def test_layers_are_those_that_see_images(unet):
    layers = image_token_layers(unet, LATENTS, KEYS)
    probe = AttentionProbe({30: torch.zeros(FRAMES, 2, dtype=torch.long), 9: torch.zeros(FRAMES, 2, dtype=torch.long)})
    seen = ReferenceContext(
        {"images": torch.randn(1, TOKENS, 8)}, torch.zeros(FRAMES, 1, dtype=torch.long), probe=probe
    )
    predict(unet, torch.zeros(FRAMES, TOKENS, 8), seen)
    assert list(layers) == list(probe.maps)
    assert {name: shape.tokens for name, shape in layers.items()} == probe.tokens
    assert all(value.shape == (FRAMES, layers[name].heads, 2, TOKENS) for name, value in probe.maps.items())
    assert token_levels(layers) == [TokenLevel((6, 5), KEYS), TokenLevel((3, 3), KEYS)]


def test_names_of_several_networks_differ(unet):
    names = list(image_token_layers(unet, LATENTS, KEYS))
    set_image_processors(unet, prefix="other.")
    try:
        assert list(image_token_layers(unet, LATENTS, KEYS, "other.")) == [f"other.{name}" for name in names]
    finally:
        set_image_processors(unet)


def test_levels_must_tell_their_tokens_apart():
    shapes = {"a": LayerShape((2, 3), 1, 1, KEYS), "b": LayerShape((3, 2), 1, 1, KEYS)}
    with pytest.raises(ValueError, match="same grids and keys"):
        token_levels(shapes)


def test_dropped_frames_see_the_null_image_alone(unet):
    images = torch.randn(4, TOKENS, 8)
    levels = [TokenLevel((6, 5), KEYS), TokenLevel((3, 3), KEYS)]
    hidden = torch.tensor([[False, True]] * FRAMES)
    flags = {level.tokens: gate_flags(hidden, level) for level in levels}
    seen = ReferenceContext(
        {"images": images},
        torch.tensor([[0, 1]] * FRAMES),
        Visibility({n: query for n, (query, _) in flags.items()}, {n: key for n, (_, key) in flags.items()}),
    )
    nothing = torch.zeros(FRAMES, TOKENS, 8)
    dropped = torch.tensor([False, True, False])
    expected = predict(unet, images[torch.tensor([0, 3, 0])], None)
    assert torch.allclose(predict(unet, nothing, seen.drop_to_null(dropped, 3)), expected, atol=1e-5)
    plain = same_reference({"images": images[:3]}, 1).drop_to_null(dropped, 3)
    plain = ReferenceContext({"images": images}, plain.index)
    assert torch.allclose(predict(unet, nothing, plain), predict(unet, images[[0, 3, 2]], None), atol=1e-5)


@pytest.mark.parametrize("preset", ["paper", "release", "exclusive"])
def test_tokens_without_a_place_are_hidden_with_their_image_only(preset):
    """The flags of placed tokens are those of reference attention; the class token goes by person and frame."""
    generator = torch.Generator().manual_seed(0)
    n, r, persons, frames = 6, 4, 2, 8
    target = (torch.rand(frames, persons, n, generator=generator) > 0.5).float()
    other = torch.zeros(frames, n)
    reference, calibrated = ((torch.rand(frames, persons, r, generator=generator) > 0.5).float() for _ in range(2))
    present = torch.rand(frames, persons, generator=generator) > 0.3
    arguments = (target, other, reference, calibrated, present)

    def visible(layout: KeyLayout | None) -> torch.Tensor:
        query, key = visibility_flags(*arguments, preset=preset, layout=layout)
        return torch.einsum("bqg,bkg->bqk", query, key) == 0

    expected = visible(None)[..., n:].unflatten(-1, (1 + persons, r))
    found = visible(KeyLayout((2, 2), whole=1)).unflatten(-1, (1 + persons, 1 + r))
    assert torch.equal(found[..., 1:], expected)
    whole = found[..., 0]  # (frames, queries, images)
    assert whole[..., 0].all(), "the reference's is never hidden"
    mine = (target > 0).transpose(1, 2) & present[:, None]
    background = ~mine.any(-1) & ~((target > 0).transpose(1, 2) & ~present[:, None]).any(-1)
    allowed = (mine | background[..., None] if preset == "paper" else mine) & present[:, None]
    assert torch.equal(whole[..., 1:], allowed)
    with_own = visible(KeyLayout((2, 2), whole=1, own=True))
    assert with_own[..., :n].all() and torch.equal(with_own[..., n:].unflatten(-1, (3, 5)), found)


def test_mixed_tokens_are_there_or_not():
    made = calibration_of(2)
    level = TokenLevel((4, 4), KeyLayout(None, whole=5))
    members = np.full((made.frames, 2), -1)
    members[0] = made.member[0]
    members[1, 0] = made.member[1, 0]
    flags = frame_visibility(made, range(made.frames), members, [level])
    visible = dense_mask(flags, 16).unflatten(-1, (3, 5))
    assert (visible.all(1).all(-1) == visible.any(1).any(-1)).all(), "all queries, all tokens of an image alike"
    expected = torch.cat([torch.ones(made.frames, 1, dtype=torch.bool), torch.from_numpy(members >= 0)], dim=1)
    assert torch.equal(visible[:, 0, :, 0], expected)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=4))
def test_replacing_shows_each_image_once_and_the_reference_where_somebody_is_uncalibrated(rows):
    level = TokenLevel((2, 2), KeyLayout((2, 1), own=True))
    slots = torch.tensor(rows)
    assert torch.equal(attended_images(slots, replaces_reference=True), slots)
    flags = replacement_visibility(slots.numpy() - 1, [level])
    visible = dense_mask(flags, 4)
    assert visible[..., :4].all(), "a frame always sees itself"
    shown = visible[..., 4:].unflatten(-1, (3, 2))
    assert torch.equal(shown.all(-1), shown.any(-1)) and torch.equal(shown.all(1), shown.any(1))
    for row, seen in zip(rows, shown[:, 0, :, 0].tolist(), strict=True):
        images = [image for image, there in zip(row, seen, strict=True) if there]
        assert images.count(0) == min(1, row.count(0)), "the reference once, if anybody needs it"
        assert [image for image in images if image] == [image for image in row if image]


def test_one_person_is_replaced_without_flags():
    for slots, expected in ((torch.tensor([[3], [0]]), [[3], [0]]), (torch.zeros(2, 0, dtype=torch.long), [[0], [0]])):
        assert replacement_visibility(slots.numpy() - 1, []) is None
        assert attended_images(slots, replaces_reference=True).tolist() == expected


def scales(scale, *names: str) -> tuple[float, ...]:
    """`Animator.guidance_scales`, which knows nothing of an animator but the names."""
    return Animator.guidance_scales(SimpleNamespace(guidance_names=names), scale)


def test_guidance_scales():
    assert scales(2, *Animator.guidance_names) == (2.0,)
    assert scales(2.5, "image", "pose") == (2.5, 2.5)
    assert scales([8, 3], "image", "pose") == (8.0, 3.0)
    with pytest.raises(ValueError, match="image, pose"):
        scales([1, 2, 3], "image", "pose")


@pytest.mark.parametrize(
    ("keys", "grid"), [(KeyLayout(None, whole=5), (1, 1)), (KEYS, (2, 3)), (KeyLayout((4, 3), own=True), (4, 3))]
)
def test_recorded_maps_have_the_grid_of_the_keys(tmp_path, keys, grid):
    """What has no place in an image is summed up: into the image's share, or into what is not of the maps."""
    frames, heads, images, queries = 2, 2, 3, 12
    run = AttentionRun({"layer": LayerShape((4, 3), heads, 8, keys)}, (24, 32), frames, 1, images, replaced=True)
    generator = torch.Generator().manual_seed(0)
    count = images * keys.tokens + queries * keys.own
    query, key = (torch.randn(frames, heads, n, 4, generator=generator) for n in (queries, count))
    with AttentionRecording(AttentionConfig()) as recording:
        recording.begin(run)
        recording.probe(0, 10, [range(frames)], 0).record("layer", query, key, None, 0.5)
    recording.result.save(tmp_path / "recorded")
    expected = (query @ key.transpose(2, 3) * 0.5).softmax(-1)
    shown = expected[..., count - images * keys.tokens :].unflatten(-1, (images, keys.tokens))
    placed = shown.sum(-1, keepdim=True) if keys.grid is None else shown[..., keys.whole :]
    for recorded in (recording.result, RecordedAttention.load(tmp_path / "recorded")):
        assert recorded.grid("layer") == grid and recorded.images == ("calibrated 0", "calibrated 1", "calibrated 2")
        assert np.abs(recorded.maps["layer"][0] - placed.numpy()).max() < 1e-6
        assert np.abs(recorded.maps["layer"].sum((-1, -2)) + recorded.own["layer"] - 1).max() < 1e-5
        with pytest.raises(UserError, match="tpc.attach=replace shows no reference"):
            require_reference(recorded)


def test_attention_to_mixed_tokens_points_nowhere():
    run = AttentionRun({"layer": LayerShape((2, 2), 1, 4, KeyLayout(None, whole=5))}, (8, 8), 1, 1)
    with AttentionRecording(AttentionConfig()) as recording:
        recording.begin(run)
    with pytest.raises(UserError, match="layer attends to tokens that mix the whole image"):
        require_reference(recording.result)
