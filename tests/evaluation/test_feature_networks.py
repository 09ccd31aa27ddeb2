"""Feature networks: the published architectures, their weight files, and what is said when one is missing.

Known answers come from the published implementations (pytorch-fid 0.3.0, pytorch-i3d, DisCo's 3D ResNet, lpips 0.1.4,
stlpips-pytorch 0.0.2) with the same weights, which `seeded` draws from names and shapes. A second device computes
them, which all of a network must be on.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.errors import UserError
from metrics import features, weights
from metrics.networks.inception import InceptionV3
from metrics.networks.perceptual import alexnet, vgg16
from metrics.networks.video import I3D, ResNet3d50
from tests.second_device import SECOND, second_device


def seeded(network: nn.Module) -> nn.Module:
    """Random weights that keep activations of a reasonable size, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()
    for name in sorted(state):
        value = state[name]
        if not value.dtype.is_floating_point:
            continue
        if "running_var" in name:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.ndim > 1:
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
        else:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1 + name.endswith("weight"))
    return network.eval()


def drawn(*shape: int, normal: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn if normal else torch.rand)(shape, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize(
    ("network", "file", "opened", "side", "known"),
    [
        (ResNet3d50, weights.RESNET3D, features.resnet3d_features, 112, (1473.7347, 282.8661, 851.1154)),
        (I3D, weights.I3D_KINETICS, features.i3d_features, 224, (-2.1307, -3.3392, 1.1354)),
    ],
)
def test_networks_of_windows_are_the_published_ones(tmp_path, network, file, opened, side, known):
    torch.save(seeded(network()).state_dict(), tmp_path / file.names[0])
    clip = drawn(1, 3, 16, side, side).transpose(1, 2)
    with second_device(double=False):
        extractor = opened(tmp_path, SECOND)
        assert extractor.prepare(np.zeros((1, 8, 8, 3), np.uint8)).device == SECOND
        result = extractor.extract(clip.to(SECOND))
        assert result.shape == (1, extractor.dimension)
        assert result[0, :3].tolist() == pytest.approx(known, rel=1e-3)


@torch.no_grad()
def test_inception_from_its_file_is_the_published_one(tmp_path):
    """As pytorch-fid: images in [0, 1], resized bilinearly. Its file lacks the counters of batch norm."""
    state = seeded(InceptionV3()).state_dict()
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / weights.INCEPTION.names[0])
    images = drawn(2, 3, 128, 128, normal=False)
    prepared = torch.nn.functional.interpolate(images, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    frames = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    with second_device(double=False):
        extractor = features.inception_features(tmp_path, SECOND)
        assert extractor.extract(prepared.to(SECOND))[0, :3].tolist() == pytest.approx((3.2474, 0.0, 1.4296), rel=1e-3)
        assert torch.allclose(extractor.prepare(frames).cpu(), prepared, atol=0.005)
    assert extractor.dimension == 2048 and len(extractor.sha256) == 64


def test_resnet_of_a_training_checkpoint_and_its_pixels(tmp_path):
    state = {f"module.{name}": value for name, value in seeded(ResNet3d50()).state_dict().items()}
    path = tmp_path / weights.RESNET3D.names[0]
    torch.save({"epoch": 3, "arch": "resnet-50", "state_dict": state, "optimizer": {}}, path)
    frames = np.full((2, 30, 40, 3), 120, np.uint8)
    with second_device(double=False):
        prepared = features.resnet3d_features(tmp_path, SECOND).prepare(frames).cpu()
    assert prepared.shape == (2, 3, 112, 112)
    assert torch.allclose(prepared[0, :, 0, 0], 120 - torch.tensor(features.KINETICS_MEAN), atol=1e-3)


def test_torchscript_networks_get_the_flags_they_know(tmp_path):
    class Published(nn.Module):
        def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False):
            return x.mean(dim=(2, 3, 4)) + 100 * float(rescale) + 10 * float(resize) + float(return_features)

    torch.jit.script(Published()).save(str(tmp_path / "i3d_torchscript.pt"))
    extractor = features.i3d_features(tmp_path)
    assert "TorchScript" in extractor.network
    clip = extractor.prepare(np.full((16, 20, 20, 3), 255, np.uint8))[None]
    assert extractor.extract(clip)[0].tolist() == pytest.approx([2.0] * 3, abs=1e-4)  # 1 of the pixels + 1 of the flag


