"""The two BlazePose networks with their pre- and post-processing: person detector, and landmarks with person mask.

Coordinates in here are continuous: (0, 0) is the outer corner of the first pixel. Only what leaves
`LandmarkNet.__call__` is in pixels with centres at integers.

Source: Bazarevsky et al., "BlazePose: On-device Real-time Body Pose tracking", 2020, and the published model card.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from core.errors import UserError
from core.terminal import without_native_lines

DETECTOR_SIDE = 224
_LANDMARK_SIDE = 256
_LANDMARKS = 39  # 33 on the body, then the hip centre, the point that gives size and rotation, and four unused ones
_HIP_CENTRE, _SIZE_POINT = 33, 34

# BlazePose landmarks that are the 17 COCO keypoints.
COCO_FROM_BLAZEPOSE = np.array([0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28])


@dataclass(frozen=True)
class Roi:
    """Square around a person, turned so that the person stands upright in it."""

    x: float  # centre, the middle of the hips
    y: float
    side: float  # pixels
    rotation: float  # radians from the upright person to this one, clockwise in the image (y down)

    @classmethod
    def from_points(cls, hip_centre: np.ndarray, size_point: np.ndarray) -> Roi:
        """Region from the middle of the hips and the point above the head on the circle around the whole person."""
        dx, dy = (size_point - hip_centre).tolist()
        x, y = hip_centre.tolist()
        return cls(x, y, 2.5 * math.hypot(dx, dy), math.atan2(dx, -dy))

    def matrix(self, side: int) -> np.ndarray:
        """(2, 3) from continuous coordinates of a crop of `side` pixels to those of the image."""
        scale = self.side / side
        a, b = scale * math.cos(self.rotation), scale * math.sin(self.rotation)
        half = side / 2
        return np.array([[a, -b, self.x - half * (a - b)], [b, a, self.y - half * (b + a)]])


@dataclass(frozen=True)
class Detection:
    """A person found by the detector: the region for landmarks, and the detector's score in [0, 1]."""

    roi: Roi
    score: float


@dataclass(frozen=True)
class Landmarks:
    points: np.ndarray  # (33, 2) pixels of the image, centres at integers
    visibility: np.ndarray  # (33,) in [0, 1]: in the image and not hidden
    presence: np.ndarray  # (33,) in [0, 1]: in the image
    # (33,) in [0, 1]: highest value of the heatmap near the landmark. Where the network is at a loss this stays low
    # (0.2 to 0.5) although visibility and presence are near 1; a sure landmark has 0.6 to 1.
    sharpness: np.ndarray
    person: float  # probability that the region shows a person
    mask: np.ndarray  # (256, 256) float32, probability of the person in the crop
    roi: Roi  # the network's input
    next_roi: Roi  # around the person as placed now, for a second pass or for the next frame

    def image_mask(self, size: tuple[int, int]) -> np.ndarray:
        """(h, w) float32: probability of the person in an image of (width, height); 0 outside the region."""
        return cv2.warpAffine(self.mask, _pixel_matrix(self.roi.matrix(_LANDMARK_SIDE)), size, flags=cv2.INTER_LINEAR)


class DetectorNet:
    """Detector of persons who are upright in an image, or in an image turned by a given angle."""

    def __init__(self, path: Path, threads: int):
        self._net = _Net(path, threads)
        self._anchors = _anchor_centres()

    def __call__(self, image: np.ndarray, rotation: float = 0.0, threshold: float = 0.5) -> list[Detection]:
        """Persons turned by about `rotation` radians (clockwise) in an image (h, w, 3) uint8 RGB, surest first."""
        height, width = image.shape[:2]
        sine, cosine = abs(math.sin(rotation)), abs(math.cos(rotation))
        side = max(width * cosine + height * sine, width * sine + height * cosine)
        region = Roi(width / 2, height / 2, side, rotation)
        crop = crop_region(image, region, DETECTOR_SIDE)
        boxes, logits = self._net(crop[None].astype(np.float32) / 127.5 - 1)  # (1, anchors, 12), (1, anchors, 1)
        scores = _sigmoid(logits[0, :, 0])
        kept = scores >= threshold
        boxes, points = _decode_boxes(boxes[0][kept], self._anchors[kept])
        matrix = region.matrix(DETECTOR_SIDE)
        detections = []
        for members in weighted_clusters(boxes, scores[kept]):
            weights = scores[kept][members]
            blended = (points[members] * weights[:, None, None]).sum(axis=0) / weights.sum()
            blended = blended @ matrix[:, :2].T + matrix[:, 2]
            detections.append(Detection(Roi.from_points(blended[0], blended[1]), float(weights.max())))
        return detections


