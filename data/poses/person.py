"""One estimated person: 17 COCO keypoints, scores, an optional mask; boxes, and comparisons of two estimates.

Keypoints are (x, y) pixels, y down, centres at integers: an image spans [-0.5, size - 0.5]. Score 0: not visible.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# Index that exchanges left and right: keypoints[COCO_MIRROR] are the keypoints of the mirrored image, x reflected.
COCO_MIRROR = np.array([0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15])

# Standard deviations of human annotators per keypoint relative to the object's scale (COCO keypoint evaluation).
COCO_SIGMAS = np.array(
    [0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087]
    + [0.089, 0.089],
    dtype=np.float32,
)


class Box(NamedTuple):
    """Axis-aligned box in pixels: x from `left` to `right`, y from `top` to `bottom`."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top

    @property
    def area(self) -> float:
        return max(0.0, self.width) * max(0.0, self.height)


@dataclass(frozen=True, eq=False)
class PersonEstimate:
    keypoints: np.ndarray  # (17, 2) float32, pixels of the image
    scores: np.ndarray  # (17,) float32 in [0, 1]
    mask: np.ndarray | None  # (h, w) bool, True on the person; None when the estimator gives no mask
    confidence: float  # in [0, 1], that this is a person


def person_box(keypoints: np.ndarray, scores: np.ndarray, threshold: float = 0.3, margin: float = 0.0) -> Box | None:
    """Smallest box around keypoints (17, 2) with scores above `threshold`; None for fewer than two.

    `margin` is the part of its longer side added on each side; 0.1 takes in most of head and feet.
    """
    visible = np.asarray(keypoints, dtype=np.float64)[np.asarray(scores) > threshold]
    if len(visible) < 2:
        return None
    low, high = visible.min(axis=0), visible.max(axis=0)
    extra = margin * float((high - low).max())
    return Box(*(low - extra).tolist(), *(high + extra).tolist())


def mask_box(mask: np.ndarray) -> Box | None:
    """Box around the True pixels of a mask (h, w), to their outer edges; None without any."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    return Box(columns[0] - 0.5, rows[0] - 0.5, columns[-1] + 0.5, rows[-1] + 0.5)


def joint_box(boxes: list[Box], size: tuple[int, int]) -> Box | None:
    """Smallest box around boxes, cut to an image of (width, height); None without boxes."""
    if not boxes:
        return None
    low = np.clip(np.min([box[:2] for box in boxes], axis=0), -0.5, np.array(size) - 0.5)
    high = np.clip(np.max([box[2:] for box in boxes], axis=0), -0.5, np.array(size) - 0.5)
    return Box(*low.tolist(), *high.tolist())


def scores_inside(keypoints: np.ndarray, scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scores (...,) with 0 for keypoints (..., 2) outside an image of (width, height)."""
    inside = ((keypoints >= -0.5) & (keypoints <= np.asarray(size) - 0.5)).all(axis=-1)
    return np.where(inside, scores, 0).astype(np.float32)


def box_iou(a: ArrayLike, b: ArrayLike) -> ArrayLike:
    """Intersection over union (...) of boxes (..., 4) left, top, right, bottom; 0 without area, nan where one is."""
    # `Box`es, arrays or tensors: only methods that all of these have are called.
    a, b = (np.asarray(box) if isinstance(box, tuple) else box for box in (a, b))
    sides = a[..., 2:].clip(max=b[..., 2:]) - a[..., :2].clip(min=b[..., :2])
    shared = sides.clip(min=0).prod(-1)
    union = sum((box[..., 2:] - box[..., :2]).clip(min=0).prod(-1) for box in (a, b)) - shared
    return shared / (union + (union <= 0))


def keypoint_similarity(a: PersonEstimate, b: PersonEstimate, threshold: float = 0.3) -> float:
    """Object keypoint similarity (COCO) of two estimates over the keypoints that both see; 0 when there is none."""
    both = (a.scores > threshold) & (b.scores > threshold)
    boxes = [box for box in (person_box(p.keypoints, p.scores, threshold) for p in (a, b)) if box is not None]
    if not both.any() or len(boxes) < 2:
        return 0.0
    # COCO's scale is the root of the person's area; half the longer side is about that, also for a person edge-on.
    scale = max(max(box.width, box.height) for box in boxes) / 2
    squared = ((a.keypoints[both] - b.keypoints[both]) ** 2).sum(axis=-1)
    return float(np.exp(-squared / (2 * (2 * COCO_SIGMAS[both] * max(scale, 1.0)) ** 2)).mean())


def is_same_person(a: PersonEstimate, b: PersonEstimate) -> bool:
    """True for similar keypoints, or masks, or without masks boxes, that mostly coincide."""
    if keypoint_similarity(a, b) > 0.5:
        return True
    if a.mask is None or b.mask is None:
        boxes = [person_box(person.keypoints, person.scores) for person in (a, b)]
        return None not in boxes and box_iou(*boxes) > 0.6
    shared = np.count_nonzero(a.mask & b.mask)
    return shared > 0.5 * min(np.count_nonzero(a.mask), np.count_nonzero(b.mask))


