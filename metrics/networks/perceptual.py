"""LPIPS (Zhang et al. 2018) and its shift-tolerant form ST-LPIPS (Ghildyal and Liu 2022): AlexNet and VGG-16 features.

Shapes use n = images, c = channels, h, w = pixels of a layer.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Mean and deviation of ImageNet's pixels after they were scaled to [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
VGG_BLOCKS = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512))


def lpips_from_features(first: Sequence[Tensor], second: Sequence[Tensor], heads: Sequence[Tensor]) -> Tensor:
    """Equation 1 of the LPIPS paper: distances (n,) from layers (n, c, h, w) and their heads (1, c, 1, 1)."""
    distance = first[0].new_zeros(len(first[0]))
    for a, b, head in zip(first, second, heads, strict=True):
        difference = (_unit_length(a) - _unit_length(b)) ** 2
        distance = distance + F.conv2d(difference, head).mean(dim=(1, 2, 3))
    return distance


def _unit_length(features: Tensor) -> Tensor:
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


class Blur(nn.Module):
    """Binomial 3 x 3 filter with stride 2, in place of a pooling or striding that would alias."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("filt", torch.zeros(channels, 1, 3, 3))

    def forward(self, features: Tensor) -> Tensor:
        # A border of 2 and not 1: the published networks were trained with it.
        padded = F.pad(features, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(padded, self.filt, stride=2, groups=len(self.filt))


class FeatureStack(nn.Module):
    """Layers in a row; the outputs of those whose indices are in `taps` are the features."""

    def __init__(self, layers: Sequence[nn.Module], taps: Sequence[int]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.taps = tuple(taps)

    def forward(self, images: Tensor) -> list[Tensor]:
        features, tapped = images, []
        for index, layer in enumerate(self.layers):
            features = layer(features)
            if index in self.taps:
                tapped.append(features)
        return tapped

    def load_named(self, state: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Load layers with parameters from a state dict in which they are called `names`, in order."""
        loaded = [layer for layer in self.layers if layer.state_dict()]
        for layer, name in zip(loaded, names, strict=True):
            layer.load_state_dict({key: state[f"{name}.{key}"] for key in layer.state_dict()})


def alexnet() -> FeatureStack:
    """The convolutions of torchvision's AlexNet, with features after each of its five ReLUs."""
    layers = [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for width, following in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(width, following, 3, padding=1), nn.ReLU()]
    return FeatureStack(layers, (1, 4, 7, 9, 11))


def vgg16() -> FeatureStack:
    """The convolutions of torchvision's VGG-16, with features at the end of each of its five blocks."""
    return _vgg([[nn.MaxPool2d(2, 2)] for _ in VGG_BLOCKS[1:]])


def shift_tolerant_alexnet() -> FeatureStack:
    """AlexNet of ST-LPIPS: no striding without a blur before it."""
    layers = [nn.Conv2d(3, 64, 11, stride=1, padding=2), Blur(64), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 1), Blur(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 1), Blur(192)]
    for width, following in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(width, following, 3, padding=1), nn.ReLU()]
    return FeatureStack(layers, (2, 6, 10, 12, 14))


def shift_tolerant_vgg16() -> FeatureStack:
    """VGG-16 of ST-LPIPS: every pooling is a maximum without stride and a blur with it."""
    return _vgg([[nn.MaxPool2d(2, 1), Blur(widths[0])] for widths in VGG_BLOCKS[1:]])


def _vgg(poolings: Sequence[list[nn.Module]]) -> FeatureStack:
    layers: list[nn.Module] = []
    taps = []
    for pooling, widths in zip([[], *poolings], VGG_BLOCKS, strict=True):
        layers += pooling
        for width, following in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(width, following, 3, padding=1), nn.ReLU()]
        taps.append(len(layers) - 1)
    return FeatureStack(layers, taps)


class PerceptualDistance(nn.Module):
    """A feature stack and its heads: the distance of images."""

    def __init__(self, stack: FeatureStack, heads: Sequence[Tensor]):
        super().__init__()
        self.stack = stack
        for index, head in enumerate(heads):
            self.register_buffer(f"head_{index}", head)
        self.num_heads = len(heads)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])

    def features(self, images: Tensor) -> list[Tensor]:  # images (n, 3, h, w) in [-1, 1]
        return self.stack((images - self.shift) / self.scale)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:  # (n, 3, h, w) in [-1, 1] -> (n,)
        heads = [getattr(self, f"head_{index}") for index in range(self.num_heads)]
        return lpips_from_features(self.features(first), self.features(second), heads)
