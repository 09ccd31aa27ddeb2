"""Persons of a driving clip followed over time and assigned to the persons of the reference.

Slots of pose estimators may change from frame to frame. Tracks are built by optimal assignment between neighbouring
frames, then assigned to the reference's persons by where they stand and how large they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from data.cuts import shots
from data.poses.poses import Poses
from tpc.config import CalibrationConfig
from tpc.estimation import ReferencePerson
from tpc.silhouettes import visible

# Costs are mean distances of keypoints in parts of the person's size. A runner moves by 0.1 a frame; a person's
# neighbour in a crowd is 0.4 away.
MAX_STEP = 0.35
STEP_PER_MISSED_FRAME = 0.1
MAX_MISSED_FRAMES = 30  # a track that was lost for longer starts anew, and is joined to the old one in the assignment
MAX_PREDICTED_FRAMES = 4  # how far ahead a constant velocity is believed
FORBIDDEN = 1e6
LAYOUT_FRAMES = 10  # over which the places of persons are averaged


def match_persons(
    persons: list[ReferencePerson], poses: Poses, config: CalibrationConfig, cuts: Sequence[int] = ()
) -> np.ndarray:
    """(frames, persons) int: the slot of the driving poses that each person of the reference takes, -1 = absent.

    Every shot is assigned by itself; `cuts` are the first frames of shots.
    """
    frames, available = poses.keypoints.shape[:2]
    seen = visible(poses.scores, poses.keypoints, config.score_threshold)
    if not persons:
        return np.full((frames, 0), -1)
    if config.match == "given":
        slots = np.arange(len(persons))
        present = np.pad(seen.any(-1), ((0, 0), (0, len(persons))))[:, : len(persons)]
        return np.where(present & (slots < available), slots, -1)
    reference = np.stack([p.keypoints for p in persons]), np.stack([p.seen for p in persons]), persons[0].size
    parts = shots(frames, cuts)
    return np.concatenate([assign_persons(*reference, poses.keypoints[s], seen[s], poses.size) for s in parts])


@dataclass
class _Track:
    slots: np.ndarray  # (frames,) slot of the poses, -1 = absent
    keypoints: np.ndarray  # (17, 2) when last seen
    seen: np.ndarray  # (17,) bool when last seen
    frame: int
    velocity: np.ndarray  # (2,) pixels a frame

    def cost(self, frame: int, keypoints: np.ndarray, seen: np.ndarray) -> float:
        ahead = min(frame - self.frame, MAX_PREDICTED_FRAMES)
        missed = frame - self.frame - 1
        if missed > MAX_MISSED_FRAMES:
            return FORBIDDEN
        expected = self.keypoints + self.velocity * ahead
        size = max(_extent(self.keypoints, self.seen), _extent(keypoints, seen), 1.0)
        common = self.seen & seen
        if common.any():
            distance = np.linalg.norm(expected - keypoints, axis=-1)[common].mean()
        else:
            distance = np.linalg.norm(expected[self.seen].mean(0) - keypoints[seen].mean(0))
        cost = float(distance / size)
        return cost if cost <= MAX_STEP + STEP_PER_MISSED_FRAME * missed else FORBIDDEN

    def follow(self, frame: int, slot: int, keypoints: np.ndarray, seen: np.ndarray) -> None:
        common = self.seen & seen
        if common.any():
            moved = (keypoints - self.keypoints)[common].mean(0) / (frame - self.frame)
            self.velocity = 0.5 * self.velocity + 0.5 * moved
        self.slots[frame], self.keypoints, self.seen, self.frame = slot, keypoints, seen, frame


def track_persons(keypoints: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(tracks, frames) int: the slot in which a track's person is found, -1 = absent.

    Keypoints are (frames, slots, 17, 2) pixels, `seen` (frames, slots, 17) bool.
    """
    frames = len(keypoints)
    tracks: list[_Track] = []
    for frame in range(frames):
        present = np.flatnonzero(seen[frame].any(-1))
        costs = np.array([[t.cost(frame, keypoints[frame, s], seen[frame, s]) for s in present] for t in tracks])
        left = set(present.tolist())
        if costs.size:
            for row, column in zip(*linear_sum_assignment(costs), strict=True):
                if costs[row, column] < FORBIDDEN:
                    slot = int(present[column])
                    tracks[row].follow(frame, slot, keypoints[frame, slot], seen[frame, slot])
                    left.discard(slot)
        for slot in sorted(left):
            slots = np.full(frames, -1)
            slots[frame] = slot
            tracks.append(_Track(slots, keypoints[frame, slot], seen[frame, slot], frame, np.zeros(2)))
    return np.stack([t.slots for t in tracks]) if tracks else np.zeros((0, frames), int)