@torch.no_grad()
@pytest.mark.parametrize(
    ("net", "stack", "known"),
    [("alex", alexnet, (0.11165950, 0.10198854)), ("vgg", vgg16, (0.16908176, 0.17054503))],
)
def test_lpips_with_brought_and_packaged_weights_is_the_lpips_package(tmp_path, net, stack, known):
    packaged()
    generator = torch.Generator().manual_seed(0)
    state = {}
    layers = [layer for layer in stack().layers if layer.state_dict()]
    for layer, name in zip(layers, features._CONVOLUTIONS[net], strict=True):
        # In the order in which the known answer drew them: biases before weights.
        state[f"{name}.bias"] = torch.randn(layer.bias.shape, generator=generator) * 0.1
        deviation = (2 / layer.weight[0].numel()) ** 0.5
        state[f"{name}.weight"] = torch.randn(layer.weight.shape, generator=generator) * deviation
    file = {"alex": weights.ALEXNET, "vgg": weights.VGG16}[net]
    torch.save(state | {"classifier.1.weight": torch.zeros(2)}, tmp_path / file.names[0])
    first, second = (torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(2))
    with second_device(double=False):
        distance = features.lpips(net, tmp_path, SECOND).distance
        first, second = first.to(SECOND), second.to(SECOND)
        assert distance(first, second).tolist() == pytest.approx(known, rel=1e-4)
        assert distance(first, first).abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize(("net", "known"), [("alex", (0.00136828, 0.00112447)), ("vgg", (0.00171661, 0.00168859))])
def test_stand_ins_are_st_lpips(net, known):
    packaged()
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    second = (first + 0.3 * torch.rand(2, 3, 64, 64, generator=generator)).clamp(-1, 1)
    with second_device(double=False):
        distance = features.shift_tolerant_lpips(net, SECOND)
        assert distance.distance(first.to(SECOND), second.to(SECOND)).tolist() == pytest.approx(known, rel=1e-3)
    assert "ST-LPIPS" in distance.network


@torch.no_grad()
def test_stand_in_of_fvd_sees_order_and_the_one_of_fid_does_not():
    packaged()
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    with second_device(double=False):
        frame = features.vgg_features(SECOND)
        clip = features.vgg_clip_features(frame)
        prepared = frame.prepare(frames)
        parts = [clip.extract(part) for part in (prepared[:1].repeat(6, 1)[None], prepared[None])]
        rows, still, moving = (part.cpu() for part in (prepared, *parts))
    assert rows.shape == (6, 512) and rows.norm(dim=1).max() <= 1.0001
    assert still.shape == (1, clip.dimension) and still[0, 512:].abs().max() == 0 < moving[0, 512:].max()
    assert torch.allclose(moving[0, :512], rows.mean(dim=0))


class TestFiles:
    def test_a_missing_file_is_named_with_where_people_get_it(self, tmp_path):
        for open_network, name in (
            (features.inception_features, "pt_inception-2015-12-05-6726825d.pth"),
            (features.resnet3d_features, "resnet-50-kinetics.pth"),
            (features.i3d_features, "i3d_pretrained_400.pt"),
            (lambda folder: features.lpips("vgg", folder), "vgg16-397923af.pth"),
            (lambda folder: features.lpips("alex", folder), "alexnet-owt-7be5be79.pth"),
        ):
            with pytest.raises(UserError, match=f"{name}.*get it from .*features=stand-in") as caught:
                open_network(tmp_path)
            assert str(tmp_path) in str(caught.value)

    def test_files_that_are_something_else(self, tmp_path):
        path = tmp_path / weights.I3D_KINETICS.names[0]
        for content in (b"text", b""):
            path.write_bytes(content)
            with pytest.raises(UserError, match="is not a file of tensors"):
                features.i3d_features(tmp_path)
        torch.save({"conv1.weight": torch.zeros(3)}, path)
        with pytest.raises(UserError, match="does not fit I3D"):
            features.i3d_features(tmp_path)
        torch.save([torch.zeros(3)], path)
        with pytest.raises(UserError, match="does not hold a state dict"):
            features.i3d_features(tmp_path)

    def test_code_in_a_pickle_does_not_run(self, tmp_path):
        class Harm:
            def __reduce__(self):
                return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

        path = tmp_path / weights.VGG16.names[0]
        torch.save({"features.0.weight": Harm()}, path)
        with pytest.raises(UserError, match="is not a file of tensors"):
            weights.read_state(path)
        assert not (tmp_path / "ran").exists()

    def test_packaged_files_are_checked(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TPC_ANIMATE_CACHE", str(tmp_path))
        with pytest.raises(UserError, match="alex_shift_tolerant.pth is missing; run `python -m metrics.weights`"):
            features.shift_tolerant_lpips("alex")
        (tmp_path / "metrics").mkdir()
        (tmp_path / "metrics" / "lpips-alex.pth").write_bytes(b"other")
        with pytest.raises(UserError, match="not the published file"):
            weights.packaged_path(weights.LPIPS_HEADS["alex"])
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        with pytest.raises(UserError, match="fetching the weights of measures failed in `pip download lpips==0.1.4`"):
            weights.fetch_packaged()


def packaged() -> None:
    """The files out of published packages, or a skip where they cannot be had."""
    try:
        weights.fetch_packaged()
    except UserError as error:
        pytest.skip(f"the packages cannot be had: {error}")
