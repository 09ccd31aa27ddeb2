"""Motion clips: conventions of the angles, limits, smoothness, plausibility, variety."""

import numpy as np
import pytest

from data.people.bodies import (
    ANKLE_HEIGHT,
    JOINT_INDEX,
    JOINTS,
    PARENTS,
    Pose,
    align_rotation,
    axis_rotation,
    load_people,
    neutral_pose,
    pose_joints,
    rotations_from_angles,
)
from data.people.motion import JOINT_LIMITS, MOTIONS, limited, random_motion

FPS = 24.0


@pytest.fixture(scope="module")
def body():
    return load_people().bodies["train_00"]


def joint_positions(body, pose: Pose) -> dict[str, np.ndarray]:
    transforms = pose_joints(body.joints, body.neutral, pose, body.height).astype(float)
    positions = np.einsum("jab,jb->ja", transforms[:, :, :3], body.joints) + transforms[:, :, 3]
    return dict(zip(JOINTS, positions, strict=True))


def with_angles(joint: str, angle: tuple[float, float, float]) -> Pose:
    angles = np.zeros((19, 3))
    angles[JOINT_INDEX[joint]] = angle
    return Pose(rotations_from_angles(angles), np.zeros(3, np.float32))


# The skeleton


def test_parents_come_first():
    assert all(parent < joint for joint, parent in enumerate(PARENTS))


def test_align_rotation_turns_one_direction_into_the_other():
    source, target = np.array([1.0, 2.0, -0.5]), np.array([0.3, -1.0, 0.8])
    rotation = align_rotation(source, target)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(rotation @ source / np.linalg.norm(source), target / np.linalg.norm(target), atol=1e-12)


