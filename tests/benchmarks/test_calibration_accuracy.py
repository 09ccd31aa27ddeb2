"""The benchmark of calibration against a known change of the camera."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from benchmarks.calibration_accuracy import estimate_pair, measure
from benchmarks.calibration_pairs import SIZE, rendered_pairs
from tpc.config import best


@pytest.fixture(scope="module")
def pairs():
    return list(rendered_pairs(3))


def test_reported_iou_is_that_of_the_pixels_not_of_the_samples_it_was_maximised_on(pairs):
    config, rng = replace(best(), min_iou=0.0), np.random.default_rng(0)
    measured = measure(pairs, config, same_pose=False, noise=0.0, seed=0)
    differences = []
    for iou, pair in zip(measured.ious, pairs, strict=True):
        found = estimate_pair(pair, pair.other_pose, config, 0.0, rng)[1]
        mask = pair.reference.mask.astype(np.float32)
        warped = cv2.warpAffine(mask, found.matrix[:2], SIZE, flags=cv2.INTER_AREA) >= 0.5
        goal = pair.other_pose.mask
        assert iou == pytest.approx((warped & goal).sum() / (warped | goal).sum(), abs=2e-3)
        differences.append(abs(iou - found.iou))
    assert max(differences) > 6e-3
