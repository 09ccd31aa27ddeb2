"""DreamPose through the commands: animation with given and drawn pose images, evaluation, training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import infer
import train
from core.errors import UserError
from data.video.files import read_video
from models.animators.dream_pose.model import DreamPose, DreamPosePipeline
from models.animators.registry import load_pipeline
from models.checkpoints.convert import published_scheduler
from models.vae import load_vae
from tests.clips import given, save_rendered_pair
from tests.dream_pose_parts import small_pipeline
from tests.networks import TINY
from tests.training_runs import ARGUMENTS, make_vae, weights
from tests.training_runs import train as train_process

QUICK = ["steps=2", "num_frames=3", "size=[32,32]"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A rendered pair, and coloured images in place of DensePose."""
    folder = tmp_path_factory.mktemp("inputs")
    save_rendered_pair(folder)
    (folder / "densepose").mkdir()
    for number, frame in enumerate(read_video(folder / "driving.mp4").frames):
        Image.fromarray(frame).save(folder / "densepose" / f"{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("published")
    small_pipeline().save_pretrained(folder)
    return f"model={folder}"


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> str:
    """A new small model, which reads figures that are drawn."""
    folder = tmp_path_factory.mktemp("figures")
    torch.manual_seed(0)
    networks = DreamPose.small(TINY, latent_channels=4, latent_side=8)
    vae = load_vae(make_vae(folder / "vae_alone"))
    parts = {name: module.eval() for name, module in networks.named_children()}
    DreamPosePipeline(vae=vae, scheduler=published_scheduler("dreampose"), **parts).save_pretrained(folder / "model")
    return f"model={folder / 'model'}"


def result(output: Path) -> np.ndarray:
    return read_video(output / "animation.mp4").frames


def test_animation_with_given_pose_images(inputs, published, tmp_path):
    poses = f"pose_images={inputs / 'densepose'}"
    for attach in ("add", "replace"):
        infer.main([*given(inputs), poses, published, f"output={tmp_path / attach}", f"tpc.attach={attach}", *QUICK])
        assert result(tmp_path / attach).shape == (3, 32, 32, 3)
        written = json.loads((tmp_path / attach / "result.json").read_text())
        assert written["calibration"]["calibrated"] == 3
    assert not np.array_equal(result(tmp_path / "add"), result(tmp_path / "replace"))


def test_figures_are_not_drawn_for_a_model_of_coordinates(inputs, published, tmp_path):
    with pytest.raises(UserError, match="pose_images= is required.*reads DensePose images"):
        infer.main([*given(inputs), published, f"output={tmp_path}", *QUICK])


def test_animation_with_drawn_figures_and_two_scales(inputs, figures, tmp_path):
    arguments = [*given(inputs), figures, *QUICK]
    infer.main([*arguments, f"output={tmp_path / 'one'}", "guidance_scale=8"])
    infer.main([*arguments, f"output={tmp_path / 'two'}", "guidance_scales=[8,3]"])
    assert np.array_equal(result(tmp_path / "one"), result(tmp_path / "two"))


def test_evaluation_sweeps(figures, published, tmp_path):
    quick = ["sampling.steps=1", "sampling.size=[32,32]", "source=48", "frames=2", "seeds=[0]", "clips=1"]
    evaluate.main(["sweep", figures, f"output={tmp_path / 'sweep'}", "angles=2", "scales=[1.0]", *quick])
    assert (tmp_path / "sweep" / "results.json").is_file()
    with pytest.raises(UserError, match="the model reads DensePose images, which cannot be drawn from keypoints"):
        evaluate.main(["sweep", published, f"output={tmp_path / 'no'}", "angles=2", "scales=[1.0]", *quick])


def test_training_makes_a_pipeline(inputs, tmp_path):
    """Clips with calibrated training and every kind of dropout; the result animates, and goes on as `model.init`."""
    arguments = ["stage=motion", "data.num_frames=3", "max_steps=2", *ARGUMENTS]
    new = ["model.animator=dream_pose", f"model.vae={make_vae(tmp_path / 'vae')}"]
    validation = ["validation.steps=2", "validation.clips=1", "validation.num_frames=3"]
    once = ["validation.num_inference_steps=1"]
    train_process(tmp_path / "log", f"output={tmp_path / 'run'}", *new, *arguments, *validation, *once)
    assert (tmp_path / "run" / "samples" / "0000002.png").is_file()
    pipeline = load_pipeline(tmp_path / "run" / "pipeline")
    assert type(pipeline) is DreamPosePipeline and pipeline.pose_kind == "OpenPose"
    infer.main([*given(inputs), f"model={tmp_path / 'run' / 'pipeline'}", f"output={tmp_path / 'out'}", *QUICK])
    assert result(tmp_path / "out").shape == (3, 32, 32, 3)

    further = [f"model.init={tmp_path / 'run' / 'pipeline'}", "trainable=adapter", "model.train_image_encoder=false"]
    train_process(tmp_path / "log2", f"output={tmp_path / 'more'}", *arguments, *further)
    before, after = (weights(tmp_path / name / "pipeline") for name in ("run", "more"))
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"adapter"}


def test_training_refuses_what_the_model_cannot_use(published, tmp_path):
    init = [f"model.init={published.removeprefix('model=')}", f"output={tmp_path}", "stage=image", "data.size=[32,32]"]
    with pytest.raises(UserError, match="reads DensePose images; give data.pose_images="):
        train.main(init)
    with pytest.raises(UserError, match="trainable=motion is not one of full, adapter, lora, which DreamPose has"):
        train.main([*init, "stage=motion", "data.num_frames=2", "trainable=motion", f"data.pose_images={tmp_path}"])