def test_axis_rotation_is_right_handed():
    np.testing.assert_allclose(axis_rotation(2, np.pi / 2) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(axis_rotation(0, np.pi / 2) @ [0, 1, 0], [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(axis_rotation(1, np.pi / 2) @ [0, 0, 1], [1, 0, 0], atol=1e-12)


def test_neutral_pose_stands_upright_with_hanging_arms(body):
    joints = joint_positions(body, neutral_pose())
    assert joints["left_foot"][2] == pytest.approx(ANKLE_HEIGHT * body.height, abs=1e-5)
    assert joints["left_hand"][2] < joints["left_forearm"][2] < joints["left_upper_arm"][2]
    assert joints["head"][2] > 0.85 * body.height


@pytest.mark.parametrize(
    ("joint", "angle", "moved", "axis", "sign"),
    [
        ("left_upper_arm", (1, 0, 0), "left_hand", 1, -1),  # arm forward
        ("right_upper_arm", (1, 0, 0), "right_hand", 1, -1),
        ("left_upper_arm", (0, 1, 0), "left_hand", 0, 1),  # arm away from the body
        ("right_upper_arm", (0, 1, 0), "right_hand", 0, -1),
        ("left_forearm", (1, 0, 0), "left_hand", 1, -1),
        ("left_clavicle", (0, 0.4, 0), "left_upper_arm", 2, 1),
        ("right_clavicle", (0, 0.4, 0), "right_upper_arm", 2, 1),
        ("left_thigh", (1, 0, 0), "left_shin", 1, -1),
        ("left_shin", (1, 0, 0), "left_foot", 1, 1),  # the knee bends backward
        ("right_thigh", (0, 0.5, 0), "right_foot", 0, -1),
        ("spine", (0.5, 0, 0), "head", 1, -1),  # trunk forward
        ("spine", (0, 0.3, 0), "head", 0, 1),  # trunk to the person's left
        ("pelvis", (0, 0, 0.5), "left_upper_arm", 1, 1),  # facing the person's left takes the left shoulder back
    ],
)
def test_angles_mean_what_they_say(body, joint, angle, moved, axis, sign):
    before = joint_positions(body, neutral_pose())
    after = joint_positions(body, with_angles(joint, angle))
    shift = (after[moved] - after["pelvis"]) - (before[moved] - before["pelvis"])
    assert sign * shift[axis] > 0.02


def test_equal_angles_are_a_mirrored_pose(body):
    angles = np.zeros((19, 3))
    for side in ("left", "right"):
        angles[JOINT_INDEX[f"{side}_upper_arm"]] = (0.5, 0.8, 0.4)
        angles[JOINT_INDEX[f"{side}_forearm"]] = (1.1, 0, 0)
        angles[JOINT_INDEX[f"{side}_thigh"]] = (0.7, 0.3, 0.2)
        angles[JOINT_INDEX[f"{side}_shin"]] = (0.9, 0, 0)
    joints = joint_positions(body, Pose(rotations_from_angles(angles), np.zeros(3)))
    for bone in ("hand", "forearm", "foot", "shin"):
        np.testing.assert_allclose(joints[f"left_{bone}"], joints[f"right_{bone}"] * (-1, 1, 1), atol=0.01)


# The clips


@pytest.mark.parametrize("name", MOTIONS)
def test_rotations_are_rotations_and_repeatable(name):
    clip, again = (random_motion(np.random.default_rng(4), 30, FPS, name) for _ in range(2))
    assert clip.name == name and len(clip) == 30
    assert clip.rotations.shape == (30, 19, 3, 3) and clip.translations.shape == (30, 3)
    assert np.array_equal(clip.rotations, again.rotations) and np.array_equal(clip.translations, again.translations)
    products = clip.rotations @ np.swapaxes(clip.rotations, -1, -2)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(3), products.shape), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(clip.rotations), 1, atol=1e-5)


@pytest.mark.parametrize("name", MOTIONS)
def test_motion_is_smooth(name):
    """No joint turns faster than 14 radians a second, which a quick punch reaches."""
    for seed in range(10):
        rotations = random_motion(np.random.default_rng(seed), 72, FPS, name).rotations.astype(float)
        steps = np.swapaxes(rotations[:-1], -1, -2) @ rotations[1:]
        cosine = (np.trace(steps, axis1=-2, axis2=-1) - 1) / 2
        assert np.arccos(np.clip(cosine, -1, 1)).max() < 14 / FPS


@pytest.mark.parametrize("name", MOTIONS)
def test_limbs_do_not_enter_the_body(name, body):
    def distance(point, start, end):
        along = np.clip((point - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
        return np.linalg.norm(point - start - along * (end - start))

    for seed in range(4):
        clip = random_motion(np.random.default_rng(seed), 48, FPS, name)
        for frame in range(0, 48, 4):
            joints = joint_positions(body, clip.pose(frame))
            for side in ("left", "right"):
                for bone in ("hand", "forearm"):
                    assert distance(joints[f"{side}_{bone}"], joints["pelvis"], joints["neck"]) > 0.13
                skull = joints["head"] + (0, 0, 0.06)
                assert np.linalg.norm(joints[f"{side}_hand"] - skull) > 0.12
            assert np.linalg.norm(joints["left_hand"] - joints["right_hand"]) > 0.08
            assert distance(joints["left_foot"], joints["right_shin"], joints["right_foot"]) > 0.06


@pytest.mark.parametrize("name", MOTIONS)
def test_feet_stay_on_the_ground_unless_they_jump(name, body):
    clip = random_motion(np.random.default_rng(1), 48, FPS, name)
    lowest = []
    for frame in range(48):
        joints = joint_positions(body, clip.pose(frame))
        lowest.append(min(joints["left_foot"][2], joints["right_foot"][2]) / body.height - ANKLE_HEIGHT)
    np.testing.assert_allclose(lowest, clip.translations[:, 2], atol=1e-5)
    if name == "jump":
        assert max(lowest) > 0.05
    else:
        assert max(lowest) < 0.02


def test_poses_vary_within_a_clip(body):
    """Joints wander by more than 4 cm from their mean on average over all kinds of motion, the still ones included."""
    spreads = []
    for seed, name in enumerate(MOTIONS):
        clip = random_motion(np.random.default_rng(seed), 72, FPS, name)
        joints = np.array([list(joint_positions(body, clip.pose(frame)).values()) for frame in range(0, 72, 6)])
        spreads.append(np.linalg.norm(joints - joints.mean(0), axis=-1).mean())
    assert np.mean(spreads) > 0.07 and min(spreads) > 0.01


def facing(clip) -> np.ndarray:
    front = clip.rotations[:, 0] @ np.array([0, -1, 0], np.float32)
    return np.unwrap(np.arctan2(front[:, 0], -front[:, 1]))


def test_people_mostly_face_the_camera():
    rng = np.random.default_rng(0)
    angles = [np.abs(facing(random_motion(rng, 2, FPS, name))[0]) for _ in range(20) for name in MOTIONS]
    assert 0.75 < np.mean(np.array(angles) < np.radians(50)) < 0.99


def test_turn_goes_round():
    turned = [np.ptp(facing(random_motion(np.random.default_rng(seed), 120, FPS, "turn"))) for seed in range(5)]
    assert min(turned) > np.pi


def test_angles_are_kept_within_the_limits():
    angles = np.random.default_rng(0).normal(0, 3, (50, 19, 3))
    kept = limited(angles)
    for name in JOINTS:
        kind = name.removeprefix("left_").removeprefix("right_")
        for axis, (low, high) in enumerate(JOINT_LIMITS[kind]):
            values = kept[:, JOINT_INDEX[name], axis]
            assert low <= values.min() and values.max() <= high
    assert np.array_equal(limited(kept), kept)


def test_unknown_motion_is_an_error():
    with pytest.raises(ValueError, match="moonwalk"):
        random_motion(np.random.default_rng(0), 2, FPS, "moonwalk")
