"""Face identity: the cosine of two faces' embeddings by a network that the user brings as an ONNX file.

Faces are aligned as for ArcFace (Deng et al., CVPR 2019): a similarity takes eyes and nose to ArcFace's places in a
picture of 112 x 112. Its other two points, the corners of the mouth, are no COCO keypoints, and ears are none of its.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from core.errors import UserError
from core.onnx import open_onnx
from metrics.weights import digest

SIDE = 112
NOSE_AND_EYES = [0, 1, 2]  # COCO: nose, left eye, right eye
PLACES = np.array([[56.0252, 71.7366], [73.5318, 51.5014], [38.2946, 51.6963]])  # of them in ArcFace's picture
SMALLEST = 8.0  # pixels between the eyes of a true face that can be told from another; ArcFace's picture has 35


def face_matrix(keypoints: np.ndarray, scores: np.ndarray, threshold: float = 0.3) -> np.ndarray | None:
    """Similarity (2, 3) from the image to ArcFace's picture, from keypoints (17, 2) and scores (17,) in COCO order.

    None without a face: a point is not visible, the head is seen from behind (the eyes are exchanged), or turned so
    far that the nose is not between the eyes.
    """
    if not (scores[NOSE_AND_EYES] > threshold).all():
        return None
    nose, left, right = keypoints[NOSE_AND_EYES].astype(np.float64)
    across, down = left - right, nose - right
    along = across @ down
    if across[0] * down[1] - across[1] * down[0] <= 0 or not 0 < along < across @ across:
        return None
    source, target = (points @ [1, 1j] for points in (keypoints[NOSE_AND_EYES].astype(np.float64), PLACES))
    centred = source - source.mean()
    turn = np.vdot(centred, target - target.mean()) / np.vdot(centred, centred).real  # least squares
    shift = target.mean() - turn * source.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


class FaceNetwork:
    """An embedding of aligned faces: one input (1, 3, 112, 112), RGB in [-1, 1], one output (1, dimension)."""

    def __init__(self, path: str | Path):
        session = open_onnx(path, "face")
        inputs, outputs = session.get_inputs(), session.get_outputs()
        shape, found = inputs[0].shape, outputs[0].shape
        wanted = (1, 3, SIDE, SIDE)
        fits = len(shape) == 4 and all(not isinstance(n, int) or n == w for n, w in zip(shape, wanted, strict=True))
        if len(inputs) != 1 or not fits or inputs[0].type != "tensor(float)":
            raise UserError(
                f"face={path} takes {inputs[0].type} {shape}; an embedding of faces has one input of floats {wanted}"
            )
        if len(outputs) != 1 or len(found) != 2:
            raise UserError(
                f"face={path} gives {[o.shape for o in outputs]}; an embedding has one output (1, dimension)"
            )
        self._path, self._session, self._input = path, session, inputs[0].name
        self.network = f"ONNX embedding {Path(path).name} of faces aligned to {SIDE} x {SIDE}; the user's file"
        self.sha256 = digest(Path(path))

    def __call__(self, image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """The embedding (dimension,), of unit length, of the face in an image (h, w, 3) uint8; see `face_matrix`."""
        face = cv2.warpAffine(image, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR)
        values = ((face.astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1)[None]
        (embedding,) = self._session.run(None, {self._input: values})[0].astype(np.float64)
        length = np.linalg.norm(embedding)
        if not (np.isfinite(length) and length > 0):
            raise UserError(f"face={self._path} gave an embedding of length {length:g}; the file may be damaged")
        return embedding / length

    def similarity(
        self,
        generated: tuple[np.ndarray, np.ndarray, np.ndarray],
        truth: tuple[np.ndarray, np.ndarray, np.ndarray],
        threshold: float = 0.3,
    ) -> float:
        """Cosine of the faces in two images, each with its keypoints and scores; higher is more alike.

        NaN where the truth shows no face of `SMALLEST` pixels; 0, as of strangers, where only the generated has none.
        """
        matrices = [face_matrix(keypoints, scores, threshold) for _, keypoints, scores in (generated, truth)]
        eyes = truth[1][NOSE_AND_EYES[1:]].astype(np.float64)
        if matrices[1] is None or np.linalg.norm(eyes[0] - eyes[1]) < SMALLEST:
            return float("nan")
        if matrices[0] is None:
            return 0.0
        ours, theirs = (self(side[0], m) for side, m in zip((generated, truth), matrices, strict=True))
        return float(ours @ theirs)
