"""Cached features: what is stored, when it stops being valid, and that training on it gives the same loss."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

import training.vae
from core.errors import UserError
from data.clips.caches import FeatureCache
from data.clips.videos import VideoFolder
from data.config import FeatureConfig, PrepareConfig, Shard
from data.preparation.layouts import find_clips
from data.preparation.manifest import read_manifest, write_manifest
from data.preparation.prepare import prepare_clips
from inference.features import load_network, make_features, network_digest
from models.vae import vae_encode, vae_scale_factor
from tests.filmed import FigureEstimator, damage, figure_film, rendered_film, save_prepared_videos
from tests.networks import TINY
from training.build import make_networks
from training.config import AugmentationConfig, DataConfig, ModelConfig, NoiseConfig, TrainConfig
from training.data import check_features, make_dataset
from training.objective import Objective, compose_samples, sample_generators

SIZE = [32, 32]
ALONE = Shard()


def prepare(root: Path, output: Path) -> None:
    clips = find_clips(root)
    prepare_clips(clips, output, PrepareConfig(source=str(root), output=str(output)), FigureEstimator)
    write_manifest(output, [clip.name for clip in clips], "videos", str(root))


@pytest.fixture(scope="module")
def model(tiny_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Two prepared clips of rendered people."""
    root = save_prepared_videos(tmp_path / "videos", {"a": rendered_film(0), "sub/b": rendered_film(1)})
    prepare(root, tmp_path / "set")
    return tmp_path / "set"


def make(kind: str, dataset: Path, model: Path, shard: Shard = ALONE, **settings):
    given = {"dataset": str(dataset), "model": str(model), "size": SIZE, "crop": "pad", "device": "cpu"}
    return make_features(kind, FeatureConfig(**given | settings), shard)


def train_config(dataset: Path, model: Path, frames: int = 2, **data) -> TrainConfig:
    settings = {
        "source": "videos",
        "root": str(dataset),
        "size": SIZE,
        "num_frames": frames,
        "crop": "pad",
        "workers": 0,
    }
    return TrainConfig(
        stage="motion" if frames > 1 else "image",
        output="x",
        data=DataConfig(**settings | data),
        model=replace(TINY, init=str(model), train_image_encoder=False),
    )


def loss_of(config: TrainConfig, vae, model, composition=None, dropout: float = 0.5) -> torch.Tensor:
    """The loss of one batch of both clips, exactly as training computes it."""
    dataset = make_dataset(config.data, 2)
    batch = default_collate([dataset[0], dataset[1]])
    generators = sample_generators(5, range(2))
    augmentation = composition or config.augmentation.composition
    batch = compose_samples(batch, augmentation, 0, generators)
    config = replace(config, noise=NoiseConfig(condition_dropout=dropout, noise_offset=0.1))
    return Objective(model, vae, config).loss(model, batch, generators).loss.detach()


@pytest.mark.parametrize("frames", [1, 3])
def test_the_loss_is_the_same_with_cached_features(dataset, model, frames):
    made = [make(kind, dataset, model) for kind in ("latents", "embeddings")]
    assert [(one.made, one.current, one.left_out) for one in made] == [(2, 0, {})] * 2
    plain = train_config(dataset, model, frames)
    vae, networks = make_networks(plain)
    expected = loss_of(plain, vae, networks)
    caches = {"latents": str(dataset / "latents"), "embeddings": str(dataset / "embeddings")}
    for used in (["latents"], ["embeddings"], ["latents", "embeddings"]):
        config = train_config(dataset, model, frames, **{kind: caches[kind] for kind in used})
        networks.requires_grad_(False)
        check_features(config, vae, networks)
        item = make_dataset(config.data, 2)[0]
        assert ("frames" in item) == ("latents" not in used)
        assert ("reference" in item) == (len(used) < 2)
        torch.testing.assert_close(loss_of(config, vae, networks), expected, atol=2e-6, rtol=1e-5)
    wrong = loss_of(train_config(dataset, model, frames, seed=1, **caches), vae, networks)
    assert abs(wrong - expected) > 1e-4  # other frames: the comparison can fail


def test_half_precision_costs_half_and_three_digits_remain(dataset, model):
    make("latents", dataset, model)
    make("latents", dataset, model, dtype="float16", output=str(dataset / "half"))
    full, half = (dataset / folder / "a.safetensors" for folder in ("latents", "half"))
    assert half.stat().st_size < 0.6 * full.stat().st_size
    vae, networks = make_networks(train_config(dataset, model))
    expected = loss_of(train_config(dataset, model), vae, networks)
    found = loss_of(train_config(dataset, model, latents=str(dataset / "half")), vae, networks)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


