"""Where attention points: geometry of tokens, and measures of attention over the tokens of an image.

Everything is a torch function that passes gradients on where it can, for training losses, logs and analysis alike.

Shapes use p = any leading axes, such as frames and points, r = h*w tokens of an image's grid, H, W = image size.
Places are (x, y). In pixels, pixel centres are integers; in tokens, 0 is the centre of the first token. An image of
W pixels spans [-0.5, W - 0.5], as a grid of w tokens spans [-0.5, w - 0.5].
"""

import torch
from torch import Tensor

EPS = 1e-6  # a query that gives an image less does not see it


def token_coords(points: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Places (..., 2) in pixels of an image of `size` (H, W) -> in tokens of a grid (h, w)."""
    scale = points.new_tensor([grid[1] / size[1], grid[0] / size[0]])
    return (points + 0.5) * scale - 0.5


def pixel_coords(places: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of `token_coords`."""
    scale = places.new_tensor([size[1] / grid[1], size[0] / grid[0]])
    return (places + 0.5) * scale - 0.5


def token_indices(points: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The tokens (...) that contain places (..., 2) in pixels; the nearest of the image for places outside."""
    places = token_coords(points, size, grid).round().long()
    column, row = places[..., 0].clamp(0, grid[1] - 1), places[..., 1].clamp(0, grid[0] - 1)
    return row * grid[1] + column


def token_centres(grid: tuple[int, int], like: Tensor) -> Tensor:
    """(r, 2) places of all tokens in tokens, row by row; number format and device of `like`."""
    rows = torch.arange(grid[0], device=like.device).repeat_interleave(grid[1])
    columns = torch.arange(grid[1], device=like.device).repeat(grid[0])
    return torch.stack([columns, rows], dim=-1).to(like.dtype)


def token_distances(places: Tensor, grid: tuple[int, int]) -> Tensor:
    """Places (..., 2) in tokens -> their distances in tokens to all tokens, (..., r)."""
    return (places[..., None, :] - token_centres(grid, places)).norm(dim=-1)


def edge_distances(places: Tensor, grid: tuple[int, int]) -> Tensor:
    """Places (..., 2) in tokens -> their distances in tokens to the edges of all tokens, (..., r); 0 inside.

    What a token cannot resolve does not count: on a coarse grid centres lie far from what their tokens hold.
    """
    apart = (places[..., None, :] - token_centres(grid, places)).abs() - 0.5
    return apart.clamp(min=0).norm(dim=-1)


def normalised(maps: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Attention (..., r) over an image as parts of what the image gets; close to 0 where it gets next to nothing.

    Args:
        dim: axes that one distribution extends over.
    """
    return maps / maps.sum(dim, keepdim=True).clamp(min=EPS)


def gaussian_mass(distribution: Tensor, distances: Tensor, radius: float) -> Tensor:
    """Part of a distribution (..., r) near a place, weighted with a Gaussian of `radius`; differentiable.

    Args:
        distances: (..., r) of the tokens from the place, in the unit of `radius`.
    """
    return (distribution * torch.exp(-0.5 * (distances / radius) ** 2)).sum(-1)


def mass_within(distribution: Tensor, distances: Tensor, radius: float | Tensor) -> Tensor:
    """Part of a distribution (..., r) whose tokens lie within `radius` of a place; differentiable."""
    return (distribution * (distances <= radius)).sum(-1)


def value_at_argmax(distribution: Tensor, values: Tensor) -> Tensor:
    """The value (...) of `values` (..., r) at the strongest token of each distribution (..., r)."""
    return values.gather(-1, distribution.detach().argmax(-1, keepdim=True))[..., 0]


def centroid(distribution: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean place (..., 2) in tokens of a distribution (..., r); differentiable."""
    return distribution @ token_centres(grid, distribution)


def spread(distribution: Tensor, grid: tuple[int, int]) -> Tensor:
    """Root mean square distance (...) in tokens of a distribution (..., r) from its centroid; differentiable."""
    squares = token_distances(centroid(distribution, grid), grid).square()
    return (distribution * squares).sum(-1).sqrt()


def entropy(distribution: Tensor) -> Tensor:
    """Entropy (...) in nats of distributions (..., r): 0 for one token, log r for all alike; differentiable."""
    return -torch.xlogy(distribution, distribution.clamp(min=1e-30)).sum(-1)


def region_share(maps: Tensor, coverage: Tensor) -> Tensor:
    """Attention (...) that falls on a region, of maps (..., r); differentiable.

    Args:
        coverage: (..., r) part of every token that the region covers, see `models.attention.layers.pool_masks`.
    """
    return (maps * coverage).sum(-1)
