"""Actions of the legs, arms and trunk of a moving person, functions that add curves to a `Score`, and their recipes.

Angles are those of `data.people.bodies.rotations_from_angles`, in radians.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.people.bodies import JOINT_INDEX, JOINTS

SIDES = ("left", "right")


class Score:
    """Curves of a clip while it is put together: angles (f, 19, 3), translation (f, 3) and facing (f,)."""

    def __init__(self, rng: np.random.Generator, times: np.ndarray) -> None:
        self.rng, self.times = rng, times
        self.angles = np.zeros((len(times), len(JOINTS), 3))
        self.translation = np.zeros((len(times), 3))
        self.facing = np.zeros(len(times))
        self.rate = rng.uniform(0.45, 1.0)  # cycles per second of everything that keeps time
        self.phase = rng.random()

    def add(self, joint: str, bend: np.ndarray = 0.0, side: np.ndarray = 0.0, twist: np.ndarray = 0.0) -> None:
        for index, curve in enumerate((bend, side, twist)):
            self.angles[:, JOINT_INDEX[joint], index] += curve

    def cycle(self, low: float, high: float, shift: float = 0.0, multiple: float = 1.0) -> np.ndarray:
        """Swing from `low` to `high` and back, `multiple` times a cycle."""
        turn = multiple * (self.rate * self.times + self.phase) + shift
        return low + (high - low) * (0.5 - 0.5 * np.cos(2 * np.pi * turn))

    def hold(self, shift: float = 0.0, multiple: float = 1.0) -> np.ndarray:
        """Go from 0 to 1 and back with a rest at both ends."""
        turn = multiple * (self.rate * self.times + self.phase) + shift
        return 0.5 + 0.5 * np.tanh(2.2 * np.sin(2 * np.pi * turn))

    def drift(self, low: float, high: float, period: float = 2.2) -> np.ndarray:
        """Wander smoothly and without repetition between two angles."""
        rates = self.rng.uniform(0.5, 1.6, 3)[:, None] / period
        phases = self.rng.random((3, 1))
        weights = np.array([[0.5], [0.3], [0.2]])
        wave = (weights * np.sin(2 * np.pi * (rates * self.times + phases))).sum(0)
        return low + (high - low) * (0.5 + 0.5 * np.tanh(1.8 * wave))

    def other(self, side: str) -> str:
        return SIDES[1 - SIDES.index(side)]

    def any_side(self) -> str:
        return str(self.rng.choice(SIDES))


def stand(score: Score) -> None:
    sway = score.drift(-0.06, 0.06, 3.5)
    score.add("pelvis", side=sway)
    score.add("left_thigh", side=0.05 + sway)
    score.add("right_thigh", side=0.05 - sway)
    for side in SIDES:
        score.add(f"{side}_shin", bend=score.drift(0.0, 0.15, 3.0))


def walk(score: Score) -> None:
    _gait(score, score.rng.uniform(0.35, 0.6), 0.9)
    score.translation[:, 2] += score.cycle(0.0, 0.008, multiple=2)


def march(score: Score) -> None:
    for side, shift in zip(SIDES, (0.0, 0.5), strict=True):
        lift = np.maximum(score.cycle(-1.0, 1.0, shift), 0) ** 1.5
        score.add(f"{side}_thigh", bend=score.rng.uniform(0.9, 1.4) * lift, side=0.04)
        score.add(f"{side}_shin", bend=1.4 * lift)
        score.add(f"{side}_foot", bend=-0.3 * lift)


def _gait(score: Score, reach: float, knee: float) -> None:
    for side, shift in zip(SIDES, (0.0, 0.5), strict=True):
        turn = 2 * np.pi * (score.rate * score.times + score.phase + shift)
        swing = np.maximum(0, -np.sin(turn - 0.5)) ** 2  # the knee bends while its leg swings forward
        score.add(f"{side}_thigh", bend=reach * np.cos(turn) + 0.1, side=0.02)
        score.add(f"{side}_shin", bend=0.12 + knee * swing)
        score.add(f"{side}_foot", bend=0.1 - 0.35 * np.maximum(0, -np.cos(turn)) ** 2)
    score.add("pelvis", twist=0.1 * np.cos(2 * np.pi * (score.rate * score.times + score.phase)))


def squat(score: Score) -> None:
    depth = score.rng.uniform(0.6, 1.0) * score.hold(multiple=0.8)
    width = score.rng.uniform(0.1, 0.4)
    _crouch(score, depth, width)
    score.add("spine", bend=0.35 * depth)
    score.add("chest", bend=0.1 * depth)


def _crouch(score: Score, depth: np.ndarray, width: float) -> None:
    for side in SIDES:
        score.add(f"{side}_thigh", bend=1.5 * depth, side=0.05 + width * depth, twist=0.8 * width * depth)
        score.add(f"{side}_shin", bend=1.9 * depth)
        score.add(f"{side}_foot", bend=0.4 * depth)


def jump(score: Score) -> None:
    turn = (score.rate * score.times + score.phase) % 1.0
    air = np.clip((turn - 0.35) / 0.45, 0, 1)
    height = score.rng.uniform(0.06, 0.16) * 4 * air * (1 - air)
    crouch = np.exp(-(((turn - 0.25) / 0.1) ** 2)) + 0.8 * np.exp(-(((turn - 0.88) / 0.08) ** 2))
    spread = score.rng.uniform(0.0, 0.45) * np.sin(np.pi * air)
    _crouch(score, 0.45 * crouch, 0.1)
    for side in SIDES:
        score.add(f"{side}_thigh", side=spread)
        score.add(f"{side}_foot", bend=-0.5 * np.sin(np.pi * air))
    score.translation[:, 2] += height


def side_step(score: Score) -> None:
    reach = score.rng.uniform(0.2, 0.45)
    for side, shift in zip(SIDES, (0.0, 0.5), strict=True):
        step = score.cycle(0.0, 1.0, shift)
        score.add(f"{side}_thigh", side=0.04 + reach * step, bend=0.35 * step)
        score.add(f"{side}_shin", bend=0.1 + 0.45 * step)
    score.translation[:, 0] += score.cycle(-0.1, 0.1, 0.25, 0.5)


def leg_lift(score: Score) -> None:
    side = score.any_side()
    lift = score.hold()
    if score.rng.random() < 0.5:
        score.add(f"{side}_thigh", bend=score.rng.uniform(0.7, 1.4) * lift, side=0.05)
        score.add(f"{side}_shin", bend=score.rng.uniform(0.2, 1.3) * lift)
    else:
        score.add(f"{side}_thigh", side=score.rng.uniform(0.4, 0.8) * lift)
    other = score.other(side)
    score.add(f"{other}_thigh", side=0.03)
    score.add("spine", side=(0.12 if other == "left" else -0.12) * lift)


def lunge(score: Score) -> None:
    front = score.any_side()
    back = score.other(front)
    depth = score.hold(multiple=0.8)
    score.add(f"{front}_thigh", bend=1.05 * depth, side=0.05)
    score.add(f"{front}_shin", bend=1.0 * depth)
    score.add(f"{back}_thigh", bend=-0.45 * depth, side=0.05)
    score.add(f"{back}_shin", bend=0.6 * depth)
    score.add(f"{back}_foot", bend=-0.3 * depth)


def sit(score: Score) -> None:
    depth = 0.35 + 0.5 * score.hold(multiple=0.6)
    for side in SIDES:
        score.add(f"{side}_thigh", bend=1.5 * depth, side=0.08, twist=0.1)
        score.add(f"{side}_shin", bend=1.55 * depth)
        score.add(f"{side}_foot", bend=0.05 * depth)
    score.add("pelvis", bend=0.2 * depth)


def dance_legs(score: Score) -> None:
    _gait(score, score.rng.uniform(0.15, 0.35), score.rng.uniform(0.4, 1.0))
    for side in SIDES:
        out, bend, twist = score.drift(0.03, 0.4), score.drift(0.0, 0.5), score.drift(-0.1, 0.4)
        score.add(f"{side}_thigh", bend, out, twist)
        score.add(f"{side}_shin", bend=score.drift(0.05, 0.9))
    score.add("pelvis", side=score.cycle(-0.14, 0.14), twist=score.drift(-0.3, 0.3))
    score.translation[:, 0] += score.drift(-0.07, 0.07)


def hang(score: Score, side: str) -> None:
    score.add(f"{side}_upper_arm", bend=score.drift(-0.1, 0.2), side=score.drift(0.08, 0.3))
    score.add(f"{side}_forearm", bend=score.drift(0.12, 0.5))


def swing(score: Score, side: str) -> None:
    reach = score.rng.uniform(0.35, 0.7)
    shift = 0.5 if side == "left" else 0.0
    swing = np.cos(2 * np.pi * (score.rate * score.times + score.phase + shift))
    score.add(f"{side}_upper_arm", bend=reach * swing, side=0.12)
    score.add(f"{side}_forearm", bend=0.4 + 0.3 * swing)


def wave(score: Score, side: str) -> None:
    score.add(f"{side}_upper_arm", side=score.drift(1.0, 1.7, 3.0), twist=1.5)
    score.add(f"{side}_forearm", bend=score.cycle(0.7, 1.8, multiple=score.rng.choice([1.0, 1.5, 2.0])))


def raise_sideways(score: Score, side: str) -> None:
    shift = score.rng.choice([0.0, 0.0, 0.5])
    score.add(f"{side}_upper_arm", side=score.cycle(0.12, score.rng.uniform(1.6, 2.5), shift))
    score.add(f"{side}_forearm", bend=score.cycle(0.1, score.rng.uniform(0.1, 0.8), shift + 0.3))


def raise_forward(score: Score, side: str) -> None:
    shift = score.rng.choice([0.0, 0.5])
    score.add(f"{side}_upper_arm", bend=score.cycle(0.0, score.rng.uniform(1.3, 2.6), shift), side=0.15)
    score.add(f"{side}_forearm", bend=score.cycle(0.1, score.rng.uniform(0.2, 0.9), shift + 0.2))


def on_hip(score: Score, side: str) -> None:
    score.add(f"{side}_upper_arm", side=0.85 + score.drift(-0.1, 0.1), bend=-0.35, twist=-0.75)
    score.add(f"{side}_forearm", bend=1.75)


def punch(score: Score, side: str) -> None:
    out = score.cycle(0.0, 1.0, 0.0 if side == "left" else 0.5, 1.5)
    score.add(f"{side}_upper_arm", bend=0.35 + 1.1 * out, side=0.25, twist=0.2 - 0.1 * out)
    score.add(f"{side}_forearm", bend=2.1 - 1.8 * out)


def free(score: Score, side: str) -> None:
    score.add(f"{side}_upper_arm", score.drift(-0.4, 1.5), score.drift(0.15, 1.9), score.drift(0.0, 1.5))
    score.add(f"{side}_forearm", bend=score.drift(0.1, 1.9, 1.6))
    score.add(f"{side}_hand", bend=score.drift(-0.4, 0.4, 1.5))


def overhead(score: Score, side: str) -> None:
    reach = score.hold(multiple=0.8)
    score.add(f"{side}_upper_arm", side=0.2 + 2.2 * reach, twist=0.5 * reach)
    score.add(f"{side}_forearm", bend=0.2 + score.rng.uniform(0.1, 1.0) * reach)


def upright(score: Score) -> None:
    score.add("spine", score.drift(-0.08, 0.15, 3), score.drift(-0.1, 0.1, 3), score.drift(-0.12, 0.12))
    score.add("chest", score.drift(-0.05, 0.1, 3), score.drift(-0.08, 0.08), score.drift(-0.15, 0.15))


def bend_forward(score: Score) -> None:
    depth = score.rng.uniform(0.5, 1.0) * score.hold(multiple=0.7)
    score.add("pelvis", bend=0.5 * depth)
    for side in SIDES:
        score.add(f"{side}_thigh", bend=0.5 * depth)
    score.add("spine", bend=0.6 * depth)
    score.add("chest", bend=0.4 * depth)


def bend_sideways(score: Score) -> None:
    lean = score.cycle(-1.0, 1.0, multiple=0.7)
    score.add("spine", side=0.35 * lean)
    score.add("chest", side=0.28 * lean)
    score.add("pelvis", side=0.08 * lean)


def twist(score: Score) -> None:
    turn = score.cycle(-1.0, 1.0, multiple=0.8)
    score.add("spine", twist=0.33 * turn, bend=0.05)
    score.add("chest", twist=0.33 * turn)


def groove(score: Score) -> None:
    score.add("spine", bend=score.drift(-0.2, 0.3), side=score.drift(-0.3, 0.3), twist=score.drift(-0.3, 0.3))
    score.add("chest", bend=score.drift(-0.15, 0.25), side=score.drift(-0.25, 0.25), twist=score.drift(-0.3, 0.3))


def look(score: Score, reach: float) -> None:
    turn = score.drift(-reach, reach, 2.0)
    score.add("neck", bend=score.drift(-0.12, 0.15), twist=0.4 * turn)
    score.add("head", bend=score.drift(-0.15, 0.25), side=score.drift(-0.15, 0.15), twist=0.6 * turn)


@dataclass(frozen=True)
class MotionRecipe:
    """Actions that a motion may combine; every entry of a tuple is equally likely."""

    legs: tuple[Callable[[Score], None], ...]
    arms: tuple[Callable[[Score, str], None], ...]  # of the arm that leads
    other_arms: tuple[Callable[[Score, str], None], ...] = (hang, on_hip, free)  # unless it does the same
    trunk: tuple[Callable[[Score], None], ...] = (upright,)
    mirrored_arms: float = 0.4  # probability that both arms do the same
    turns: bool = False
    look: float = 0.5  # how far the head turns, radians
    weight: float = 1.0  # how often, relative to the others


MOTIONS = {
    "walk": MotionRecipe((walk,), (swing,), mirrored_arms=1.0),
    "march": MotionRecipe((march,), (swing, punch, raise_sideways), mirrored_arms=0.8),
    "turn": MotionRecipe((walk, stand), (hang, swing, raise_sideways), turns=True),
    "bend": MotionRecipe((stand,), (hang, raise_forward, free), trunk=(bend_forward, bend_sideways)),
    "stretch": MotionRecipe((stand, lunge), (overhead, raise_sideways, on_hip), trunk=(bend_sideways, twist)),
    "wave": MotionRecipe((stand, side_step), (wave,), mirrored_arms=0.15),
    "dance": MotionRecipe((dance_legs,), (free,), trunk=(groove,), mirrored_arms=1.0, weight=3),
    "squat": MotionRecipe((squat,), (raise_forward, free, on_hip), mirrored_arms=0.8),
    "jump": MotionRecipe((jump,), (raise_sideways, overhead, swing), mirrored_arms=0.9),
    "raise": MotionRecipe((stand, walk), (raise_sideways, raise_forward, overhead), trunk=(upright, twist), weight=2),
    "sit": MotionRecipe((sit,), (free, hang, wave), trunk=(upright, twist)),
    "side_step": MotionRecipe((side_step,), (hang, swing, raise_sideways, punch), trunk=(upright, groove)),
    "look_around": MotionRecipe((stand,), (on_hip, hang), trunk=(upright, twist), look=1.0, weight=0.5),
    "leg_lift": MotionRecipe((leg_lift, lunge), (raise_sideways, on_hip, free)),
    "box": MotionRecipe((stand, dance_legs), (punch,), trunk=(twist, groove), mirrored_arms=1.0),
    "gesture": MotionRecipe((stand,), (free,), trunk=(upright, groove), mirrored_arms=1.0, weight=2),
}
