"""Where in an image to look for persons: BlazePose's detector over rotations and tiles.

The detector is trained on upright people who fill a good part of the image. Turning the image finds those who lie,
bend or stand on their heads; tiles find small ones. What many rotations agree on is seldom wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np

from data.poses.blazepose_networks import DETECTOR_SIDE, DetectorNet, Roi

_ALL_ROTATIONS = tuple(math.radians(30 * step) for step in range(12))


@dataclass(frozen=True)
class SearchPlan:
    """How thoroughly to search.

    Attributes:
        rotations: radians, clockwise, of the persons to look for.
        least_confidence: of a person who is accepted: the detector's evidence times the landmarks' confidence. Twelve
            rotations that must agree leave few false alarms, so they may ask for less than a single one.
        tile_rotations: the same for overlapping tiles of half the size, which are searched when too few persons are
            found in the whole image; none where that is not worth the time.
    """

    rotations: tuple[float, ...]
    least_confidence: float
    tile_rotations: tuple[float, ...] = ()


UPRIGHT = SearchPlan(rotations=(0.0,), least_confidence=0.25)
TURNED = SearchPlan(rotations=_ALL_ROTATIONS, least_confidence=0.1)
THOROUGH = SearchPlan(rotations=_ALL_ROTATIONS, least_confidence=0.1, tile_rotations=_ALL_ROTATIONS[::2])


@dataclass(frozen=True)
class Candidate:
    """A region that may show a person; `evidence` in [0, 1] is the detector's mean score over the rotations."""

    roi: Roi
    evidence: float


@dataclass(frozen=True)
class _Hit:
    roi: Roi
    score: float
    rotation: int


def find_candidates(
    detector: DetectorNet, image: np.ndarray, rotations: tuple[float, ...], tiled: bool
) -> list[Candidate]:
    """Regions of the image (h, w, 3) where the detector finds persons, best supported first.

    Args:
        tiled: look at overlapping tiles of half the image's longer side, not at the whole image.
    """
    height, width = image.shape[:2]
    # Turned by 45 degrees the crop's side is the diagonal; this size keeps it below twice what the detector takes.
    scale = min(1.0, (2 if tiled else 1) * math.sqrt(2) * DETECTOR_SIDE / max(height, width))
    small_size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = image if scale == 1 else cv2.resize(image, small_size, interpolation=cv2.INTER_AREA)
    factors = (width / small_size[0], height / small_size[1])
    hits = []
    for left, top, tile in _tiles(small) if tiled else [(0, 0, small)]:
        for number, rotation in enumerate(rotations):
            for found in detector(tile, rotation):
                roi = replace(
                    found.roi,
                    x=(found.roi.x + left) * factors[0],
                    y=(found.roi.y + top) * factors[1],
                    side=found.roi.side * max(factors),
                )
                hits.append(_Hit(roi, found.score, number))
    return _agreeing(hits, len(rotations))


def _tiles(image: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Squares of half the longer side that overlap by half, with the (left, top) of each."""
    height, width = image.shape[:2]
    side = math.ceil(max(height, width) / 2)
    steps = [sorted({round(p) for p in np.linspace(0, n - side, 3)}) if n > side else [0] for n in (width, height)]
    return [(left, top, image[top : top + side, left : left + side]) for top in steps[1] for left in steps[0]]


def _agreeing(hits: list[_Hit], rotations: int) -> list[Candidate]:
    """Candidates from hits that agree; a rotation counts once, with its best score, however many tiles hit."""
    candidates = []
    waiting = sorted(hits, key=lambda hit: -hit.score)
    while waiting:
        best = waiting[0].roi
        agreeing = [hit for hit in waiting if _alike(best, hit.roi)]
        scores = {hit.rotation: hit.score for hit in reversed(agreeing)}
        candidates.append(Candidate(_mean_roi(agreeing), sum(scores.values()) / rotations))
        waiting = [hit for hit in waiting if hit not in agreeing]
    return sorted(candidates, key=lambda candidate: -candidate.evidence)


def _mean_roi(hits: list[_Hit]) -> Roi:
    """Score-weighted mean of regions that are turned alike; sides are averaged as ratios, angles as directions."""
    weights = np.array([hit.score for hit in hits])
    places = np.array([(hit.roi.x, hit.roi.y, math.log(hit.roi.side)) for hit in hits])
    x, y, log_side = (weights @ places / weights.sum()).tolist()
    directions = np.exp(1j * np.array([hit.roi.rotation for hit in hits]))
    return Roi(x, y, math.exp(log_side), float(np.angle(weights @ directions)))


def _alike(a: Roi, b: Roi) -> bool:
    """Whether two regions overlap closely and are turned alike."""
    turn = math.remainder(a.rotation - b.rotation, 2 * math.pi)
    distance = math.hypot(a.x - b.x, a.y - b.y)
    return abs(turn) < math.pi / 4 and distance < 0.2 * max(a.side, b.side) and 0.5 < b.side / a.side < 2
