"""Named, versioned protocols of measures, which are printed with the numbers.

    disco-2023    what DisCo's published evaluation computed in 2023, errors included
    disco-fixed   the same images and windows with the errors put right
    native        the generated resolution, standard forms of all measures
    tpc-2026      native with the measures of 2024 to 2026: MMD, motion of keypoints, face identity, steadiness

A change that alters any number gets a new version.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import cv2
import numpy as np
from PIL import Image

from metrics.image import historical_l1, mean_absolute_error, overflowing_psnr, psnr, ssim


@dataclass(frozen=True)
class Measure:
    name: str  # in result files
    label: str  # in tables
    # "pixels", their "changes" from frame to frame, a learned "distance" of images, how "steady" a clip's features
    # are, or of the "person". Distances of two sets of vectors: of "frames" or "windows", of the "motion" of keypoints
    # in windows, or "given" ones.
    kind: str
    definition: str
    unit: str = ""
    better: str = "lower"  # or "higher"
    mmd: bool = False  # of sets of vectors: the MMD, else the Frechet distance

    @property
    def is_pooled(self) -> bool:
        """True for distances of two sets of vectors, which a single clip or frame has no value of."""
        return self.kind in ("frames", "windows", "motion", "given")


_MMD = "100 x squared MMD, unbiased, kernel (x.y / d)^2, clips alike, of"
_MEASURES = (
    Measure("mae", "L1", "pixels", "mean absolute difference over pixels and channels", "0-255"),
    Measure("l1_historical", "L1 (historical)", "pixels", "mean absolute difference / (height x width)"),
    Measure("psnr", "PSNR", "pixels", "10 log10(255^2 / MSE) of each frame; 100 if identical", "dB", "higher"),
    Measure("psnr_overflow", "PSNR (overflow)", "pixels",
            "PSNR with squares that wrap around in 8 bits", "dB", "higher"),
    Measure("ssim", "SSIM", "pixels", "structural similarity of each frame", better="higher"),
    Measure("flicker", "flicker", "changes",
            "mean absolute difference of the change since the frame before from the true change", "0-255"),
    Measure("lpips_alex", "LPIPS (AlexNet)", "distance", "LPIPS 0.1 with AlexNet"),
    Measure("lpips_vgg", "LPIPS (VGG)", "distance", "LPIPS 0.1 with VGG-16"),
    Measure("st_lpips_alex", "ST-LPIPS (AlexNet)", "distance", "shift-tolerant LPIPS, not LPIPS"),
    Measure("st_lpips_vgg", "ST-LPIPS (VGG)", "distance", "shift-tolerant LPIPS, not LPIPS"),
    Measure("fid", "FID", "frames", "Frechet distance of Inception features of all frames, pooled"),
    Measure("fid_vid", "FID-VID", "windows", "Frechet distance of 3D ResNet-50 features of windows"),
    Measure("fvd", "FVD", "windows", "Frechet distance of I3D logits of windows"),
    Measure("vgg_frechet", "VGG Frechet distance", "frames", "Frechet distance of VGG features, not FID"),
    Measure("vgg_frechet_video", "VGG Frechet video distance", "windows",
            "Frechet distance of VGG features of windows and of their change over time, not FVD"),
    Measure("keypoint_error", "keypoint error", "person",
            "distance of estimated keypoints from the target's, in heights of the person", "heights"),
    Measure("part_colour", "part colour difference", "person",
            "difference of the median colours of body parts", "CIEDE2000"),
    Measure("mmd_i3d", "MMD (I3D)", "windows", f"{_MMD} I3D logits of windows", mmd=True),
    Measure("mmd_resnet3d", "MMD (3D ResNet-50)", "windows", f"{_MMD} 3D ResNet-50 features of windows", mmd=True),
    Measure("mmd_vgg", "MMD (VGG)", "windows",
            f"{_MMD} VGG features of windows and of their change over time", mmd=True),
    Measure("mmd_given", "MMD (given features)", "given", f"{_MMD} features that the user brings", mmd=True),
    Measure("keypoint_motion", "keypoint motion distance", "motion",
            "Frechet distance of histograms of the velocity and acceleration of body keypoints, not FVMD"),
    Measure("keypoint_motion_mmd", "keypoint motion MMD", "motion", f"{_MMD} these histograms", mmd=True),
    Measure("face_identity", "face similarity", "person",
            "cosine of the embeddings of generated and true face; 0 where only the generated image has none",
            better="higher"),
    Measure("vgg_consistency", "VGG consistency", "steady",
            "cosine of each frame's VGG features with the first frame's and with the one's before, not VBench's",
            better="higher"),
    Measure("vgg_consistency_truth", "true VGG consistency", "steady", "the same of the true clips", better="higher"),
    Measure("vgg_smoothness", "VGG smoothness", "steady",
            "1 - relative distance of each frame's VGG features from the middle of its neighbours', not VBench's",
            better="higher"),
    Measure("vgg_smoothness_truth", "true VGG smoothness", "steady", "the same of the true clips", better="higher"),
)  # fmt: skip
MEASURES = {measure.name: measure for measure in _MEASURES}
# What stands in for measures whose networks must be brought.
STAND_INS = {
    "lpips_alex": "st_lpips_alex",
    "lpips_vgg": "st_lpips_vgg",
    "fid": "vgg_frechet",
    "fid_vid": "vgg_frechet_video",
    "fvd": "vgg_frechet_video",
    "mmd_i3d": "mmd_vgg",
    "mmd_resnet3d": "mmd_vgg",
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The form that images are brought to and the measures that are taken of them."""

    name: str
    version: str
    crop: str = "none"  # or "centre square"
    size: tuple[int, int] | None = None  # (width, height) that both are resized to after the crop, None as generated
    resize: str = "none"  # in words
    ssim: str = "rgb-gaussian"  # variant of `metrics.image.ssim`
    lpips_range: tuple[float, float] = (-1.0, 1.0)  # of the images that LPIPS gets; (-1, 1) is right
    window: int = 16  # frames
    stride: int = 1  # frames between the starts of windows
    measures: tuple[str, ...]  # names of `MEASURES`; some need poses or files, and are left out without
    regions: str = "pixels outside the region are painted grey (128) in both images; pixel measures leave them out"

    def plain(self) -> dict[str, Any]:
        values = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def lines(self) -> list[str]:
        """The protocol in sentences, for tables and the terminal."""
        size = "resolution as generated" if self.size is None else f"{self.size[0]} x {self.size[1]} pixels"
        low, high = self.lpips_range
        return [
            f"protocol {self.name}, version {self.version}: {size}, crop {self.crop}, resizing {self.resize}",
            f"values 0-255; SSIM {self.ssim}; LPIPS inputs in [{low:g}, {high:g}]",
            f"windows of {self.window} frames, a start every {self.stride}, whole windows only; features of all "
            "frames and windows of all clips pooled",
        ]


