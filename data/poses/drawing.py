"""Pose images: the OpenPose body-18 figure that pose-driven animators take as input."""

import colorsys

import cv2
import numpy as np

# OpenPose body-18 order, as indices into the COCO order with the neck appended at index 17.
BODY_FROM_COCO = np.array([0, 17, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3])

# Pairs of body-18 joints, in drawing order: shoulders, arms, trunk and legs, neck to nose, face.
_LIMBS = np.array(
    [(1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)]
    + [(1, 0), (0, 14), (14, 16), (0, 15), (15, 17)]
)

# Eighteen steps of 20 degrees around the hue wheel.
_COLOURS = [tuple(int(255 * value) for value in colorsys.hsv_to_rgb(step / 18, 1, 1)) for step in range(18)]
_LIMB_COLOURS = [tuple(int(value * 0.6) for value in colour) for colour in _COLOURS]

_HALF_WIDTH_AT_512 = 4.0  # pixels: half the limb's width and the joint's radius in an image whose short side is 512
_SHIFT = 4  # fractional bits of the coordinates given to OpenCV
_EDGE = 0.5  # pixels by which OpenCV's anti-aliased edge lies outside the outline it is given
_CIRCLE = np.stack([f(np.linspace(0, 2 * np.pi, 24, endpoint=False)) for f in (np.cos, np.sin)])


def draw_pose(keypoints: np.ndarray, scores: np.ndarray, size: tuple[int, int], threshold: float = 0.3) -> np.ndarray:
    """OpenPose body-18 image (height, width, 3) uint8 RGB of all persons, on black, anti-aliased.

    Keypoints (persons, 17, 2) with scores (persons, 17) at or below `threshold` are not drawn.
    """
    width, height = size
    factor = max(1, min(4, 512 // min(size)))  # limbs of a pixel or two are drawn larger and averaged
    image = np.zeros((height * factor, width * factor, 3), np.uint8)
    joints, visible = body_joints(keypoints, scores, threshold)
    joints = (joints + 0.5) * factor - 0.5  # pixel centres at integers, edges to edges
    # Limbs are filled ellipses, joints filled circles.
    half_width = _HALF_WIDTH_AT_512 * min(size) / 512 * factor
    _draw_limbs(image, joints, visible, half_width)
    _draw_joints(image, joints, visible, half_width)
    return image if factor == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def draw_thin_pose(
    keypoints: np.ndarray, scores: np.ndarray, size: tuple[int, int], threshold: float = 0.5
) -> np.ndarray:
    """The same figure as Wan-Animate is shown it: lines of a few pixels on whole pixels, without soft edges."""
    # Wan-Video/Wan2.2, `wan/modules/animate/preprocess/human_visualization.py`; it draws hands and toes as well.
    image = np.zeros((size[1], size[0], 3), np.uint8)
    joints, visible = body_joints(keypoints, scores, threshold)
    half_width = max(min(size) // 200 - 1, 1)
    for person, seen in zip(np.clip(joints, -(2.0**20), 2.0**20), visible, strict=True):
        for (start, end), colour in zip(_LIMBS, _LIMB_COLOURS, strict=False):
            if seen[start] and seen[end]:
                along = person[start] - person[end]
                angle = int(np.degrees(np.arctan2(along[1], along[0])))
                centre = tuple(int(value) for value in (person[start] + person[end]) / 2)
                outline = cv2.ellipse2Poly(centre, (int(np.hypot(*along) / 2), half_width), angle, 0, 360, 1)
                cv2.fillConvexPoly(image, outline, colour)
        for joint in np.flatnonzero(seen):
            cv2.circle(image, tuple(int(value) for value in person[joint]), half_width, _COLOURS[joint], cv2.FILLED)
    return image


def body_joints(keypoints: np.ndarray, scores: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """COCO-17 to OpenPose body-18: joints (persons, 18, 2), and bool (persons, 18) of those that are drawn."""
    keypoints, scores = np.asarray(keypoints, np.float64), np.asarray(scores)
    if keypoints.ndim != 3 or keypoints.shape[1:] != (17, 2) or scores.shape != keypoints.shape[:2]:
        raise ValueError(
            f"keypoints and scores must have shapes (persons, 17, 2) and (persons, 17), "
            f"got {keypoints.shape} and {scores.shape}"
        )
    visible = (scores > threshold) & np.isfinite(keypoints).all(axis=-1)
    keypoints = np.where(visible[..., None], keypoints, 0.0)
    # The neck is the mean of the shoulders, and drawn when both are.
    neck = keypoints[:, 5:7].mean(axis=1, keepdims=True)
    joints = np.concatenate([keypoints, neck], axis=1)[:, BODY_FROM_COCO]
    visible = np.concatenate([visible, visible[:, 5:7].all(axis=1, keepdims=True)], axis=1)[:, BODY_FROM_COCO]
    return joints, visible


# What models read -> what draws it of keypoints, scores and a size.
FIGURES = {"OpenPose": draw_pose, "Wan-Animate": draw_thin_pose}


def _draw_limbs(image: np.ndarray, joints: np.ndarray, visible: np.ndarray, half_width: float) -> None:
    half_width = max(half_width - _EDGE, 0.0)
    start, end = joints[:, _LIMBS[:, 0]], joints[:, _LIMBS[:, 1]]  # (persons, limbs, 2)
    drawn = visible[:, _LIMBS[:, 0]] & visible[:, _LIMBS[:, 1]]
    along = (end - start) / 2
    length = np.linalg.norm(along, axis=-1, keepdims=True)
    across = np.stack([-along[..., 1], along[..., 0]], axis=-1) * (half_width / np.maximum(length, 1e-6))
    outline = along[..., None, :] * _CIRCLE[0][:, None] + across[..., None, :] * _CIRCLE[1][:, None]
    outline = _fixed_point((start + along)[..., None, :] + outline)
    # Limb by limb, then person by person: where two persons cross, their arms lie over both trunks or under both.
    for limb, person in np.argwhere(drawn.T):
        cv2.fillConvexPoly(image, outline[person, limb], _LIMB_COLOURS[limb], cv2.LINE_AA, _SHIFT)


def _draw_joints(image: np.ndarray, joints: np.ndarray, visible: np.ndarray, radius: float) -> None:
    centres = _fixed_point(joints).tolist()
    fixed_radius = max(1, round((radius - _EDGE) * 2**_SHIFT))
    for joint, person in np.argwhere(visible.T):
        cv2.circle(image, centres[person][joint], fixed_radius, _COLOURS[joint], cv2.FILLED, cv2.LINE_AA, _SHIFT)


def _fixed_point(points: np.ndarray) -> np.ndarray:
    # Points far outside would overflow OpenCV's 32-bit coordinates; 2^20 pixels leaves the direction of a limb intact.
    return np.rint(np.clip(points, -(2.0**20), 2.0**20) * 2**_SHIFT).astype(np.int32)