def assign_persons(
    reference_keypoints: np.ndarray,
    reference_seen: np.ndarray,
    reference_size: tuple[int, int],
    keypoints: np.ndarray,
    seen: np.ndarray,
    size: tuple[int, int],
) -> np.ndarray:
    """Slots of the driving poses as `match_persons` gives them; persons lead the reference's shapes.

    The tracks that are seen longest and largest go to the persons of the reference by the least total difference in
    place and size. Other tracks go to a person whose own are absent at those times: somebody who left and came back.
    """
    frames, persons = len(keypoints), len(reference_keypoints)
    tracks = track_persons(keypoints, seen)
    assigned = np.full((frames, persons), -1)
    wanted = np.flatnonzero(reference_seen.any(-1))
    if not len(wanted) or not len(tracks):
        return assigned
    weight = _prominence(tracks, keypoints, seen)
    at_once = int((tracks >= 0).sum(0).max())
    main = np.sort(np.argsort(-weight, kind="stable")[: max(len(wanted), at_once)])
    places = _track_places(tracks[main], keypoints, seen, size)
    goals = np.stack([_place(reference_keypoints[p], reference_seen[p], reference_size) for p in wanted])
    cost = _layout_cost(goals, places) + 2 * (1 - weight[main] / weight.max())
    taken = set()
    for row, column in zip(*linear_sum_assignment(cost), strict=True):
        track = tracks[main[column]]
        assigned[track >= 0, wanted[row]] = track[track >= 0]
        taken.add(int(main[column]))
    _join_others(assigned, wanted, tracks, [t for t in np.argsort(-weight) if t not in taken], keypoints, seen)
    return assigned


def _join_others(
    assigned: np.ndarray,
    wanted: np.ndarray,
    tracks: np.ndarray,
    others: list[int],
    keypoints: np.ndarray,
    seen: np.ndarray,
) -> None:
    """Give each remaining track to the nearest person, in time then in place, who is absent while it lasts."""
    for track in others:
        during = np.flatnonzero(tracks[track] >= 0)
        best = None
        for person in wanted:
            own = np.flatnonzero(assigned[:, person] >= 0)
            if len(own) and (assigned[during, person] >= 0).any():
                continue
            candidate = (np.inf, 0.0)
            if len(own):
                near = own[np.abs(own - during[0]).argmin()]
                here, there = tracks[track, during[0]], assigned[near, person]
                gap = _middle(keypoints[during[0], here], seen[during[0], here]) - _middle(
                    keypoints[near, there], seen[near, there]
                )
                candidate = (float(np.linalg.norm(gap)), float(abs(near - during[0])))
            if best is None or candidate < best[0]:
                best = (candidate, person)
        if best is not None:
            assigned[during, best[1]] = tracks[track, during]


def _prominence(tracks: np.ndarray, keypoints: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(tracks,) frames times size: how much of the clip is about this person."""
    weight = np.zeros(len(tracks))
    for n, track in enumerate(tracks):
        for frame in np.flatnonzero(track >= 0):
            weight[n] += max(_extent(keypoints[frame, track[frame]], seen[frame, track[frame]]), 1.0)
    return weight


def _track_places(tracks: np.ndarray, keypoints: np.ndarray, seen: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(tracks, 3) mean place and size over the first frames in which most of them are seen together."""
    together = (tracks >= 0).sum(0)
    common = np.flatnonzero(together == together.max())[:LAYOUT_FRAMES]
    places = []
    for track in tracks:
        frames = common[track[common] >= 0]
        if not len(frames):
            frames = np.flatnonzero(track >= 0)[:LAYOUT_FRAMES]
        places.append(np.mean([_place(keypoints[f, track[f]], seen[f, track[f]], size) for f in frames], axis=0))
    return np.stack(places)


def _layout_cost(goals: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(goals, places) differences of (x, y, log size); groups of as many persons are laid over each other first."""
    if len(goals) == len(places) and len(goals) > 1:
        goals, places = goals - goals.mean(0), places - places.mean(0)
        spread = [max(np.linalg.norm(g[:, :2], axis=-1).mean(), 1e-3) for g in (goals, places)]
        goals = goals / [spread[0], spread[0], 1]
        places = places / [spread[1], spread[1], 1]
    difference = np.abs(goals[:, None] - places[None])
    return np.hypot(difference[..., 0], difference[..., 1]) + 0.2 * difference[..., 2]


def _place(keypoints: np.ndarray, seen: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(3,) x and y in parts of the image's width, log of the person's size in the same unit."""
    middle = _middle(keypoints, seen) / size[0]
    return np.array([*middle, np.log(max(_extent(keypoints, seen), 1.0) / size[0])])


def _middle(keypoints: np.ndarray, seen: np.ndarray) -> np.ndarray:
    visible = keypoints[seen]
    return (visible.min(0) + visible.max(0)) / 2


def _extent(keypoints: np.ndarray, seen: np.ndarray) -> float:
    """Diagonal of the box of the visible keypoints, pixels."""
    visible = keypoints[seen]
    return float(np.linalg.norm(visible.max(0) - visible.min(0))) if len(visible) else 0.0
