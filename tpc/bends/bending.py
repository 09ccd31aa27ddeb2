"""How the parts of a person depart from its similarity over a clip, and which of them lie in front."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.cuts import shots
from tpc.bends.parts import (
    NAMES,
    OWN,
    fit_parts,
    settle,
    with_neck,
)
from tpc.config import CalibrationConfig
from tpc.procrustes import apply_matrix
from tpc.silhouettes import NOSE, TORSO, body_height
from tpc.trajectory import Track, filter_jitter

TURNED = "moves as a whole: the torso is turned further than parts can follow"
UNFOLDS = "moves as a whole: both legs are folded in the reference, which hides what they would show unfolded"


@dataclass(frozen=True)
class Pose:
    """A driving person as the bends see it, left and right as the reference's."""

    keypoints: np.ndarray  # (17, 2) original driving pixels
    seen: np.ndarray  # (17,) bool
    scores: np.ndarray  # (17,)
    mirrored: bool  # left and right were exchanged, one of the two being seen from behind
    matrix: np.ndarray  # (3, 3) the person's similarity in this frame alone
    outlined: bool = False  # there are masks, not drawn ones, of the person in the frame and in the reference


@dataclass(frozen=True)
class Bends:
    """How the parts of one person depart from its similarity over the clip."""

    matrices: np.ndarray  # (frames, parts, 3, 3) B, the identity where the person does not bend
    follows: np.ndarray  # (frames, parts) bool, parts that follow their parent for want of keypoints
    bent: np.ndarray  # (frames,) bool, False where the person moves by its similarity alone
    depth: np.ndarray  # (frames, parts), larger = nearer to the camera
    reasons: tuple[str | None, ...]  # why a person with a similarity does not bend
    outlined: np.ndarray  # (frames,) bool, see `Pose`
    height: float  # of the reference's body in pixels

    def straightened(self, reasons: dict[int, str]) -> "Bends":
        """The same without bends in some frames, with the reasons."""
        bent, matrices = self.bent.copy(), self.matrices.copy()
        bent[list(reasons)], matrices[list(reasons)] = False, np.eye(3)
        return replace(
            self, bent=bent, matrices=matrices, reasons=tuple(reasons.get(f, r) for f, r in enumerate(self.reasons))
        )


def bend(
    source: np.ndarray,
    seen: np.ndarray,
    poses: list[Pose | None],
    track: Track,
    config: CalibrationConfig,
    cuts: Sequence[int] = (),
) -> Bends:
    """Part maps of a person with keypoints (17, 2), seen (17,), whose poses in the frames are given, or unknown."""
    parts = [
        _bend_shot(source, seen, poses[shot], track.available[shot], track.matrices[shot], config)
        for shot in shots(len(poses), cuts)
    ]
    values = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    reasons, height = sum(values.pop("reasons"), ()), values.pop("height")[0]
    return Bends(**{name: np.concatenate(part) for name, part in values.items()}, reasons=reasons, height=height)


def _bend_shot(
    source: np.ndarray,
    seen: np.ndarray,
    poses: list[Pose | None],
    available: np.ndarray,
    similarities: np.ndarray,
    config: CalibrationConfig,
) -> Bends:
    frames, height = len(poses), body_height(source, seen)
    bent = available & (height > 0) & np.isfinite(config.bend_radius)
    known = [int(f) for f in np.flatnonzero(bent) if poses[f] is not None]
    if not known:
        return still(frames)
    reference, reference_seen = with_neck(source, seen)
    matrices, own = still(frames).matrices, np.zeros((frames, len(NAMES)), bool)
    depth = np.zeros((frames, len(NAMES)))
    target, both, scores, mirrored, whole = (
        np.stack([getattr(poses[f], name) for f in known])
        for name in ("keypoints", "seen", "scores", "mirrored", "matrix")
    )
    both = both & seen
    # Fitted against the frame's own similarity: one that is averaged over time is late where the person moves quickly.
    target, both = with_neck(apply_matrix(np.linalg.inv(whole), np.where(both[..., None], target, 0.0)), both)
    matrices[known], own[known], mirrors, unfolds = fit_parts(reference, target, both, height, config.bend_radius)
    own_similarity = np.linalg.inv(similarities[known]) @ whole
    matrices[known] = np.where(own[known][..., None, None], own_similarity[:, None] @ matrices[known], np.eye(3))
    depth[known] = painting_depth(target, both, scores, mirrored, height)
    # Where thighs are not seen, as when they were last.
    told = np.maximum.accumulate(np.where(unfolds >= 0, np.arange(len(known)), -1))
    reasons = {known[i]: UNFOLDS for i in np.flatnonzero((told >= 0) & (unfolds[told] == 1))}
    reasons |= {known[i]: TURNED for i in np.flatnonzero(mirrors)}
    bent[list(reasons)] = False
    matrices, follows = settle(matrices, own & bent[:, None], bent, reference, height, config)
    for f in np.flatnonzero(bent & follows.all(1)):
        bent[f], reasons[int(f)] = False, "moves as a whole: no part has keypoints of its own in both images"
    posed = np.isin(np.arange(frames), known)
    depth = filter_jitter(depth, depth[:, :0], posed, config.smoothing)
    # Frames between known ones are painted as the known one before them.
    depth = depth[np.maximum.accumulate(np.where(posed, np.arange(frames), known[0]))]
    outlined = np.array([pose is not None and pose.outlined for pose in poses])
    reasons = tuple(reasons.get(f) for f in range(frames))
    return Bends(matrices, follows, bent, depth, reasons, outlined & bent, height)


