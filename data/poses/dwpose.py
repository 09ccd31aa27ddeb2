"""DWPose / RTMPose as a pose estimator, from your own ONNX files: a YOLOX person detector and a SimCC pose network.

    pose.backend=dwpose pose.weights=yolox_l.onnx,dw-ll_ucoco_384.onnx

Any YOLOX with undecoded output (n, boxes, 5 + classes) and any RTMPose with outputs simcc_x, simcc_y of 17, 26 or 133
keypoints, COCO's 17 first, will do. Sources: Ge et al., "YOLOX", 2021; Li et al., "SimCC", 2022; Jiang et al.,
"RTMPose", 2023; Yang et al., "Effective Whole-body Pose Estimation with Two-stages Distillation", 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from core.errors import UserError
from core.onnx import open_onnx
from data.poses.person import (
    Box,
    PersonEstimate,
    assign_slots,
    box_iou,
    by_prominence,
    distinct_persons,
    scores_inside,
)

_LEAST_DETECTION, _NMS_OVERLAP = 0.3, 0.45
_MEAN = np.array([123.675, 116.28, 103.53], np.float32)  # of ImageNet, RGB
_STD = np.array([58.395, 57.12, 57.375], np.float32)
_ENOUGH = 0.8  # mean keypoint score of an upright person that makes other rotations not worth trying


@dataclass(frozen=True)
class BoxScore:
    """Person box in pixels of the image and its score in [0, 1]."""

    box: Box
    score: float


class DWPose:
    """Top-down pose estimator: boxes from YOLOX, keypoints from RTMPose. It gives no masks."""

    def __init__(self, detector: str | Path, pose: str | Path, threads: int = 2):
        self._detector = _OnnxNet(detector, "YOLOX detector", outputs=1, threads=threads)
        self._pose = _OnnxNet(pose, "SimCC pose network", outputs=2, threads=threads)

    @classmethod
    def from_weights(cls, weights: str | None, threads: int = 2) -> DWPose:
        """Estimator of the setting `pose.weights`: "detector.onnx,pose.onnx"."""
        paths = [path.strip() for path in (weights or "").split(",") if path.strip()]
        if len(paths) != 2:
            raise UserError(
                f"pose.weights={weights} must name two files, pose.weights=detector.onnx,pose.onnx, "
                "for pose.backend=dwpose"
            )
        return cls(*paths, threads=threads)

    def image(self, image: np.ndarray, max_persons: int = 1) -> list[PersonEstimate]:
        persons = self._upright(image)
        # Both networks are trained on upright people, so the image is tried at other rotations too, unless the upright
        # one shows enough persons clearly.
        if sum(person.confidence >= _ENOUGH for person in persons) < max_persons:
            for step in range(1, 12):
                persons += self._turned(image, math.radians(30 * step))
        return by_prominence(distinct_persons(persons), image.shape[1::-1])[:max_persons]

    def video(self, frames: Iterable[np.ndarray], max_persons: int = 1) -> Iterator[list[PersonEstimate | None]]:
        """Persons in each frame, in `max_persons` fixed slots, None for those who are not visible."""
        last_seen: list[PersonEstimate | None] = [None] * max_persons
        for frame in frames:
            persons = by_prominence(distinct_persons(self._upright(frame)), frame.shape[1::-1])
            if not persons:
                persons = self.image(frame, max_persons)
            slots = assign_slots(last_seen, persons)
            last_seen = [now or before for now, before in zip(slots, last_seen, strict=True)]
            yield slots

    def _turned(self, image: np.ndarray, rotation: float) -> list[PersonEstimate]:
        turned, matrix = turn_image(image, rotation)
        back = np.linalg.inv(matrix[:, :2])  # from the turned image to the given one
        size = image.shape[1::-1]
        persons = []
        for person in self._upright(turned):
            keypoints = ((person.keypoints - matrix[:, 2]) @ back.T).astype(np.float32)
            scores = scores_inside(keypoints, person.scores, size)
            persons.append(PersonEstimate(keypoints, scores, None, person.confidence))
        return persons

    def _upright(self, image: np.ndarray) -> list[PersonEstimate]:
        boxed, scale = letterbox(image, self._detector.size)
        (output,) = self._detector(boxed[None])
        return [self._keypoints(image, found) for found in decode_boxes(output[0], self._detector.size, scale)]

    def _keypoints(self, image: np.ndarray, found: BoxScore) -> PersonEstimate:
        size = self._pose.size
        matrix = box_matrix(found.box, size)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        crop = cv2.warpAffine(image, matrix, size, flags=flags).astype(np.float32)
        values = ((crop - _MEAN) / _STD).transpose(2, 0, 1)[None]  # (1, 3, h, w)
        points, scores = decode_simcc(*self._pose(values), size)
        points = (points[:17] @ matrix[:, :2].T + matrix[:, 2]).astype(np.float32)  # COCO's keypoints come first
        scores = scores_inside(points, scores[:17], image.shape[1::-1])
        inside = scores[scores > 0]
        confidence = found.score * float(inside.mean()) if len(inside) else 0.0
        return PersonEstimate(points, scores, None, confidence)


def letterbox(image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Detector's input (3, h, w) float32 BGR of (width, height), the image at the top left, and its scale."""
    scale = min(size[0] / image.shape[1], size[1] / image.shape[0])
    shown = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    boxed = np.full((size[1], size[0], 3), 114, np.uint8)
    boxed[: shown[1], : shown[0]] = cv2.resize(image, shown, interpolation=interpolation)
    return np.ascontiguousarray(boxed[..., ::-1].transpose(2, 0, 1), dtype=np.float32), scale


