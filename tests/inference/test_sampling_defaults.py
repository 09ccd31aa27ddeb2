"""Steps, guidance and size travel with a pipeline's folder."""

import json
import shutil
from pathlib import Path

import pytest

from core.errors import UserError
from inference.animate import with_own_start
from inference.config import InferConfig
from inference.pairs import size_note, with_defaults
from models.animators.registry import load_pipeline
from models.checkpoints.convert import convert, convert_config, families
from models.config import SHIPPED_MODEL
from tests.published import write_weights
from tpc import CalibrationConfig
from training.build import make_pipeline
from training.config import NoiseConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """AnimateAnyone, converted."""
    path = tmp_path_factory.mktemp("weights")
    write_weights(path)
    convert(convert_config("animate_anyone", str(path / "p"), weights=str(path)))
    return path / "p"


def settings(job: InferConfig) -> tuple:
    return job.steps, job.guidance_scale


def test_a_converted_folder_says_how_it_is_sampled(folder):
    pipeline = load_pipeline(folder)
    assert settings(with_defaults(InferConfig(), pipeline)) == (30, 3.5)
    assert settings(with_defaults(InferConfig(steps=7), pipeline)) == (7, 3.5)
    assert settings(with_defaults(InferConfig(guidance_scale=1.0), pipeline)) == (30, 1.0)
    assert pipeline.default_size((512, 784)) == (512, 784)
    width, height = pipeline.default_size((1280, 720))  # as many pixels, in the video's shape
    assert width * height == pytest.approx(512 * 784, rel=0.03) and width / height == pytest.approx(16 / 9, rel=0.03)
    trained = make_pipeline(pipeline.vae, pipeline.animator, NoiseConfig(), init=str(folder))
    assert trained.sampling == pipeline.sampling


@pytest.mark.parametrize(
    ("given", "start"),
    [({}, 50), ({"start": -1}, -1), ({"start": 7}, 7), ({"preset": "paper"}, None), ({"fill": "mean"}, None)],
)
def test_the_preset_best_begins_where_the_model_is_best_begun(folder, given, start):
    pipeline = load_pipeline(folder)
    config = CalibrationConfig(**given)
    assert with_own_start(config, pipeline, masked=True) == config  # the folder says nothing of it
    pipeline.register_to_config(sampling={**pipeline.sampling, "start": 50})
    assert with_own_start(config, pipeline, masked=True).start == start
    assert with_own_start(config, pipeline, masked=False) == config  # drawn silhouettes are too rough to begin from


def test_sizes_far_beyond_the_models_own_are_noted(folder):
    pipeline = load_pipeline(folder)
    assert size_note(pipeline, (512, 784)) is None and size_note(pipeline, (640, 896)) is None
    assert "2.0 times the pixels" in size_note(pipeline, (1024, 784))


def test_folders_that_do_not_say_it_are_sampled_as_ever(folder, tmp_path):
    old = shutil.copytree(folder, tmp_path / "old")
    index = json.loads((old / "model_index.json").read_text())
    del index["sampling"]
    (old / "model_index.json").write_text(json.dumps(index))
    for path, own in ((old, (20, 2.0)), (SHIPPED_MODEL, (4, 1.0))):
        pipeline = load_pipeline(path)
        assert settings(with_defaults(InferConfig(), pipeline)) == own
    assert load_pipeline(old).default_size((64, 64)) == (256, 256)  # sample_size of the UNet times the VAE's factor


@pytest.mark.parametrize(
    "sampling", [[30], {"steps": "30"}, {"size": [512]}, {"guidance_scale": -1}, {"size": [0, 8]}]
)
def test_settings_that_cannot_be_are_refused(folder, tmp_path, sampling):
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "sampling": sampling}))
    with pytest.raises(UserError, match="sampling in model_index.json is"):
        load_pipeline(tmp_path)


def test_the_settings_are_those_of_the_table_in_the_notes():
    notes = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    for name, family in families().items():
        own = family.sampling
        if own:
            size = "x".join(map(str, own["size"]))
            assert f"| `{name}` | {own['steps']} | {own['guidance_scale']:g} | {size} |" in notes
