"""The benchmark of calibration against a known change of the camera."""

import json

import cv2
import numpy as np
import pytest

from benchmarks.calibration_accuracy import BASE, Condition, Method, estimate_pair, main, measure, methods
from benchmarks.calibration_pairs import SIZE, rendered_pairs
from evaluation.config import MASKS


@pytest.fixture(scope="module")
def pairs():
    return list(rendered_pairs(3))


def test_reported_iou_is_that_of_the_pixels_not_of_the_samples_it_was_maximised_on(pairs):
    measured = measure(pairs, Method(BASE), Condition(same_pose=False), seed=0)
    differences = []
    for iou, pair in zip(measured.ious, pairs, strict=True):
        found = estimate_pair(pair, pair.other_pose, Method(BASE), Condition(False), np.random.default_rng(0))[1]
        mask = pair.reference.mask.astype(np.float32)
        warped = cv2.warpAffine(mask, found.matrix[:2], SIZE, flags=cv2.INTER_AREA) >= 0.5
        goal = pair.other_pose.mask
        assert iou == pytest.approx((warped & goal).sum() / (warped | goal).sum(), abs=2e-3)
        differences.append(abs(iou - found.iou))
    assert max(differences) > 6e-3


def test_masks_change_what_is_estimated_and_not_what_it_is_measured_against(pairs):
    condition = Condition(same_pose=True, share=0.02)
    found = {}
    for name, method in {m: Method(BASE, m) for m in MASKS}.items():
        found[name] = estimate_pair(pairs[0], pairs[0].same_pose, method, condition, np.random.default_rng(0))
        np.testing.assert_array_equal(found[name][0].keypoints, found["exact"][0].keypoints)
    areas = [reference.silhouette.sample_area * reference.silhouette.samples.number for reference, _ in found.values()]
    assert len(set(areas)) == 3
    assert [found[name][0].silhouette.drawn for name in MASKS] == [False, False, True]
    exact = measure(pairs, Method(BASE), Condition(same_pose=True), seed=0)
    drawn = measure(pairs, Method(BASE, "drawn"), Condition(same_pose=True), seed=0)
    np.testing.assert_allclose(drawn.errors, 0, atol=1e-3)
    np.testing.assert_allclose(drawn.ious, exact.ious, atol=1e-3)  # both of the exact masks


def test_every_transform_has_rows_of_its_own_subsets_and_of_all_keypoints():
    rules, transforms = methods()
    kinds = {(method.config.transform, method.config.keypoints) for method in transforms.values()}
    assert len(transforms) == len(kinds) == 6
    assert {method.masks for name, method in rules.items() if name.startswith("exhaustive")} == set(MASKS)


def test_tables_and_numbers_are_written(tmp_path, capsys):
    main(["pairs=2", "clips=1", f"output={tmp_path}"])
    numbers = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert len(numbers) == 6 and all(len(rows) == 15 for rows in numbers.values())
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert text.strip() in capsys.readouterr().out and text.count("| exhaustive, drawn masks |") == 2
