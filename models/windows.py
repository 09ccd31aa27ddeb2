"""Context windows: long clips are denoised in overlapping pieces whose predictions are blended.

The windows of a clip are open-ended: none wraps from the last frame to the first, which the peers' do and which mixes
the end of a clip with its beginning.
"""

import torch
from torch import Tensor


def context_windows(num_frames: int, size: int, overlap: int) -> list[range]:
    """Ranges of `size` frames that cover a clip, neighbours sharing at least `overlap` frames.

    Starts are spread evenly, so the last window ends with the clip and no window is shorter than the others. A clip
    of at most `size` frames is one window.

    Raises:
        ValueError: for sizes that cannot be, or an overlap that is not smaller than the window.
    """
    if num_frames < 1 or size < 1:
        raise ValueError(f"num_frames and size must be at least 1, got {num_frames} and {size}")
    if not 0 <= overlap < size:
        raise ValueError(f"overlap must be at least 0 and smaller than the window of {size} frames, got {overlap}")
    if num_frames <= size:
        return [range(num_frames)]
    steps = -(-(num_frames - size) // (size - overlap))
    starts = [round(k * (num_frames - size) / steps) for k in range(steps + 1)]
    return [range(start, start + size) for start in starts]


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
