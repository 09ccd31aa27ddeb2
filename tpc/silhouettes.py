"""Measures of a person's 17 COCO keypoints, and silhouettes: sampled from masks, or drawn around the keypoints.

Keypoints are (..., 17, 2) pixels (x, y), y down, pixel centres at integers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from data.poses.poses import Poses
from tpc.procrustes import Array, apply_matrix, library

NOSE, LEFT_EYE, RIGHT_EYE, LEFT_EAR, RIGHT_EAR = range(5)
LEFT_SHOULDER, RIGHT_SHOULDER, LEFT_ELBOW, RIGHT_ELBOW, LEFT_WRIST, RIGHT_WRIST = range(5, 11)
LEFT_HIP, RIGHT_HIP, LEFT_KNEE, RIGHT_KNEE, LEFT_ANKLE, RIGHT_ANKLE = range(11, 17)
NUM_KEYPOINTS = 17

FACE = (NOSE, LEFT_EYE, RIGHT_EYE, LEFT_EAR, RIGHT_EAR)
TORSO = (LEFT_SHOULDER, RIGHT_SHOULDER, LEFT_HIP, RIGHT_HIP)
TRUNK = FACE + TORSO
FIXED_RULES = {"all": tuple(range(NUM_KEYPOINTS)), "face": FACE, "torso": TORSO, "trunk": TRUNK}

# Length of each bone and width of the body around it, as parts of the standing height (Drillis and Contini's
# proportions, rounded; widths include clothes).
BONES = {
    (LEFT_SHOULDER, RIGHT_SHOULDER): (0.22, 0.11),
    (LEFT_SHOULDER, LEFT_ELBOW): (0.17, 0.065),
    (RIGHT_SHOULDER, RIGHT_ELBOW): (0.17, 0.065),
    (LEFT_ELBOW, LEFT_WRIST): (0.15, 0.05),
    (RIGHT_ELBOW, RIGHT_WRIST): (0.15, 0.05),
    (LEFT_SHOULDER, LEFT_HIP): (0.29, 0.11),
    (RIGHT_SHOULDER, RIGHT_HIP): (0.29, 0.11),
    (LEFT_HIP, RIGHT_HIP): (0.13, 0.13),
    (LEFT_HIP, LEFT_KNEE): (0.245, 0.1),
    (RIGHT_HIP, RIGHT_KNEE): (0.245, 0.1),
    (LEFT_KNEE, LEFT_ANKLE): (0.245, 0.07),
    (RIGHT_KNEE, RIGHT_ANKLE): (0.245, 0.07),
}
FACE_BONES = {
    (LEFT_EAR, RIGHT_EAR): 0.085,
    (LEFT_EYE, RIGHT_EYE): 0.038,
    (NOSE, LEFT_EAR): 0.065,
    (NOSE, RIGHT_EAR): 0.065,
}
HEAD_WIDTH, HEAD_HEIGHT = 0.1, 0.14
# Hands and feet: length beyond the end of the bone, and width.
ENDS = {
    (LEFT_ELBOW, LEFT_WRIST): (0.08, 0.05),
    (RIGHT_ELBOW, RIGHT_WRIST): (0.08, 0.05),
    (LEFT_KNEE, LEFT_ANKLE): (0.06, 0.07),
    (RIGHT_KNEE, RIGHT_ANKLE): (0.06, 0.07),
}

# Silhouettes are compared by about this many samples of the reference's: on a person 300 pixels tall every 4th to
# 5th pixel of every 4th to 5th row.
NUM_SAMPLES = 1000
BITMAP_SIDE = 256  # cells on the longer side of the driving person's box
CHUNK = 64  # samples between two checks whether a candidate can still win
OUTLINE_POINTS = 220  # about as many describe an outline
# Before that, by so many larger pieces of the reference's silhouette.
NUM_PIECES = (64, 256)


def visible(scores: np.ndarray, keypoints: np.ndarray, threshold: float) -> np.ndarray:
    """(..., 17) bool: scores above the threshold at finite coordinates. Score 0 never counts."""
    return (scores > max(threshold, 0)) & np.isfinite(keypoints).all(-1)


def body_height(keypoints: np.ndarray, seen: np.ndarray) -> float:
    """Standing height in pixels that fits the visible bones (17, 2), (17,) bool; 0 when no bone is visible."""
    lengths = {bone: share for bone, (share, _) in BONES.items()} | FACE_BONES
    estimates = [
        np.linalg.norm(keypoints[a] - keypoints[b]) / share for (a, b), share in lengths.items() if seen[a] and seen[b]
    ]
    # An upper quartile, not the mean: perspective only shortens bones.
    return float(np.quantile(estimates, 0.75)) if estimates else 0.0


def keypoint_box(keypoints: Array, seen: Array) -> Array:
    """(..., 4) left, top, right, bottom of the visible keypoints, arrays or tensors; nan without any."""
    xp, seen = library(keypoints), seen[..., None]
    low = xp.amin(xp.where(seen, keypoints, np.inf), -2)
    high = xp.amax(xp.where(seen, keypoints, -np.inf), -2)
    box = xp.concatenate([low, high], -1)
    return xp.where(seen.any(-2), box, np.nan)


def facing(keypoints: np.ndarray, seen: np.ndarray) -> float:
    """Direction of the torso: about +1 seen from the front, -1 from behind, 0 from the side or unknown."""
    # The width of shoulders and hips, signed by left and right, over the torso's length, in units of that ratio of a
    # person seen squarely: place, scale and rotation in the image do not matter.
    if not (seen[list(TORSO)]).all():
        return 0.0
    left, right = keypoints[[LEFT_SHOULDER, LEFT_HIP]], keypoints[[RIGHT_SHOULDER, RIGHT_HIP]]
    across = (left - right).mean(0)
    down = (keypoints[[LEFT_HIP, RIGHT_HIP]] - keypoints[[LEFT_SHOULDER, RIGHT_SHOULDER]]).mean(0)
    length = float(np.linalg.norm(down))
    if length == 0:
        return 0.0
    return float((across[0] * down[1] - across[1] * down[0]) / length**2 * 0.29 / 0.175)


def head_axis(keypoints: Array, seen: Array) -> Array:
    """(..., 2) from the pelvis to the nose, the line whose angle the paper measures; nan where either is unseen."""
    axis = keypoints[..., NOSE, :] - (keypoints[..., LEFT_HIP, :] + keypoints[..., RIGHT_HIP, :]) / 2
    known = seen[..., NOSE] & seen[..., LEFT_HIP] & seen[..., RIGHT_HIP]
    return library(keypoints).where(known[..., None], axis, np.nan)


def relative_angle(reference: Array, driving: Array) -> Array:
    """Angles (...) from one head axis (..., 2) to another, radians in [-pi, pi)."""
    xp = library(reference)
    turn = xp.atan2(driving[..., 1], driving[..., 0]) - xp.atan2(reference[..., 1], reference[..., 0])
    return (turn + np.pi) % (2 * np.pi) - np.pi


@dataclass(frozen=True)
class Silhouette:
    """A person's outline as a bitmap of its own resolution."""

    mask: np.ndarray  # (rows, columns) bool
    origin: tuple[float, float]  # (x, y) image pixels of the bitmap's first sample
    cell: float  # image pixels between samples
    area: float  # of the person, image pixels
    drawn: bool = False  # around keypoints, instead of taken from a mask

    def points(self) -> np.ndarray:
        """(n, 2) image coordinates of the samples inside the outline."""
        rows, columns = np.nonzero(self.mask)
        return np.stack([columns, rows], -1) * self.cell + self.origin

    def covers(self, points: np.ndarray) -> np.ndarray:
        """(n,) bool: the points (n, 2) of the image that lie on the person."""
        position = np.floor((points - self.origin) / self.cell + 0.5)
        rows, columns = self.mask.shape
        hit = (position >= 0).all(-1) & (position < (columns, rows)).all(-1)
        column, row = position[hit].astype(int).T
        hit[hit] = self.mask[row, column]
        return hit


