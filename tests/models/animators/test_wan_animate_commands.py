"""Wan-Animate through infer.py: segments, faces, prompts, cached embeddings, and a calibrated image a segment."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

import infer
from core.errors import UserError
from data.video.files import read_video
from models.animators.registry import load_pipeline
from models.images import Words
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
    assert json.loads((tmp_path / "tpc/result.json").read_text())["calibration"]["calibrated"] == 6
    plain = run(inputs, folder, tmp_path / "plain", "prompt=a fan", "tpc.enabled=false")
    assert np.abs(plain.astype(int) - frames).max() > 0


def test_embeddings_of_a_file(inputs, folder, tmp_path):
    pipeline = load_pipeline(folder)
    prompt = pipeline.animator.embedding("prompt", "a fan", Words())
    save_file({"prompt": prompt}, tmp_path / "words.safetensors")
    words = f"embeddings={tmp_path / 'words.safetensors'}"
    told = run(inputs, folder, tmp_path / "told", "prompt=a fan", "tpc.enabled=false")
    cached = run(inputs, folder, tmp_path / "cached", words, "tpc.enabled=false")
    assert (
        np.abs(cached.astype(int) - told).mean() < 0.5
    )  # rounding, and what the codec makes of it; of another prompt 1.7
    save_file({"prompt": prompt[0]}, tmp_path / "wrong.safetensors")
    refused = {
        f"embeddings={tmp_path / 'wrong.safetensors'}": "has prompt of shape .* each \\(1, tokens, channels\\)",
        f"embeddings={tmp_path / 'none.safetensors'}": "does not exist",
    }
    for argument, error in refused.items():
        with pytest.raises(UserError, match=error):
            run(inputs, folder, tmp_path / "refused", argument)
    with pytest.raises(UserError, match="prompt=, .* are of no use to model=None"):
        infer.main([*given(inputs), f"output={tmp_path / 'o'}", "prompt=a fan"])
