"""Several passes of the UNet in one batch: the results of one at a time, up to rounding."""

from dataclasses import replace

import pytest
import torch

from tests.devices.test_inference import Case, animated
from tests.small_animators import small_pipeline

# Passes at a time. Windows of two shots beside each other, which move; all branches of guidance of one window.
CASES = {
    "windows": (
        3,
        Case(
            {"preset": "release", "fill": "scene", "start": 300},
            {"solver": "unipc", "window_size": 2, "window_overlap": 1, "shift_windows": True, "cuts": [3]},
            recorded=True,
        ),
    ),
    "halves": (4, Case({"preset": "paper", "groups": 2, "attach": "replace"}, recorded=True)),
}


@pytest.mark.parametrize("kind", ["animate_anyone", "disco", "dream_pose"])
@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_one_pass_at_a_time(kind, name):
    passes, case = CASES[name]
    pipeline, calls = small_pipeline(kind), []
    hook = pipeline.animator.denoising_unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        expected, _ = animated(pipeline, kind, case)
        alone = len(calls)
        found, _ = animated(pipeline, kind, replace(case, arguments=case.arguments | {"passes_at_a_time": passes}))
    finally:
        hook.remove()
    assert 2 * (len(calls) - alone) <= alone
    for part, value in expected.items():
        torch.testing.assert_close(found[part], value, atol=2e-5, rtol=1e-4)
