"""Bodies of other proportions: a baked body with its bones rescaled, and mesh, clothes and keypoints with them.

    child = rescaled(body, library.topology, PROPORTIONS["child"])

The shipped bodies are adults, whose legs differ by 8 % against their trunks. Every joint j gets an affine map
A_j(x) = J'_j + L_j (x - J_j) of the points that it holds. L_j stretches trunk and neck along the body's axes, a limb
along its bone, and turns nothing; a child joint's new place is its parent's map of the old one, J'_c = A_p(J_c).
Vertices are blended by the weights they are skinned with: neighbours stay neighbours, and clothes and hair move with
what they are worn on.
"""

from dataclasses import dataclass, replace

import numpy as np

from data.people.actions import SIDES
from data.people.bodies import JOINT_INDEX, JOINTS, PARENTS, Body, Pose, Topology, rest_to_neutral

# What a limb's thickness, and the depth of broad shoulders, grow by: this power of the factor on their length.
THICKNESS = 1 / 3
# The end of each limb's bone; hands, feet and head have none, and keep their shape.
BONE_ENDS = {"clavicle": "upper_arm", "upper_arm": "forearm", "forearm": "hand", "thigh": "shin", "shin": "foot"}


@dataclass(frozen=True)
class Proportions:
    """Factors on a body's measures; only their ratios show, as cameras count in standing heights."""

    trunk: float = 1.0  # length from pelvis to neck
    neck: float = 1.0  # length
    head: float = 1.0  # in all directions
    shoulders: float = 1.0  # width of the shoulders and of the chest
    arms: float = 1.0  # length of upper arm and forearm
    legs: float = 1.0  # length of thigh and shin


PROPORTIONS = {
    "own": Proportions(),
    "child": Proportions(neck=0.7, head=1.45, shoulders=0.9, arms=0.84, legs=0.76),  # of about three years
    "long_legged": Proportions(arms=1.08, legs=1.35),
    "large_headed": Proportions(neck=0.8, head=1.9),
    "broad_shouldered": Proportions(head=0.95, shoulders=1.4, arms=1.12),
}


def leg_share(body: Body) -> float:
    """Length of thigh and shin, mean of both sides, in body heights."""
    sides = [[body.joints[JOINT_INDEX[f"{side}_{joint}"]] for joint in ("thigh", "shin", "foot")] for side in SIDES]
    return float(np.linalg.norm(np.diff(sides, axis=1), axis=-1).sum() / 2 / body.height)


def in_own_steps(pose: Pose, mover: Body, body: Body) -> Pose:
    """The mover's pose for another body, whose way is as many lengths of its own legs, or its feet would slide."""
    return Pose(pose.rotations, pose.translation * np.float32(leg_share(body) / leg_share(mover)))


def rescaled(body: Body, topology: Topology, proportions: Proportions) -> Body:
    """The body with its measures multiplied by `proportions`, on its soles and in its attitude at rest.

    Feet grow as the whole body does, whose height is that of the highest vertex as before.
    """
    if proportions == Proportions():
        return body
    joints = body.joints.astype(np.float64)
    linear = _linear_maps(joints, proportions)
    moved = np.zeros_like(joints)
    for joint, parent in enumerate(PARENTS[1:], 1):
        moved[joint] = moved[parent] + linear[parent] @ (joints[joint] - joints[parent])
    vertices = _mapped(body.vertices, topology, joints, linear, moved)
    # Ankles are as high above the soles, in body heights, as they were: feet grow by the height's factor, whose
    # part above the ankles is known.
    feet = [JOINT_INDEX[f"{side}_foot"] for side in SIDES]
    ankle = joints[feet, 2].mean()
    grown = (vertices[:, 2].max() - moved[feet, 2].mean()) / (body.height - ankle)
    linear[feet] = grown * np.eye(3)
    moved[:, 2] += grown * ankle - moved[feet, 2].mean()
    vertices = _mapped(body.vertices, topology, joints, linear, moved)
    # A keypoint's share of joint j is a weighted sum of vertices, and the weights' sum: all of it moves by A_j.
    points, weights = body.keypoints[..., :3].astype(np.float64), body.keypoints[..., 3:].astype(np.float64)
    points = np.einsum("jab,kjb->kja", linear, points) + weights * (moved - np.einsum("jab,jb->ja", linear, joints))
    return replace(
        body,
        vertices=vertices.astype(np.float32),
        joints=moved.astype(np.float32),
        neutral=rest_to_neutral(moved.astype(np.float32)),
        keypoints=np.concatenate([points, weights], -1).astype(np.float32),
        height=float(vertices[:, 2].max()),
    )


def _linear_maps(joints: np.ndarray, proportions: Proportions) -> np.ndarray:
    """L_j (19, 3, 3); of the feet those of a body of the same height."""
    factors = {"clavicle": proportions.shoulders, "upper_arm": proportions.arms, "forearm": proportions.arms}
    factors |= {"thigh": proportions.legs, "shin": proportions.legs, "hand": proportions.arms}
    trunk, broad, deep = proportions.trunk, proportions.shoulders, proportions.shoulders**THICKNESS
    maps = {
        "pelvis": np.diag([1, 1, trunk]),
        "spine": np.diag([broad**0.5, deep, trunk]),  # the waist is between hips and shoulders
        "chest": np.diag([broad, deep, trunk]),
        "neck": np.diag([1, 1, proportions.neck]),
        "head": proportions.head * np.eye(3),
    }
    linear = np.tile(np.eye(3), (len(JOINTS), 1, 1))
    for index, name in enumerate(JOINTS):
        side, _, bone = name.partition("_")
        if name in maps:
            linear[index] = maps[name]
        elif bone in factors:
            factor = factors[bone]
            linear[index] = factor**THICKNESS * np.eye(3)
            if bone in BONE_ENDS:
                along = joints[JOINT_INDEX[f"{side}_{BONE_ENDS[bone]}"]] - joints[index]
                linear[index] += (factor - factor**THICKNESS) * np.outer(along, along) / (along @ along)
    return linear


def _mapped(
    vertices: np.ndarray, topology: Topology, joints: np.ndarray, linear: np.ndarray, moved: np.ndarray
) -> np.ndarray:
    """Vertices (v, 3) float64 by the joints' maps, blended by the weights they are skinned with."""
    offsets = moved - np.einsum("jab,jb->ja", linear, joints)
    held = topology.joint_indices  # (v, 4)
    by_joint = np.einsum("vkab,vb->vka", linear[held], vertices) + offsets[held]
    return np.einsum("vk,vka->va", topology.joint_weights, by_joint)
