"""An animator that lives elsewhere, by one line of the registry; folders of earlier releases."""

import json
import shutil

import pytest
import torch

from core.errors import UserError
from models.animators.registry import load_pipeline
from models.checkpoints.__main__ import main
from models.config import ANIMATORS, SMALL_ANIMATORS
from tests.models.animators.test_animators_doc import example, networks
from training.build import make_pipeline, new_animator, open_animator
from training.config import ModelConfig, NoiseConfig

SMALL = """

from tests.models.animators.test_animators_doc import networks


def small(cls, sizes, latent_channels, image_size):
    return cls(*list(networks().values())[1:])


TokenAnimator.small, TokenAnimator.trainable = classmethod(small), True
"""
CHECKPOINT = """
from dataclasses import dataclass

from models.checkpoints.convert import IMAGE_SCHEDULE, Family, Recognised
from models.config import ConvertConfig, published_file
from models.checkpoints.loading import compare, load_strictly, on_meta, shapes_of
from tests.models.animators.test_animators_doc import networks
from token_animator.model import TokenPipeline


@dataclass
class TokenFiles(ConvertConfig):
    tokens: str | None = published_file("tokens.pth")


def load_unet(tensors, what, dtype):
    unet = networks()["denoising_unet"]
    return load_strictly(on_meta(type(unet).from_config, unet.config), tensors, what, dtype)


def make(sources):
    parts = networks() | {"denoising_unet": sources.load("tokens", load_unet)}
    return TokenPipeline(**parts, scheduler=sources.family.scheduler(), window_size=sources.family.window)


def recognise(shapes):
    wanted = shapes_of(networks()["denoising_unet"].state_dict())
    return Recognised("TokenAnimator", "", compare(wanted, shapes)) if "conv_in.weight" in shapes else None


FAMILIES = (Family("tokens", TokenFiles, make, IMAGE_SCHEDULE, window=7, recognisers=(recognise,)),)
"""


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """The animator of docs/animators.md in a package of its own, and a file of its weights."""
    package = tmp_path / "token_animator"
    package.mkdir()
    (package / "model.py").write_text(example()[0] + SMALL)
    (package / "checkpoint.py").write_text(CHECKPOINT)
    torch.save(networks()["denoising_unet"].state_dict(), tmp_path / "tokens.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(ANIMATORS, "tokens", "token_animator.model:TokenPipeline")
    return tmp_path


def test_one_line_makes_an_animator_known(registered, capsys):
    main(["inspect", str(registered / "tokens.pth")])
    assert "TokenAnimator" in capsys.readouterr().out
    main(["convert", "family=tokens", f"weights={registered}", f"output={registered / 'converted'}"])
    pipeline = load_pipeline(registered / "converted")
    assert type(pipeline).__name__ == "TokenPipeline" and pipeline.config.window_size == 7
    weights = networks()["denoising_unet"].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in pipeline.denoising_unet.state_dict().items())

    model = new_animator(ModelConfig(animator="tokens"), networks()["vae"], 32)
    assert type(model).__name__ == "TokenAnimator"
    make_pipeline(networks()["vae"], model, NoiseConfig()).save_pretrained(registered / "trained")
    assert type(open_animator("model.init", str(registered / "trained"))[1]) is type(model)


def test_names_that_are_not_known(registered, tmp_path):
    with pytest.raises(UserError, match="model.animator=token is not one of animate_anyone, .*tokens"):
        new_animator(ModelConfig(animator="token"), networks()["vae"], 32)
    with pytest.raises(UserError, match="unknown key 'token'; the nearest known one is 'tokens'"):
        main(["convert", "family=tokens", "token=x", f"output={tmp_path / 'p'}"])
    with pytest.raises(UserError, match="family= is required"):
        main(["convert", f"output={tmp_path / 'p'}"])


def test_values_of_earlier_releases_are_translated(tmp_path):
    """What the shipped folder of DisCo says, and what a folder says that is written today."""
    disco = next(folder for folder in SMALL_ANIMATORS if folder.name == "disco")
    assert json.loads((disco / "model_index.json").read_text())["null_tokens"] == "empty_picture"
    pipeline = load_pipeline(disco)
    assert pipeline.config.null_tokens == pipeline.animator.null_tokens == "empty_image"
    pipeline.save_config(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["null_tokens"] == "empty_image"


def test_components_have_the_annotated_classes(tmp_path):
    folder = shutil.copytree(SMALL_ANIMATORS[0], tmp_path / "p")
    index = json.loads((folder / "model_index.json").read_text())
    index["reference_net"] = ["diffusers", "UNet2DConditionModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="component reference_net is a UNet2DConditionModel, not one of ReferenceNet"):
        load_pipeline(folder)
