"""Presets of the calibration: what each fills in, and choices that are refused."""

from dataclasses import replace

import numpy as np
import pytest

from core.errors import UserError
from tests.tpc_bodies import SIZE, image, poses, reference, walk
from tpc import CalibrationConfig, calibrate
from tpc.config import best, paper, release, resolve
from tpc.trajectory import group_of_frames
from tpc.warping import ImagePyramid, quad_mask


def test_presets_are_complete_and_choices_are_checked():
    for preset in (best(), paper(), release()):
        assert None not in vars(preset).values() and resolve(preset) == preset
    assert resolve(None) == best()
    assert resolve(None, masked=False) == replace(best(), transform="procrustes")  # drawn silhouettes bend badly
    bent = CalibrationConfig(transform="articulated")
    assert resolve(bent, masked=False) == best() and resolve(paper(), masked=False) == paper()
    assert resolve(CalibrationConfig(preset="paper", groups=7)).groups == 7
    assert resolve(CalibrationConfig(preset="paper", groups=0)).groups == 0
    for options, text in (
        ({"preset": "papr"}, "tpc.preset"),
        ({"keypoints": "feet"}, "tpc.keypoints"),
        ({"min_keypoints": 1}, "tpc.min_keypoints"),
        ({"min_scale": 2.0, "max_scale": 1.0}, "tpc.min_scale"),
        ({"smoothing": float("nan")}, "tpc.smoothing"),
        ({"start": -2}, "tpc.start=-2 must be an integer, -1 to"),
        ({"preset": "paper", "start": 300}, "start=300 begins with the background.*fill=reference does not"),
    ):
        with pytest.raises(UserError, match=text):
            resolve(CalibrationConfig(**options))


def test_visibility_that_needs_another_fill_is_refused():
    with pytest.raises(UserError, match="visibility=scene .* tpc.fill=black does not"):
        resolve(CalibrationConfig(fill="black", visibility="scene"))
    with pytest.raises(UserError, match="visibility=scene"):
        resolve(CalibrationConfig(preset="paper", visibility="scene"))


def test_paper_leaves_the_warped_background_and_makes_groups_of_four():
    points = reference()
    driving, _ = walk(points, 12)
    found = calibrate(image(), poses(points[None, None]), poses(driving[:, None]), SIZE, CalibrationConfig("paper"))
    np.testing.assert_array_equal(group_of_frames(12, found.config.groups), np.repeat(range(3), 4))
    everything = ImagePyramid(image()).warp(found.frame_map @ found.matrices[5, 0], SIZE)
    shown = quad_mask(found.frame_map @ found.matrices[5, 0], SIZE, SIZE)
    np.testing.assert_array_equal(found.images[found.member[5, 0]], everything * shown[..., None])
    assert (shown & ~found.masks[found.member[5, 0]]).any()
