"""Context windows: long clips are denoised in overlapping pieces whose predictions are blended.

The windows of a clip are open-ended: none wraps from the last frame to the first, which the peers' do and which mixes
the end of a clip with its beginning.
"""

import math

import torch
from torch import Tensor

# Fractions of a distance between windows by which successive steps shift them: multiples of the golden ratio spread
# evenly however many there are.
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def context_windows(num_frames: int, size: int, overlap: int, shift: float = 0.0) -> list[range]:
    """Ranges of `size` frames that cover a clip, neighbours sharing at least `overlap` frames.

    Starts are spread evenly, so the last window ends with the clip and no window is shorter than the others. A clip
    of at most `size` frames is one window.

    Args:
        shift: in [0, 1), moves all windows but the first and the last by this fraction of their distance, and takes
            one more of them.

    Raises:
        ValueError: for sizes or a shift that cannot be, or an overlap that is not smaller than the window.
    """
    if num_frames < 1 or size < 1:
        raise ValueError(f"num_frames and size must be at least 1, got {num_frames} and {size}")
    if not 0 <= overlap < size:
        raise ValueError(f"overlap must be at least 0 and smaller than the window of {size} frames, got {overlap}")
    if num_frames <= size:
        return [range(num_frames)]
    if not 0 <= shift < 1:
        raise ValueError(f"shift must be at least 0 and below 1, got {shift}")
    last = num_frames - size
    steps = -(-last // (size - overlap))
    # Rounding halves up keeps the distance of two starts within the rounded-up distance before rounding.
    inner = [math.floor((k + shift) * last / steps + 0.5) for k in range(steps)]
    return [range(start, start + size) for start in dict.fromkeys([0, *inner, last])]


def step_shift(step: int) -> float:
    """A shift for each denoising step, so that no frame is always at a window's end."""
    return step * GOLDEN_RATIO % 1


def window_weights(windows: list[range], num_frames: int) -> list[Tensor]:
    """Blending weights of each window's frames, (size,) float32, which sum to 1 over the windows of every frame.

    A window counts most in its middle, where its motion modules see context on both sides, and tapers linearly
    towards ends that it shares with a neighbour; the clip's own ends are not tapered.
    """
    weights = []
    for window in windows:
        size = len(window)
        from_start = torch.arange(1, size + 1, dtype=torch.float32)
        from_end = from_start.flip(0)
        if window.start == 0:
            from_start = torch.full((size,), float(size))
        if window.stop == num_frames:
            from_end = torch.full((size,), float(size))
        weights.append(torch.minimum(from_start, from_end))
    total = torch.zeros(num_frames)
    for window, weight in zip(windows, weights, strict=True):
        total[window.start : window.stop] += weight
    return [weight / total[window.start : window.stop] for window, weight in zip(windows, weights, strict=True)]
