"""Images and masks through an affine map, in one resampling.

Convention:
    matrix      (3, 3) affine, from source pixels to destination pixels, (x, y), pixel centres at integers
    quad        the source is the square region [-0.5, width - 0.5] x [-0.5, height - 0.5] and nothing beyond
    filters     bicubic for images, linear for masks; before shrinking, what the new pixels cannot show is removed
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import cv2
import numpy as np
from scipy.ndimage import distance_transform_edt

from data.poses.person import PackedMasks
from data.video.lazy import LazyImages
from tpc.bends.bending import Bends
from tpc.bends.layers import Coverage, Layer, lay
from tpc.bends.outlines import GAP_SIDE, Nudge
from tpc.config import CalibrationConfig
from tpc.procrustes import apply_matrix
from tpc.trajectory import Track, filter_jitter

# Calibrated images whose corners differ by less, in pixels of the model's frame, are one image.
SAME_PIXELS = 1 / 64
MAX_SIDE = 32766  # OpenCV's warps address pixels by 16-bit integers
MAX_COORDINATE = 1e8  # pixels: a map that sends a corner further off shows nothing that a frame could hold
MIN_AREA = 1e-12  # of a source pixel in the frame
STEADY, FAR_APART = 12.0, 1e3  # frames; in the unit of `filter_jitter`
MAX_COST = 0.01  # of IoU, that of edges which the two kinds of warp draw differently
STRAIGHTENED = "moves as a whole: bent, its silhouette would fit less well"


@dataclass(frozen=True)
class Framing:
    """The model's frame, and how original images come into it."""

    size: tuple[int, int]  # (width, height) of the model's frame in pixels
    frame_map: np.ndarray  # (3, 3), pixels of the driving clip to the model's frame
    reference_map: np.ndarray  # (3, 3), pixels of the reference to the model's frame


@dataclass(frozen=True)
class WarpedClip:
    """The distinct calibrated images of a clip."""

    images: LazyImages  # these three: see `Calibration`
    masks: PackedMasks
    member: np.ndarray
    # (frames, persons) of the calibrated and the driving person's masks, nan where there is nothing to compare
    iou: np.ndarray
    bends: list[Bends] | None  # of the persons, without those that would cost too much silhouette


@dataclass(frozen=True)
class _Source:
    """What one calibrated image is made of."""

    person: int
    matrix: np.ndarray  # (3, 3) reference pixels to the model's frame
    maps: np.ndarray | None = None  # (parts, 3, 3) likewise, where the person bends
    order: tuple[int, ...] = ()  # parts in which it is painted
    nudge: Nudge | None = None  # that lays the bent person's outline on the driving mask

    def moved(self, matrix: np.ndarray) -> Self:
        """The same after a map (3, 3) of the frame."""
        nudge = self.nudge and replace(self.nudge, after=matrix)
        return replace(self, matrix=matrix @ self.matrix, maps=matrix @ self.maps, nudge=nudge)


