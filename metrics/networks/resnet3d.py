"""3D ResNet-50 (Hara et al. 2018, Kinetics-400), whose features FID-VID compares: `resnet-50-kinetics.pth`."""

import torch.nn.functional as F
from torch import Tensor, nn


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
