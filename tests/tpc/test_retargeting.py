"""Calibration to retargeted poses: who is whom, what becomes of the masks, and the commands that ask for it."""

import cv2
import numpy as np
import pytest

from benchmarks.retargeting import cases
from data.config import DrivingPoseConfig
from data.inputs import Driving, Reference
from data.people.bodies import load_people
from data.poses.poses import Poses
from data.poses.retarget import retarget
from tpc import CalibrationConfig
from tpc.__main__ import main
from tpc.retargeting import retargeted

SIZE = (512, 512)


@pytest.fixture(scope="module")
def inputs():
    """A child in two places of the reference, and two drivers in the other order."""
    case = next(cases(load_people(), "child", 1, 6, 3))
    own, driving = case.pictures["standing"], case.driving
    sides = [0.4 * own + [20, 100], 0.45 * own + [260, 100]]
    drivers = [0.5 * driving + [255, 0], 0.4 * driving + [0, 60]]
    still, moving = (Poses(np.stack(p, 1), np.ones((len(p[0]), 2, 17)), SIZE, 8.0) for p in (sides, drivers))
    masks = np.ones((6, 2, 512, 512), bool)
    return Reference(np.zeros((512, 512, 3), np.uint8), still, None), Driving(None, moving, masks, drawn=moving)


def pose(**keys) -> DrivingPoseConfig:
    return DrivingPoseConfig(retarget="bones", **keys)


def test_persons_are_matched_as_the_calibration_does(inputs):
    reference, driving = inputs
    result, notes = retargeted(reference, driving, pose(), CalibrationConfig())
    expected, _ = retarget(driving.poses, reference.poses, slots=np.tile([1, 0], (6, 1)))
    np.testing.assert_allclose(result.poses.keypoints, expected.keypoints)
    np.testing.assert_allclose(result.drawn.keypoints, expected.keypoints)
    assert (result.masks, notes) == (None, [])
    given, _ = retargeted(reference, driving, pose(), CalibrationConfig(match="given"))
    expected, _ = retarget(driving.poses, reference.poses, slots=np.tile([0, 1], (6, 1)))
    np.testing.assert_allclose(given.poses.keypoints, expected.keypoints)


def test_what_stays_keeps_its_masks(inputs):
    reference, driving = inputs
    assert retargeted(reference, driving, DrivingPoseConfig(), CalibrationConfig()) == (driving, [])
    alone = Driving(None, driving.poses.person(0), driving.masks[:, :1])
    own = Reference(reference.image, alone.poses[2], None)
    assert retargeted(own, alone, pose(), CalibrationConfig()) == (alone, [])
    assert retargeted(own, alone, pose(height_ratio=1.2), CalibrationConfig())[0].masks is None


def test_the_command_calibrates_to_the_retargeted_poses(inputs, tmp_path, capsys):
    reference, driving = inputs
    cv2.imwrite(str(tmp_path / "r.png"), reference.image)
    still, moving = reference.poses.person(0), driving.poses.person(0)
    Poses(still.keypoints, still.scores * (np.arange(17) < 13), SIZE, 1.0).save(tmp_path / "r.npz")
    moving.save(tmp_path / "d.npz")
    paths = [f"reference={tmp_path}/r.png", f"reference_poses={tmp_path}/r.npz", f"driving_poses={tmp_path}/d.npz"]
    main([*paths, f"output={tmp_path}/out", "max_side=64", "pose.retarget=bones"])
    assert "note: person 0: the reference does not show thigh, shin; taken" in capsys.readouterr().out
    assert "retarget: bones" in (tmp_path / "out" / "config.yaml").read_text()
