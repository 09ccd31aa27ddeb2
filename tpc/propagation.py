"""Iterative propagation: the frame whose calibrated image each frame attends to, at every denoising step.

The frames are divided into consecutive groups. At each step one member of a group is drawn uniformly at random and
serves all frames of its group: neighbours agree at every step, and over the steps every member is heard (paper,
"iterative propagation").
"""

from dataclasses import dataclass

import numpy as np

FRAMES_PER_GROUP = 4  # what the paper's 30 groups come to on its clips of about 120 frames


def group_of_frames(num_frames: int, num_groups: int) -> np.ndarray:
    """Group index (frames,) of every frame; sizes differ by at most one.

    Args:
        num_groups: M; at least `num_frames` puts every frame in a group of its own. 0 makes groups of four frames.
    """
    frames = np.arange(num_frames)
    if num_groups == 0:
        return frames // FRAMES_PER_GROUP
    return frames * min(num_groups, num_frames) // max(num_frames, 1)


@dataclass(frozen=True)
class Schedule:
    """The draws of a clip, a pure function of (seed, step, group, person).

    Nothing else enters: every context window, rank and resumed run draws the same.

    Attributes:
        available: (frames, persons) bool, frames that have a calibrated image of the person.
        groups: number of groups M, 0 = groups of four frames.
        mode: "iterative", "hold" (the first available member for all steps) or "off" (each frame its own).
        seed: any integer.
    """

    available: np.ndarray
    groups: int
    mode: str
    seed: int

    def source_frame(self, step: int) -> np.ndarray:
        """(frames, persons) int: the frame whose calibrated image each frame uses at `step`; -1 = none.

        Only frames with an image of their own take part: the others stay uncalibrated whatever their group draws.
        """
        frames, persons = self.available.shape
        if self.mode == "off":
            return np.where(self.available, np.arange(frames)[:, None], -1)
        source = np.full((frames, persons), -1)
        group = group_of_frames(frames, self.groups)
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        for g, (start, stop) in enumerate(zip(starts, [*starts[1:], frames], strict=True)):
            for person in range(persons):
                members = start + np.flatnonzero(self.available[start:stop, person])
                if len(members):
                    drawn = 0 if self.mode == "hold" else self._draw(step, g, person, len(members))
                    source[members, person] = members[drawn]
        return source

    def _draw(self, step: int, group: int, person: int, count: int) -> int:
        if count == 1:
            return 0
        # Philox is counter-based: its stream at a counter does not depend on what was drawn before.
        stream = np.random.Philox(key=self.seed % 2**64, counter=[0, person, group, step])
        return int(np.random.Generator(stream).integers(count))
