"""Driving poses in the proportions of the reference's persons, whom the calibration then carries to them."""

from dataclasses import replace

import numpy as np

from data.config import DrivingPoseConfig
from data.inputs import Driving, Reference
from data.poses.retarget import retarget
from tpc.config import CalibrationConfig, resolve
from tpc.estimation import ReferencePerson
from tpc.matching import match_persons

STAYED = 0.5  # pixels that nobody sees


def retargeted(
    reference: Reference,
    driving: Driving,
    pose: DrivingPoseConfig,
    config: CalibrationConfig,
    reference_map: np.ndarray | None = None,
) -> tuple[Driving, list[str]]:
    """The clip with poses by `data.poses.retarget.retarget`, and its notes; persons are matched as TPC matches them.

    Masks of the driving video fit its own poses alone, and are left out: the calibration draws silhouettes.
    """
    if pose.retarget == "off":
        return driving, []
    config, own = resolve(config), reference.poses
    threshold = config.reference_score_threshold
    persons = [
        ReferencePerson.of(keypoints, scores, own.size, None, threshold)
        for keypoints, scores in zip(own.keypoints[0], own.scores[0], strict=True)
    ]
    poses, notes = retarget(
        driving.poses,
        own,
        pose.retarget,
        slots=match_persons(persons, driving.poses, config, driving.cuts),
        height_ratio=pose.height_ratio,
        reference_map=reference_map,
        cuts=driving.cuts,
    )
    if (abs(poses.keypoints - driving.poses.keypoints) < STAYED).all():
        return driving, notes
    drawn = None if driving.drawn is None else poses.bridged(driving.cuts)
    filmed = driving.drawn or driving.poses
    return replace(driving, poses=poses, drawn=drawn, masks=None, filmed=filmed), notes