_BASIC = ("mae", "psnr", "ssim")
_DISTANCES = ("lpips_vgg", "fid", "fid_vid", "fvd")
_OF_2026 = (
    "mmd_resnet3d", "mmd_i3d", "mmd_given", "keypoint_motion", "keypoint_motion_mmd", "face_identity",
    "vgg_consistency", "vgg_consistency_truth", "vgg_smoothness", "vgg_smoothness_truth",
)  # fmt: skip
_DISCO = Protocol(
    name="disco-fixed",
    version="1.0",
    crop="centre square",
    size=(256, 256),
    resize="PIL bilinear (generated squares of another size: OpenCV bilinear)",
    ssim="grey-uniform",
    measures=(*_BASIC, *_DISTANCES),
)
PROTOCOLS = {
    "disco-2023": replace(
        _DISCO,
        name="disco-2023",
        lpips_range=(0.0, 1.0),
        measures=("l1_historical", "psnr_overflow", *_DISCO.measures),
    ),
    "disco-fixed": _DISCO,
    "native": Protocol(name="native", version="1.0", measures=(*_BASIC, "lpips_alex", *_DISTANCES)),
    "tpc-2026": Protocol(
        name="tpc-2026",
        version="1.0",
        stride=16,  # windows of a clip share no frames
        measures=(*_BASIC, "flicker", "lpips_alex", *_DISTANCES, *_OF_2026),
    ),
}


def brought_to_form(image: np.ndarray, protocol: Protocol, nearest: bool = False) -> np.ndarray:
    """An image (h, w, 3) uint8, or a mask (h, w) bool with `nearest`, cropped and resized as the protocol says."""
    if protocol.crop == "centre square":
        height, width = image.shape[:2]
        side = min(height, width)
        # Rounded as torchvision's CenterCrop rounds.
        top, left = round((height - side) / 2), round((width - side) / 2)
        image = image[top : top + side, left : left + side]
    if protocol.size is None or image.shape[1::-1] == protocol.size:
        return image
    method = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(image).resize(protocol.size, method))


def generated_to_form(image: np.ndarray, true_size: tuple[int, int], protocol: Protocol) -> np.ndarray:
    """A generated image (h, w, 3) uint8 brought to the form of the true one, whose original size is `true_size`."""
    height, width = image.shape[:2]
    if (width, height) == true_size:
        return brought_to_form(image, protocol)
    if protocol.size is not None and width == height:
        return cv2.resize(image, protocol.size, interpolation=cv2.INTER_LINEAR)
    wanted = f"{true_size[0]}x{true_size[1]}" + (", or square" if protocol.size is not None else "")
    raise ValueError(f"is {width}x{height}; protocol {protocol.name} needs {wanted}")


def pixel_measure(
    name: str, protocol: Protocol, generated: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None
) -> float:
    """One measure of kind "pixels" of two images in the protocol's form."""
    if name == "ssim":
        return ssim(generated, truth, mask, protocol.ssim)
    measures = {"mae": mean_absolute_error, "l1_historical": historical_l1}
    measures |= {"psnr": psnr, "psnr_overflow": overflowing_psnr}
    return measures[name](generated, truth, mask)
