"""Images as users give them, as networks take them, and as a run passes them around.

Shapes use f = frames, i = images, c = channels, h, w = latent size, H, W = image size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from core.processes import to_device
from models.attention.layers import TokenLevel
from models.attention.masking import Visibility
from models.vae import VAE, VideoVAE, vae_encode

ENCODE_CHUNK = 8  # images that go through VAE and encoder at a time
REFERENCE = -1  # index of the reference, beside those of calibrated images


class CalibratedClip(Protocol):
    """Calibrated images of a clip, and the frames that attend to them; `tpc.Calibration` is one."""

    images: Sequence[np.ndarray]  # (m, H, W, 3) uint8, indexed like an array
    masks: Sequence[np.ndarray]  # (m, H, W) bool, the calibrated person in each image
    reference_masks: np.ndarray  # (persons, H, W) bool, the persons in the reference
    frames: int
    persons: int  # of the reference
    size: tuple[int, int]  # (width, height)
    replaces_reference: bool  # a calibrated image takes the reference's place in its frames
    start_timestep: int | None  # of training, where frames begin that `shows_everybody`; None: all begin from noise
    shows_everybody: np.ndarray  # (frames,) bool, frames whose calibrated images leave out nobody

    def index(self, step: int) -> np.ndarray:
        """(frames, persons) int: the calibrated image each frame attends to at a denoising step, -1 = none."""

    def used(self, num_steps: int) -> np.ndarray:
        """The calibrated images of steps 0 ... num_steps - 1, ascending."""

    def frame_image(self, frame: int) -> np.ndarray:
        """(H, W, 3) uint8: a frame's calibrated images, persons laid over each other; its own, or of `attending`."""

    def held(self, frames: range, groups: int) -> Self:
        """These frames alone calibrated, each of so many groups of them to the frame that fits it, at every step."""

    def attending(self, index: np.ndarray) -> Self:
        """The same, its frames attending to these images, (frames, persons) as of `index`, at every step."""

    def segment_image(self, frames: range) -> np.ndarray | None:
        """(H, W, 3) uint8: the calibrated image that stands for all of these frames; None: nobody is calibrated."""

    def flags(self, frames: range, step: int, levels: Sequence[TokenLevel]) -> Visibility | None:
        """Flags for consecutive frames at a denoising step; None where nothing is hidden.

        Keys are [own, if any | reference | calibrated image of each person]; with `replaces_reference` [own, if any |
        calibrated image of each person, or the reference where the person is uncalibrated].
        """


def image_tensor(images: Any, argument: str) -> Tensor:
    """Any accepted form of one or more images -> (f, 3, H, W), uint8 or float in [0, 1] as they came."""
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError(f"{argument} is empty")
        convert = isinstance(images[0], Image.Image)
        images = np.stack([np.asarray(p.convert("RGB")) if convert else np.asarray(p) for p in images])
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images))
        images = (images[None] if images.ndim == 3 else images).movedim(-1, 1)
    elif isinstance(images, Tensor):
        images = images[None] if images.ndim == 3 else images
    else:
        raise ValueError(f"{argument} must be PIL images, an array or a tensor, got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"{argument} must be RGB images of one size, got shape {tuple(images.shape)}")
    return images


def unit_range(images: Tensor) -> Tensor:
    """Bytes or numbers in [0, 1] -> float32 in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def as_images(images: Any, argument: str) -> Tensor:
    """Any accepted form of one or more images -> float32 (f, 3, H, W) in [0, 1]."""
    return unit_range(image_tensor(images, argument))


def resize_images(images: Tensor, width: int, height: int) -> Tensor:
    """(f, 3, H, W) -> (f, 3, height, width), anti-aliased; unchanged when the size is right already."""
    if tuple(images.shape[-2:]) == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def as_mask(mask: Any, width: int, height: int) -> Tensor:
    """Mask (1, 1, height, width), 0 or 1, of a PIL image, array or tensor (H, W) of bool, bytes or [0, 1]."""
    if isinstance(mask, Image.Image):
        mask = mask.convert("L")
    array = mask if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
    if array.ndim != 2:
        raise ValueError(f"reference_mask must have shape (H, W), got {tuple(array.shape)}")
    resized = resize_images(unit_range(array)[None, None], width, height)
    return (resized >= 0.5).float()  # a pixel covered by half belongs to the mask


def clip_pixels(images: Tensor, side: int) -> Tensor:
    """Images (b, 3, H, W) in [-1, 1] squashed to (b, 3, side, side) float32, with CLIP's mean and deviation."""
    # Rounding may leave [0, 1] by a little after the cubic filter; the encoder was trained on clipped images.
    pixels = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True).clamp(-1, 1) / 2 + 0.5
    channels = zip(pixels.unbind(1), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


def clip_mask(masks: Tensor, side: int) -> Tensor:
    """Masks (b, 1, H, W) -> (b, 1, side, side) in [0, 1], soft along outlines as resized images are."""
    return F.interpolate(masks.float(), (side, side), mode="bilinear", antialias=True)


def image_pixels(image: np.ndarray, like: Tensor) -> Tensor:
    """An image (H, W, 3) uint8 as (1, 3, H, W) in [-1, 1], of the device and dtype of `like`."""
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    return to_device(pixels, like.device).to(like) / 127.5 - 1


class ImageSequence:
    """Images (f, 3, H, W), uint8 or in [0, 1], resized, converted and moved where they are used."""

    def __init__(self, images: Tensor, size: tuple[int, int], device: torch.device, dtype: torch.dtype):
        self.images = images
        self.size = size  # (width, height)
        self.device, self.dtype = device, dtype

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, frames: range) -> Tensor:
        """Consecutive frames, (k, 3, height, width) in [0, 1]."""
        part = unit_range(to_device(self.images[frames.start : frames.stop], self.device))
        return resize_images(part, *self.size).to(self.dtype)


