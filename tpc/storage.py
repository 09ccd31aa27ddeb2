"""Images and masks of a clip that are indexed like arrays and cost little while nobody looks at them."""

import zlib
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
        return np.stack(images).reshape(*chosen.shape, *self.shape[1:]) if images else self._empty(chosen.shape)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def _empty(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros((*shape, *self.shape[1:]), np.uint8)


class PackedMasks:
    """Masks (..., h, w) bool, each compressed; indexing its leading dimensions gives ordinary bool arrays.

    The outline of a person takes about a hundredth of its pixels in bytes, so that a long clip's masks fit in memory.
    """

    dtype = np.dtype(bool)

    def __init__(self, parts: np.ndarray, size: tuple[int, int]):
        self._parts = parts  # (...,) of bytes
        self.size = size
        self.shape = (*parts.shape, size[1], size[0])

    @classmethod
    def zeros(cls, leading: tuple[int, ...], size: tuple[int, int]) -> "PackedMasks":
        parts = np.empty(leading, object)
        parts[...] = _compressed(np.zeros((size[1], size[0]), bool))
        return cls(parts, size)

    @classmethod
    def from_arrays(cls, content: np.ndarray, lengths: np.ndarray, size: tuple[int, int]) -> "PackedMasks":
        """What `to_arrays` gave."""
        ends = lengths.reshape(-1).cumsum()
        parts = np.empty(lengths.size, object)
        for i, (end, length) in enumerate(zip(ends, lengths.reshape(-1), strict=True)):
            parts[i] = content[end - length : end].tobytes()
        return cls(parts.reshape(lengths.shape), size)

    def to_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All compressed bytes (n,) uint8 one mask after the other, and how many each mask has (...,)."""
        lengths = np.array([len(part) for part in self._parts.reshape(-1)], np.int64).reshape(self._parts.shape)
        return np.frombuffer(b"".join(self._parts.reshape(-1)), np.uint8), lengths

    def first(self, count: int) -> "PackedMasks":
        return PackedMasks(self._parts[:count], self.size)

    @property
    def nbytes(self) -> int:
        """Bytes in memory; equal masks that share theirs count once."""
        return sum(len(part) for part in {id(part): part for part in self._parts.reshape(-1)}.values())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: object) -> np.ndarray:
        chosen = self._parts[index]
        width, height = self.size
        if isinstance(chosen, bytes):
            return self._expanded(chosen)
        masks = np.empty((chosen.size, height, width), bool)
        for i, part in enumerate(chosen.reshape(-1)):
            masks[i] = self._expanded(part)
        return masks.reshape(*chosen.shape, height, width)

    def __setitem__(self, index: object, masks: np.ndarray) -> None:
        chosen = self._parts[index]
        if isinstance(chosen, bytes):
            self._parts[index] = _compressed(masks)
            return
        parts = np.empty(chosen.size, object)
        for i, mask in enumerate(
            np.broadcast_to(masks, (*chosen.shape, *masks.shape[-2:])).reshape(-1, *masks.shape[-2:])
        ):
            parts[i] = _compressed(mask)
        self._parts[index] = parts.reshape(chosen.shape)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[...].astype(dtype or self.dtype, copy=False)

    def _expanded(self, part: bytes) -> np.ndarray:
        width, height = self.size
        bits = np.frombuffer(zlib.decompress(part), np.uint8)
        return np.unpackbits(bits, count=width * height).reshape(height, width).view(bool)


def _compressed(mask: np.ndarray) -> bytes:
    return zlib.compress(np.packbits(mask).tobytes(), 1)