def decode_boxes(output: np.ndarray, size: tuple[int, int], scale: float) -> list[BoxScore]:
    """Person boxes of YOLOX's raw output (cells, 5 + classes), surest first, after non-maximum suppression."""
    # Strides come in this order, cells row by row, for an input of (width, height) that is `scale` times
    # the image's size.
    cells, strides = [], []
    for stride in (8, 16, 32):
        columns, rows = size[0] // stride, size[1] // stride
        cells.append(np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2))
        strides.append(np.full((rows * columns, 1), stride))
    cells, strides = np.concatenate(cells), np.concatenate(strides)
    if len(output) != len(cells):
        raise UserError(
            f"pose.weights: the detector gives {len(output)} boxes for an input of {size[0]}x{size[1]}, YOLOX "
            f"{len(cells)}; export it with undecoded outputs"
        )
    # A cell (i, j) of stride s with raw values (x, y, w, h) stands for the box with centre s (j + x, i + y) and size
    # s (exp w, exp h); its score is objectness times the probability of the first class, person.
    scores = output[:, 4] * output[:, 5]
    kept = scores > _LEAST_DETECTION
    centres = (output[kept, :2] + cells[kept]) * strides[kept] / scale
    halves = np.exp(np.minimum(output[kept, 2:4], 20)) * strides[kept] / scale / 2
    corners = np.concatenate([centres - halves, centres + halves], axis=1)
    order = np.argsort(-scores[kept], kind="stable")
    boxes: list[BoxScore] = []
    for index in order:
        box = Box(*corners[index].tolist())
        if all(box_iou(box, other.box) <= _NMS_OVERLAP for other in boxes):
            boxes.append(BoxScore(box, float(scores[kept][index])))
    return boxes


def box_matrix(box: Box, size: tuple[int, int]) -> np.ndarray:
    """(2, 3) from pixels of the pose network's input of (width, height) to pixels of the image, box padded by 1.25."""
    # The padded box is widened to the input's aspect ratio about its centre.
    width, height = max(box.width, 1.0), max(box.height, 1.0)
    scale = 1.25 * max(width / size[0], height / size[1])
    centre = np.array([box.left + box.right, box.top + box.bottom]) / 2
    return np.column_stack([scale * np.eye(2), centre - scale * np.asarray(size) / 2])


def decode_simcc(x: np.ndarray, y: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Points (k, 2) in pixels of an input of (width, height), and scores (k,), from SimCC's bins x, y (1, k, bins)."""
    # The bins divide width and height, usually two to a pixel.
    bins = np.stack([x[0].argmax(axis=-1), y[0].argmax(axis=-1)], axis=-1)  # (k, 2)
    points = bins * (np.asarray(size) / (x.shape[-1], y.shape[-1]))
    return points, np.clip(np.minimum(x[0].max(axis=-1), y[0].max(axis=-1)), 0, 1)


def turn_image(image: np.ndarray, rotation: float) -> tuple[np.ndarray, np.ndarray]:
    """Image turned whole so that a person at `rotation` radians (clockwise) stands upright; and its matrix (2, 3)."""
    height, width = image.shape[:2]
    c, s = math.cos(rotation), math.sin(rotation)
    size = (math.ceil(width * abs(c) + height * abs(s)), math.ceil(width * abs(s) + height * abs(c)))
    linear = np.array([[c, s], [-s, c]])
    shift = (np.asarray(size) - 1) / 2 - linear @ ((np.array([width, height]) - 1) / 2)
    matrix = np.column_stack([linear, shift])
    return cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR), matrix


class _OnnxNet:
    """An ONNX network with one image as input; `size` is its (width, height)."""

    def __init__(self, path: str | Path, role: str, outputs: int, threads: int):
        self._session = open_onnx(path, "pose.weights", threads)
        inputs, found = self._session.get_inputs(), self._session.get_outputs()
        shape = inputs[0].shape
        if len(inputs) != 1 or len(shape) != 4 or not all(isinstance(n, int) for n in shape[2:]):
            raise UserError(f"pose.weights={path} is not a {role}: its input is {shape}, not (1, 3, height, width)")
        if len(found) != outputs:
            raise UserError(f"pose.weights={path} is not a {role}: it has {len(found)} outputs, not {outputs}")
        self.size = (shape[3], shape[2])
        self._input = inputs[0].name

    def __call__(self, values: np.ndarray) -> list[np.ndarray]:
        return self._session.run(None, {self._input: values})