def still(frames: int) -> Bends:
    """Nobody bends."""
    shape = frames, len(NAMES)
    eyes, no = np.tile(np.eye(3), (*shape, 1, 1)), np.zeros(shape, bool)
    return Bends(eyes, no, no[:, 0], np.zeros(shape), (None,) * frames, no[:, 0], 0.0)


def painting_depth(
    points: np.ndarray, seen: np.ndarray, scores: np.ndarray, mirrored: np.ndarray, height: float
) -> np.ndarray:
    """(frames, parts) larger = nearer to the camera, from where keypoints (frames, 18, 2) with scores are.

    From the front arms and thighs lie before the torso, from behind the torso hides them; of somebody seen from the
    side the near limbs lie before and the far ones behind; of two legs the one that stands lower is nearer; and a limb
    whose end the estimator believes hidden lies behind.
    """
    front, down = facing_of(points, seen)
    front = np.where(mirrored, -front, front)
    right = np.stack([down[:, 1], -down[:, 0]], -1)  # of the image, were the person upright
    face = np.where(seen[:, 1:5, None], points[:, 1:5], 0).sum(1) / np.maximum(seen[:, 1:5].sum(1), 1)[:, None]
    look = ((points[:, NOSE] - face) * right).sum(1) * (seen[:, NOSE] & seen[:, 1:5].any(1)) / (0.03 * height)
    # Who looks to the right of the image has the right side nearer.
    near = np.clip(look, -1, 1) * np.sqrt(1 - np.minimum(front**2, 1)) * np.where(mirrored, 1, -1)
    lower = ((points[:, 15] - points[:, 16]) * down).sum(1) * (seen[:, 15] & seen[:, 16]) / (0.1 * height)
    depth = np.zeros((len(points), len(NAMES)))
    best = np.maximum(scores.max(1), 1e-6)
    levels = {"upper_arm": 0.5, "forearm": 1.0, "hand": 1.0, "thigh": 0.2, "shin": 0.1, "foot": 0.1}
    for p, name in enumerate(NAMES):
        side, _, kind = name.partition("_")
        if kind not in levels:
            depth[:, p] = 0.3 if name == "head" else 0.0
            continue
        sign = 1 if side == "left" else -1
        hidden = 1 - scores[:, OWN[p][-1]] / best
        depth[:, p] = levels[kind] * np.sign(front) + 2 * sign * near - 3 * hidden * seen[:, OWN[p][-1]]
        if kind in ("thigh", "shin", "foot"):
            depth[:, p] += 0.04 * sign * np.clip(lower, -1, 1)
    return depth


def facing_of(points: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(frames,) +1 from the front to -1 from behind, and (frames, 2) unit vectors down the torso; (0, 1) if unseen."""
    whole = seen[:, list(TORSO)].all(1)
    down = (points[:, 11] + points[:, 12] - points[:, 5] - points[:, 6]) / 2
    across = (points[:, 5] + points[:, 11] - points[:, 6] - points[:, 12]) / 2
    length = np.linalg.norm(down, axis=1)
    whole &= length > 1e-9
    down = np.where(whole[:, None], down / np.maximum(length, 1e-9)[:, None], [0.0, 1.0])
    width = across[:, 0] * down[:, 1] - across[:, 1] * down[:, 0]
    front = np.where(whole, width / np.maximum(length, 1e-9) * 0.29 / 0.175, 1.0)
    return np.clip(front, -1, 1), down
