"""Networks of metrics, and recorded attention as the viewer shows it, on a second device."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation.attention.recorded_runs import record_both
from inference.config import SamplingConfig
from metrics import features, weights
from metrics.networks.inception import InceptionV3
from metrics.networks.perceptual import PerceptualDistance, alexnet, shift_tolerant_vgg16
from metrics.networks.video import I3D, ResNet3d50
from tests.second_device import SECOND, second_device
from tests.viewed import rendered_inputs
from tpc import CalibrationConfig


def drawn(network: nn.Module) -> nn.Module:
    """Weights that keep activations of a reasonable size, cheaply."""
    generator = torch.Generator().manual_seed(0)
    for value in network.state_dict().values():
        if value.ndim > 1:
            value.uniform_(-1, 1, generator=generator).mul_((3 / value[0].numel()) ** 0.5)
        elif value.is_floating_point():
            value.uniform_(0.5, 1, generator=generator)
    return network.eval()


@pytest.mark.parametrize("stack", [alexnet, shift_tolerant_vgg16])
def test_perceptual_distances(stack):
    layers = drawn(stack())
    heads = [
        torch.rand(1, width, 1, 1)
        for width in ([64, 192, 384, 256, 256] if stack is alexnet else [64, 128, 256, 512, 512])
    ]
    network, images = PerceptualDistance(layers, heads).requires_grad_(False), torch.rand(2, 1, 3, 64, 64) * 2 - 1
    expected = network(*images)
    with second_device():
        assert torch.equal(network.to(SECOND)(*images.to(SECOND)).cpu(), expected)


@pytest.mark.parametrize(
    ("network", "file", "extractor", "frames"),
    [
        (InceptionV3, weights.INCEPTION, features.inception_features, 1),
        (ResNet3d50, weights.RESNET3D, features.resnet3d_features, 4),
        (I3D, weights.I3D_KINETICS, features.i3d_features, 9),
    ],
)
def test_frechet_features(tmp_path, network, file, extractor, frames):
    with torch.device("meta"):
        made = network()
    torch.save(drawn(made.to_empty(device="cpu")).state_dict(), tmp_path / file.names[0])

    def extracted(device: torch.device | str) -> Tensor:
        made = extractor(tmp_path, device)
        images = np.random.default_rng(0).integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8)
        prepared = made.prepare(images)
        with torch.no_grad():
            return made.extract(prepared if frames == 1 else prepared[None]).cpu()

    expected = extracted("cpu")
    assert expected.isfinite().all() and expected.std() > 0
    with second_device():
        assert torch.equal(extracted(SECOND), expected)


def test_runs_of_the_viewer(tiny_pipeline, tmp_path):
    inputs, sampling = (
        rendered_inputs(tmp_path),
        SamplingConfig(size=[32, 32], num_frames=3, steps=1, guidance_scale=1.0),
    )
    expected = record_both(tiny_pipeline, *inputs, sampling, CalibrationConfig())
    with second_device():
        found = record_both(deepcopy(tiny_pipeline).to(SECOND), *inputs, sampling, CalibrationConfig())
    for name, side in expected.sides.items():
        # The VAE decodes other numbers of frames at a time, which rounds otherwise.
        assert np.abs(side.frames.astype(int) - found.sides[name].frames).max() <= 1
        for layer, maps in side.recorded.maps.items():
            assert np.array_equal(maps, found.sides[name].recorded.maps[layer])
