"""Wan-Animate through infer.py: segments, faces, prompts, cached embeddings, and a calibrated image a segment."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import evaluate
import infer
from core.errors import UserError
from data.video.files import read_video
from inference import embeddings
from models.config import SHIPPED_MODEL
from tests.clips import given
from tests.wan_parts import published_folder

QUICK = ["steps=1", "num_frames=6", "size=[32,32]", "compare=false", "window_size=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return published_folder(tmp_path_factory.mktemp("published") / "wan")


def run(inputs: Path, folder: Path, output: Path, *arguments: str) -> np.ndarray:
    infer.main([*given(inputs), f"model={folder}", f"output={output}", *QUICK, *arguments])
    return read_video(output / "animation.mp4").frames


def test_a_calibrated_image_for_each_segment(inputs, folder, tmp_path, capsys):
    frames = run(inputs, folder, tmp_path / "tpc", "prompt=a fan")
    assert frames.shape == (6, 32, 32, 3)
    told = capsys.readouterr().out
    assert "2 segments of 5 frames = 2 passes (window_size=4 becomes 5)" in told
    unused = ["negative_prompt=bad", "tpc.groups=2", "passes_at_a_time=2", "window_overlap=2"]
    run(inputs, folder, tmp_path / "cut", "cuts=[1,2]", *unused)
    told = capsys.readouterr().out
    assert "3 segments of 5 frames = 3 passes (window_size=4 becomes 5, window_overlap=2 becomes 1)" in told
    assert "note: negative_prompt: of no use without guidance" in told
    assert "note: tpc.groups, passes_at_a_time: of no use to a model that animates in segments" in told
    refused = {"tpc.start=500": "tpc.start=500 is for diffusion", "solver=ddim": "knows no flow"}
    refused |= {"window_size=null window_overlap=9": "window_overlap=9 must be 0 to 8"}
    for argument, error in refused.items():
        with pytest.raises(UserError, match=error):
            run(inputs, folder, tmp_path / "refused", *argument.split())
    assert json.loads((tmp_path / "tpc/result.json").read_text())["calibration"]["calibrated"] == 6
    plain = run(inputs, folder, tmp_path / "plain", "prompt=a fan", "tpc.enabled=false")
    assert np.abs(plain.astype(int) - frames).max() > 0
    # The driver's face is seen beside given pose images, too.
    reference, driving = given(inputs)[:2]
    images = [f"pose_images={driving.split('=')[1]}", "tpc.enabled=false"]
    seen = run(inputs, folder, tmp_path / "seen", *images)
    capsys.readouterr()
    infer.main([reference, driving, f"model={folder}", f"output={tmp_path / 'unseen'}", *QUICK, *images])
    assert not np.array_equal(seen, read_video(tmp_path / "unseen/animation.mp4").frames)
    assert "note: driving: the face is not shown to the model" in capsys.readouterr().out


def test_embeddings_of_a_file(inputs, folder, tmp_path, capsys):
    """Made by the command where the folder has nothing but encoders, used where it has none."""
    encoders, rest = tmp_path / "encoders", shutil.copytree(folder, tmp_path / "rest")
    encoders.mkdir()
    shutil.copy(folder / "model_index.json", encoders)
    for name in ("text_encoder", "tokenizer", "image_encoder", "image_processor"):
        (rest / name).rename(encoders / name)
    file = tmp_path / "words.safetensors"
    reference = given(inputs)[0]
    words = [reference, "size=[32,32]", "prompt=a fan", "negative_prompt=bad"]
    embeddings.main([f"model={encoders}", f"output={file}", *words])
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[:3]] == [
        "prompt: 1 x 512 x 16", "negative_prompt: 1 x 512 x 16", "image: 1 x 5 x 8"
    ]  # fmt: skip
    settings = ["guidance_scale=2", "tpc.enabled=false"]
    told = run(inputs, folder, tmp_path / "told", *words[2:], *settings)
    cached = run(inputs, rest, tmp_path / "cached", f"embeddings={file}", *settings)
    assert np.array_equal(cached, told)
    other = run(inputs, folder, tmp_path / "other", "prompt=no man", *words[3:], *settings)
    assert not np.array_equal(other, told)

    with safe_open(file, "pt") as opened:
        prompt = opened.get_tensor("prompt")
    save_file({"prompt": prompt[0]}, tmp_path / "wrong.safetensors")
    refused = {
        f"embeddings={tmp_path / 'wrong.safetensors'}": "has prompt of shape .* each \\(1, tokens, channels\\)",
        f"embeddings={tmp_path / 'none.safetensors'}": "does not exist",
    }
    for argument, error in refused.items():
        with pytest.raises(UserError, match=error):
            run(inputs, folder, tmp_path / "refused", argument)
    for argument in words[2:]:  # of which the file has its own
        with pytest.raises(UserError, match=f"^{argument.split('=')[0]}= and embeddings=.*give one of the two"):
            run(inputs, folder, tmp_path / "refused", argument, f"embeddings={file}")
    with pytest.raises(UserError, match="has the image of one reference, and there are several"):
        infer.main([f"model={folder}", f"output={tmp_path / 'refused'}", f"embeddings={file}"])  # two samples
    for model, error in {rest: "component text_encoder is missing", SHIPPED_MODEL: "takes no embeddings"}.items():
        with pytest.raises(UserError, match=error):
            embeddings.main([f"model={model}", f"output={tmp_path / 'x.safetensors'}"])
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(UserError, match="prompt=, .* are of no use to model=None"):
        infer.main([*given(inputs), f"output={tmp_path / 'o'}", "prompt=a fan"])


def test_attention_is_compared_with_the_reference_in_sight(folder, tmp_path):
    quick = [
        "clips=1",
        "frames=2",
        "seeds=[0]",
        "sampling.steps=1",
        "sampling.size=[32,32]",
        "layers=[blocks.0.attn1]",
    ]
    evaluate.main(["attention", f"model={folder}", f"output={tmp_path / 'o'}", *quick])
    with_tpc = json.loads((tmp_path / "o/results.json").read_text())["results"]["misaligned, with TPC"]
    shares = [with_tpc[name]["mean"] for name in ("self", "reference person", "reference background")]
    assert with_tpc["calibrated images"]["mean"] > 0.1
    assert sum(shares) + with_tpc["calibrated images"]["mean"] == pytest.approx(1, abs=1e-4)
