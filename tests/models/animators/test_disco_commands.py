"""DisCo through the commands: animation with and without calibration, evaluation, training of both stages."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import infer
from data.video.files import read_video
from models.animators.disco.model import DiscoPipeline
from models.animators.disco.networks import is_temporal
from models.animators.registry import load_pipeline
from tests.clips import given
from tests.disco_parts import small_disco_pipeline
from tests.training_runs import ARGUMENTS, make_vae, weights
from tests.training_runs import train as train_process

QUICK = ["steps=1", "num_frames=3", "size=[32,32]"]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("published")
    small_disco_pipeline().save_pretrained(folder)
    return f"model={folder}"


def driven(inputs: Path) -> list[str]:
    """All but the reference's poses, which only calibration needs."""
    return [argument for argument in given(inputs) if not argument.startswith("reference_poses=")]


def result(output: Path) -> np.ndarray:
    return read_video(output / "animation.mp4").frames


def test_animation_with_calibrated_tokens_added_or_in_place_of_the_references(inputs, published, tmp_path):
    poses = f"reference_poses={inputs / 'reference.npz'}"
    for attach in ("add", "replace"):
        arguments = [*driven(inputs), poses, published, f"output={tmp_path / attach}", f"tpc.attach={attach}", *QUICK]
        infer.main([*arguments, f"compare={str(attach == 'add').lower()}"])
        assert result(tmp_path / attach).shape == (3, 32, 32, 3)
        assert json.loads((tmp_path / attach / "result.json").read_text())["calibration"]["calibrated"] == 3


def test_animation_without_calibration_takes_the_given_mask(inputs, published, tmp_path):
    """Neither keypoints of the reference nor an estimator are needed."""
    infer.main([*driven(inputs), published, f"output={tmp_path / 'o'}", "tpc.enabled=false", *QUICK])
    assert result(tmp_path / "o").shape == (3, 32, 32, 3) and not (tmp_path / "o" / "calibration").exists()


def test_evaluation_compares_adding_with_replacing(published, tmp_path):
    quick = ["sampling.steps=1", "sampling.size=[32,32]", "source=48", "frames=2", "seeds=[0]", "clips=1"]
    once = ["attachments=[add,replace]", "transforms=[procrustes]", "subsets=[trunk]", "propagations=[hold]"]
    evaluate.main(["ablation", published, f"output={tmp_path / 'o'}", *quick, *once])
    results = json.loads((tmp_path / "o" / "results.json").read_text())["results"]
    assert len(results) == 3 and sum("replace" in name for name in results) == 1


def test_both_stages_train_and_the_second_makes_the_temporal_variant(inputs, tmp_path):
    """With calibrated images and dropped references; validation samples with TPC."""
    new = ["model.animator=disco", f"model.vae={make_vae(tmp_path / 'vae')}", "stage=image", "max_steps=2"]
    validation = ["validation.clips=1", "validation.num_frames=1", "validation.num_inference_steps=1"]
    first, second = tmp_path / "first", tmp_path / "second"
    train_process(tmp_path / "log", f"output={first}", *ARGUMENTS, *new, *validation, "validation.steps=2")
    assert (first / "samples" / "0000002.png").is_file()
    clips = ["stage=motion", "data.num_frames=3", "max_steps=2", "trainable=temporal", "validation.steps=0"]
    train_process(tmp_path / "log2", f"output={second}", *ARGUMENTS, *clips, f"model.init={first / 'pipeline'}")
    before, after = weights(first / "pipeline"), weights(second / "pipeline")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {name for name in after if name not in before} == {name for name in after if is_temporal(name)}
    pipeline = load_pipeline(second / "pipeline")
    assert type(pipeline) is DiscoPipeline and pipeline.animator.temporal and pipeline.config.window_size == 3
    assert any(".tem_conv.weight" in name and value.any() for name, value in after.items())
    infer.main(
        [*driven(inputs), f"model={second / 'pipeline'}", f"output={tmp_path / 'o'}", "tpc.enabled=false", *QUICK]
    )
    assert result(tmp_path / "o").shape == (3, 32, 32, 3)
