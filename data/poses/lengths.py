"""Lengths of people's body parts from 2D keypoints: over a clip, in one picture, and of one person in another's.

Seen from the side of a bone its length in the picture is its own, and it is shorter from elsewhere: of many frames the
longest count. One picture does not tell a short bone from a foreshortened one. The other side of the body does, the
rest of the limb, or frames of the other person in the same posture; what is left open is taken to be as people are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.cuts import shots
from data.poses.poses import local_lines

# Points beside the 17 keypoints: middles of hips, shoulders and ears.
HIPS, SHOULDERS, HEAD = 17, 18, 19
_MIDDLES = ([11, 12], [5, 6], [3, 4])
PARTS = ("trunk", "shoulders", "hips", "neck", "upper_arm", "forearm", "thigh", "shin", "head")
# Part, ends, length in standing heights: means of the training bodies of `assets/people`.
SEGMENTS = (
    ("trunk", HIPS, SHOULDERS, 0.296),
    ("shoulders", 5, 6, 0.186),
    ("hips", 11, 12, 0.111),
    ("neck", SHOULDERS, HEAD, 0.117),
    ("upper_arm", 5, 7, 0.158),
    ("upper_arm", 6, 8, 0.158),
    ("forearm", 7, 9, 0.144),
    ("forearm", 8, 10, 0.144),
    ("thigh", 11, 13, 0.231),
    ("thigh", 12, 14, 0.231),
    ("shin", 13, 15, 0.229),
    ("shin", 14, 16, 0.229),
    ("head", 3, 4, 0.086),
    ("head", 0, 3, 0.075),
    ("head", 0, 4, 0.075),
    ("head", 1, 3, 0.055),
    ("head", 2, 4, 0.055),
)
_PART = np.array([PARTS.index(part) for part, *_ in SEGMENTS])
_ENDS = np.array([ends for _, *ends, _ in SEGMENTS])
_LENGTHS = np.array([length for *_, length in SEGMENTS])
_BONES = _PART != PARTS.index("head")
# Shares of the standing height: above the ankles as the parts, of which the head goes up to the crown.
_UPRIGHT = {"shin": 0.228, "thigh": 0.230, "trunk": 0.296, "neck": 0.117, "head": 0.066}
_ANKLE = 0.063

LONGEST = 0.9  # quantile of a segment's lengths over a clip that is its length
LIKELY_SIZE = 0.75  # quantile of the sizes that a frame's segments speak for that is the body's
SIZE_WINDOW = 1.0  # seconds (standard deviation) over which bodies come nearer or go away
# Parts that are seldom foreshortened together, and the least that one is in the other.
_GROUPS = ((("thigh", "shin"), 0.9), (("upper_arm", "forearm"), 0.9), (("shoulders", "hips"), 0.75))
# Parts of which nothing tells whether they are turned away, by their share of the length in people of this build:
# below the first number they are taken to be turned and as usual, above the second to be short.
_TRUST = {"shoulders": (0.7, 1.0), "hips": (0.7, 1.0), "trunk": (0.4, 0.7), "neck": (0.4, 0.7)}
_TRUST |= {"thigh": (0.7, 1.0), "shin": (0.7, 1.0)}  # of legs of which one of the two is not seen
DOUBT = 0.9  # power of the lengths below the average that one picture is believed by
ALIKE = 0.04  # logarithm of a ratio that may as well be an error; greater ones are believed
UNLIKE = 0.008  # mean of 1 - cosine of the bones' turns at which two postures are no longer the same
GREATEST = 3.0  # ratio of two people's parts; what is beyond is an error
_TIE = 0.005  # weight of the whole body in the ratio of a part in the same posture, in that of a part seen in full


def with_middles(points: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints (f, 17, 2) and which are seen (f, 17), with `HIPS`, `SHOULDERS` and `HEAD` behind them.

    A middle is the mean of those of its pair that are seen, the head's without ears that of the face.
    """
    groups = (*_MIDDLES, [0, 1, 2])
    count = np.stack([seen[:, group].sum(1) for group in groups], 1)  # (f, 4)
    total = np.stack([(points[:, group] * seen[:, group, None]).sum(1) for group in groups], 1)
    middles = total / np.maximum(count, 1)[..., None]
    middles[:, 2] = np.where(count[:, 2, None] > 0, middles[:, 2], middles[:, 3])
    count[:, 2] += count[:, 3]
    return np.concatenate([points, middles[:, :3]], 1), np.concatenate([seen, count[:, :3] > 0], 1)


def unmeasured(lengths: np.ndarray) -> list[str]:
    """Names of the parts that none of `segment_lengths` (f, segments) is of."""
    return [name for p, name in enumerate(PARTS) if np.isnan(lengths[:, _PART == p]).all()]


