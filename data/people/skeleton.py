"""The skeleton of the rendered people: 19 joints, angles in anatomical terms, forward kinematics.

World axes of a person: x towards the person's left, y towards the person's back, z up, metres. In the neutral pose
the person stands upright and looks along -y, arms hanging, and every joint rotation is the identity.
"""

from dataclasses import dataclass

import numpy as np

JOINTS = (
    "pelvis", "spine", "chest", "neck", "head",
    "left_clavicle", "left_upper_arm", "left_forearm", "left_hand",
    "right_clavicle", "right_upper_arm", "right_forearm", "right_hand",
    "left_thigh", "left_shin", "left_foot",
    "right_thigh", "right_shin", "right_foot",
)  # fmt: skip
PARENTS = (-1, 0, 1, 2, 3, 2, 5, 6, 7, 2, 9, 10, 11, 0, 13, 14, 0, 16, 17)
JOINT_INDEX = {name: index for index, name in enumerate(JOINTS)}

# Where the limbs of the neutral pose point. The bodies are stored with spread arms and legs, which skin best.
NEUTRAL_DIRECTIONS = {
    "upper_arm": (0.14, 0.02, -1.0),
    "forearm": (0.06, -0.06, -1.0),
    "thigh": (0.03, 0.0, -1.0),
    "shin": (0.02, 0.03, -1.0),
}

ANKLE_HEIGHT = 0.053  # height of the ankles above the soles in body heights


@dataclass(frozen=True)
class Pose:
    """One pose of a person."""

    rotations: np.ndarray  # (19, 3, 3) of every joint relative to its parent; the pelvis turns the whole person
    # (3,) in body heights: x and y of the pelvis from where the person stands, and the height of the lower ankle above
    # its standing height (0 = on the ground).
    translation: np.ndarray


def neutral_pose() -> Pose:
    """Pose of standing upright, arms hanging."""
    return Pose(np.tile(np.eye(3, dtype=np.float32), (len(JOINTS), 1, 1)), np.zeros(3, np.float32))


def axis_rotation(axis: int, angle: np.ndarray) -> np.ndarray:
    """Right-handed rotation matrices (..., 3, 3) about axis 0, 1 or 2 by `angle` (...) in radians."""
    angle = np.asarray(angle, np.float64)
    matrix = np.zeros((*angle.shape, 3, 3))
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix[..., axis, axis] = 1
    matrix[..., first, first] = matrix[..., second, second] = np.cos(angle)
    matrix[..., second, first] = np.sin(angle)
    matrix[..., first, second] = -np.sin(angle)
    return matrix


def rotations_from_angles(angles: np.ndarray) -> np.ndarray:
    """Joint rotations (..., 19, 3, 3) from anatomical angles (..., 19, 3) in radians: `bend`, `side` and `twist`.

        bend: trunk, neck and head forward; arm, forearm and thigh forward (flexion); shin backward (knee flexion);
            toes up.
        side: limbs away from the body's middle; clavicle up; trunk and head towards the person's left.
        twist: limbs outward (external rotation); trunk, head and pelvis towards the person's left.
    A positive number means the same for the left and the right limb, so equal angles are a mirrored pose.
    """
    signs = np.array([_angle_signs(name) for name in JOINTS])  # (19, 3)
    bend, side, twist = np.moveaxis(angles * signs, -1, 0)
    return (axis_rotation(1, side) @ axis_rotation(0, bend) @ axis_rotation(2, twist)).astype(np.float32)


def _angle_signs(name: str) -> tuple[int, int, int]:
    """Signs that turn anatomical angles into right-handed angles about x, y and z."""
    if "_" not in name:
        return 1, 1, 1
    mirror = 1 if name.startswith("left") else -1
    bend = 1 if name.endswith("shin") else -1
    return bend, -mirror, mirror


def align_rotation(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Smallest rotation (3, 3) that turns direction `source` (3,) into `target` (3,), not its opposite."""
    source, target = source / np.linalg.norm(source), target / np.linalg.norm(target)
    x, y, z = np.cross(source, target)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + cross + cross @ cross / (1 + source @ target)


def rest_to_neutral(joints: np.ndarray) -> np.ndarray:
    """Rotations (19, 3, 3) that bring each bone of a body at rest, with joints (19, 3), to the neutral pose."""
    rotations = np.tile(np.eye(3), (len(JOINTS), 1, 1))
    for side, mirror in (("left", 1.0), ("right", -1.0)):
        for bone, end in (("upper_arm", "forearm"), ("forearm", "hand"), ("thigh", "shin"), ("shin", "foot")):
            here, there = JOINT_INDEX[f"{side}_{bone}"], JOINT_INDEX[f"{side}_{end}"]
            target = np.array(NEUTRAL_DIRECTIONS[bone]) * (mirror, 1, 1)
            rotations[here] = align_rotation(joints[there] - joints[here], target)
        rotations[JOINT_INDEX[f"{side}_hand"]] = rotations[JOINT_INDEX[f"{side}_forearm"]]
    return rotations


def pose_joints(joints: np.ndarray, neutral: np.ndarray, pose: Pose, height: float) -> np.ndarray:
    """Skinning transforms (19, 3, 4), rest -> world, of a posed body.

    Args:
        joints: (19, 3) at rest, metres, soles at z = 0.
        neutral: (19, 3, 3) from `rest_to_neutral`.
        height: of the standing body, metres.
    """
    world = np.empty((len(JOINTS), 3, 3))
    position = np.zeros((len(JOINTS), 3))
    for joint, parent in enumerate(PARENTS):
        if parent < 0:
            world[joint] = pose.rotations[joint]
            continue
        world[joint] = world[parent] @ pose.rotations[joint]
        bone = neutral[parent] @ (joints[joint] - joints[parent])  # in the parent's axes
        position[joint] = position[parent] + world[parent] @ bone
    # The ground is z = 0: the lower ankle is put at its standing height, plus the translation's.
    ankles = [JOINT_INDEX["left_foot"], JOINT_INDEX["right_foot"]]
    position[:, :2] += pose.translation[:2] * height
    position[:, 2] += ANKLE_HEIGHT * height + pose.translation[2] * height - position[ankles, 2].min()
    transforms = np.empty((len(JOINTS), 3, 4), np.float32)
    transforms[:, :, :3] = world @ neutral
    transforms[:, :, 3] = position - np.einsum("jab,jb->ja", transforms[:, :, :3], joints)
    return transforms
