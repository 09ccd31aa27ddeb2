"""Motion clips of our own making: joint-angle curves with random rates, phases and reach.

A clip combines actions of the legs, the arms and the trunk, and a facing. Angles are those of
`data.people.bodies.rotations_from_angles`, in radians, kept inside the joints' limits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.people.actions import MOTIONS, SIDES, Score, look
from data.people.bodies import JOINT_INDEX, JOINTS, Pose, axis_rotation, rotations_from_angles

# Lowest and highest bend, side and twist of each joint.
JOINT_LIMITS = {
    "pelvis": ((-0.3, 0.6), (-0.25, 0.25), (-0.5, 0.5)),
    "spine": ((-0.3, 0.8), (-0.4, 0.4), (-0.35, 0.35)),
    "chest": ((-0.2, 0.6), (-0.35, 0.35), (-0.35, 0.35)),
    "neck": ((-0.3, 0.4), (-0.25, 0.25), (-0.5, 0.5)),
    "head": ((-0.35, 0.4), (-0.25, 0.25), (-0.6, 0.6)),
    "clavicle": ((-0.2, 0.2), (-0.1, 0.6), (-0.3, 0.3)),
    "upper_arm": ((-0.8, 2.7), (0.04, 2.6), (-0.9, 1.7)),
    "forearm": ((0.05, 2.3), (0.0, 0.0), (-1.0, 1.0)),
    "hand": ((-0.6, 0.6), (-0.3, 0.3), (0.0, 0.0)),
    "thigh": ((-0.6, 1.7), (0.0, 0.9), (-0.3, 0.6)),
    "shin": ((0.0, 2.1), (0.0, 0.0), (0.0, 0.0)),
    "foot": ((-0.7, 0.5), (-0.2, 0.2), (-0.2, 0.3)),
}


@dataclass(frozen=True)
class Motion:
    """Poses of one moving person, see `data.people.bodies.Pose`."""

    name: str  # a key of `MOTIONS`
    rotations: np.ndarray  # (f, 19, 3, 3) float32
    translations: np.ndarray  # (f, 3) float32

    def __len__(self) -> int:
        return len(self.rotations)

    def pose(self, frame: int) -> Pose:
        return Pose(self.rotations[frame], self.translations[frame])


def random_motion(rng: np.random.Generator, num_frames: int, fps: float, name: str | None = None) -> Motion:
    """Draw a clip of the motion `name`, a key of `MOTIONS`, or of any; a cycle takes one to two seconds."""
    if name is not None and name not in MOTIONS:
        raise ValueError(f"name must be one of {tuple(MOTIONS)}, got {name!r}")
    weights = np.array([recipe.weight for recipe in MOTIONS.values()])
    name = name or str(rng.choice(list(MOTIONS), p=weights / weights.sum()))
    recipe = MOTIONS[name]
    score = Score(rng, np.arange(num_frames) / fps)
    _pick(rng, recipe.legs)(score)
    _pick(rng, recipe.trunk)(score)
    lead, arm = score.any_side(), _pick(rng, recipe.arms)
    arm(score, lead)
    (arm if rng.random() < recipe.mirrored_arms else _pick(rng, recipe.other_arms))(score, score.other(lead))
    look(score, recipe.look)
    _shrug(score)
    _face(score, recipe.turns)
    rotations = rotations_from_angles(limited(score.angles))
    facing = axis_rotation(2, score.facing)
    rotations[:, 0] = facing @ rotations[:, 0]
    translations = np.einsum("fab,fb->fa", facing, score.translation)
    return Motion(name, rotations, translations.astype(np.float32))


def limited(angles: np.ndarray) -> np.ndarray:
    """Angles (f, 19, 3) clipped to `JOINT_LIMITS`."""
    types = [name.split("_", 1)[1] if name.startswith(SIDES) else name for name in JOINTS]
    low, high = np.moveaxis(np.array([JOINT_LIMITS[name] for name in types]), -1, 0)
    return np.clip(angles, low, high)


def _pick(rng: np.random.Generator, choices: tuple) -> Callable:
    return choices[rng.integers(len(choices))]


def _shrug(score: Score) -> None:
    """Let the shoulder girdle rise with a raised arm."""
    for side in SIDES:
        bend, out, _ = score.angles[:, JOINT_INDEX[f"{side}_upper_arm"]].T
        score.add(f"{side}_clavicle", side=0.22 * np.maximum(np.hypot(bend, out) - 0.6, 0))


def _face(score: Score, turns: bool) -> None:
    """Turn the person: mostly within 40 degrees of the camera, sometimes anywhere, or all round."""
    rng = score.rng
    anywhere = rng.random() < 0.1
    score.facing += rng.uniform(-np.pi, np.pi) if anywhere else np.clip(rng.normal(0, 0.35), -0.7, 0.7)
    score.facing += score.drift(-0.15, 0.15, 4.0)
    if turns:
        score.facing += rng.choice([-1, 1]) * 2 * np.pi * rng.uniform(0.2, 0.5) * score.times
