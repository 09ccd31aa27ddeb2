"""Feature extractors of the Frechet distances and of LPIPS, and windows of consecutive frames.

An extractor works in two stages, so that overlapping windows share the first: `prepare` takes single frames, `extract`
what was prepared, stacked for a batch of frames or of windows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from metrics import weights
from metrics.networks.inception import InceptionV3
from metrics.networks.perceptual import (
    FeatureStack,
    PerceptualDistance,
    alexnet,
    shift_tolerant_alexnet,
    shift_tolerant_vgg16,
    vgg16,
)
from metrics.networks.video import I3D, ResNet3d50

KINETICS_MEAN = (114.7748, 107.7354, 99.4750)  # RGB mean of Kinetics that the 3D ResNet was trained with
_NAMES = {"alex": "AlexNet", "vgg": "VGG-16"}
# Layers with parameters in the published files, in order.
_CONVOLUTIONS = {
    "alex": ("features.0", "features.3", "features.6", "features.8", "features.10"),
    "vgg": tuple(f"features.{n}" for n in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
}
_SHIFT_TOLERANT_LAYERS = {
    "alex": "1.0 1.1 2.4 2.5 3.8 3.9 4.11 5.13",
    "vgg": "1.0 1.2 2.5 2.6 2.8 3.11 3.12 3.14 3.16 4.19 4.20 4.22 4.24 5.27 5.28 5.30 5.32",
}  # behind "net.slice"


@dataclass(frozen=True)
class FeatureExtractor:
    """A network that turns frames, or windows of frames, into vectors."""

    network: str  # its name and what of it is compared, for reports
    dimension: int  # of the vectors
    sha256: str  # of its weight file
    prepare: Callable[[np.ndarray], Tensor]  # frames (n, h, w, 3) uint8 -> (n, ...), one row each frame
    extract: Callable[[Tensor], Tensor]  # prepared frames (n, ...) or windows (n, t, ...) -> (n, dimension) float32


@dataclass(frozen=True)
class ImageDistance:
    network: str  # its name, for reports
    sha256: str  # of its weight files
    distance: Callable[[Tensor, Tensor], Tensor]  # images (n, 3, h, w), twice -> (n,)


def image_tensor(frames: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Frames (n, h, w, 3) uint8 -> (n, 3, h, w) float32, 0 to 255."""
    return torch.from_numpy(np.ascontiguousarray(frames)).to(device).permute(0, 3, 1, 2).float()


def resize_bicubic(frames: np.ndarray, side: int) -> np.ndarray:
    """Frames (n, h, w, 3) uint8 -> (n, side, side, 3) float32: PIL's bicubic filter on each channel, not rounded."""
    resized = np.empty((len(frames), side, side, 3), np.float32)
    for index, frame in enumerate(frames):
        for channel in range(3):
            image = Image.fromarray(frame[..., channel].astype(np.float32))
            resized[index, ..., channel] = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    return resized


