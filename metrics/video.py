"""Windows of consecutive frames, of which measures of videos take one feature vector each."""

import torch
from torch import Tensor


def window_starts(num_frames: int, length: int, stride: int) -> range:
    """First frames of the windows of a clip: whole windows only, so a clip shorter than `length` has none.

    Clips of 15, 16, 17 and 40 frames have 0, 1, 2 and 25 windows of 16 frames at stride 1.
    """
    if length < 1 or stride < 1:
        raise ValueError(f"length and stride must be at least 1, got {length} and {stride}")
    return range(0, max(0, num_frames - length + 1), stride)


class WindowBuffer:
    """The windows of `window_starts` of a clip whose frames come in batches; few frames are held at a time.

    Args:
        length: frames of a window.
        stride: frames between the starts of windows.
    """

    def __init__(self, length: int, stride: int):
        window_starts(0, length, stride)  # checks the arguments
        self.length, self.stride = length, stride
        self._held: Tensor | None = None
        self._first = 0  # number of the first frame that is held
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