def warp_clip(
    reference: np.ndarray,
    masks: np.ndarray,
    tracks: list[Track],
    placed: list[Track],
    targets: PackedMasks,
    framing: Framing,
    config: CalibrationConfig,
    bends: list[Bends] | None = None,
    layers: Sequence[list[Layer]] = (),
    cuts: Sequence[int] = (),
) -> WarpedClip:
    """Find the distinct calibrated images; warp their masks now, and the images when they are asked for.

    Fills the target masks of interpolated frames in which the person was not seen with the calibrated person's.
    `tracks` lie on the driving persons, by whose masks bends are judged; `placed` are those that are painted.
    `bends` and `layers` of the persons are for articulated calibration.
    """
    frames = len(tracks[0].matrices) if tracks else len(targets)
    member, iou = np.full((frames, len(tracks)), -1), np.full((frames, len(tracks)), np.nan)
    known: dict[tuple, int] = {}
    sources: list[_Source] = []
    warped = PackedMasks.zeros((int(sum(track.available.sum() for track in tracks)),), framing.size)
    coverage = [mask_pyramid(mask) for mask in masks]
    # Of their own: a pyramid remembers the last scale that it was sampled at, and these are sampled at another.
    coarse = [] if bends is None else [mask_pyramid(mask) for mask in masks]
    height, width = reference.shape[:2]
    corners = np.array([[0, 0], [width, 0], [0, height]], np.float64)

    def nudged(source: _Source, target: np.ndarray) -> _Source:
        p, size, cell = source.person, *_small(framing.size)
        shrink = np.array([[1 / cell, 0, 0.5 / cell - 0.5], [0, 1 / cell, 0.5 / cell - 0.5], [0, 0, 1]])
        small = source.moved(shrink)
        mask = bent_mask(layers[p], coarse[p], small, size)
        target = warp_mask(mask_pyramid(target), shrink, size)
        height = bends[p].height * np.sqrt(abs(np.linalg.det(small.matrix[:2, :2])))
        return replace(source, nudge=Nudge.between(mask, target, height, cell))

    def shown(source: _Source) -> np.ndarray:
        if source.maps is None:
            return warp_mask(coverage[source.person], source.matrix, framing.size)
        return bent_mask(layers[source.person], coverage[source.person], source, framing.size)

    for p, track in enumerate(tracks):
        matrices, painted = (framing.frame_map @ each.matrices for each in (track, placed[p]))
        bent, bent_sources = PackedMasks.zeros((frames,), framing.size), {}
        if bends is not None:
            gains, shot = np.zeros((frames, 1)), np.isin(np.arange(frames), cuts).cumsum()
            for f in np.flatnonzero(bends[p].bent):
                order = tuple(np.argsort(bends[p].depth[f], kind="stable").tolist())
                source, target = _Source(p, matrices[f], matrices[f] @ bends[p].matrices[f], order), targets[f, p]
                if bends[p].outlined[f] and target.any():
                    source = nudged(source, target)
                mask, whole = shown(source), shown(_Source(p, matrices[f]))
                bent[f], bent_sources[f] = mask, source
                gains[f] = np.nan_to_num(mask_iou(mask, target) - mask_iou(whole, target))
            # Decided over more than a moment: nobody goes limp for some frames.
            gains = filter_jitter(gains, FAR_APART * shot[:, None], bends[p].bent, STEADY)[:, 0]
            bends[p] = bends[p].straightened({int(f): STRAIGHTENED for f in np.flatnonzero(gains < -MAX_COST)})
        for f in np.flatnonzero(track.available):
            source = _Source(p, painted[f])
            if bends is not None and bends[p].bent[f]:
                source = bent_sources[f]
                if placed[p] is not track:
                    source = source.moved(painted[f] @ np.linalg.inv(matrices[f]))
            moved = apply_matrix(source.matrix if source.maps is None else source.maps, corners)
            outline = b"" if source.nudge is None else source.nudge.field.tobytes()
            key = (p, source.order, outline, *np.round(moved.reshape(-1) / SAME_PIXELS).tolist())
            member[f, p] = known.setdefault(key, len(sources))
            if member[f, p] == len(sources):
                warped[len(sources)] = shown(source) if source.maps is None or placed[p] is not track else bent[f]
                sources.append(source)
            mask, target = warped[member[f, p]], targets[f, p]
            if target.any():
                iou[f, p] = mask_iou(mask, target)
            elif track.interpolated[f]:
                targets[f, p] = mask if placed[p] is track else shown(bent_sources.get(f, _Source(p, matrices[f])))
    image = ImagePyramid(np.ascontiguousarray(reference))
    background = _background(image, masks, framing, config.fill)

    def paint(index: int) -> np.ndarray:
        source = sources[index]
        p, matrix = source.person, source.matrix
        quad, under = None, background
        if config.fill == "reference":
            quad = quad_mask(matrix, image.size, framing.size)
            under = np.where(quad[..., None], image.warp(matrix, framing.size), np.uint8(0))
            if source.maps is not None:
                # The image moves along as a whole, but for the person, who would be seen twice.
                under = remove_persons(under, _widened(coverage[p].warp(matrix, framing.size) > 0))
        if source.maps is not None:
            layered = sorted(layers[p], key=lambda layer: source.order.index(layer.part))
            return paint_layers(layered, image, coverage[p], source, under)
        return under if config.fill == "reference" else place_person(image, coverage[p], matrix, under)

    images = LazyImages(len(sources), framing.size, paint)
    return WarpedClip(images, warped.select(slice(len(sources))), member, iou, bends)


