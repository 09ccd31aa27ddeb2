"""Training of VAEs: what moves of a published one, what stays, crops, the loss, and what is refused; one of videos."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

import training.autoencoder
import training.vae
from core.config import load_config
from core.errors import UserError
from models.checkpoints.networks import load_autoencoder
from models.vae import clip_encode, video_decode
from tests.dream_pose_parts import published
from tests.training_runs import VIDEO_CLIPS, VIDEO_VAE, make_vae, start_two
from training.config import OptimizerConfig, VAEConfig
from training.data import make_dataset

ROOT = Path(__file__).parents[2]
QUICK = ["max_steps=2", "batch_size=1", "data.size=[16,16]", "data.workers=0", "log_steps=1", "freeze_encoder=true"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vae")
    load_autoencoder(published("vae"), "vae").save_pretrained(path)
    return path


def test_the_decoder_moves_and_nothing_else(folder, tmp_path):
    training.vae.main(
        [f"output={tmp_path}", f"init={folder}", *QUICK, "gradient_accumulation=2", "loss=squares", "crop=0.1"]
    )
    before, after = (AutoencoderKL.from_pretrained(path) for path in (folder, tmp_path / "vae"))
    moved = {name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])}
    assert moved == {name for name in before.state_dict() if name.startswith("decoder.")}
    assert after.config.scaling_factor == before.config.scaling_factor
    assert (tmp_path / "reconstructions.png").is_file()


def test_encoders_of_published_vaes_stay(folder, tmp_path):
    with pytest.raises(UserError, match="AutoencoderKL: only its decoder is trained, add freeze_encoder=true"):
        training.vae.main([f"output={tmp_path}", f"init={folder}", *QUICK[:-1]])
    with pytest.raises(UserError, match="init=.* does not exist"):
        training.vae.main([f"output={tmp_path}", f"init={tmp_path / 'none'}", *QUICK])
    for wrong, named in (("loss=cubes", "loss=cubes must be one of edges, squares"), ("crop=1", "crop=1 must be")):
        with pytest.raises(UserError, match=named):
            training.vae.main([f"output={tmp_path}", f"init={folder}", *QUICK, wrong])


def test_crops_keep_images_and_masks_together():
    torch.manual_seed(0)
    masks = (torch.rand(6, 1, 20, 16) > 0.5).float()
    images = masks.expand(-1, 3, -1, -1) * 2 - 1
    assert all(
        torch.equal(*pair)
        for pair in zip(training.autoencoder.random_crops(images, masks, 0.0), (images, masks), strict=True)
    )
    cropped, cropped_masks = training.autoencoder.random_crops(images, masks, 0.5)
    assert cropped.shape == images.shape and cropped_masks.shape == masks.shape
    assert torch.allclose(cropped, cropped_masks.expand_as(cropped) * 2 - 1, atol=1e-5)
    assert not torch.allclose(cropped, images, atol=0.1)
    # The rest of a ramp is a ramp that rises less.
    ramp = torch.linspace(0, 1, 20)[None, None, :, None].expand(1, 4, 20, 16)
    (part, _) = training.autoencoder.random_crops(ramp[:, :3], ramp[:, 3:], 0.5)
    assert 0.4 < (part[0, 0, -1, 0] - part[0, 0, 0, 0]).item() < 1


def test_squares_are_the_mean_squared_error():
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(0, 0),
        num_decoder_blocks=(0, 0),
    )
    images, masks = torch.rand(2, 3, 8, 8) * 2 - 1, torch.ones(2, 1, 8, 8)
    config = VAEConfig(output="x", loss="squares", latent_noise=0.0)
    loss, error = training.autoencoder.vae_loss(vae, images, masks, config)
    expected = (vae.decode(vae.encode(images).latents).sample - images).square().mean()
    assert torch.allclose(loss, expected) and torch.allclose(error, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in vae.parameters())


def test_the_shipped_recipe_is_the_published_one():
    config = load_config(VAEConfig, ["output=x"], files=[ROOT / "configs" / "vae_dreampose.yaml"])
    assert config.freeze_encoder and config.loss == "squares" and config.crop == 0.1
    assert config.optimizer == OptimizerConfig(learning_rate=5e-5)
    assert 2 * config.batch_size * config.gradient_accumulation == 16  # two images a clip


def test_two_processes_do_what_one_does_with_their_batches_together(tmp_path):
    make_vae(tmp_path / "start")
    shared = [
        f"init={tmp_path / 'start'}",
        "max_steps=3",
        "log_steps=1",
        "loss=squares",
        "latent_noise=0",
        "data.size=[32,32]",
        "data.workers=0",
        "optimizer.learning_rate=3e-3",
        "optimizer.epsilon=1e-4",
    ]
    arguments = [*shared, f"output={tmp_path / 'two'}", "batch_size=1"]
    for process in start_two(tmp_path / "two.log", *arguments, script="training/vae.py"):
        process.finish()
    training.vae.main([*shared, f"output={tmp_path / 'one'}", "batch_size=2"])
    start, one, two = (
        AutoencoderTiny.from_pretrained(path).state_dict()
        for path in (tmp_path / "start", tmp_path / "one" / "vae", tmp_path / "two" / "vae")
    )
    assert max((one[name] - start[name]).abs().max() for name in start) > 1e-3
    assert max((one[name] - two[name]).abs().max() for name in start) < 1e-5


def test_a_video_vae_is_trained_to_latents_of_unit_variance(tmp_path):
    training.autoencoder.train_vae(replace(VIDEO_VAE, output=str(tmp_path), max_steps=2, batch_size=1, crop=0.1))
    pipeline_vae = training.autoencoder.build_vae(replace(VIDEO_VAE, init=str(tmp_path / "vae"), freeze_encoder=True))
    heldout = make_dataset(replace(VIDEO_CLIPS, split="heldout"), 8)
    clips = torch.stack([heldout[i]["frames"] for i in range(8)])
    with torch.no_grad():
        latents = clip_encode(pipeline_vae, clips).transpose(0, 1).flatten(1)
        decoded = video_decode(pipeline_vae, clip_encode(pipeline_vae, clips[:1]))
    assert torch.allclose(latents.mean(1), torch.zeros(4), atol=1e-3)
    assert torch.allclose(latents.std(1), torch.ones(4), atol=1e-2)
    assert decoded.shape == (VIDEO_CLIPS.num_frames, 3, *VIDEO_CLIPS.size)
    assert (tmp_path / "reconstructions.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.num_frames=8"], "data.num_frames=8 must be 1 more than a multiple of 4"),
        (["data.num_frames=9", "multiples=[1,2]"], "multiples=[1, 2] needs three resolutions or more"),
        (["data.num_frames=9", "data.size=[30,32]"], "multiples of 4, by which multiples=[1, 2, 2]"),
    ],
)
def test_wrong_video_vaes_are_refused(arguments, words):
    with pytest.raises(UserError, match=re.escape(words)):
        load_config(VAEConfig, ["output=x", "multiples=[1,2,2]", *arguments])
