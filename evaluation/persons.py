"""Poses of generated people: estimated as the frames come, and measured against where they should be."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data.poses.poses import PoseEstimator
from metrics.person import keypoint_error, part_colour_difference, part_colours
from tpc.silhouettes import body_height, visible

THRESHOLD = 0.3


@dataclass(frozen=True)
class SeenPerson:
    """The person of a frame; scores are all 0 when nobody was found.

    Attributes:
        keypoints, scores: (17, 2) pixels and (17,).
    """

    keypoints: np.ndarray
    scores: np.ndarray

    @property
    def height(self) -> float:
        """Standing height in pixels, 0 when unknown."""
        return body_height(self.keypoints, visible(self.scores, self.keypoints, THRESHOLD))


NOBODY = SeenPerson(np.zeros((17, 2), np.float32), np.zeros(17, np.float32))


def seen_persons(frames: Iterable[np.ndarray], estimator: PoseEstimator) -> Iterator[tuple[np.ndarray, SeenPerson]]:
    """Every frame (h, w, 3) uint8 of a clip with its most prominent person; few frames are held at a time."""
    held: deque[np.ndarray] = deque()

    def source() -> Iterator[np.ndarray]:
        for frame in frames:
            held.append(frame)
            yield frame

    for persons in estimator.video(source(), 1):
        person = persons[0] if persons else None
        yield held.popleft(), NOBODY if person is None else SeenPerson(person.keypoints, person.scores)


def person_values(generated: np.ndarray, found: SeenPerson, truth: np.ndarray, target: SeenPerson) -> dict[str, float]:
    """Pose and identity measures of one frame: images (h, w, 3) uint8 and their persons."""
    height = target.height
    error = keypoint_error(found.keypoints, found.scores, target.keypoints, target.scores, height, THRESHOLD)
    colours = [
        part_colours(image, person.keypoints, person.scores, person.height, THRESHOLD)
        for image, person in ((generated, found), (truth, target))
    ]
    return {"keypoint_error": error, "part_colour": part_colour_difference(*colours)}
