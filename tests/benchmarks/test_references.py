"""Benchmarks of references for many frames, and of what fills their gaps."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.config import SegmentsConfig
from benchmarks.references.scene_filling import FILLS
from benchmarks.references.segments import geometry, measured, row
from evaluation.misaligned_clips import draw, read_manifest
from tests.tpc_bodies import EVERY_POINT, body, place

DRIVER = place(body(np.random.default_rng(0)), 100, 0, (64, 64))


def test_height_angle_and_feet_of_a_placed_person():
    assert geometry(DRIVER, DRIVER, EVERY_POINT) == pytest.approx((1, 0, 0), abs=1e-6)
    height, angle, feet = geometry(DRIVER + [3, 4], DRIVER, EVERY_POINT)
    assert (height, angle) == pytest.approx((1, 0), abs=1e-6) and feet == pytest.approx(0.05, rel=0.1)
    turned = place(DRIVER, 1.25, np.radians(20), (64, 64))
    height, angle, _ = geometry(turned, DRIVER, EVERY_POINT)
    assert height == pytest.approx(1.25) and abs(angle) == pytest.approx(20)


def test_references_of_a_turned_clip_are_measured():
    manifest = replace(read_manifest("rotation", "development"), frames=3)
    found = measured(draw(manifest, manifest.clips[0]), SegmentsConfig(frames=3, length=2, size=48))
    cells = {key: row(np.array(values, np.float64)) for key, values in found.items()}
    assert len(found["procrustes", "2", "nearest"]) == len(found["articulated", "all", "first"]) == 3
    assert sum(own for own, *_ in found["procrustes", "2", "nearest"]) == 2  # two segments
    angles = {key: np.abs([frame[2] for frame in found[key]]).max() for key in found}
    assert angles["uncalibrated", "", ""] > 40 and angles["procrustes", "1", "nearest"] < 15
    assert cells["uncalibrated", "", ""][0] == "" and cells["procrustes", "all", "nearest"][2].count("/") == 2


@pytest.mark.parametrize("where", FILLS)
def test_fills_change_nothing_that_is_known(where):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[20:40, 24:36] = True
    if where == "beyond the edges":
        mask = np.ones((64, 64), bool)
        mask[12:52, 12:52] = False
    inner = ~mask if where == "the place of a person" else np.pad(np.ones((32, 32), bool), 16)  # edges are softened
    for name, fill in FILLS[where].items():
        filled = fill(np.where(mask[..., None], np.uint8(0), image), mask)
        np.testing.assert_array_equal(filled[inner], image[inner], err_msg=name)
        assert filled[mask].mean() > 60, name
