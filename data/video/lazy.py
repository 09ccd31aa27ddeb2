"""Images that are made when they are asked for."""

from collections.abc import Callable, Iterator

import numpy as np


class LazyImages:
    """A stack (n, h, w, 3) uint8 whose images are made when they are asked for.

    `images[3]` is one image, `images[[3, 5]]` and `images[2:9]` are stacks, `np.asarray(images)` is all of them.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, count: int, size: tuple[int, int], make: Callable[[int], np.ndarray]):
        self.shape = (count, size[1], size[0], 3)
        self._make = make

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._make(i) for i in range(len(self)))

    def __getitem__(self, index: int | slice | np.ndarray | list[int]) -> np.ndarray:
        chosen = np.arange(len(self))[index]
        if chosen.ndim == 0:
            return self._make(int(chosen))
        images = [self._make(int(i)) for i in chosen.reshape(-1)]
        return np.array(images, np.uint8).reshape(*chosen.shape, *self.shape[1:])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)