def test_recomposed_references_are_encoded_anew(dataset, model):
    """Composition changes the reference's pixels; the frames' latents stay good, the reference's do not."""
    make("latents", dataset, model)
    plain = train_config(dataset, model)
    composition = replace(plain.augmentation.composition, probability=1.0)
    vae, networks = make_networks(plain)
    expected = loss_of(plain, vae, networks, composition, dropout=0.0)
    cached = train_config(dataset, model, latents=str(dataset / "latents"))
    torch.testing.assert_close(loss_of(cached, vae, networks, composition, 0.0), expected, atol=2e-6, rtol=1e-5)


def test_rows_are_the_frames_of_the_clip(dataset, model, tiny_pipeline):
    make("latents", dataset, model, batch_size=4)
    cache = FeatureCache(dataset / "latents", "latents")
    frames = VideoFolder(dataset, (32, 32), num_frames=6, crop="pad")[0]["frames"]
    name = VideoFolder(dataset, (32, 32), crop="pad").clips[0].clip.name
    stored = [cache.read(name, list(range(6))), cache.read("sub/b" if name == "a" else "a", list(range(6)))]
    with torch.no_grad():
        expected = vae_encode(tiny_pipeline.vae, frames.transpose(0, 1))
    differences = [float((one["mean"] - expected).abs().max()) for one in stored]
    assert min(differences) < 1e-5 < max(differences)
    some = cache.read("a", [4, 0])
    assert torch.equal(some["deviation"], cache.read("a", list(range(6)))["deviation"][[4, 0]])


def test_a_second_run_makes_nothing_and_shards_share(dataset, model):
    assert make("latents", dataset, model, Shard(0, 2)).made == 1
    assert make("latents", dataset, model, Shard(1, 2)).made == 1
    done = make("latents", dataset, model)
    assert (done.made, done.current, dict(done.again)) == (0, 2, {})


def test_every_input_that_changes_makes_the_cache_invalid(dataset, model, tmp_path):
    """Video, size, crop and network; training says which, and making them again repairs it."""
    make("latents", dataset, model)
    latents = {"latents": str(dataset / "latents")}
    vae, networks = make_networks(train_config(dataset, model))

    def refused(config: TrainConfig, message: str, network=vae) -> None:
        with pytest.raises(UserError, match=message) as caught:
            check_features(config, network, networks)
        assert "run `python prepare.py latents` again" in str(caught.value)

    check_features(train_config(dataset, model, **latents), vae, networks)
    refused(train_config(dataset, model, **latents | {"size": [64, 32]}), r"2 of 2 clips .*other size: 2 \(a\)")
    refused(train_config(dataset, model, **latents | {"crop": "centre"}), r"other crop: 2")
    refused(train_config(dataset, model, latents=str(dataset / "nowhere")), r"missing: 2")
    changed = load_network("latents", FeatureConfig(model=str(model)))
    changed.encoder.conv_in.bias.data[0] += 1e-4
    refused(train_config(dataset, model, **latents), r"other network: 2", changed)
    video = Path(read_manifest(dataset).clips[1].video)
    video.write_bytes((tmp_path / "videos" / "a.mp4").read_bytes())
    prepare(tmp_path / "videos", dataset)
    refused(train_config(dataset, model, **latents), r"1 of 2 clips .*other video: 1 \(sub/b\)")
    (dataset / "latents" / "a.safetensors").write_bytes(b"damaged")
    refused(train_config(dataset, model, **latents), r"damaged: 1 \(a\); other video: 1")
    done = make("latents", dataset, model)
    assert done.made == 2 and dict(done.again) == {"damaged": 1, "other video": 1}
    check_features(train_config(dataset, model, **latents), vae, networks)


def test_a_retrained_decoder_leaves_the_latents_valid(model):
    vae = load_network("latents", FeatureConfig(model=str(model)))
    before = network_digest(vae)
    vae.decoder.conv_in.bias.data += 1
    assert network_digest(vae) == before
    vae.register_to_config(scaling_factor=0.5)
    assert network_digest(vae) != before