def silhouette_from_mask(mask: np.ndarray, max_samples: int | None = None, max_side: int | None = None) -> Silhouette:
    """Crop a mask (h, w) bool to the person and sample it on a regular grid of whole pixels.

    The finest grid with at most about `max_samples` samples inside and `max_side` along the box's longer side.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return Silhouette(np.zeros((1, 1), bool), (0.0, 0.0), 1.0, 0.0)
    top, left = int(rows[0]), int(columns[0])
    crop = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    area, cell = int(np.count_nonzero(crop)), 1
    if max_samples:
        cell = max(cell, round((area / max_samples) ** 0.5))
    if max_side:
        cell = max(cell, -(-max(crop.shape) // max_side))
    start = (cell - 1) // 2  # centres the grid on the box
    return Silhouette(crop[start::cell, start::cell], (left + start, top + start), float(cell), float(area))


class Samples(NamedTuple):
    """Points spread evenly over a silhouette, in chunks."""

    points: np.ndarray  # (chunks, 2, CHUNK) x and y; the last chunk is padded
    counts: np.ndarray  # (chunks, CHUNK) int32, of the finest samples that each stands for; 0 for padding
    left: np.ndarray  # (chunks,) int64, finest samples in a chunk and all after it
    number: int  # of the points

    @classmethod
    def of(cls, points: np.ndarray, counts: np.ndarray) -> "Samples":
        """Samples at (n, 2) points, in their order."""
        chunks = -(-len(points) // CHUNK)
        padding = chunks * CHUNK - len(points)
        chunked = np.pad(points, ((0, padding), (0, 0))).reshape(chunks, CHUNK, 2)
        counts = np.pad(counts, (0, padding)).astype(np.int32).reshape(chunks, CHUNK)
        left = counts.sum(1)[::-1].cumsum(dtype=np.int64)[::-1]
        return cls(chunked.transpose(0, 2, 1).copy(), counts, left.copy(), len(points))

    @classmethod
    def shuffled(cls, points: np.ndarray, counts: np.ndarray) -> "Samples":
        """Samples at (n, 2) points; each chunk is spread over all of them."""
        order = np.random.default_rng(0).permutation(len(points))
        return cls.of(points[order], counts[order])

    def listed(self) -> np.ndarray:
        """(n, 2) the points without padding."""
        return self.points.transpose(0, 2, 1).reshape(-1, 2)[: self.number]


@dataclass(frozen=True)
class ReferenceSilhouette:
    """The reference person's outline, sampled once for all frames."""

    samples: Samples  # all samples, reference pixels, float64
    pieces: tuple[Samples, ...]  # coarser ones, from few to many, float32
    sample_area: float  # reference pixels that one sample stands for
    box: np.ndarray  # (4,) centre x and y, half the width and the height of the box of the samples
    drawn: bool = False  # see `Silhouette`

    @classmethod
    def of(cls, silhouette: Silhouette) -> "ReferenceSilhouette":
        points = silhouette.points().astype(np.float64)
        if not len(points):
            return cls(Samples.of(points, np.zeros(0)), (), 0.0, np.zeros(4))
        pieces = tuple(_pieces(points, count) for count in NUM_PIECES if 2 * count <= len(points))
        least, most = points.min(0), points.max(0)
        box = np.concatenate([(least + most) / 2, (most - least) / 2])
        samples = Samples.shuffled(points, np.ones(len(points)))
        return cls(samples, pieces, silhouette.area / len(points), box, silhouette.drawn)

    @property
    def empty(self) -> bool:
        return self.samples.number == 0


