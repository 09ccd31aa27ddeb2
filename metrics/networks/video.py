"""Networks whose features of windows of frames are compared.

FVD: the 400 logits of I3D (Carreira and Zisserman 2017), with the parameter names of `i3d_pretrained_400.pt`.
FID-VID: the features of 3D ResNet-50 (Hara et al. 2018, Kinetics-400), with those of `resnet-50-kinetics.pth`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Channels of each block: input, then 1x1, two of the first 3x3 branch, two of the second, and of the pooling branch.
BLOCKS = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}


def pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """TensorFlow's padding: as many outputs as inputs over strides, the odd zero at the end."""
    padding: list[int] = []
    for size, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        total = max(k - (size % s or s), 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding)


def max_pool_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Maximum over windows; the padded zeros take part, as features are never negative."""
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


class ConvUnit3d(nn.Module):
    """Convolution, and batch norm and ReLU unless it gives logits."""

    def __init__(self, width: int, out: int, kernel: int = 1, stride: int = 1, logits: bool = False):
        super().__init__()
        self.conv3d = nn.Conv3d(width, out, kernel, stride=stride, bias=logits)
        self.bn = None if logits else nn.BatchNorm3d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))
        return x if self.bn is None else F.relu(self.bn(x))


class InceptionBlock3d(nn.Module):
    """Four branches side by side."""

    def __init__(self, width: int, out: tuple[int, ...]):
        super().__init__()
        self.b0 = ConvUnit3d(width, out[0])
        self.b1a, self.b1b = ConvUnit3d(width, out[1]), ConvUnit3d(out[1], out[2], 3)
        self.b2a, self.b2b = ConvUnit3d(width, out[3]), ConvUnit3d(out[3], out[4], 3)
        self.b3b = ConvUnit3d(width, out[5])

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool_same(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class I3D(nn.Module):
    """Logits (n, 400) of windows (n, 3, t, 224, 224) in [-1, 1], t at least 9; the mean over time."""

    dimension = 400

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = ConvUnit3d(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = ConvUnit3d(64, 64)
        self.Conv3d_2c_3x3 = ConvUnit3d(64, 192, 3)
        for name, (width, out) in BLOCKS.items():
            self.add_module(name, InceptionBlock3d(width, out))
        self.logits = ConvUnit3d(1024, self.dimension, logits=True)

    def forward(self, clips: Tensor) -> Tensor:
        x = max_pool_same(self.Conv3d_1a_7x7(clips), (1, 3, 3), (1, 2, 2))  # (n, 64, t/2, 56, 56)
        x = max_pool_same(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))  # (n, 192, t/2, 28, 28)
        x = max_pool_same(self.Mixed_3c(self.Mixed_3b(x)), (3, 3, 3), (2, 2, 2))  # (n, 480, t/4, 14, 14)
        x = self.Mixed_4f(self.Mixed_4e(self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(x)))))
        x = self.Mixed_5c(self.Mixed_5b(max_pool_same(x, (2, 2, 2), (2, 2, 2))))  # (n, 1024, t/8, 7, 7)
        return self.logits(F.avg_pool3d(x, (1, 7, 7), stride=1)).mean(dim=(2, 3, 4))


class Bottleneck3d(nn.Module):
    """1x1x1, 3x3x3, 1x1x1 convolutions around a shortcut."""

    expansion = 4

    def __init__(self, width: int, inner: int, stride: int):
        super().__init__()
        out = inner * self.expansion
        self.conv1, self.bn1 = nn.Conv3d(width, inner, 1, bias=False), nn.BatchNorm3d(inner)
        self.conv2 = nn.Conv3d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(inner)
        self.conv3, self.bn3 = nn.Conv3d(inner, out, 1, bias=False), nn.BatchNorm3d(out)
        self.downsample = None
        if stride != 1 or width != out:
            self.downsample = nn.Sequential(nn.Conv3d(width, out, 1, stride=stride, bias=False), nn.BatchNorm3d(out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNet3d50(nn.Module):
    """Pooled features (n, 2048) of windows (n, 3, 16, 112, 112): pixels of 0 to 255 minus the mean image."""

    dimension = 2048

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv3d(3, 64, 7, stride=(1, 2, 2), padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.layer1 = _stage(64, 64, 3, stride=1)
        self.layer2 = _stage(256, 128, 4, stride=2)
        self.layer3 = _stage(512, 256, 6, stride=2)
        self.layer4 = _stage(1024, 512, 3, stride=2)
        self.fc = nn.Linear(self.dimension, 400)  # in the published file; features are taken before it

    def forward(self, clips: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(clips))), 3, stride=2, padding=1)  # (n, 64, 8, 28, 28)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3, 4))  # of (n, 2048, 1, 4, 4)


def _stage(width: int, inner: int, blocks: int, stride: int) -> nn.Sequential:
    out = inner * Bottleneck3d.expansion
    rest = [Bottleneck3d(out, inner, 1) for _ in range(blocks - 1)]
    return nn.Sequential(Bottleneck3d(width, inner, stride), *rest)
