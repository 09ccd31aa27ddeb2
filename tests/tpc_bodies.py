"""Articulated stick bodies with exact keypoints, for the tests of `tpc`."""

import numpy as np

from data.poses.poses import Poses
from tpc import CalibrationConfig, SimilarityTransform
from tpc.procrustes import apply_matrix
from tpc.silhouettes import draw_silhouette

EVERY_POINT = np.ones(17, bool)

SIZE = (128, 128)
TORSO = CalibrationConfig(keypoints="trunk", smoothing=0.0)


def body(rng: np.random.Generator, spread: float = 0.6) -> np.ndarray:
    """(17, 2) keypoints of a standing person of height 1, seen from the front, with random limbs."""
    points = np.zeros((17, 2))
    lean = rng.normal(0, 0.1)
    points[11], points[12] = (0.065, 0), (-0.065, 0)
    shoulders = _turned((0, -0.29), lean)
    points[5], points[6] = shoulders + (0.11, 0), shoulders - (0.11, 0)
    head = shoulders + _turned((0, -0.12), lean + rng.normal(0, 0.15))
    offsets = [(0, 0.01), (0.018, -0.01), (-0.018, -0.01), (0.042, 0), (-0.042, 0)]
    points[:5] = head + np.array(offsets)
    for joints, lengths in (((5, 7, 9), (0.17, 0.15)), ((6, 8, 10), (0.17, 0.15))):
        _limb(points, rng, joints, lengths, spread)
    for joints, lengths in (((11, 13, 15), (0.245, 0.245)), ((12, 14, 16), (0.245, 0.245))):
        _limb(points, rng, joints, lengths, spread / 3)
    return points


def _turned(vector: tuple[float, float], angle: float) -> np.ndarray:
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([cosine * vector[0] - sine * vector[1], sine * vector[0] + cosine * vector[1]])


def _limb(points, rng, joints, lengths, spread) -> None:
    side = 1 if joints[0] % 2 else -1
    angle = -side * abs(rng.normal(0.2, spread))
    points[joints[1]] = points[joints[0]] + _turned((0, lengths[0] * rng.uniform(0.8, 1)), angle)
    angle += rng.normal(0, spread)
    points[joints[2]] = points[joints[1]] + _turned((0, lengths[1] * rng.uniform(0.8, 1)), angle)


def place(points: np.ndarray, height: float, angle: float = 0.0, centre: tuple[float, float] = (64, 64)) -> np.ndarray:
    """Resize to a body height in pixels, turn about the middle, and move the middle to `centre`."""
    cosine, sine = height * np.cos(angle), height * np.sin(angle)
    return (points - points.mean(0)) @ np.array([[cosine, sine], [-sine, cosine]]) + centre


def silhouette(points: np.ndarray, size: tuple[int, int] = (128, 128)) -> np.ndarray:
    """(h, w) bool outline around all keypoints."""
    return draw_silhouette(points, EVERY_POINT, size)


def poses(keypoints: np.ndarray, size: tuple[int, int] = (128, 128), scores: np.ndarray | None = None) -> Poses:
    """Keypoints (frames, persons, 17, 2) with full scores as `Poses`."""
    keypoints = np.asarray(keypoints, np.float32)
    if scores is None:
        scores = np.ones(keypoints.shape[:3], np.float32)
    return Poses(keypoints, np.asarray(scores, np.float32), size, 25.0)


def image(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)


def reference(seed: int = 0) -> np.ndarray:
    return place(body(np.random.default_rng(seed)), 80, 2.0)


def bodies(count: int, height: float = 60.0) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [place(body(rng), height, 0, (40 + 60 * i, 64)) for i in range(count)]


def walk(points: np.ndarray, frames: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """A rigid body that grows, turns and moves: keypoints (frames, 17, 2) and the true matrices from `points`."""
    middle = points.mean(0)
    truth = []
    for frame in range(frames):
        share = frame / max(frames - 1, 1)
        scale, angle = 0.7 + 0.5 * share, 0.6 * share
        turned = SimilarityTransform(np.float64(scale), np.float64(angle), np.zeros(2))
        truth.append(SimilarityTransform(turned.scale, turned.rotation, (64 + 8 * share, 66) - turned(middle)).matrix)
    return np.stack([apply_matrix(matrix, points) for matrix in truth]), np.stack(truth)
