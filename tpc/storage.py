"""Pictures and masks of a clip that are indexed like arrays and cost little while nobody looks at them."""

from collections.abc import Callable, Iterator

import numpy as np


class LazyImages:
    """A stack (n, h, w, 3) uint8 whose pictures are made when they are asked for.

    `images[3]` is one picture, `images[[3, 5]]` and `images[2:9]` are stacks, `np.asarray(images)` is all of them.
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
        pictures = [self._make(int(i)) for i in chosen.reshape(-1)]
        return np.stack(pictures).reshape(*chosen.shape, *self.shape[1:]) if pictures else self._empty(chosen.shape)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def _empty(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros((*shape, *self.shape[1:]), np.uint8)


class PackedMasks:
    """Masks (..., h, w) bool kept as bits; indexing its leading dimensions gives ordinary bool arrays."""

    dtype = np.dtype(bool)

    def __init__(self, bits: np.ndarray, size: tuple[int, int]):
        self.bits = bits  # (..., bytes) uint8
        self.size = size
        self.shape = (*bits.shape[:-1], size[1], size[0])

    @classmethod
    def zeros(cls, leading: tuple[int, ...], size: tuple[int, int]) -> "PackedMasks":
        return cls(np.zeros((*leading, -(-size[0] * size[1] // 8)), np.uint8), size)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: object) -> np.ndarray:
        chosen = self.bits[index]
        width, height = self.size
        flat = np.unpackbits(chosen, axis=-1, count=width * height)
        return flat.reshape(*chosen.shape[:-1], height, width).view(bool)

    def __setitem__(self, index: object, masks: np.ndarray) -> None:
        self.bits[index] = np.packbits(masks.reshape(*masks.shape[:-2], -1), axis=-1)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[...].astype(dtype or self.dtype, copy=False)
