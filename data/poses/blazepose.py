"""BlazePose as a pose estimator: several persons, turned persons, tracking through a video, person masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from data.poses.blazepose_networks import COCO_FROM_BLAZEPOSE, DetectorNet, LandmarkNet, Landmarks, Roi
from data.poses.blazepose_search import THOROUGH, TURNED, UPRIGHT, SearchPlan, find_candidates
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
_LEAST_IN_TILE = 0.5  # a tile that shows a vase as large as a person asks for surer landmarks
_SETTLING_LOOKS = 3  # a region from the detector is rough: each look centres, turns and scales it better
# A still is looked at again with the region turned (radians) and scaled a little; the mean halves the noise.
_STILL_LOOKS = ((0.0, 1.0), (-0.15, 1.0), (0.15, 1.0), (-0.3, 1.0), (0.3, 1.0), (0.0, 0.9), (0.0, 1.1))
_SEARCH_INTERVAL = 10  # frames between thorough searches of a video for somebody who is missing
_SHARPNESS = (0.2, 0.6)  # of a heatmap's peak: worth nothing, worth full trust
_AREA_ROOT = 0.35  # root of a person's area in units of the side of the region around them, for COCO's keypoint scale


@dataclass(frozen=True, eq=False)
class _Person(PersonEstimate):
    """A person in one frame, the soft mask (h, w) in [0, 1], and where to look for them next."""

    probability: np.ndarray
    next_roi: Roi


class BlazePose:
    """Pose estimator with the published BlazePose networks on the CPU.

    Args:
        heavy: the heavy landmark network: about three times slower and less noisy than the full one.
        threads: CPU threads of the networks.

    Raises:
        UserError: a model file is missing; the message says how to fetch it.
    """

    def __init__(self, heavy: bool = False, threads: int = 2):
        self._detector = DetectorNet(model_path(DETECTOR), threads)
        self._landmarks = LandmarkNet(model_path(HEAVY_LANDMARKS if heavy else FULL_LANDMARKS), threads)

    def image(self, image: np.ndarray, max_persons: int = 1) -> list[PersonEstimate]:
        """Persons in a still (h, w, 3) uint8 RGB, at whatever angle they are, the most prominent first."""
        found = self._search(image, THOROUGH, max_persons)
        return _with_exclusive_masks([self._look_closely(image, person) for person in found])

    def video(self, frames: Iterable[np.ndarray], max_persons: int = 1) -> Iterator[list[PersonEstimate | None]]:
        """Persons in each frame, in fixed slots: a list of `max_persons`, None for who is not seen.

        A person is followed from frame to frame. Frames in which somebody is missing are searched: at all rotations
        when a person has just been lost and in every tenth frame, upright otherwise.
        """
        persons: list[_Person | None] = [None] * max_persons
        last_seen = persons
        for number, frame in enumerate(frames):
            followed = [person and self._look(frame, person.next_roi) for person in persons]
            distinct = distinct_persons([person for person in followed if person is not None])
            followed = [person if person in distinct else None for person in followed]
            if None in followed:
                just_lost = followed.count(None) > persons.count(None)
                plan = UPRIGHT
                if just_lost or number % _SEARCH_INTERVAL == 0:
                    plan = TURNED if any(followed) else THOROUGH
                followed = self._fill_slots(frame, plan, followed, last_seen)
            persons = followed
            last_seen = [now or before for now, before in zip(persons, last_seen, strict=True)]
            exclusive = iter(_with_exclusive_masks([person for person in persons if person is not None]))
            yield [person and next(exclusive) for person in persons]

    def _fill_slots(
        self, frame: np.ndarray, plan: SearchPlan, persons: list[_Person | None], last_seen: list[_Person | None]
    ) -> list[_Person | None]:
        """`persons` with the empty slots filled by whom a search of the frame finds beside the others."""
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
                if person is None or (tiled and person.confidence < _LEAST_IN_TILE):
                    continue
                if person.confidence * candidate.evidence >= plan.least_confidence:
                    found.append(replace(person, confidence=person.confidence * candidate.evidence))
            # Who is seen in the whole image is seen better there than in a tile that may cut them.
            known = list(persons)
            persons += [p for p in distinct_persons(found) if not any(is_same_person(p, other) for other in known)]
        return by_prominence(persons, image.shape[1::-1])[:max_persons]

    def _settle(self, image: np.ndarray, roi: Roi) -> _Person | None:
        person = None
        for _ in range(_SETTLING_LOOKS):
            person = self._look(image, roi)
            if person is None:
                return None
            roi = person.next_roi
        return person

    def _look(self, image: np.ndarray, roi: Roi) -> _Person | None:
        landmarks = self._landmarks(image, roi)
        return _person([landmarks], image.shape[1::-1]) if landmarks.person >= _LEAST_PERSON else None

    def _look_closely(self, image: np.ndarray, person: _Person) -> _Person:
        roi = person.next_roi
        looks = [
            self._landmarks(image, replace(roi, rotation=roi.rotation + turn, side=roi.side * scale))
            for turn, scale in _STILL_LOOKS
        ]
        sure = [look for look in looks if look.person >= _LEAST_PERSON]
        return _person(sure, image.shape[1::-1]) if sure else person


def _person(looks: list[Landmarks], size: tuple[int, int]) -> _Person:
    """The person of one or several looks at nearly the same region of an image of (width, height).

    Looks are averaged with the fourth power of their heatmaps' sharpness as weight, so a look that is at a loss about
    a keypoint hardly counts. The score of a keypoint is visibility times presence, times a trust that grows with the
    sharpness, times how well the looks agree on its place (COCO's object keypoint similarity to their mean); it is 0
    outside the image.
    """
    places = np.stack([look.points[COCO_FROM_BLAZEPOSE] for look in looks])  # (looks, 17, 2)
    sharpness = np.stack([look.sharpness[COCO_FROM_BLAZEPOSE] for look in looks])
    seen = np.stack([(look.visibility * look.presence)[COCO_FROM_BLAZEPOSE] for look in looks])
    weights = np.maximum(sharpness, 0.01) ** 4
    weights /= weights.sum(axis=0)
    points = (weights[..., None] * places).sum(axis=0)
    away = np.linalg.norm(places - points, axis=-1) / (2 * COCO_SIGMAS * _AREA_ROOT * looks[0].roi.side)
    trust = np.clip((sharpness - _SHARPNESS[0]) / (_SHARPNESS[1] - _SHARPNESS[0]), 0, 1)
    scores = (weights * seen * trust * np.exp(-(away**2) / 2)).sum(axis=0)
    scores = scores_inside(points, np.clip(scores, 0, 1), size)
    inside = scores[scores > 0]
    probability = np.mean([look.image_mask(size) for look in looks], axis=0)
    return _Person(
        keypoints=points.astype(np.float32),
        scores=scores,
        mask=probability > 0.5,
        confidence=float(np.mean([look.person for look in looks]) * (inside.mean() if len(inside) else 0)),
        probability=probability,
        next_roi=looks[0].next_roi,
    )


def _with_exclusive_masks(persons: list[_Person]) -> list[PersonEstimate]:
    """The persons with every pixel of their masks given to the likeliest of them."""
    if not persons:
        return []
    likeliest = np.argmax([person.probability for person in persons], axis=0)
    return [
        PersonEstimate(person.keypoints, person.scores, person.mask & (likeliest == index), person.confidence)
        for index, person in enumerate(persons)
    ]
