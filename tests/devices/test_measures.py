"""Recorded attention as the viewer shows it, on a second device.

Networks of metrics are on it in `tests/evaluation/test_feature_networks.py`.
"""

from copy import deepcopy

import numpy as np

from evaluation.attention.recorded_runs import record_both
from inference.config import SamplingConfig
from tests.second_device import SECOND, second_device
from tests.viewed import rendered_inputs
from tpc import CalibrationConfig


def test_runs_of_the_viewer(tiny_pipeline, tmp_path):
    inputs = rendered_inputs(tmp_path)
    sampling = SamplingConfig(size=[32, 32], num_frames=3, steps=1, guidance_scale=1.0)
    expected = record_both(tiny_pipeline, *inputs, sampling, CalibrationConfig())
    with second_device(double=False):
        found = record_both(deepcopy(tiny_pipeline).to(SECOND), *inputs, sampling, CalibrationConfig())
    for name, side in expected.sides.items():
        # The VAE decodes other numbers of frames at a time, which rounds otherwise.
        assert np.abs(side.frames.astype(int) - found.sides[name].frames).max() <= 1
        for layer, maps in side.recorded.maps.items():
            assert np.array_equal(maps, found.sides[name].recorded.maps[layer])
