"""Rendered images of one person under two cameras, with the exact map between them.

Settings are chosen on them, so they show people of the development split.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.people.bodies import build_person, load_people, random_identity
from data.people.motion import random_motion
from data.people.renderer import Camera, Rendered, camera_matrix, render_person

SIZE = (512, 512)
HEIGHT = 0.6  # of the standing person, as a share of the image's; the geometric mean over the two images
MOTION_FRAMES, FPS = 30, 15.0


@dataclass(frozen=True)
class Pair:
    """A reference and two driving images: the reference's body pose, and another one."""

    reference: Rendered
    same_pose: Rendered
    other_pose: Rendered
    truth: np.ndarray  # (3, 3), reference pixels to driving pixels: the change of the camera
    scale: float
    rotation: float  # degrees

    @property
    def box(self) -> np.ndarray:
        """(4, 2) corners of the person's box in the reference."""
        rows, columns = np.nonzero(self.reference.mask)
        (left, right), (top, bottom) = (columns.min(), columns.max()), (rows.min(), rows.max())
        return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float64)


def rendered_pairs(count: int, seed: int = 0) -> Iterator[Pair]:
    """People of the development split in random poses; scale 0.4 to 2.5 (even in its logarithm), all rotations."""
    rng, library = np.random.default_rng(seed), load_people()
    for _ in range(count):
        person = build_person(random_identity(rng, library, "development"), library)
        poses = [random_motion(rng, MOTION_FRAMES, FPS).pose(int(rng.integers(MOTION_FRAMES))) for _ in range(2)]
        scale, rotation = np.exp(rng.uniform(np.log(0.4), np.log(2.5))), rng.uniform(-np.pi, np.pi)
        centres = rng.uniform(-0.1, 0.1, (2, 2)) * [1, 0.5] + 0.5
        upright = rng.uniform(-0.1, 0.1)
        first = Camera(HEIGHT / scale**0.5, upright - rotation, tuple(centres[0]))
        second = Camera(HEIGHT * scale**0.5, upright, tuple(centres[1]))
        yield Pair(
            render_person(person, poses[0], first, SIZE),
            render_person(person, poses[0], second, SIZE),
            render_person(person, poses[1], second, SIZE),
            camera_change(person, first, second),
            float(scale),
            float(np.degrees(rotation)),
        )


def rendered_clip(seed: int) -> list[Pair]:
    """One pair a frame of a clip whose camera zooms and turns steadily."""
    rng, library = np.random.default_rng(seed), load_people()
    person = build_person(random_identity(rng, library, "development"), library)
    motion = random_motion(rng, MOTION_FRAMES, FPS)
    pose = random_motion(rng, MOTION_FRAMES, FPS).pose(int(rng.integers(MOTION_FRAMES)))
    still = Camera(HEIGHT, rng.uniform(-np.pi, np.pi), (0.5, 0.5))
    reference = render_person(person, pose, still, SIZE)
    start, stop = rng.uniform(0.4, 0.9, 2)
    turn = rng.uniform(-0.4, 0.4)
    pairs = []
    for frame in range(MOTION_FRAMES):
        share = frame / (MOTION_FRAMES - 1)
        camera = Camera(start ** (1 - share) * stop**share, turn * share, (0.5, 0.5))
        driving = render_person(person, motion.pose(frame), camera, SIZE)
        change, rotation = camera_change(person, still, camera), float(np.degrees(turn * share))
        pairs.append(Pair(reference, driving, driving, change, camera.scale / HEIGHT, rotation))
    return pairs


def camera_change(person, first: Camera, second: Camera) -> np.ndarray:
    """(3, 3) from pixels of the first camera to those of the second, at the person's distance."""
    maps = [np.vstack([camera_matrix(c, SIZE, person.body.height), [0, 0, 1]]) for c in (first, second)]
    return maps[1] @ np.linalg.inv(maps[0])
