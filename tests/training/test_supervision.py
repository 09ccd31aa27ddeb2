"""What the small model's training adds to the published objective: supervised attention, weights on the person,
resolutions without attention, cached latents."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from core.config import check_config
from core.errors import UserError
from data.clips.caches import CachedClips
from data.config import PeopleConfig
from models.animators.animate_anyone.model import AnimateAnyone
from models.animators.registry import load_pipeline, supervised_attention
from models.attention.layers import token_levels, unet_layers
from models.config import SHIPPED_MODEL, SMALL_ANIMATORS
from models.unets import ReferenceNet
from tests.networks import TINY
from tpc.config import CompositionConfig
from training.attention_loss import attention_loss, body_points, point_probe, point_weights, with_background
from training.build import make_pipeline, set_trainable, start_from
from training.config import (
    AttentionLossConfig,
    AugmentationConfig,
    DataConfig,
    ModelConfig,
    NoiseConfig,
    TrainConfig,
)
from training.data import ensure_latents, make_dataset
from training.export import record_training
from training.objective import Objective, batch_latents, person_weights, sample_generators

SIZE = [32, 32]
GRIDS = [(8, 8), (4, 4)]
ON = AttentionLossConfig(weight=0.5)


@pytest.fixture(scope="module")
def vae() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(0, 0, 0),
        num_decoder_blocks=(0, 0, 0),
        latent_channels=4,
    ).eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    data = make_dataset(DataConfig(size=SIZE, num_frames=1, stride=4, workers=0), 3)
    return torch.utils.data.default_collate([data[i] for i in range(3)])


def networks(config: ModelConfig = TINY):
    torch.manual_seed(1)
    model = AnimateAnyone.small(config, 4, max(SIZE) // 4).train()
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    set_trainable(model, TrainConfig(stage="image", output="x", model=config))
    return model


def loss_of(model, vae, batch, attention=None, noise=None):
    noise = noise or NoiseConfig(condition_dropout=0.0)
    generators = sample_generators(0, range(len(batch["frames"])))
    config = TrainConfig(stage="image", output="x", noise=noise, data=DataConfig(size=SIZE))
    config.attention = attention or config.attention
    return Objective(model, vae, config).loss(model, batch, generators)


def pointing_at(places: torch.Tensor, grid: tuple[int, int], points, share: float) -> SimpleNamespace:
    """What a probe found of queries that give `share` to the reference, all to the tokens at `places` in pixels."""
    n = grid[0] * grid[1]
    numbers = point_probe(replace(points, targets=places), [grid]).queries[n]
    maps = torch.zeros(*numbers.shape, 2 * n)
    maps[..., :n] = (1 - share) / n
    maps[..., n:].scatter_(-1, numbers[..., None], share)
    return SimpleNamespace(tokens={"layer": n}, maps={"layer": maps[:, None].repeat(1, 2, 1, 1)})


def test_points_are_means_of_keypoints_and_cover_limbs_and_trunk():
    weights = point_weights()
    assert torch.allclose(weights.sum(1), torch.ones(len(weights)))
    assert (weights >= 0).all()
    for joint in (0, *range(5, 17)):
        assert (weights[:, joint] > 1 - 1e-6).any(), f"keypoint {joint} is not itself a point"
    assert len(torch.unique(weights, dim=0)) == len(weights)


def test_points_need_their_keypoints_in_both_images(batch):
    seen = body_points(batch, 0.3)
    hidden = {name: value.clone() for name, value in batch.items()}
    hidden["reference_keypoints"][:, 9, 2] = 0.1
    lost = seen.valid & ~body_points(hidden, 0.3).valid
    assert lost.any()
    assert (point_weights()[lost.any(0)][:, 9] > 0).all()


def test_pointing_right_costs_little_and_pointing_wrong_much(batch):
    points, grid = body_points(batch, 0.0), GRIDS[0]
    right, accuracy = attention_loss(pointing_at(points.sources, grid, points, 0.5), points, [grid], ON)
    wrong, none = attention_loss(pointing_at(31 - points.sources, grid, points, 0.5), points, [grid], ON)
    assert accuracy == 1
    assert right < 0.5 / ON.radius**2  # the farthest place of a token is half its diagonal from the centre
    assert wrong > right + 1
    assert none < 1


def test_the_share_that_the_reference_gets_does_not_matter(batch):
    points, grid = body_points(batch, 0.0), GRIDS[0]
    losses = [attention_loss(pointing_at(points.sources, grid, points, s), points, [grid], ON)[0] for s in (0.1, 0.9)]
    assert torch.allclose(*losses, atol=1e-5)
    blind, accuracy = attention_loss(pointing_at(points.sources, grid, points, 0.0), points, [grid], ON)
    assert blind == 0
    assert torch.isnan(accuracy)


def test_supervision_teaches_attention_and_leaves_the_rest_of_the_loss(vae, batch):
    model = networks()
    plain, supervised = loss_of(model, vae, batch), loss_of(model, vae, batch, ON)
    assert torch.equal(plain.errors, supervised.errors)
    assert plain.pointing is None
    assert torch.allclose(supervised.loss, plain.loss + ON.weight * supervised.pointing[0], atol=1e-5)
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and ("to_q" in name or "to_k" in name)]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    before = supervised.pointing[0]
    for _ in range(15):
        optimizer.zero_grad()
        result = loss_of(model, vae, batch, ON)
        result.loss.backward()
        optimizer.step()
    assert result.pointing[0] < before - 0.2


def test_dropped_samples_are_not_supervised(vae, batch):
    result = loss_of(networks(), vae, batch, ON, NoiseConfig(condition_dropout=1.0))
    assert result.pointing[0] == 0


def test_weights_have_mean_one_and_the_ratio_asked_for():
    masks = torch.zeros(2, 1, 1, 32, 32)
    masks[0, ..., :16, :] = 1
    weights = person_weights(masks, (8, 8), 4.0)
    assert torch.allclose(weights.mean(dim=(1, 2, 3, 4)), torch.ones(2))
    assert torch.allclose(weights[0, ..., 0, 0] / weights[0, ..., 7, 0], torch.tensor(4.0))
    assert torch.equal(weights[1], torch.ones_like(weights[1]))


def test_a_heavier_person_moves_the_gradient_towards_it(vae, batch):
    model = networks()
    even = loss_of(model, vae, batch)
    heavy = loss_of(model, vae, batch, noise=NoiseConfig(condition_dropout=0.0, person_weight=4.0))
    assert torch.equal(even.errors, heavy.errors)
    assert not torch.allclose(even.loss, heavy.loss)


WITHOUT_FINEST = replace(TINY, block_out_channels=[8, 16, 32], attention=["none", "both", "both"])
UP_AT_FINEST = replace(WITHOUT_FINEST, attention=["up", "both", "both"], attention_heads=[1, 2, 4])


@pytest.mark.parametrize(
    ("config", "grids"), [(WITHOUT_FINEST, [(4, 4), (2, 2)]), (UP_AT_FINEST, [(8, 8), (4, 4), (2, 2)])]
)
def test_resolutions_with_less_attention(vae, batch, config, grids):
    model = networks(config)
    assert [level.queries for level in token_levels(unet_layers(model.denoising_unet, (8, 8)))] == grids
    loss_of(model, vae, batch, ON).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    layers = model.attention_layers((8, 8))
    assert any(layer.startswith("up_blocks.2.") for layer in layers) == (len(grids) == 3)
    assert not any(layer.startswith("down_blocks.0.") for layer in layers)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("attention", ["both", "none"]),
        ("attention", ["none", "both", "none"]),
        ("attention", ["down", "both", "both"]),
        ("attention_heads", [1, 2]),
        ("attention_heads", [3]),
    ],
)
def test_resolution_settings_that_cannot_be_built(setting, value):
    with pytest.raises(UserError, match=f"model.{setting}="):
        networks(replace(WITHOUT_FINEST, **{setting: value}))


def test_networks_go_on_after_they_got_further_layers(tmp_path, vae, batch):
    """The added transformers end in zeros, so the prediction is that of the networks they start from."""
    small = networks(WITHOUT_FINEST)
    make_pipeline(vae, small, NoiseConfig()).save_pretrained(tmp_path)
    grown = AnimateAnyone.small(UP_AT_FINEST, 4, max(SIZE) // 4)
    start_from(grown, str(tmp_path))
    for model in (small, grown):
        model.eval()
    # One head more or less changes what the old layers compute, so the comparison keeps theirs.
    same = AnimateAnyone.small(replace(UP_AT_FINEST, attention_heads=[2]), 4, max(SIZE) // 4).eval()
    start_from(same, str(tmp_path))
    with torch.no_grad():
        assert torch.allclose(loss_of(small, vae, batch).loss, loss_of(same, vae, batch).loss, rtol=1e-5)
    own = small.denoising_unet.state_dict()
    for name in ("up_blocks.2.resnets.0.conv1.weight", "up_blocks.1.upsamplers.0.conv.weight"):
        assert torch.equal(grown.reference_net.state_dict()[name], own[name]), "not taken from the twin"
    with pytest.raises(UserError, match="agrees with .* of the new networks"):
        start_from(
            AnimateAnyone.small(replace(TINY, block_out_channels=[48, 48], context_dim=24), 3, 12), str(tmp_path)
        )


def test_background_points_lie_in_the_background_and_stay_where_they_are(batch):
    points = with_background(body_points(batch, 0.3), batch, 4, sample_generators(0, range(3)))
    body = body_points(batch, 0.3).targets.shape[1]
    assert points.body == body
    added = points.targets[:, body:]
    assert added.shape == (3, 16, 2)
    assert torch.equal(added, points.sources[:, body:])
    cells = ((added + 0.5) / 8).long()
    assert torch.equal(cells[..., 1] * 4 + cells[..., 0], torch.arange(16).expand(3, -1)), "one point a cell"
    valid = points.valid[:, body:]
    assert valid.any()
    assert not valid.all()
    pixels = added.round().long().clamp(0, 31)
    for number in range(3):
        person = torch.maximum(batch["masks"][number, 0, 0], batch["reference_mask"][number, 0])
        covered = person[pixels[number, :, 1], pixels[number, :, 0]] > 0.5
        assert torch.equal(valid[number], ~covered)


def test_surface_takes_the_place_of_keypoints(vae, batch):
    model = networks()
    items = dict(batch)
    places = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))  # every place shows another point
    items["surfaces"], items["reference_surface"] = places[:, :, None], places
    on = AttentionLossConfig(weight=0.5, surface=24, background=4)
    keypoints, surface = loss_of(model, vae, items, replace(on, surface=0)), loss_of(model, vae, items, on)
    assert torch.equal(keypoints.errors, surface.errors), "the prediction is the same"
    assert keypoints.pointing[0] != surface.pointing[0]
    surface.loss.backward()
    query = model.denoising_unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert query.grad.abs().sum() > 0
    hidden = items | {"reference_surface": torch.full_like(places, torch.nan)}
    # Nobody is in the reference: the background alone is supervised.
    assert torch.isfinite(loss_of(model, vae, hidden, on).loss)


def test_background_is_supervised_beside_the_body(vae, batch):
    model = networks()
    both = AttentionLossConfig(weight=0.5, background=4)
    alone, beside = loss_of(model, vae, batch, ON), loss_of(model, vae, batch, both)
    assert torch.equal(alone.errors, beside.errors)
    assert not torch.allclose(alone.pointing[0], beside.pointing[0])
    assert torch.equal(alone.pointing[1], beside.pointing[1]), "accuracy is that of the body"


def test_reference_net_without_later_blocks_loads_again(tmp_path):
    net = networks(WITHOUT_FINEST).reference_net
    net.save_pretrained(tmp_path)
    again = ReferenceNet.from_pretrained(tmp_path)
    assert again.state_dict().keys() == net.state_dict().keys()
    assert len(again.up_blocks) == 2


def test_both_unets_start_as_the_same_image_model():
    torch.manual_seed(0)
    model = AnimateAnyone.small(TINY, 4, 8)
    own = model.denoising_unet.state_dict()
    shared = [name for name in model.reference_net.state_dict() if name in own]
    assert len(shared) > 50
    assert all(torch.equal(model.reference_net.state_dict()[name], own[name]) for name in shared)


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_cached_latents_are_those_of_the_images(tmp_path, vae, kind):
    if kind == "kl":
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
        ).eval()
    config = DataConfig(size=SIZE, stride=4, workers=0, cache=str(tmp_path / "clips"), cache_clips=3, cache_frames=2)
    clips = make_dataset(config, 5)
    assert isinstance(clips, CachedClips)
    folder = ensure_latents(clips, vae, chunk=4)
    assert (folder / "deviation.npy").exists() == (kind == "kl")
    assert ensure_latents(clips, vae) == folder
    items, model = clips.with_latents(folder), networks(TINY)
    for index in range(5):
        plain = {name: value[None] for name, value in clips[index].items()}
        cached = {name: value[None] for name, value in items[index].items()}
        for expected, found in zip(*(batch_latents(vae, b, model) for b in (plain, cached)), strict=True):
            assert torch.allclose(expected, found, atol=0.05 * float(expected.abs().max().clamp(min=1e-3)))


def test_options_that_cannot_work_are_refused():
    good = TrainConfig(stage="image", output="x", model=replace(TINY, vae="vae"))
    check_config(good)
    moved = AugmentationConfig(composition=CompositionConfig(probability=0.5, fill="edge"))
    for bad, message in (
        (replace(good, attention=AttentionLossConfig(weight=-1.0)), "attention.weight=-1"),
        (replace(good, attention=AttentionLossConfig(background=-1)), "attention.background=-1"),
        (replace(good, attention=AttentionLossConfig(background=4), augmentation=moved), "composition.fill=edge"),
        (replace(good, noise=NoiseConfig(person_weight=0.0)), "person_weight=0"),
        (replace(good, data=DataConfig(cache_latents=True)), "cache_latents"),
    ):
        with pytest.raises(UserError, match=message):
            check_config(bad)
    for people, message in (
        (PeopleConfig(height=[1.0]), "height"),
        (PeopleConfig(plain=1.5), "plain=1.5"),
        (PeopleConfig(tilted=-0.1), "tilted=-0.1"),
    ):
        with pytest.raises(UserError, match=message):
            make_dataset(DataConfig(people=people), 1)


def test_pipeline_folders_say_whether_attention_was_supervised(tiny_pipeline, tmp_path):
    """By the run itself or by one that it began with; nobody knows of weights from elsewhere."""
    tiny_pipeline.save_pretrained(tmp_path / "elsewhere")
    runs = [
        ("plain", 0.0, {}, False),
        ("supervised", 0.1, {}, True),
        ("later", 0.0, {"init": "supervised"}, True),
        ("larger", 0.0, {"start": "later"}, True),
        ("later_plain", 0.0, {"init": "plain"}, False),
        ("unknown", 0.0, {"init": "elsewhere"}, None),
        ("tuned", 0.1, {"init": "elsewhere"}, True),
    ]
    for name, weight, begun, expected in runs:
        config = TrainConfig(attention=AttentionLossConfig(weight=weight))
        for key, folder in begun.items():
            setattr(config.model, key, str(tmp_path / folder))
        tiny_pipeline.save_pretrained(tmp_path / name)
        record_training(tmp_path / name, config)
        assert supervised_attention(tmp_path / name) is expected, name
    load_pipeline(tmp_path / "later")


def test_shipped_models_say_whether_attention_was_supervised():
    assert supervised_attention(SHIPPED_MODEL)
    known = {folder.name: supervised_attention(folder) for folder in SMALL_ANIMATORS}
    unsupervised = dict.fromkeys(("disco", "dream_pose", "wan_animate"), False)
    assert known == {"animate_anyone": True, "magic_animate": True, **unsupervised}