EMBEDDINGS = ("prompt", "negative_prompt", "image")  # that `Words` may hold


@dataclass(frozen=True)
class Words:
    """What the result shall show, for animators that take it, as text or as what encoders have made of it."""

    prompt: str | None = None  # None: the model's own
    negative_prompt: str | None = None  # what guidance leads away from
    # Some of `EMBEDDINGS`, (1, n, c) each; "image" has CLIP's tokens of the reference. ValueError for anything else.
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, embedding in self.embeddings.items():
            if name not in EMBEDDINGS or embedding.ndim != 3 or len(embedding) != 1:
                raise ValueError(
                    f"has {name} of shape {list(embedding.shape)}; it may hold {', '.join(EMBEDDINGS)}, each "
                    "(1, tokens, channels)"
                )


@dataclass(frozen=True)
class ImageBatch:
    """Some of the reference and calibrated images of a run; pixels, masks and latents are made when asked for."""

    vae: VAE | VideoVAE
    reference: Tensor  # (1, 3, H, W) in [-1, 1]
    mask: Tensor | None = None  # (1, 1, H, W), 1 where the reference's persons are; None: as the calibration has it
    calibration: CalibratedClip | None = None
    indices: Sequence[int] = (REFERENCE,)  # of calibrated images, or `REFERENCE`
    words: Words = Words()
    # Index -> latents (1, c, h, w), which the batches of a run share.
    encoded: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, indices: Sequence[int]) -> Self:
        """Other images of the same run."""
        return replace(self, indices=indices)

    @property
    def pixels(self) -> Tensor:
        """(i, 3, H, W) in [-1, 1]."""
        return torch.cat([self._image(index) for index in self.indices])

    @property
    def masks(self) -> Tensor | None:
        """(i, 1, H, W), 1 where a person is; None: unknown."""
        if self.mask is None and (self.calibration is None or not self.calibration.persons):
            return None
        return torch.cat([self._mask(index) for index in self.indices])

    @property
    def latents(self) -> Tensor:
        """(i, c, h, w), scaled to about unit variance."""
        distinct = sorted(set(self.indices))
        for start in range(0, len(distinct), ENCODE_CHUNK):
            missing = [index for index in distinct[start : start + ENCODE_CHUNK] if index not in self.encoded]
            # The reference goes by itself, so that its latents do not depend on which images it comes with.
            if REFERENCE in missing:
                missing.remove(REFERENCE)
                self.encoded[REFERENCE] = self.encode(self.reference)
            if missing:
                latents = self.encode(self.select(missing).pixels)
                self.encoded.update({index: latent[None] for index, latent in zip(missing, latents, strict=True)})
        return torch.cat([self.encoded[index] for index in self.indices])

    def encode(self, images: Tensor) -> Tensor:
        """Latents (n, c, h, w) of other images (n, 3, H, W) in [-1, 1]."""
        return vae_encode(self.vae, images)

    def _image(self, index: int) -> Tensor:
        if index == REFERENCE:
            return self.reference
        return image_pixels(self.calibration.images[index], self.reference)

    def _mask(self, index: int) -> Tensor:
        if index == REFERENCE and self.mask is not None:
            return self.mask
        mask = self.calibration.reference_masks.any(axis=0) if index == REFERENCE else self.calibration.masks[index]
        return to_device(torch.from_numpy(mask)[None, None], self.reference.device).to(self.reference)
