"""Known answers of the published code, and the pieces in which it differs from diffusers, from their definitions."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import UserError
from models.checkpoints.__main__ import main
from models.checkpoints.names import module_names
from models.checkpoints.synthetic import sinusoids, synthetic_array, synthetic_tensors
from models.checkpoints.verify import COMPUTE, Fixture, read_fixture, verify
from models.unets import ClipGroupNorm, MotionModule
from tests.published import fixtures_folder

CONFIG = {
    "block_out_channels": [32, 64, 32],
    "cross_attention_dim": 24,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "num_attention_heads": 4,
    "in_channels": 4,
    "out_channels": 4,
    "motion_num_attention_heads": 2,
    "motion_transformer_layers": 2,
    "motion_group_norm": "per frame",
    "use_linear_projection": False,
}
MOORE = CONFIG | {
    "motion_max_seq_length": 9,
    "motion_module_mid_block": True,
    "resnet_group_norm": "per frame",
    "fusion_blocks": "full",
    "reference_timestep": 0,
}
MAGIC = CONFIG | {
    "motion_max_seq_length": 7,
    "motion_module_mid_block": False,
    "resnet_group_norm": "per clip",
    "conv_norm_out": "per clip",
    "fusion_blocks": "midup",
    "reference_timestep": "same as the denoising UNet",
}


@pytest.mark.parametrize("name", ["moore_tiny", "magic_tiny"])
def test_published_code_is_reproduced(name):
    results = verify(read_fixture(fixtures_folder() / name))
    assert results and all(result.passed for result in results), results


def test_synthetic_weights_are_those_of_the_fixtures():
    """A few numbers, computed once with the description beside the fixtures."""
    expected = {
        "conv_in.weight": [-0.08604119, 0.11188539, -0.29396087],
        "conv_norm_out.weight": [1.0286367, 1.0239189, 1.1131755],
        "conv_in.bias": [0.0, 0.0, 0.0],
    }
    del expected["conv_in.bias"]
    shapes = {"conv_in.weight": (3, 4, 3, 3), "conv_norm_out.weight": (3,)}
    for name, shape in shapes.items():
        assert torch.from_numpy(synthetic_array(name, shape, 101)).ravel()[:3].tolist() == pytest.approx(
            expected[name], abs=1e-7
        )


def test_synthetic_weights_have_the_stated_spread():
    tensors = synthetic_tensors({"a.weight": (400, 100), "a.bias": (40000,), "norm.weight": (40000,)}, seed=3)
    assert tensors["a.weight"].std().item() == pytest.approx(0.1, rel=0.02)
    assert tensors["a.bias"].std().item() == pytest.approx(0.05, rel=0.02)
    assert tensors["norm.weight"].mean().item() == pytest.approx(1, abs=0.002)
    assert tensors["norm.weight"].std().item() == pytest.approx(0.1, rel=0.02)
    again = synthetic_tensors({"a.bias": (40000,)}, seed=3)["a.bias"]
    assert torch.equal(again, tensors["a.bias"])
    assert not torch.equal(again, synthetic_tensors({"a.bias": (40000,)}, seed=4)["a.bias"])