def _small(size: tuple[int, int]) -> tuple[tuple[int, int], float]:
    """A size (width, height) of about `GAP_SIDE` pixels, and how many pixels each of its pixels is wide."""
    cell = max(1.0, max(size) / GAP_SIDE)
    return (math.ceil(size[0] / cell), math.ceil(size[1] / cell)), cell


def mask_iou(mask: np.ndarray, target: np.ndarray) -> float:
    """IoU of two masks (h, w) bool; nan for an empty target."""
    return np.count_nonzero(mask & target) / np.count_nonzero(mask | target) if target.any() else np.nan


def _background(image: "ImagePyramid", masks: np.ndarray, framing: Framing, fill: str) -> np.ndarray:
    """(h, w, 3) uint8, painted around calibrated persons."""
    width, height = framing.size
    everybody = np.logical_or.reduce(masks, axis=0) if len(masks) else np.zeros(image.size[::-1], bool)
    background = np.zeros((height, width, 3), np.uint8)
    if fill == "mean":
        pixels = image.levels[0][~everybody]
        background[:] = np.round(pixels.mean(0)) if len(pixels) else 127
    if fill == "scene":
        to_model, size = framing.reference_map, framing.size
        scene = place_whole(image, to_model, size)
        background = remove_persons(scene, _widened(mask_pyramid(everybody).warp(to_model, size) > 0))
    return background


