"""BlazePose as a pose estimator: several persons, turned persons, tracking through a video, person masks.

The detector is trained on upright people who fill a good part of the image. Turning the image finds those who lie,
bend or stand on their heads; tiles find small ones. What many rotations agree on is seldom wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np

from data.poses.blazepose_networks import (
    COCO_FROM_BLAZEPOSE,
    DETECTOR_SIDE,
    Detection,
    DetectorNet,
    LandmarkNet,
    Landmarks,
    Roi,
)
from data.poses.person import (
    COCO_SIGMAS,
    PersonEstimate,
    assign_slots,
    by_prominence,
    distinct_persons,
    is_same_person,
    scores_inside,
)
from data.poses.weights import DETECTOR, FULL_LANDMARKS, HEAVY_LANDMARKS, model_path

_LEAST_PERSON = 0.5  # below this the landmark network says that the region shows no person
# Turns (radians) and scales of the region in the passes over a still, whose mean halves the noise.
_STILL_PASSES = ((0.0, 1.0), (-0.15, 1.0), (0.15, 1.0), (-0.3, 1.0), (0.3, 1.0), (0.0, 0.9), (0.0, 1.1))
_SHARPNESS = (0.2, 0.6)  # of a heatmap's peak: worth nothing, worth full trust
_AREA_ROOT = 0.35  # root of a person's area in units of the side of the region around them, for COCO's keypoint scale
_ALL_ROTATIONS = tuple(math.radians(30 * step) for step in range(12))


@dataclass(frozen=True)
class SearchPlan:
    """Thoroughness of a search for persons; rotations are those of the persons, radians clockwise."""

    rotations: tuple[float, ...]
    # Of the detector's evidence times the landmarks' confidence. Twelve rotations that must agree leave few false
    # alarms, so they may ask for less than a single one.
    least_confidence: float
    # Of overlapping tiles of half the size, searched when the whole image shows too few persons; none to save time.
    tile_rotations: tuple[float, ...] = ()


UPRIGHT = SearchPlan(rotations=(0.0,), least_confidence=0.25)
TURNED = SearchPlan(rotations=_ALL_ROTATIONS, least_confidence=0.1)
THOROUGH = SearchPlan(rotations=_ALL_ROTATIONS, least_confidence=0.1, tile_rotations=_ALL_ROTATIONS[::2])


@dataclass(frozen=True, eq=False)
class _Person(PersonEstimate):
    """A person in one frame, and where to search for them next."""

    probability: np.ndarray  # (h, w) soft mask in [0, 1]
    next_roi: Roi


class BlazePose:
    """Pose estimator with the published BlazePose networks on the CPU."""

    def __init__(self, heavy: bool = False, threads: int = 2):
        self._detector = DetectorNet(model_path(DETECTOR), threads)
        # The heavy network is about three times slower and less noisy than the full one.
        self._landmarks = LandmarkNet(model_path(HEAVY_LANDMARKS if heavy else FULL_LANDMARKS), threads)

    def image(self, image: np.ndarray, max_persons: int = 1) -> list[PersonEstimate]:
        """Persons in a still (h, w, 3) uint8 RGB, at whatever angle they are, the most prominent first."""
        found = self._search(image, THOROUGH, max_persons)
        return _with_exclusive_masks([self._refine(image, person) for person in found])

    def video(self, frames: Iterable[np.ndarray], max_persons: int = 1) -> Iterator[list[PersonEstimate | None]]:
        """Persons in each frame, in `max_persons` fixed slots, None for those who are not visible."""
        persons: list[_Person | None] = [None] * max_persons
        last_seen = persons
        for index, frame in enumerate(frames):
            followed = [person and self._track(frame, person.next_roi) for person in persons]
            distinct = distinct_persons([person for person in followed if person is not None])
            followed = [person if person in distinct else None for person in followed]
            if None in followed:
                # Searched at all rotations when a person has just been lost and in every tenth frame, else upright.
                just_lost = followed.count(None) > persons.count(None)
                plan = UPRIGHT
                if just_lost or index % 10 == 0:
                    plan = TURNED if any(followed) else THOROUGH
                followed = self._fill_slots(frame, plan, followed, last_seen)
            persons = followed
            last_seen = [now or before for now, before in zip(persons, last_seen, strict=True)]
            exclusive = iter(_with_exclusive_masks([person for person in persons if person is not None]))
            yield [person and next(exclusive) for person in persons]

    def _fill_slots(
        self, frame: np.ndarray, plan: SearchPlan, persons: list[_Person | None], last_seen: list[_Person | None]
    ) -> list[_Person | None]:
        """`persons` with the empty slots filled by those whom a search of the frame finds beside the others."""
        present = [person for person in persons if person is not None]
        found = self._search(frame, plan, len(persons))
        new = [person for person in found if not any(is_same_person(person, other) for other in present)]
        empty = [slot for slot, person in enumerate(persons) if person is None]
        filled = list(persons)
        for slot, person in zip(empty, assign_slots([last_seen[slot] for slot in empty], new), strict=True):
            filled[slot] = person
        return filled

    def _search(self, image: np.ndarray, plan: SearchPlan, max_persons: int) -> list[_Person]:
        """Distinct persons that a search of the image finds, the most prominent first."""
        persons: list[_Person] = []
        for rotations, tiled in ((plan.rotations, False), (plan.tile_rotations, True)):
            if len(persons) >= max_persons or not rotations:
                break
            found = []
            for candidate in find_candidates(self._detector, image, rotations, tiled)[: 2 * max_persons + 2]:
                person = self._settle(image, candidate.roi)
                # A tile that shows a vase as large as a person asks for surer landmarks.
                if person is None or (tiled and person.confidence < 0.5):
                    continue
                if person.confidence * candidate.score >= plan.least_confidence:
                    found.append(replace(person, confidence=person.confidence * candidate.score))
            # Those visible in the whole image are placed better there than in a tile that may cut them.
            known = list(persons)
            persons += [p for p in distinct_persons(found) if not any(is_same_person(p, other) for other in known)]
        return by_prominence(persons, image.shape[1::-1])[:max_persons]

    def _settle(self, image: np.ndarray, roi: Roi) -> _Person | None:
        person = self._track(image, roi)
        # A region from the detector is rough: each pass centres, turns and scales it better.
        for _ in range(2):
            person = person and self._track(image, person.next_roi)
        return person

    def _track(self, image: np.ndarray, roi: Roi) -> _Person | None:
        landmarks = self._landmarks(image, roi)
        return _person([landmarks], image.shape[1::-1]) if landmarks.person >= _LEAST_PERSON else None

    def _refine(self, image: np.ndarray, person: _Person) -> _Person:
        roi = person.next_roi
        passes = [
            self._landmarks(image, replace(roi, rotation=roi.rotation + turn, side=roi.side * scale))
            for turn, scale in _STILL_PASSES
        ]
        sure = [landmarks for landmarks in passes if landmarks.person >= _LEAST_PERSON]
        return _person(sure, image.shape[1::-1]) if sure else person


def find_candidates(
    detector: DetectorNet, image: np.ndarray, rotations: tuple[float, ...], tiled: bool
) -> list[Detection]:
    """Regions where persons are found, best supported first; `tiled`: in tiles of half the image's longer side."""
    height, width = image.shape[:2]
    # Turned by 45 degrees the crop's side is the diagonal; this size keeps it below twice what the detector takes.
    scale = min(1.0, (2 if tiled else 1) * math.sqrt(2) * DETECTOR_SIDE / max(height, width))
    small_size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = image if scale == 1 else cv2.resize(image, small_size, interpolation=cv2.INTER_AREA)
    factors = (width / small_size[0], height / small_size[1])
    hits = []
    for left, top, tile in _tiles(small) if tiled else [(0, 0, small)]:
        for index, rotation in enumerate(rotations):
            for found in detector(tile, rotation):
                x, y = (found.roi.x + left) * factors[0], (found.roi.y + top) * factors[1]
                roi = replace(found.roi, x=x, y=y, side=found.roi.side * max(factors))
                hits.append((index, Detection(roi, found.score)))
    return _agreeing(hits, len(rotations))  # scores are means over the rotations


