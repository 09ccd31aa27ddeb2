"""Images as users give them: PIL images, arrays or tensors, in bytes or in [0, 1]."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


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
    resized = torch.nn.functional.interpolate(images, (height, width), mode="bicubic", antialias=True)
    return resized.clamp(0, 1)


def as_mask(mask: Any, width: int, height: int) -> Tensor:
    """PIL image, array or tensor (H, W) of bool, bytes or numbers in [0, 1] -> (1, 1, height, width), 0 or 1.

    A pixel of the result that is covered by half belongs to the mask.
    """
    if isinstance(mask, Image.Image):
        mask = mask.convert("L")
    array = mask if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
    if array.ndim != 2:
        raise ValueError(f"reference_mask must have shape (H, W), got {tuple(array.shape)}")
    resized = resize_images(unit_range(array)[None, None], width, height)
    return (resized >= 0.5).float()


class ImageSequence:
    """Images of a clip that are resized, converted and moved to a device where they are used, a few at a time.

    Args:
        images: (f, 3, H, W), uint8 or float in [0, 1].
        size: (width, height) wanted.
    """

    def __init__(self, images: Tensor, size: tuple[int, int], device: torch.device, dtype: torch.dtype):
        self.images = images
        self.size = size
        self.device, self.dtype = device, dtype

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, frames: range) -> Tensor:
        """Consecutive frames, (k, 3, height, width) in [0, 1]."""
        part = unit_range(self.images[frames.start : frames.stop].to(self.device))
        return resize_images(part, *self.size).to(self.dtype)