def inception_features(folder: Path, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The features of FID, from a state dict as pytorch-fid's or from NVIDIA's TorchScript file."""
    path = weights.find_weights(weights.INCEPTION, folder, "fid")
    network = _load_network(InceptionV3(), path, device)
    if weights.is_torchscript(path):
        name = "Inception-v3 (TorchScript, own resizing), 2048 pooled features"
        return FeatureExtractor(name, 2048, weights.digest(path), lambda frames: image_tensor(frames, device), network)

    def prepare(frames: np.ndarray) -> Tensor:
        images = image_tensor(frames, device) / 255
        # pytorch-fid's resizing is without antialiasing.
        return F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1

    name = "Inception-v3 of 2015-12-05, 2048 pooled features; bilinear to 299 x 299"
    return FeatureExtractor(name, InceptionV3.dimension, weights.digest(path), prepare, network)


def resnet3d_features(folder: Path, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The features of FID-VID: 3D ResNet-50 at 112 x 112."""
    path = weights.find_weights(weights.RESNET3D, folder, "fid_vid")
    network = weights.load_network(ResNet3d50(), path).to(device)
    mean = torch.tensor(KINETICS_MEAN, device=device)

    def prepare(frames: np.ndarray) -> Tensor:
        return (torch.from_numpy(resize_bicubic(frames, 112)).to(device) - mean).permute(0, 3, 1, 2)

    def extract(clips: Tensor) -> Tensor:
        return network(clips.transpose(1, 2))

    name = "3D ResNet-50, Kinetics-400, 2048 pooled features; PIL bicubic to 112 x 112, minus the mean"
    return FeatureExtractor(name, ResNet3d50.dimension, weights.digest(path), prepare, extract)


def i3d_features(folder: Path, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The features of FVD: I3D's logits at 224 x 224, from a state dict or a TorchScript file."""
    path = weights.find_weights(weights.I3D_KINETICS, folder, "fvd")
    network = _load_network(I3D(), path, device)

    def prepare(frames: np.ndarray) -> Tensor:
        return torch.from_numpy(resize_bicubic(frames, 224) / 127.5 - 1).to(device).permute(0, 3, 1, 2)

    def extract(clips: Tensor) -> Tensor:
        return network(clips.transpose(1, 2))

    form = " (TorchScript)" if weights.is_torchscript(path) else ""
    name = f"I3D{form}, Kinetics-400, 400 logits; PIL bicubic to 224 x 224"
    return FeatureExtractor(name, I3D.dimension, weights.digest(path), prepare, extract)


def vgg_features(device: torch.device | str = "cpu") -> FeatureExtractor:
    """Stand-in for Inception that needs no download from elsewhere: the last layer of ST-LPIPS's VGG-16."""
    network, sha256 = _shift_tolerant("vgg", device)

    def prepare(frames: np.ndarray) -> Tensor:
        layer = network.features(image_tensor(frames, device) / 127.5 - 1)[-1]  # (n, 512, h, w)
        # Unit length at every position, as LPIPS does.
        return F.normalize(layer, dim=1).mean(dim=(2, 3))

    name = "VGG-16 of ST-LPIPS, 512 features of unit length, averaged over the image"
    return FeatureExtractor(name, 512, sha256, prepare, lambda features: features)


def vgg_clip_features(frame: FeatureExtractor) -> FeatureExtractor:
    """Stand-in for I3D: over a window the mean of `vgg_features`, and the mean of their change from frame to frame."""

    def extract(clips: Tensor) -> Tensor:
        return torch.cat([clips.mean(dim=1), clips.diff(dim=1).abs().mean(dim=1)], dim=1)

    name = f"{frame.network}; over a window their mean and their mean change from frame to frame"
    return replace(frame, network=name, dimension=2 * frame.dimension, extract=extract)


def lpips(net: str, folder: Path, device: torch.device | str = "cpu") -> ImageDistance:
    """LPIPS with torchvision's convolutions ("alex" or "vgg") and the heads of lpips 0.1.4."""
    file = {"alex": weights.ALEXNET, "vgg": weights.VGG16}[net]
    path = weights.find_weights(file, folder, f"lpips_{net}")
    heads_path = weights.packaged_path(weights.LPIPS_HEADS[net])
    stack = {"alex": alexnet, "vgg": vgg16}[net]()
    network = _perceptual_distance(stack, path, _CONVOLUTIONS[net], heads_path, device)
    return ImageDistance(f"LPIPS 0.1, {_NAMES[net]}", weights.digest(path), network)


def shift_tolerant_lpips(net: str, device: torch.device | str = "cpu") -> ImageDistance:
    """ST-LPIPS, whose networks come with a package. Not LPIPS: its values have a scale of their own."""
    network, sha256 = _shift_tolerant(net, device)
    return ImageDistance(f"ST-LPIPS 0.0, {_NAMES[net]}", sha256, network)


def _shift_tolerant(net: str, device: torch.device | str) -> tuple[PerceptualDistance, str]:
    path = weights.packaged_path(weights.SHIFT_TOLERANT[net])
    stack = {"alex": shift_tolerant_alexnet, "vgg": shift_tolerant_vgg16}[net]()
    layers = tuple(f"net.slice{name}" for name in _SHIFT_TOLERANT_LAYERS[net].split())
    return _perceptual_distance(stack, path, layers, path, device), weights.digest(path)


def _perceptual_distance(
    stack: FeatureStack, path: Path, names: tuple[str, ...], heads_path: Path, device: torch.device | str
) -> PerceptualDistance:
    """The distance with the layers `names` of one weight file and the heads of another, or of the same."""
    try:
        stack.load_named(weights.read_state(path), names)
    except (KeyError, RuntimeError) as error:
        raise weights.unfitting(path, "the network of LPIPS", error) from None
    heads = weights.read_state(heads_path)
    network = PerceptualDistance(stack, [heads[f"lin{index}.model.1.weight"] for index in range(5)])
    return network.eval().to(device).requires_grad_(False)


def _load_network(network: nn.Module, path: Path, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """The network with a file's weights, or the published TorchScript program that the file holds in its place."""
    if not weights.is_torchscript(path):
        return weights.load_network(network, path).to(device)
    program = torch.jit.load(path, map_location=device).eval()
    # Flags differ from file to file; the features alone are wanted.
    wanted = {"return_features": True, "rescale": False, "resize": False}
    known = {argument.name for argument in program.forward.schema.arguments}
    return partial(program, **{name: value for name, value in wanted.items() if name in known})


def window_starts(num_frames: int, length: int, stride: int) -> range:
    """First frames of the windows of a clip: whole windows only, so a clip shorter than `length` has none."""
    if length < 1 or stride < 1:
        raise ValueError(f"length and stride must be at least 1, got {length} and {stride}")
    return range(0, max(0, num_frames - length + 1), stride)


class WindowBuffer:
    """The windows of `window_starts` of a clip whose frames come in batches; few frames are held at a time."""

    def __init__(self, length: int, stride: int):
        window_starts(0, length, stride)  # checks the arguments
        self.length, self.stride = length, stride
        self._held: Tensor | None = None
        self._first = 0  # index of the first frame that is held
        self._next = 0  # first frame of the next window

    def push(self, frames: Tensor) -> Tensor:
        """Take in frames (n, ...) and return the windows (m, length, ...) that they complete; m may be 0."""
        held = frames if self._held is None else torch.cat([self._held, frames])
        complete = []
        while self._next + self.length <= self._first + len(held):
            start = self._next - self._first
            complete.append(held[start : start + self.length])
            self._next += self.stride
        drop = min(len(held), max(0, self._next - self._first))
        self._held, self._first = held[drop:].clone(), self._first + drop
        return torch.stack(complete) if complete else frames.new_zeros((0, self.length, *frames.shape[1:]))