def _tiles(image: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Squares of half the longer side that overlap by half, with the (left, top) of each."""
    height, width = image.shape[:2]
    side = math.ceil(max(height, width) / 2)
    steps = [sorted({round(p) for p in np.linspace(0, n - side, 3)}) if n > side else [0] for n in (width, height)]
    return [(left, top, image[top : top + side, left : left + side]) for top in steps[1] for left in steps[0]]


def _agreeing(hits: list[tuple[int, Detection]], rotations: int) -> list[Detection]:
    """Candidates from pairs (index of the rotation, detection) that agree."""
    candidates = []
    waiting = sorted(hits, key=lambda hit: -hit[1].score)
    while waiting:
        best = waiting[0][1].roi
        agreeing = [hit for hit in waiting if _alike(best, hit[1].roi)]
        scores = {rotation: found.score for rotation, found in reversed(agreeing)}  # the best of each rotation
        candidates.append(Detection(_mean_roi([found for _, found in agreeing]), sum(scores.values()) / rotations))
        waiting = [hit for hit in waiting if hit not in agreeing]
    return sorted(candidates, key=lambda candidate: -candidate.score)


def _mean_roi(found: list[Detection]) -> Roi:
    """Score-weighted mean of regions that are turned alike; sides are averaged as ratios, angles as directions."""
    weights = np.array([detection.score for detection in found])
    coords = np.array([(detection.roi.x, detection.roi.y, math.log(detection.roi.side)) for detection in found])
    x, y, log_side = (weights @ coords / weights.sum()).tolist()
    directions = np.exp(1j * np.array([detection.roi.rotation for detection in found]))
    return Roi(x, y, math.exp(log_side), float(np.angle(weights @ directions)))


def _alike(a: Roi, b: Roi) -> bool:
    """True for regions that overlap closely and are turned alike."""
    turn = math.remainder(a.rotation - b.rotation, 2 * math.pi)
    distance = math.hypot(a.x - b.x, a.y - b.y)
    return abs(turn) < math.pi / 4 and distance < 0.2 * max(a.side, b.side) and 0.5 < b.side / a.side < 2


def _person(passes: list[Landmarks], size: tuple[int, int]) -> _Person:
    """Person of one or several passes over nearly the same region of an image of (width, height)."""
    coords = np.stack([landmarks.points[COCO_FROM_BLAZEPOSE] for landmarks in passes])  # (passes, 17, 2)
    sharpness = np.stack([landmarks.sharpness[COCO_FROM_BLAZEPOSE] for landmarks in passes])
    visible = np.stack([(landmarks.visibility * landmarks.presence)[COCO_FROM_BLAZEPOSE] for landmarks in passes])
    weights = np.maximum(sharpness, 0.01) ** 4  # a pass that is at a loss about a keypoint hardly counts
    weights /= weights.sum(axis=0)
    points = (weights[..., None] * coords).sum(axis=0)
    away = np.linalg.norm(coords - points, axis=-1) / (2 * COCO_SIGMAS * _AREA_ROOT * passes[0].roi.side)
    trust = np.clip((sharpness - _SHARPNESS[0]) / (_SHARPNESS[1] - _SHARPNESS[0]), 0, 1)
    # Visibility times presence, times a trust that grows with the heatmap's sharpness, times how well the passes agree
    # on the coordinates (COCO's object keypoint similarity to their mean).
    scores = (weights * visible * trust * np.exp(-(away**2) / 2)).sum(axis=0)
    scores = scores_inside(points, np.clip(scores, 0, 1), size)
    inside = scores[scores > 0]
    probability = np.mean([landmarks.image_mask(size) for landmarks in passes], axis=0)
    return _Person(
        keypoints=points.astype(np.float32),
        scores=scores,
        mask=probability > 0.5,
        confidence=float(np.mean([found.person for found in passes]) * (inside.mean() if len(inside) else 0)),
        probability=probability,
        next_roi=passes[0].next_roi,
    )


def _with_exclusive_masks(persons: list[_Person]) -> list[PersonEstimate]:
    """Persons with every pixel of their masks given to the likeliest of them."""
    if not persons:
        return []
    likeliest = np.argmax([person.probability for person in persons], axis=0)
    return [
        PersonEstimate(person.keypoints, person.scores, person.mask & (likeliest == index), person.confidence)
        for index, person in enumerate(persons)
    ]