def distinct_persons(estimates: list[PersonEstimate]) -> list[PersonEstimate]:
    """Estimates in their order, of those that show the same person only the surest."""
    kept: list[PersonEstimate] = []
    for estimate in sorted(estimates, key=lambda estimate: -estimate.confidence):
        if not any(is_same_person(estimate, other) for other in kept):
            kept.append(estimate)
    return [estimate for estimate in estimates if estimate in kept]


def by_prominence(estimates: list[PersonEstimate], size: tuple[int, int]) -> list[PersonEstimate]:
    """Persons sorted by prominence: large, sure, near the centre of an image of (width, height)."""

    def prominence(estimate: PersonEstimate) -> float:
        box = person_box(estimate.keypoints, estimate.scores)
        if box is None:
            return 0.0
        off_centre = np.hypot((box.left + box.right) / size[0] - 1, (box.top + box.bottom) / size[1] - 1) / np.sqrt(2)
        return max(box.width, box.height) ** 2 * estimate.confidence * (1 - 0.5 * min(1.0, float(off_centre)))

    return sorted(estimates, key=prominence, reverse=True)


def assign_slots(last_seen: list[PersonEstimate | None], found: list[PersonEstimate]) -> list[PersonEstimate | None]:
    """Persons found, most prominent first, matched to slots, so that person k stays person k; None without a match.

    `last_seen` holds None for a slot that was never used.
    """
    slots: list[PersonEstimate | None] = [None] * len(last_seen)
    # Nearest pairs first, as long as the person moved by less than the size of their box.
    distances = [
        (_relative_distance(last, person), slot, index)
        for slot, last in enumerate(last_seen)
        for index, person in enumerate(found)
        if last is not None
    ]
    matched: set[int] = set()
    for distance, slot, index in sorted(distances):
        if distance < 1 and slots[slot] is None and index not in matched:
            slots[slot] = found[index]
            matched.add(index)
    # Others take unused slots in order, then slots of persons who are gone.
    unused = [slot for slot, last in enumerate(last_seen) if last is None]
    gone = [slot for slot, last in enumerate(last_seen) if last is not None and slots[slot] is None]
    others = [person for index, person in enumerate(found) if index not in matched]
    for slot, person in zip(unused + gone, others, strict=False):
        slots[slot] = person
    return slots


def _relative_distance(a: PersonEstimate, b: PersonEstimate) -> float:
    """Distance of the boxes' centres in units of the larger box's longer side."""
    boxes = [person_box(person.keypoints, person.scores) for person in (a, b)]
    if None in boxes:
        return float("inf")
    centres = [np.array([box.left + box.right, box.top + box.bottom]) / 2 for box in boxes]
    side = max(max(box.width, box.height) for box in boxes)
    return float(np.linalg.norm(centres[0] - centres[1])) / max(side, 1.0)


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
    def zeros(cls, leading: tuple[int, ...], size: tuple[int, int]) -> PackedMasks:
        parts = np.empty(leading, object)
        parts[...] = _compressed(np.zeros((size[1], size[0]), bool))
        return cls(parts, size)

    @classmethod
    def from_arrays(cls, content: np.ndarray, lengths: np.ndarray, size: tuple[int, int]) -> PackedMasks:
        """Masks from the two arrays of `to_arrays`."""
        ends = lengths.reshape(-1).cumsum()
        parts = np.empty(lengths.size, object)
        for i, (end, length) in enumerate(zip(ends, lengths.reshape(-1), strict=True)):
            parts[i] = content[end - length : end].tobytes()
        return cls(parts.reshape(lengths.shape), size)

    def to_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All compressed bytes (n,) uint8 one mask after the other, and how many each mask has (...,)."""
        lengths = np.array([len(part) for part in self._parts.reshape(-1)], np.int64).reshape(self._parts.shape)
        return np.frombuffer(b"".join(self._parts.reshape(-1)), np.uint8), lengths

    @classmethod
    def stack(cls, rows: Sequence[PackedMasks]) -> PackedMasks:
        """Masks of one size and shape under a new leading dimension."""
        return cls(np.stack([row._parts for row in rows]), rows[0].size)

    def select(self, index: object) -> PackedMasks:
        """A part of the leading dimensions, still compressed."""
        return PackedMasks(self._parts[index], self.size)

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
        masks = np.empty((*chosen.shape, height, width), bool)
        for i in np.ndindex(chosen.shape):
            masks[i] = self._expanded(chosen[i])
        return masks

    def __setitem__(self, index: object, masks: np.ndarray) -> None:
        chosen = self._parts[index]
        if isinstance(chosen, bytes):
            self._parts[index] = _compressed(masks)
            return
        masks = np.broadcast_to(masks, (*chosen.shape, *masks.shape[-2:]))
        parts = np.empty(chosen.shape, object)
        for i in np.ndindex(parts.shape):
            parts[i] = _compressed(masks[i])
        self._parts[index] = parts

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[...].astype(dtype or self.dtype, copy=False)

    def _expanded(self, part: bytes) -> np.ndarray:
        width, height = self.size
        bits = np.frombuffer(zlib.decompress(part), np.uint8)
        return np.unpackbits(bits, count=width * height).reshape(height, width).view(bool)


def _compressed(mask: np.ndarray) -> bytes:
    return zlib.compress(np.packbits(mask).tobytes(), 1)