def test_what_cannot_be_cached_is_refused(dataset, model):
    make("embeddings", dataset, model)
    embeddings = {"embeddings": str(dataset / "embeddings")}
    config = train_config(dataset, model, **embeddings)
    vae, networks = make_networks(config)
    with pytest.raises(UserError, match="train_image_encoder must be false"):
        check_features(config, vae, networks.requires_grad_(True))
    networks.requires_grad_(False)
    for name in ("composition", "calibrated"):
        augmentation = AugmentationConfig()
        setattr(augmentation, name, replace(getattr(augmentation, name), probability=0.5))
        with pytest.raises(UserError, match="data.embeddings= cannot be used with augmentation"):
            check_features(replace(config, augmentation=augmentation), vae, networks)
    with pytest.raises(UserError, match="use one"):
        check_features(train_config(dataset, model, cache="x", **embeddings), vae, networks)
    for source in ({"source": "rendered"}, {"root": str(dataset.parent / "videos")}):
        with pytest.raises(UserError, match="need a prepared data set"):
            check_features(train_config(dataset, model, **embeddings | source), vae, networks)


def test_damaged_videos_are_left_out_and_the_rest_is_made(dataset, model, tmp_path):
    damage(tmp_path / "videos" / "a.mp4", 0.1)
    manifest = dataset / "manifest.json"
    before = read_manifest(dataset).clips[0].fingerprint
    after = type(before).of(tmp_path / "videos" / "a.mp4")
    text = manifest.read_text().replace(before.sha256, after.sha256).replace(before.stamp, after.stamp)
    manifest.write_text(text)  # as if it had been damaged before its size and time were noted
    made = make("latents", dataset, model)
    assert made.made == 1 and "decoding stopped at frame" in made.left_out["a"]


def test_wrong_settings_are_user_errors(dataset, model, tmp_path, tiny_pipeline):
    for settings, named in (
        ({"size": [4, 4]}, "size="),
        ({"dtype": "int8"}, "dtype=int8"),
        ({"crop": "all"}, "crop=all"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"size": [33, 32]}, f"multiples of {vae_scale_factor(tiny_pipeline.vae)}"),
        ({"model": None}, "model= .*is required or vae="),
        ({"vae": str(tmp_path)}, "vae=.*is not a VAE folder"),
        ({"dataset": str(tmp_path / "videos")}, "is not prepared"),
    ):
        with pytest.raises(UserError, match=named):
            given = {"dataset": str(dataset), "model": str(model), "size": SIZE}
            make_features("latents", FeatureConfig(**given | settings), ALONE)
    with pytest.raises(ValueError, match="kind"):
        FeatureCache(tmp_path, "images")
    with pytest.raises(UserError, match="cannot be read as latents"):
        FeatureCache(tmp_path, "latents").read("a", [0])


def test_a_vae_is_not_trained_on_the_latents_of_another():
    with pytest.raises(UserError, match="data.latents= and data.embeddings= are of a finished VAE"):
        training.vae.main(["output=x", "data.latents=y"])


def test_the_cache_of_images_follows_the_videos(tmp_path):
    """`data.cache` keeps decoded clips; it is made anew when a video or the crop changes."""
    root = save_prepared_videos(tmp_path / "videos", {"a": figure_film()})
    config = DataConfig(source="videos", root=str(root), size=[32, 48], num_frames=2, workers=0)
    config = replace(config, cache=str(tmp_path / "cache"), cache_clips=1)
    first = make_dataset(config, 4)[0]["frames"]
    assert torch.equal(make_dataset(config, 4)[0]["frames"], first)
    save_prepared_videos(root, {"a": figure_film(box=(5, 30, 24, 48))})
    second = make_dataset(config, 4)[0]["frames"]
    assert not torch.equal(second, first)
    assert not torch.equal(make_dataset(replace(config, size=[32, 32], crop="pad"), 4)[0]["frames"], second)
    with pytest.raises(UserError, match="data.crop=middle"):
        make_dataset(replace(config, crop="middle"), 4)


def test_models_are_the_ones_that_training_starts_from(model):
    assert ModelConfig().init is None  # new networks take vae=
    digests = {
        kind: network_digest(load_network(kind, FeatureConfig(model=str(model)))) for kind in ("latents", "embeddings")
    }
    vae, networks = make_networks(TrainConfig(stage="image", output="x", model=replace(TINY, init=str(model))))
    assert digests == {"latents": network_digest(vae), "embeddings": network_digest(networks.image_encoder)}
    alone = load_network("latents", FeatureConfig(vae=str(model / "vae")))
    assert network_digest(alone) == digests["latents"]
