"""Pictures as users give them: PIL images, arrays or tensors, in bytes or in [0, 1]."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def picture_tensor(pictures: Any, argument: str) -> Tensor:
    """Any accepted form of one or more pictures -> (f, 3, H, W), uint8 or float in [0, 1] as they came."""
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    if isinstance(pictures, (list, tuple)):
        if not pictures:
            raise ValueError(f"{argument} is empty")
        convert = isinstance(pictures[0], Image.Image)
        pictures = np.stack([np.asarray(p.convert("RGB")) if convert else np.asarray(p) for p in pictures])
    if isinstance(pictures, np.ndarray):
        pictures = torch.from_numpy(np.ascontiguousarray(pictures))
        pictures = (pictures[None] if pictures.ndim == 3 else pictures).movedim(-1, 1)
    elif isinstance(pictures, Tensor):
        pictures = pictures[None] if pictures.ndim == 3 else pictures
    else:
        raise ValueError(f"{argument} must be PIL images, an array or a tensor, got {type(pictures).__name__}")
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not len(pictures):
        raise ValueError(f"{argument} must be RGB pictures of one size, got shape {tuple(pictures.shape)}")
    return pictures


def unit_range(pictures: Tensor) -> Tensor:
    """Bytes or numbers in [0, 1] -> float32 in [0, 1]."""
    return pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()


def as_pictures(pictures: Any, argument: str) -> Tensor:
    """Any accepted form of one or more pictures -> float32 (f, 3, H, W) in [0, 1]."""
    return unit_range(picture_tensor(pictures, argument))


def resize_pictures(pictures: Tensor, width: int, height: int) -> Tensor:
    """(f, 3, H, W) -> (f, 3, height, width), anti-aliased; unchanged when the size is right already."""
    if tuple(pictures.shape[-2:]) == (height, width):
        return pictures
    resized = torch.nn.functional.interpolate(pictures, (height, width), mode="bicubic", antialias=True)
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
    resized = resize_pictures(unit_range(array)[None, None], width, height)
    return (resized >= 0.5).float()


class PictureSequence:
    """Pictures of a clip that are resized, converted and moved to a device where they are used, a few at a time.

    Args:
        pictures: (f, 3, H, W), uint8 or float in [0, 1].
        size: (width, height) wanted.
    """

    def __init__(self, pictures: Tensor, size: tuple[int, int], device: torch.device, dtype: torch.dtype):
        self.pictures = pictures
        self.size = size
        self.device, self.dtype = device, dtype

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, frames: range) -> Tensor:
        """Consecutive frames, (k, 3, height, width) in [0, 1]."""
        part = unit_range(self.pictures[frames.start : frames.stop].to(self.device))
        return resize_pictures(part, *self.size).to(self.dtype)