def segment_lengths(points: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(f, segments) lengths of `SEGMENTS` in those of people one pixel tall; NaN where one is not seen.

    Of points (f, 20, 2) and `seen` (f, 20) with middles, which end segments if both of their pair are seen.
    """
    seen = seen.copy()
    for middle, pair in zip((HIPS, SHOULDERS, HEAD), _MIDDLES, strict=True):
        seen[:, middle] = seen[:, pair].all(1)
    lengths = np.linalg.norm(points[:, _ENDS[:, 1]] - points[:, _ENDS[:, 0]], axis=-1) / _LENGTHS
    return np.where(seen[:, _ENDS].all(-1) & (lengths > 0), lengths, np.nan)


def proportions(lengths: np.ndarray, fps: float = 1.0, cuts: Sequence[int] = ()) -> np.ndarray:
    """(parts,) lengths of `PARTS` in those of average people, in any unit, from `segment_lengths` (f, segments)."""
    whole = np.ones(len(SEGMENTS))
    for _ in range(2):  # sizes of average people, then of this body
        whole = _quantiles((lengths / _body_sizes(lengths / whole, fps, cuts)[:, None]).T, LONGEST)
        whole = np.where(np.isnan(whole), 1, whole)
    known = np.isfinite(lengths).any(0)
    part = np.array([max(whole[(_PART == p) & known], default=np.nan) for p in range(len(PARTS))])
    measured = np.isfinite(part)
    for names, least in _GROUPS:
        group = [PARTS.index(name) for name in names]
        part[group] = np.fmax(part[group], least * np.fmax.reduce(part[group]))
    part = np.where(np.isnan(part), 1, part)
    trunk, upper_arm, thigh, shin = (PARTS.index(name) for name in ("trunk", "upper_arm", "thigh", "shin"))
    build = max(part[trunk], part[upper_arm])
    whole_legs = measured[thigh] and measured[shin]
    for name, (nothing, everything) in _TRUST.items():
        index, usual = PARTS.index(name), 1.0 if name in ("trunk", "neck") else build
        short = part[index] / usual
        if short < 1 and not (index in (thigh, shin) and whole_legs):
            part[index] = usual * short ** np.clip((short - nothing) / (everything - nothing), 0, 1)
    return np.where(part < 1, part**DOUBT, part)


def standing(parts: np.ndarray) -> float:
    """Standing height of a body of (parts,) `proportions`, in the height of average people."""
    return _ANKLE + sum(share * parts[PARTS.index(name)] for name, share in _UPRIGHT.items())


def length_ratios(
    points: np.ndarray,
    seen: np.ndarray,
    own: np.ndarray,
    own_seen: np.ndarray,
    fps: float = 1.0,
    cuts: Sequence[int] = (),
) -> np.ndarray:
    """(parts,) lengths of the parts of `own` (20, 2) in those of `points` (f, 20, 2), both standing equally tall."""
    theirs, ours = segment_lengths(points, seen), segment_lengths(own[None], own_seen[None])
    body = proportions(theirs, fps, cuts)
    ratios = np.log(proportions(ours) / body)
    ratios -= np.median(ratios)  # sizes in the two pictures say nothing
    ratios *= ratios**2 / (ratios**2 + ALIKE**2)
    likeness = posture_likeness(points, seen, own, own_seen)
    frame = int(likeness.argmax())
    if likeness[frame] > 0:
        same = _same_posture(theirs[frame], ours[0])
        both = np.isfinite(same)
        ratios -= np.median(ratios[both])
        ratios[both] += likeness[frame] * (same[both] - np.median(same[both]) - ratios[both])
    ratios = np.exp(np.clip(ratios, -np.log(GREATEST), np.log(GREATEST)))
    return ratios * standing(body) / standing(body * ratios)


def posture_likeness(points: np.ndarray, seen: np.ndarray, own: np.ndarray, own_seen: np.ndarray) -> np.ndarray:
    """(f,) from 0 to 1: bones of `points` (f, 20, 2) point where those of `own` (20, 2) do, but for a common turn."""
    a, b = _ENDS[_BONES].T
    known = seen[:, a] & seen[:, b] & own_seen[a] & own_seen[b]
    u, v = (np.where(known, (p[..., b, :] - p[..., a, :]) @ [1, 1j], 0) for p in (points, own))
    u, v = (bones / np.maximum(np.linalg.norm(bones, axis=1, keepdims=True), 1e-9) for bones in (u, v))
    weights = np.minimum(abs(u), abs(v))
    turns = u.conj() * v / np.maximum(abs(u * v), 1e-12) * weights
    cosines = abs(turns.sum(1)) / np.maximum(weights.sum(1), 1e-9)
    return np.where(known.sum(1) >= 2 / 3 * _BONES.sum(), np.clip(1.25 - (1 - cosines) / UNLIKE, 0, 1), 0)


def _same_posture(theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """(parts,) logarithms of ours in theirs, of lengths (segments,) foreshortened alike; NaN if not in both."""
    known = np.isfinite(theirs) & np.isfinite(ours)
    theirs, ours = np.where(known, theirs, 1), np.where(known, ours, 1)
    weights, logs = known * theirs * ours, np.log(ours / theirs)
    weights = weights / weights.max() * _LENGTHS**2
    mean = np.average(logs, weights=weights)
    ties = _TIE * np.bincount(_PART, _LENGTHS**2)
    of_part = np.bincount(_PART, weights)
    return np.where(of_part > 0, (np.bincount(_PART, weights * logs) + ties * mean) / (of_part + ties), np.nan)


def _body_sizes(lengths: np.ndarray, fps: float, cuts: Sequence[int]) -> np.ndarray:
    """(f,) sizes that the longest bones of (f, segments) speak for, along lines over time; NaN without bones."""
    weights = np.isfinite(lengths[:, _BONES]) * _LENGTHS[_BONES]
    sizes = np.zeros(len(lengths))
    for f in np.flatnonzero(weights.any(1)):
        known = weights[f] > 0
        row = np.log(lengths[f, _BONES][known])
        sizes[f] = np.quantile(row, LIKELY_SIZE, weights=weights[f, known], method="inverted_cdf")
    bones = weights.sum(1)
    parts = [local_lines(sizes[s], bones[s], SIZE_WINDOW * fps) for s in shots(len(lengths), cuts)]
    return np.where(bones > 0, np.exp(np.concatenate(parts)), np.nan)


def _quantiles(rows: np.ndarray, share: float) -> np.ndarray:
    """(rows,) quantiles of the finite values of each row; NaN for none."""
    found = [row[np.isfinite(row)] for row in rows]
    return np.array([np.quantile(row, share) if len(row) else np.nan for row in found])
