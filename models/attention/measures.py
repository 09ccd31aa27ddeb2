"""Coords of tokens, and measures of attention over the tokens of an image, differentiable where they can be.

Coords are (x, y): in pixels, pixel centres are integers and an image of W pixels spans [-0.5, W - 0.5]; in tokens, 0
is the centre of the first one. Shapes use ... = any leading axes, r = h*w tokens of a grid, H, W = image size.
"""

import torch
from torch import Tensor

EPS = 1e-6  # a query that gives an image less does not attend to it


def token_coords(points: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Coords (..., 2) in pixels of an image of `size` (H, W) -> in tokens of a grid (h, w)."""
    return scaled(points + 0.5, grid[1] / size[1], grid[0] / size[0]) - 0.5


def pixel_coords(coords: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of `token_coords`."""
    return scaled(coords + 0.5, size[1] / grid[1], size[0] / grid[0]) - 0.5


def scaled(coords: Tensor, x: float, y: float) -> Tensor:
    """Coords (..., 2) times a number each, which are not copied to the device first, as a tensor of them would be."""
    return torch.stack([coords[..., 0] * x, coords[..., 1] * y], dim=-1)


def token_indices(points: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Indices (...) of the tokens that contain coords (..., 2) in pixels; outside of the image, the nearest ones."""
    coords = token_coords(points, size, grid).round().long()
    column, row = coords[..., 0].clamp(0, grid[1] - 1), coords[..., 1].clamp(0, grid[0] - 1)
    return row * grid[1] + column


def token_centres(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Coords (r, 2) of all tokens in tokens, row by row, with dtype and device of `like`."""
    rows = torch.arange(grid[0], device=like.device).repeat_interleave(grid[1])
    columns = torch.arange(grid[1], device=like.device).repeat(grid[0])
    return torch.stack([columns, rows], dim=-1).to(like.dtype)


def token_distances(coords: Tensor, grid: tuple[int, int]) -> Tensor:
    """Distances (..., r) in tokens from coords (..., 2) to all tokens."""
    return (coords[..., None, :] - token_centres(grid, coords)).norm(dim=-1)


def edge_distances(coords: Tensor, grid: tuple[int, int]) -> Tensor:
    """Distances (..., r) in tokens from coords (..., 2) to the edges of all tokens; 0 inside."""
    # On a coarse grid centres lie far from what their tokens hold; what a token cannot resolve does not count.
    apart = (coords[..., None, :] - token_centres(grid, coords)).abs() - 0.5
    return apart.clamp(min=0).norm(dim=-1)


def normalised(maps: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Attention (..., r) as parts of its sum over `dim`; close to 0 where the sum is next to nothing."""
    return maps / maps.sum(dim, keepdim=True).clamp(min=EPS)


def gaussian_mass(distribution: Tensor, distances: Tensor, radius: float) -> Tensor:
    """Part of a distribution (..., r), weighted with a Gaussian of `radius` of the distances (..., r)."""
    return (distribution * torch.exp(-0.5 * (distances / radius) ** 2)).sum(-1)


def mass_within(distribution: Tensor, distances: Tensor, radius: float | Tensor) -> Tensor:
    """Part of a distribution (..., r) at distances (..., r) of at most `radius`."""
    return (distribution * (distances <= radius)).sum(-1)


def value_at_argmax(distribution: Tensor, values: Tensor) -> Tensor:
    """The value (...), of `values` (..., r), at the largest entry of each distribution (..., r)."""
    return values.gather(-1, distribution.detach().argmax(-1, keepdim=True))[..., 0]


def centroid(distribution: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean coords (..., 2) in tokens of a distribution (..., r)."""
    return distribution @ token_centres(grid, distribution)


def spread(distribution: Tensor, grid: tuple[int, int]) -> Tensor:
    """Root mean square distance (...) in tokens of a distribution (..., r) from its centroid."""
    squares = token_distances(centroid(distribution, grid), grid).square()
    return (distribution * squares).sum(-1).sqrt()


def entropy(distribution: Tensor) -> Tensor:
    """Entropy (...) in nats of distributions (..., r): 0 for one token, log r for all alike."""
    return -torch.xlogy(distribution, distribution.clamp(min=1e-30)).sum(-1)


def region_share(maps: Tensor, coverage: Tensor) -> Tensor:
    """Attention (...) to a region, of maps (..., r); coverage: (..., r) of `models.attention.layers.pool_masks`."""
    return (maps * coverage).sum(-1)