def _pieces(points: np.ndarray, count: int) -> Samples:
    """`count` (a power of two) pieces of a silhouette, of nearly equal area; the longer side is halved each time."""
    parts = [points]
    while len(parts) < count:
        ordered = [part[np.argsort(part[:, np.ptp(part, axis=0).argmax()], kind="stable")] for part in parts]
        parts = [half for part in ordered for half in (part[: len(part) // 2], part[len(part) // 2 :])]
    means = np.stack([part.mean(0) for part in parts]).astype(np.float32)
    return Samples.shuffled(means, np.array([len(part) for part in parts]))


def silhouette_iou(
    matrix: np.ndarray, reference: ReferenceSilhouette, silhouette: Silhouette, size: tuple[int, int]
) -> float:
    """Silhouette IoU of any affine matrix (3, 3), measured as `tpc.subsets` does; 0 without silhouettes."""
    if reference.empty or silhouette.area == 0:
        return 0.0
    moved = apply_matrix(matrix, reference.samples.listed())
    on_frame = ((moved >= -0.5) & (moved < np.asarray(size) - 0.5)).all(-1)
    size_of_sample = reference.sample_area * abs(np.linalg.det(matrix[:2, :2]))
    both = min(size_of_sample * np.count_nonzero(on_frame & silhouette.covers(moved)), silhouette.area)
    return float(both / (silhouette.area + size_of_sample * np.count_nonzero(on_frame) - both))


def outline_points(silhouette: Silhouette, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """About `OUTLINE_POINTS` points (n, 2) on a silhouette's outline and their normals, without the image's edges."""
    mask = np.pad(silhouette.mask, 4).astype(np.uint8)
    found = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    step = max(1, -(-sum(len(contour) for contour in found) // OUTLINE_POINTS))
    cells = np.concatenate([contour[::step, 0] for contour in found]) if found else np.zeros((0, 2), int)
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 2)
    slope = [cv2.Sobel(soft, cv2.CV_32F, dx, 1 - dx)[cells[:, 1], cells[:, 0]] for dx in (1, 0)]
    normals = -np.stack(slope, 1).astype(np.float64)
    length = np.linalg.norm(normals, axis=1)
    normals = normals / np.maximum(length, 1e-9)[:, None]
    places = (cells - 4) * silhouette.cell + silhouette.origin + silhouette.cell / 2 * normals
    edge = 1.5 * silhouette.cell
    inside = (places > edge).all(1) & (places < np.array(size) - 1 - edge).all(1) & (length > 1e-3)
    return places[inside], normals[inside]


def draw_silhouette(keypoints: np.ndarray, seen: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Outline of a clothed body around the visible keypoints (17, 2): (h, w) bool, empty without a visible bone.

    Limbs are thick lines, the torso a filled polygon, the head an ellipse, in proportion to the person's size.
    """
    canvas = np.zeros((size[1], size[0]), np.uint8)
    body = body_height(keypoints, seen)
    if body == 0:
        return canvas.astype(bool)
    pen = _Canvas(canvas, body)
    for (a, b), (_, thickness) in BONES.items():
        if seen[a] and seen[b]:
            pen.line(keypoints[a], keypoints[b], thickness)
    for (a, b), (length, thickness) in ENDS.items():
        if seen[a] and seen[b]:
            pen.beyond(keypoints[a], keypoints[b], length, thickness)
    torso = [i for i in (LEFT_SHOULDER, RIGHT_SHOULDER, RIGHT_HIP, LEFT_HIP) if seen[i]]
    if len(torso) >= 3:
        pen.polygon(keypoints[torso])
    _draw_head(pen, keypoints, seen)
    return canvas.astype(bool)


def draw_silhouettes(poses: Poses, threshold: float = 0.3) -> np.ndarray:
    """(frames, persons, h, w) bool: everybody's `draw_silhouette` around keypoints with scores above the threshold."""
    masks = np.zeros((poses.frames, poses.persons, *poses.size[::-1]), bool)
    for index in np.ndindex(masks.shape[:2]):
        keypoints = poses.keypoints[index]
        masks[index] = draw_silhouette(keypoints, visible(poses.scores[index], keypoints, threshold), poses.size)
    return masks


def _draw_head(pen: "_Canvas", keypoints: np.ndarray, seen: np.ndarray) -> None:
    face = [i for i in FACE if seen[i]]
    if not face:
        return
    # Ears lie at the middle of the head; the nose and the eyes lie in front of it and a little lower.
    middle = keypoints[[i for i in face if i >= LEFT_EAR] or face].mean(0)
    shoulders = [i for i in (LEFT_SHOULDER, RIGHT_SHOULDER) if seen[i]]
    up = np.array([0.0, -1.0])
    if shoulders:
        neck = keypoints[shoulders].mean(0)
        if np.linalg.norm(middle - neck) > 0:
            up = (middle - neck) / np.linalg.norm(middle - neck)
        pen.line(neck, middle, 0.06)
    pen.ellipse(middle + 0.015 * pen.body * up, up, HEAD_WIDTH, HEAD_HEIGHT)


class _Canvas:
    """Filled shapes on a canvas with sizes in parts of the body height, at a sixteenth of a pixel."""

    SHIFT = 4
    LIMIT = 2**26  # OpenCV's fixed-point coordinates overflow beyond

    def __init__(self, canvas: np.ndarray, body: float):
        self.canvas, self.body = canvas, body

    def line(self, start: np.ndarray, end: np.ndarray, thickness: float) -> None:
        pixels = min(max(1, round(thickness * self.body)), 32767)
        ends = self._fixed(start), self._fixed(end)
        cv2.line(self.canvas, *ends, 255, pixels, cv2.LINE_8, self.SHIFT)

    def beyond(self, start: np.ndarray, end: np.ndarray, length: float, thickness: float) -> None:
        """From `end` on in the direction start -> end."""
        distance = np.linalg.norm(end - start)
        if distance > 0:
            self.line(end, end + (end - start) / distance * length * self.body, thickness)

    def polygon(self, points: np.ndarray) -> None:
        corners = np.array([self._fixed(point) for point in points], np.int32)
        cv2.fillPoly(self.canvas, [corners], 255, cv2.LINE_8, self.SHIFT)

    def ellipse(self, centre: np.ndarray, up: np.ndarray, width: float, height: float) -> None:
        angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)[:, None]
        side = np.array([-up[1], up[0]])
        self.polygon(centre + self.body / 2 * (width * np.cos(angle) * side + height * np.sin(angle) * up))

    def _fixed(self, point: np.ndarray) -> tuple[int, int]:
        x, y = (round(min(max(value * 2**self.SHIFT, -self.LIMIT), self.LIMIT)) for value in point.tolist())
        return x, y
