"""Batches of images and masks through similarities, on the device they are on.

Convention as in `tpc.warping`: matrices map source pixels to destination pixels, (x, y), pixel centres at integers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FILLS = ("scene", "edge", "black")
PADDING = {"edge": "border", "black": "zeros"}
SUPERSAMPLING = 2  # samples along each side of a pixel: no aliasing down to half the scale


def warp(images: Tensor, matrices: Tensor, size: tuple[int, int], fill: str) -> Tensor:
    """Resample images (b, c, h, w) by matrices (b, 3, 3) into (b, c, height, width) of `size` (width, height).

    Beyond the image lies its edge ("edge") or 0 ("black").
    """
    inverse = torch.linalg.inv(matrices.double())
    n = SUPERSAMPLING
    offsets = (torch.arange(n, dtype=torch.float64, device=inverse.device) + 0.5) / n - 0.5
    x = (torch.arange(size[0], device=inverse.device)[:, None] + offsets).reshape(-1)
    y = (torch.arange(size[1], device=inverse.device)[:, None] + offsets).reshape(-1)
    rows = [
        row[:, 0, None, None] * x + row[:, 1, None, None] * y[:, None] + row[:, 2, None, None]
        for row in (inverse[:, 0], inverse[:, 1])
    ]
    height, width = images.shape[-2:]
    # grid_sample puts -1 and 1 on the outer edges of the outermost pixels.
    grid = torch.stack([(2 * rows[0] + 1) / width - 1, (2 * rows[1] + 1) / height - 1], -1)
    sampled = F.grid_sample(
        images, grid.to(images.dtype), mode="bilinear", padding_mode=PADDING[fill], align_corners=False
    )
    return F.avg_pool2d(sampled, n)


def place(images: Tensor, masks: Tensor, matrices: Tensor, size: tuple[int, int], fill: str) -> Tensor:
    """Images (b, 3, h, w) in [-1, 1] whose persons, masks (b, 1, h, w) in [0, 1], have moved by matrices (b, 3, 3).

    With "scene" only the person moves and the place where it stood is filled from around it; else the image moves.
    The value beyond an image that is filled with "black" is -1.
    """
    if fill != "scene":
        return warp(images + 1, matrices, size, fill) - 1
    person, alpha = warp(images, matrices, size, "edge"), warp(masks, matrices, size, "black")
    return alpha * person + (1 - alpha) * remove_persons(images, masks)


def remove_persons(images: Tensor, masks: Tensor) -> Tensor:
    """Fill masks (b, 1, h, w) smoothly from the pixels around them, from coarse to fine; all mask becomes 0 (grey)."""
    reach = max(3, max(images.shape[-2:]) // 64) // 2 * 2 + 1  # the mask's edge still shows the person
    known = 1 - F.max_pool2d(masks, reach, 1, reach // 2)
    return torch.where(known > 0, images, _push_pull(images * known, known))


def _push_pull(weighted: Tensor, known: Tensor) -> Tensor:
    height, width = known.shape[-2:]
    if max(height, width) == 1:
        return torch.where(known > 0, weighted / known.clamp(min=1e-6), 0.0)
    half = ((height + 1) // 2, (width + 1) // 2)
    coarse = _push_pull(F.adaptive_avg_pool2d(weighted, half), F.adaptive_avg_pool2d(known, half))
    return weighted + (1 - known) * F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