class LandmarkNet:
    """Network that places 33 body landmarks and a person mask in a region."""

    def __init__(self, path: Path, threads: int):
        self._net = _Net(path, threads)

    def __call__(self, image: np.ndarray, roi: Roi) -> Landmarks:
        crop = crop_region(image, roi, _LANDMARK_SIDE)
        values, person, mask, heatmaps, _ = self._net(crop[None].astype(np.float32) / 255)
        values = values.reshape(_LANDMARKS, 5)  # x, y, z, visibility, presence
        points, sharpness = refine_with_heatmaps(values[:, :2], _sigmoid(heatmaps[0]), _LANDMARK_SIDE)
        matrix = roi.matrix(_LANDMARK_SIDE)
        points = points @ matrix[:, :2].T + matrix[:, 2]
        return Landmarks(
            points=points[:_HIP_CENTRE] - 0.5,
            visibility=_sigmoid(values[:_HIP_CENTRE, 3]),
            presence=_sigmoid(values[:_HIP_CENTRE, 4]),
            sharpness=sharpness[:_HIP_CENTRE],
            person=float(person[0, 0]),
            mask=_sigmoid(mask[0, :, :, 0]),
            roi=roi,
            next_roi=Roi.from_points(points[_HIP_CENTRE], points[_SIZE_POINT]),
        )


def crop_region(image: np.ndarray, roi: Roi, side: int) -> np.ndarray:
    """Region of an image as an upright square of `side` pixels, black outside the image."""
    matrix = roi.matrix(side)
    factor = int(roi.side / side)
    if factor >= 2:  # averaged down first, so that the crop does not alias
        height, width = image.shape[:2]
        reduced = (max(1, round(width / factor)), max(1, round(height / factor)))
        image = cv2.resize(image, reduced, interpolation=cv2.INTER_AREA)
        matrix = np.diag([reduced[0] / width, reduced[1] / height]) @ matrix
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, _pixel_matrix(matrix), (side, side), flags=flags, borderMode=cv2.BORDER_CONSTANT)


def refine_with_heatmaps(points: np.ndarray, heatmaps: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks (k, 2) moved to their heatmap's centre of mass, where that is sure; highest values near them (k,).

    `heatmaps` are (rows, columns, k) in [0, 1] of a crop of `side` pixels. The values are 0 outside the crop.
    """
    points = points.astype(np.float64)
    highest = np.zeros(len(points), np.float32)
    rows, columns = heatmaps.shape[:2]
    reach = 3  # cells of the 64 x 64 heatmap to either side of a landmark
    for k, (x, y) in enumerate(points * (columns / side, rows / side)):
        column, row = math.floor(x), math.floor(y)
        if not (0 <= column < columns and 0 <= row < rows):
            continue
        left, top = max(0, column - reach), max(0, row - reach)
        window = heatmaps[top : row + reach + 1, left : column + reach + 1, k]
        highest[k] = window.max()
        if highest[k] < 0.5:
            continue
        total = window.sum()
        # The network was trained with cell indices as coordinates, not cell centres.
        points[k, 0] = (window.sum(axis=0) @ np.arange(left, left + window.shape[1])) / total * side / columns
        points[k, 1] = (window.sum(axis=1) @ np.arange(top, top + window.shape[0])) / total * side / rows
    return points, highest


def weighted_clusters(boxes: np.ndarray, scores: np.ndarray) -> list[np.ndarray]:
    """Indices of each person's boxes (n, 4), surest first: non-maximum suppression that keeps the suppressed."""
    clusters = []
    waiting = np.argsort(-scores, kind="stable")
    while len(waiting):
        best = boxes[waiting[0]]
        low = np.maximum(boxes[waiting, :2], best[:2])
        high = np.minimum(boxes[waiting, 2:], best[2:])
        shared = np.prod(np.clip(high - low, 0, None), axis=1)
        areas = np.prod(boxes[waiting, 2:] - boxes[waiting, :2], axis=1)
        # IoU above 0.3 with the surest remaining box.
        joined = shared > 0.3 * (areas + areas[0] - shared)
        joined[0] = True  # also a box without area
        clusters.append(waiting[joined])
        waiting = waiting[~joined]
    return clusters


class _Net:
    def __init__(self, path: Path, threads: int):
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError:
            raise UserError("pose.backend=blazepose needs the package ai-edge-litert; install it with pip") from None
        with without_native_lines("Created TensorFlow Lite XNNPACK delegate"):
            self._interpreter = Interpreter(model_path=str(path), num_threads=threads)
            self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._outputs = [output["index"] for output in self._interpreter.get_output_details()]

    def __call__(self, values: np.ndarray) -> list[np.ndarray]:
        self._interpreter.set_tensor(self._input, values)
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]


def _decode_boxes(raw: np.ndarray, anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) left, top, right, bottom and key points (n, 4, 2) from raw values (n, 12), pixels of the crop."""
    centre, half = raw[:, :2] + anchors, raw[:, 2:4] / 2
    return np.concatenate([centre - half, centre + half], axis=1), raw[:, 4:].reshape(-1, 4, 2) + anchors[:, None]


def _anchor_centres() -> np.ndarray:
    centres = []
    for stride, count in ((8, 2), (16, 2), (32, 6)):  # anchors per cell
        cells = np.arange(DETECTOR_SIDE // stride)
        grid = np.stack(np.meshgrid(cells, cells), axis=-1).reshape(-1, 2)  # (x, y), row by row
        centres.append(np.repeat((grid + 0.5) * stride, count, axis=0))
    return np.concatenate(centres)


def _pixel_matrix(matrix: np.ndarray) -> np.ndarray:
    """Turn a map between continuous coordinates into one between pixels with centres at integers, as in OpenCV."""
    shifted = matrix.copy()
    shifted[:, 2] += matrix[:, :2].sum(axis=1) / 2 - 0.5
    return shifted


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -60, 60)))
