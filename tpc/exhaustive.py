"""The subset of keypoints whose transform aligns the two silhouettes best, over all subsets.

The paper asks for this subset and does not say how the subsets are enumerated. Here all of them are tried.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from tpc import search
from tpc.procrustes import apply_matrix
from tpc.silhouettes import Silhouette
from tpc.subset import Selection

# Silhouettes are compared by about this many samples of the reference's: on a person 300 pixels tall every 4th to
# 5th pixel of every 4th to 5th row.
NUM_SAMPLES = 1000
BITMAP_SIDE = 256  # cells on the longer side of the driving person's box
# Before that, by so many larger pieces of the reference's silhouette, each looked up in a driving silhouette blurred
# to the width of a piece times this part. Measured over pairs of poses; see docs/calibration.md.
NUM_PIECES = (64, 256)
BLUR = 0.7
# A subset is dropped when the pieces' IoU would have to be wrong by this many standard deviations for it to win. The
# error's distribution is that of some of the best subsets of the same frame.
DEVIATIONS = 4.0
NUM_CHECKED = 100
NEARLY_BEST = 0.05  # IoU: what may be among them
MARGIN = 0.15  # IoU: a subset this far below the best is not worth the rest of its samples
SAME_IOU = 1e-9  # what rounding may change
# Every subset is scored by all samples where that is quick: few samples to look up in all, or a silhouette of few.
MAX_OUTRIGHT = 8_000_000
MAX_OUTRIGHT_SAMPLES = 300
# Points within this part of the image's coordinates of each other coincide.
RELATIVE_DISTANCE = 1e-6


@dataclass(frozen=True)
class SearchLimits:
    """What a transform must satisfy to be a candidate."""

    min_points: int = 3
    min_scale: float = 1e-3
    max_scale: float = 1e3
    max_rotation: float = 180.0  # degrees


@dataclass(frozen=True)
class Samples:
    """Points spread evenly over a silhouette, in chunks of `search.CHUNK`.

    Attributes:
        points: (chunks, 2, CHUNK) x and y; the last chunk is padded.
        counts: (chunks, CHUNK) int32, of the finest samples that each stands for; 0 for padding.
        left: (chunks,) int64, finest samples in a chunk and all after it.
        number: of the points.
    """

    points: np.ndarray
    counts: np.ndarray
    left: np.ndarray
    number: int

    @classmethod
    def of(cls, points: np.ndarray, counts: np.ndarray) -> "Samples":
        """Of (n, 2) points; each chunk is spread over all of them."""
        order = np.random.default_rng(0).permutation(len(points))
        return cls.chunked(points[order], counts[order])

    @classmethod
    def chunked(cls, points: np.ndarray, counts: np.ndarray) -> "Samples":
        """Of (n, 2) points in this order."""
        chunks = -(-len(points) // search.CHUNK)
        padding = chunks * search.CHUNK - len(points)
        chunked = np.pad(points, ((0, padding), (0, 0))).reshape(chunks, search.CHUNK, 2)
        counts = np.pad(counts, (0, padding)).astype(np.int32).reshape(chunks, search.CHUNK)
        left = counts.sum(1)[::-1].cumsum(dtype=np.int64)[::-1]
        return cls(chunked.transpose(0, 2, 1).copy(), counts, left.copy(), len(points))

    def listed(self) -> np.ndarray:
        """(n, 2) the points without padding."""
        return self.points.transpose(0, 2, 1).reshape(-1, 2)[: self.number]

    def moved(self, origin: np.ndarray) -> "Samples":
        return replace(self, points=(self.points - origin[:, None]).astype(self.points.dtype))


@dataclass(frozen=True)
class ReferenceSilhouette:
    """The reference person's outline, sampled once for all frames.

    Attributes:
        samples: all samples, reference pixels, float64.
        pieces: coarser ones, from few to many, float32.
        sample_area: reference pixels that one sample stands for.
        box: (4,) centre x and y, half the width and the height of the box of the samples.
    """

    samples: Samples
    pieces: tuple[Samples, ...]
    sample_area: float
    box: np.ndarray

    @classmethod
    def of(cls, silhouette: Silhouette) -> "ReferenceSilhouette":
        points = silhouette.points().astype(np.float64)
        if not len(points):
            return cls(Samples.of(points, np.zeros(0)), (), 0.0, np.zeros(4))
        pieces = tuple(_pieces(points, count) for count in NUM_PIECES if 2 * count <= len(points))
        least, most = points.min(0), points.max(0)
        box = np.concatenate([(least + most) / 2, (most - least) / 2])
        return cls(Samples.of(points, np.ones(len(points))), pieces, silhouette.area / len(points), box)

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
    return Samples.of(means, np.array([len(part) for part in parts]))


def select_exhaustive(
    source: np.ndarray,
    target: np.ndarray,
    weights: np.ndarray,
    reference: ReferenceSilhouette,
    silhouette: Silhouette,
    size: tuple[int, int],
    *,
    limits: SearchLimits,
    outright: bool | None = None,
) -> Selection:
    """The subset whose similarity gives the highest silhouette IoU, over all subsets of the points visible in both.

    The reference's outline is carried into the driving frame by the samples inside it: with n samples of A reference
    pixels each and a scale s, the part of it on the frame covers s^2 A (samples on the frame) pixels, and shares s^2
    A (samples that land on the driving person) of them. What leaves the frame does not count.

    Ties go to the larger subset, then to the smaller residual.

    Args:
        source, target: (17, 2) reference and driving pixels.
        weights: (17,), 0 = not visible in both.
        silhouette: the driving person.
        size: (width, height) of the driving frame.
        outright: score every subset by all samples, however many; None = when they are few. Otherwise all are scored
            by few large pieces of the silhouette first, and those that could still win by more and smaller ones.
    """
    common = np.flatnonzero(weights > 0)
    if len(common) < limits.min_points:
        return Selection((), f"{len(common)} keypoints are visible in both; {limits.min_points} are needed")
    if reference.empty or silhouette.area == 0:
        return Selection((), "no silhouette of the person")
    x, y, w = source[common].astype(np.float64), target[common].astype(np.float64), weights[common] / weights.max()
    x0, y0 = x.mean(0), y.mean(0)  # moments are taken about the means, where they lose no digits
    half = (len(common) + 1) // 2
    low = search.moment_table(x[:half] - x0, y[:half] - y0, w[:half])
    high = search.moment_table(x[half:] - x0, y[half:] - y0, w[half:])
    smallest = (RELATIVE_DISTANCE * max(np.abs(x).max(), 1.0)) ** 2
    bounds = np.array([limits.min_scale, limits.max_scale, np.cos(np.deg2rad(limits.max_rotation)) - 1e-12])
    subsets, points, found = search.solve_subsets(low, high, bounds, limits.min_points, smallest)
    if not len(found):
        return Selection((), "every subset of the keypoints gives a scale or a rotation outside the bounds")
    scene = _Scene(reference, silhouette, size, x0, y0)
    finest = scene.level(reference.samples)
    members = np.arange(len(found), dtype=np.int32)
    num_samples = reference.samples.number
    if outright is None:
        outright = num_samples <= MAX_OUTRIGHT_SAMPLES or num_samples * len(found) <= MAX_OUTRIGHT
    everything = first = int(points.argmax())  # with all points: kept to the end, so that no result is worse than it
    if not outright:
        members, first = _contenders(members, first, found, scene, finest)
        members = _with(members, everything)
    scores = scene.score(scene.misses_first(finest, found[first]), members, found, first, SAME_IOU)
    winner = search.pick(members, scores, points, found)
    if winner < 0:
        return Selection((), "no subset of the keypoints makes the silhouettes overlap")
    bits, iou = subsets[members[winner]], scores[winner]
    chosen = tuple(int(i) for n, i in enumerate(common) if bits >> n & 1)
    return Selection(chosen, None, float(iou))


def _contenders(
    members: np.ndarray, first: int, found: np.ndarray, scene: "_Scene", finest: "_Level"
) -> tuple[np.ndarray, int]:
    """The candidates that could still have the highest IoU after scoring by pieces, and the best one known so far."""
    for pieces in scene.reference.pieces:
        scores = scene.score(scene.level(pieces), members, found, first, MARGIN)
        near = np.flatnonzero(scores >= max(scores.max() - NEARLY_BEST, 0.0))
        if not len(near):
            break
        checked = np.append(near[:: max(1, len(near) // NUM_CHECKED)], scores.argmax())
        exact = scene.score(finest, members[checked], found, first, 1.0)
        first = int(members[checked[exact.argmax()]])
        slope, deviation = _error_model(exact - scores[checked], found[members[checked], :4])
        kept = search.keep_contenders(members, found, scores, slope, exact.max() - DEVIATIONS * deviation)
        members = _with(kept, first)
    return members, first


def _with(members: np.ndarray, one: int) -> np.ndarray:
    return members if (members == one).any() else np.append(members, np.int32(one))


def _error_model(error: np.ndarray, transforms: np.ndarray) -> tuple[np.ndarray, float]:
    """The part of the errors (n,) that is linear in the transforms (n, 4), and the standard deviation of the rest.

    Returns the constant and the slopes (5,), and the deviation.
    """
    mean, spread = transforms.mean(0), transforms.std(0) + 1e-12
    design = np.column_stack([np.ones(len(error)), (transforms - mean) / spread])
    # A trace of ridge keeps the equations solvable where all transforms agree.
    slope = np.linalg.solve(design.T @ design + 1e-6 * np.eye(design.shape[1]), design.T @ error)
    freedom = max(len(error) - design.shape[1], 1)
    deviation = float(np.sqrt(((error - design @ slope) ** 2).sum() / freedom))
    along = slope[1:] / spread
    return np.concatenate([[slope[0] - mean @ along], along]), deviation


@dataclass(frozen=True)
class _Level:
    """Samples in the scene's coordinates, and what they are looked up in.

    Attributes:
        cover: part of a sample around each cell that the driving person covers, 0 to 255.
        border: width in cells of the zeros around it.
    """

    samples: Samples
    cover: np.ndarray
    border: int


class _Scene:
    """Both silhouettes in coordinates whose origins are the means of the keypoints."""

    def __init__(
        self,
        reference: ReferenceSilhouette,
        silhouette: Silhouette,
        size: tuple[int, int],
        x0: np.ndarray,
        y0: np.ndarray,
    ):
        self.reference, self.silhouette, self.x0, self.y0 = reference, silhouette, x0, y0
        self.box = reference.box - np.pad(x0, (0, 2))
        self.origin = np.asarray(silhouette.origin, np.float64) - y0
        self.frame = np.concatenate([(-0.5, -0.5) - y0, np.asarray(size) - 0.5 - y0])

    def level(self, samples: Samples) -> _Level:
        """Pieces are looked up in a blurred person.

        A piece is as large as it becomes by the scale that makes the two silhouettes' areas equal.
        """
        mask, side = self.silhouette.mask.astype(np.uint8) * np.uint8(search.COVERED), 1
        if samples.number < self.reference.samples.number:
            width = np.sqrt(self.silhouette.area / samples.number) / self.silhouette.cell
            side = 2 * max(round((BLUR * width - 1) / 2), 0) + 1
        border = side // 2 + 1
        cover = np.pad(mask, border)
        if side > 1:
            cover = cv2.blur(cover, (side, side), borderType=cv2.BORDER_CONSTANT)
        return _Level(samples.moved(self.x0), cover, border)

    def misses_first(self, finest: _Level, transform: np.ndarray) -> _Level:
        """The samples in another order: first those that this transform takes beside the driving person.

        Others that are as good miss mostly the same, so that the worse ones are known to lose after a few chunks.
        """
        points = finest.samples.listed()
        a, b, tx, ty = transform[:4]
        moved = apply_matrix(np.array([[a, -b, tx], [b, a, ty], [0, 0, 1]]), points) + self.y0
        order = np.argsort(_on_person(moved, self.silhouette), kind="stable")
        return replace(finest, samples=Samples.chunked(points[order], np.ones(len(points))))

    def score(self, level: _Level, members: np.ndarray, found: np.ndarray, first: int, margin: float) -> np.ndarray:
        """See `search.score_candidates`."""
        return search.score_candidates(
            members,
            found,
            first,
            level.samples.points,
            level.samples.counts,
            level.samples.left,
            self.reference.sample_area,
            self.box,
            level.cover,
            self.origin - (level.border - 1) * self.silhouette.cell,
            1 / self.silhouette.cell,
            self.silhouette.area,
            self.frame,
            margin,
        )


def _on_person(points: np.ndarray, silhouette: Silhouette) -> np.ndarray:
    """Whether points (n, 2) of the driving image lie on its person, (n,) bool."""
    position = np.floor((points - silhouette.origin) / silhouette.cell + 0.5)
    rows, columns = silhouette.mask.shape
    hit = (position >= 0).all(-1) & (position < (columns, rows)).all(-1)
    column, row = position[hit].astype(int).T
    hit[hit] = silhouette.mask[row, column]
    return hit


def silhouette_iou(
    matrix: np.ndarray, reference: ReferenceSilhouette, silhouette: Silhouette, size: tuple[int, int]
) -> float:
    """Silhouette IoU of any affine matrix (3, 3), measured as in `select_exhaustive`; 0 without silhouettes."""
    if reference.empty or silhouette.area == 0:
        return 0.0
    moved = apply_matrix(matrix, reference.samples.listed())
    on_frame = ((moved >= -0.5) & (moved < np.asarray(size) - 0.5)).all(-1)
    size_of_sample = reference.sample_area * abs(np.linalg.det(matrix[:2, :2]))
    both = min(size_of_sample * np.count_nonzero(on_frame & _on_person(moved, silhouette)), silhouette.area)
    return float(both / (silhouette.area + size_of_sample * np.count_nonzero(on_frame) - both))
