"""Pictures of a person's face, cut out of a video by the keypoints of the head.

Where Wan-Animate's preprocessing (Wan-Video/Wan2.2, `wan/modules/animate/preprocess`) has the box of 68 points of the
face, there is the square that they fill on average: so many distances of the eyes wide, about the nose.
"""

from collections.abc import Iterable

import cv2
import numpy as np

from data.poses.poses import Poses

HEAD = slice(0, 5)  # nose, eyes and ears in the order of COCO
FACE_WIDTH = 2.2  # of the 68 points from ear to ear, and from the brows to the chin, in distances of the eyes
# Largest distances of two of these points in the picture, from whichever side, in distances of the eyes.
DISTANCES = {(1, 2): 1.0, (3, 4): 2.3, (0, 1): 0.95, (0, 2): 0.95, (1, 3): 1.3, (2, 4): 1.3}
LARGER = 1.3  # the area of the picture, that of the box of the points being 1
ABOVE = 3 / 4  # of what is added to the height
THRESHOLD = 0.3  # score of a keypoint that counts


def face_boxes(poses: Poses) -> np.ndarray | None:
    """(frames, 4) int: left, top, right and bottom of the face of the person whose head is seen best.

    Frames in which it is not seen have the box of the nearest that has one; None where none has.
    """
    if not poses.persons:
        return None
    person = int(poses.scores[:, :, HEAD].sum((0, 2)).argmax())
    boxes = [_box(*frame) for frame in zip(poses.keypoints[:, person], poses.scores[:, person], strict=True)]
    known = np.array([frame for frame, box in enumerate(boxes) if box is not None])
    if not len(known):
        return None
    nearest = [known[np.abs(known - frame).argmin()] for frame in range(len(boxes))]
    found = np.array([boxes[frame] for frame in nearest])
    limits = np.tile(poses.size, 2)
    clipped = np.clip(found, 0, limits).astype(int)
    # A head outside the picture leaves a row of pixels, not none.
    clipped[:, :2] = np.minimum(clipped[:, :2], limits[:2] - 1)
    clipped[:, 2:] = np.maximum(clipped[:, 2:], clipped[:, :2] + 1)
    return clipped


def crop_faces(frames: Iterable[np.ndarray], poses: Poses, side: int) -> np.ndarray | None:
    """(f, side, side, 3) uint8: the face in each frame (H, W, 3), stretched to a square; None: no head is seen."""
    boxes = face_boxes(poses)
    if boxes is None:
        return None
    crops = (frame[top:bottom, left:right] for frame, (left, top, right, bottom) in zip(frames, boxes, strict=True))
    return np.stack([cv2.resize(crop, (side, side)) for crop in crops])


def _box(keypoints: np.ndarray, scores: np.ndarray) -> np.ndarray | None:
    """Left, top, right and bottom of keypoints (17, 2), outside the picture too; None: too little is seen."""
    head, seen = keypoints[HEAD].astype(np.float64), scores[HEAD] > THRESHOLD
    pairs = [(i, j) for i, j in DISTANCES if seen[i] and seen[j]]
    eyes = max((np.linalg.norm(head[i] - head[j]) / DISTANCES[i, j] for i, j in pairs), default=0.0)
    if eyes == 0:
        return None
    x = (head[seen, 0].min() + head[seen, 0].max()) / 2  # of a face from the side the nose is at its edge
    y = head[0, 1] if seen[0] else head[seen, 1].mean()
    half = FACE_WIDTH * eyes / 2
    added = half * (LARGER**0.5 - 1)
    above, below = 2 * added * ABOVE, 2 * added * (1 - ABOVE)
    return np.array([x - half - added, y - half - above, x + half + added, y + half + below])
