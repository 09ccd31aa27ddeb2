"""Every animator through the one protocol: animated, calibrated, recorded, trained by code that knows none of them."""

import copy

import numpy as np
import pytest
import torch
from accelerate.utils.dataclasses import get_module_class_from_name
from diffusers import AutoencoderTiny

from models.animators.base import Animator
from models.animators.registry import animator_class, pipeline_of
from models.attention.recording import AttentionConfig, AttentionRecording
from tests.models.test_pipeline import standing_poses
from tests.networks import TINY, TRAINABLE
from tpc import CalibrationConfig, calibrate
from tpc.config import CalibratedTrainingConfig
from training.build import make_pipeline, set_trainable
from training.config import DataConfig, NoiseConfig, TrainConfig
from training.data import make_dataset
from training.objective import Objective, sample_generators

SIZE, FRAMES, STEPS = (32, 24), 4, 2


@pytest.fixture(scope="module")
def vae() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).eval()


@pytest.fixture(scope="module", params=TRAINABLE)
def model(request) -> Animator:
    """Small networks, every parameter random, so that no path is a no-op."""
    torch.manual_seed(1)
    made = animator_class(request.param).small(TINY, 4, 8)
    for parameter in made.parameters():
        if parameter.numel() and parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    return made.eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    mask = np.zeros((24, 32), bool)
    mask[4:20, 10:20] = True
    return {
        "reference": generator.integers(0, 256, (24, 32, 3), dtype=np.uint8),
        "poses": generator.integers(0, 256, (FRAMES, 24, 32, 3), dtype=np.uint8),
        "reference_mask": mask,
    }


def calibration(attach: str, unseen: int = 1):
    """For `inputs`; nobody is seen, or calibrated, in the first `unseen` frames."""
    matrix = np.array([[0.375, 0, 4], [0, 0.375, 0], [0, 0, 1]])
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    driving = standing_poses(FRAMES, offset=2)
    driving.scores[:unseen] = 0
    config = CalibrationConfig(max_gap=0, propagation="off", attach=attach)
    maps = {"frame_map": matrix, "reference_map": matrix}
    return calibrate(image, standing_poses(1), driving, SIZE, config, **maps)


def run(pipeline, inputs, **arguments) -> torch.Tensor:
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "output_type": "latent", **arguments}
    return pipeline(**inputs, generator=torch.Generator().manual_seed(0), **arguments).frames


def test_units_of_sharding_are_layers_that_accelerate_finds(model):
    classes = [get_module_class_from_name(model, name) for name in model._no_split_modules]
    assert classes and None not in classes
    layers = [layer for layer in model.modules() if isinstance(layer, tuple(classes))]
    shards = {parameter for layer in layers for parameter in layer.parameters()}
    assert sum(p.numel() for p in shards) > sum(p.numel() for p in model.parameters()) / 2


def test_every_model_animates_with_and_without_tpc(model, vae, inputs):
    pipeline = make_pipeline(vae, model, NoiseConfig())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline_of(type(model)) is type(pipeline) and type(pipeline.animator) is type(model)
    base = run(pipeline, inputs)
    assert base.shape == (1, 4, FRAMES, 6, 8) and base.isfinite().all()
    assert not torch.allclose(base, run(pipeline, inputs, guidance_scale=1.0), atol=1e-4)
    for changed in ("reference", "poses"):
        assert not torch.allclose(base, run(pipeline, inputs | {changed: 255 - inputs[changed]}), atol=1e-4)
    for attach in ("add", "replace"):
        made = calibration(attach)
        assert (made.member[0] < 0).all() and (made.member[1:] >= 0).all()
        result = run(pipeline, inputs, calibration=made, window_size=2, window_overlap=1)
        alone = run(pipeline, inputs, window_size=2, window_overlap=1)
        assert all(not torch.allclose(result[:, :, f], alone[:, :, f], atol=1e-4) for f in range(1, FRAMES))
        if not model.joint_frames:
            assert torch.allclose(result[:, :, 0], alone[:, :, 0], atol=1e-5), "as without TPC"


def test_every_model_has_its_attention_recorded(model, vae, inputs):
    pipeline = make_pipeline(vae, model, NoiseConfig())
    pipeline.set_progress_bar_config(disable=True)
    made = calibration("add")
    expected = run(pipeline, inputs, calibration=made)
    with AttentionRecording(AttentionConfig(steps=[1], mean=["heads"])) as recording:
        assert torch.equal(expected, run(pipeline, inputs, calibration=made, attention=recording))
    recorded = recording.result
    assert set(recorded.layers) == set(model.attention_layers((6, 8)))
    for layer in recorded.layers:
        total = recorded.own[layer] + recorded.maps[layer].sum((-1, -2))
        assert np.abs(total - 1).max() < 1e-5
        assert (recorded.maps[layer][:, 0, :, :, 1] == 0).all(), "nothing of an image that is not there"


@pytest.mark.parametrize("stage", ["image", "motion"])
def test_every_model_trains_with_calibrated_images(model, vae, stage):
    model = copy.deepcopy(model).train()
    set_trainable(model, TrainConfig(stage=stage, output="x", model=TINY))
    data = make_dataset(DataConfig(size=[32, 32], num_frames=1 if stage == "image" else 3, workers=0), 2)
    batch = torch.utils.data.default_collate([data[0], data[1]])
    config = TrainConfig(stage=stage, output="x", noise=NoiseConfig(condition_dropout=0.5))
    config.data.size = [32, 32]
    config.augmentation.calibrated = CalibratedTrainingConfig(probability=1.0, noise=0.0)
    result = Objective(model, vae, config).loss(model, batch, sample_generators(0, range(2)))
    result.loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and result.loss.isfinite()
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    assert not trained.keys() & model.unused_parameters()