def place_whole(image: "ImagePyramid", matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The image in a frame of (width, height), (h, w, 3) uint8, continued where it does not reach."""
    return continued(image.warp(matrix, size), ~quad_mask(matrix, image.size, size))


def continued(image: np.ndarray, beyond: np.ndarray) -> np.ndarray:
    """An image (h, w, 3) uint8 that goes on where a mask (h, w) bool is set as its edge does, softer further away."""
    if not beyond.any() or beyond.all():
        return image
    # From a little inside: the outermost pixels, often a frame or a line, would be drawn out into bars.
    distance, nearest = distance_transform_edt(_widened(beyond), return_indices=True)
    result = image[tuple(nearest)].astype(np.float32)
    for sigma in (max(image.shape) / 128 * np.array([1, 4, 12])).tolist():
        share = np.clip(distance / (3 * sigma), 0, 1).astype(np.float32)[..., None]
        result += share * (cv2.GaussianBlur(result, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE) - result)
    return np.round(result).astype(np.uint8)


def _widened(mask: np.ndarray) -> np.ndarray:
    """A mask (h, w) bool and what lies just beside it: edge pixels still show what is masked."""
    reach = max(2, max(mask.shape) // 128)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    return cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)


class ImagePyramid:
    """An image (h, w, 3) or (h, w) uint8 that can be warped at any scale without aliasing.

    Beyond it lie its edge pixels ("edge": for colours, sampled bicubically) or zeros ("zero": for masks, linearly).
    Shrinking averages blocks of 2x2 pixels as often as the scale halves, then blurs for the rest. Both are kept, and
    used again by the next frame of about the same scale.
    """

    BLUR_STEP = 0.1  # pixels of standard deviation; finer steps are invisible

    def __init__(self, image: np.ndarray, beyond: str = "edge"):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0:
            raise ValueError(f"image must be uint8 (h, w, 3) or (h, w), got {image.dtype} {image.shape}")
        if beyond not in ("edge", "zero"):
            raise ValueError(f"beyond must be edge or zero, got {beyond!r}")
        self.levels = [image]
        self.beyond = beyond
        self._blurred: tuple[tuple[int, int], np.ndarray] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.levels[0].shape[1], self.levels[0].shape[0]

    def warp(self, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Resample into a frame of (width, height); zeros when the matrix sends the image nowhere."""
        matrix = np.asarray(matrix, np.float64)
        corners = matrix[:2] @ np.array([[0, self.size[0], 0], [0, 0, self.size[1]], [1, 1, 1.0]])
        if not np.abs(corners).max() <= MAX_COORDINATE or abs(np.linalg.det(matrix[:2, :2])) < MIN_AREA:
            return np.zeros((size[1], size[0], *self.levels[0].shape[2:]), np.uint8)
        source, unit, half = self.prepared(np.linalg.svd(matrix[:2, :2], compute_uv=False)[-1])
        step = matrix @ np.array([[unit, 0, half], [0, unit, half], [0, 0, 1]])
        flags, border = self._sampling
        return cv2.warpAffine(source, step[:2], size, flags=flags, borderMode=border)

    def remap(self, places: np.ndarray, scale: float) -> np.ndarray:
        """Look up pixels (x, y) of the image, (h, w, 2) float32, as `scale` pixels wide as they are here."""
        source, unit, half = self.prepared(scale)
        flags, border = self._sampling
        # Shrinking, the prepared image has more pixels than the frame, and lines between them are good enough.
        flags = cv2.INTER_LINEAR if scale <= 1 else flags
        return cv2.remap(source, (places - half) / np.float32(unit), None, flags, borderMode=border)

    @property
    def _sampling(self) -> tuple[int, int]:
        if self.beyond == "edge":
            return cv2.INTER_CUBIC, cv2.BORDER_REPLICATE
        return cv2.INTER_LINEAR, cv2.BORDER_CONSTANT

    def prepared(self, smallest: float) -> tuple[np.ndarray, float, float]:
        """The image as it is sampled where one of its pixels shrinks to `smallest`; pixel i of it is unit i + half."""
        level = max(0, math.floor(math.log2(1 / smallest)), math.ceil(math.log2(max(self.size) / MAX_SIDE)))
        source = self._reduced(level)
        level = min(level, len(self.levels) - 1)
        shrink = max(1.0, 1 / (smallest * 2**level))  # in (1, 2]: what the halvings leave
        source = self._blur(level, source, 0.5 * math.sqrt(shrink**2 - 1))
        # Pixel i of a level is the mean of pixels 2^level i ... 2^level (i + 1) - 1.
        return source, 2.0**level, (2.0**level - 1) / 2

    def _reduced(self, level: int) -> np.ndarray:
        while len(self.levels) <= level:
            last = self.levels[-1]
            if max(last.shape[:2]) == 1:
                break
            odd = [(0, n % 2) for n in last.shape[:2]] + [(0, 0)] * (last.ndim - 2)
            padded = np.pad(last, odd, mode="edge" if self.beyond == "edge" else "constant")
            self.levels.append(
                cv2.resize(padded, (padded.shape[1] // 2, padded.shape[0] // 2), interpolation=cv2.INTER_AREA)
            )
        return self.levels[min(level, len(self.levels) - 1)]

    def _blur(self, level: int, source: np.ndarray, sigma: float) -> np.ndarray:
        steps = round(sigma / self.BLUR_STEP)
        if steps == 0:
            return source
        if self._blurred is None or self._blurred[0] != (level, steps):
            blurred = cv2.GaussianBlur(source, (0, 0), steps * self.BLUR_STEP, borderType=cv2.BORDER_REPLICATE)
            self._blurred = ((level, steps), blurred)
        return self._blurred[1]


def quad_mask(matrix: np.ndarray, source_size: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """(h, w) bool: the destination pixels whose centres lie on the warped source image."""
    inverse = np.linalg.inv(matrix)
    x, y = np.arange(size[0])[None, :], np.arange(size[1])[:, None]
    inside = np.ones((size[1], size[0]), bool)
    for (a, b, c), length in zip(inverse[:2], source_size, strict=True):
        coordinate = a * x + b * y + c
        inside &= (coordinate >= -0.5) & (coordinate <= length - 0.5)
    return inside


def mask_pyramid(mask: np.ndarray) -> ImagePyramid:
    """A mask (h, w) bool as an image of coverage, 0 to 255."""
    return ImagePyramid(mask.astype(np.uint8) * np.uint8(255), "zero")


def warp_mask(mask: ImagePyramid, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) bool: the destination pixels of which the mask covers at least half."""
    return mask.warp(matrix, size) >= 128


def place_person(image: ImagePyramid, mask: ImagePyramid, matrix: np.ndarray, background: np.ndarray) -> np.ndarray:
    """The warped person over a background (h, w, 3) uint8, blended where a pixel is covered in part."""
    size = (background.shape[1], background.shape[0])
    alpha = mask.warp(matrix, size)
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    result = background.copy()
    if not len(rows):
        return result
    # Only the box of the person is resampled.
    top, left, bottom, right = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
    to_box = np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1.0]]) @ matrix
    person = image.warp(to_box, (int(right - left), int(bottom - top)))
    share = alpha[top:bottom, left:right, None].astype(np.float32) / 255
    blended = share * person + (1 - share) * result[top:bottom, left:right]
    result[top:bottom, left:right] = np.round(blended).astype(np.uint8)
    return result


def paint_layers(
    layers: list[Layer], image: ImagePyramid, mask: ImagePyramid, source: _Source, background: np.ndarray
) -> np.ndarray:
    """A bent person's layers, the farthest first, over a background (h, w, 3) uint8; see `layers.lay`."""
    result, (coverage, size) = background.copy(), (_coverage(mask, source.matrix), background.shape[1::-1])
    for layer in layers:
        patch = lay(layer, source.maps, coverage, size, source.nudge)
        if patch is not None:
            colours, under = image.remap(patch.places, coverage.scale), result[patch.box]
            under[:] = cv2.blendLinear(colours, under, patch.share, 1 - patch.share)
    return result


def bent_mask(layers: list[Layer], mask: ImagePyramid, source: _Source, size: tuple[int, int]) -> np.ndarray:
    """(h, w) bool: the pixels of which the layers of a bent person cover at least half."""
    covered, coverage = np.zeros((size[1], size[0]), bool), _coverage(mask, source.matrix)
    for layer in layers:
        patch = lay(layer, source.maps, coverage, size, source.nudge)
        if patch is not None:
            covered[patch.box] |= patch.share >= 128 / 255
    return covered


def _coverage(mask: ImagePyramid, matrix: np.ndarray) -> Coverage:
    """The mask as it is sampled where a similarity says how large the image's pixels become."""
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    return Coverage(*mask.prepared(scale), scale)


def remove_persons(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fill the pixels of a mask (h, w) bool smoothly from those around it: (h, w, 3) uint8.

    An image that is all mask becomes grey.
    """
    known = (~mask).astype(np.float32)
    if not known.any():
        return np.full_like(image, 127)
    filled = _push_pull(image.astype(np.float32) * known[..., None], known)
    return np.where(mask[..., None], np.round(filled).clip(0, 255).astype(np.uint8), image)


def _push_pull(weighted: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Colours times weights (h, w, 3) and weights (h, w) -> colours without holes (h, w, 3).

    Known pixels are averaged into ever coarser images, and the holes of each are filled from the next coarser one.
    """
    height, width = known.shape
    if height == 1 and width == 1:
        return weighted / np.maximum(known[..., None], 1e-6)
    half = ((width + 1) // 2, (height + 1) // 2)
    coarse = _push_pull(
        cv2.resize(weighted, half, interpolation=cv2.INTER_AREA).reshape(half[1], half[0], 3),
        cv2.resize(known, half, interpolation=cv2.INTER_AREA),
    )
    share = np.minimum(known, 1)[..., None]
    return weighted + (1 - share) * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
