"""Context windows: every frame covered, none wraps, weights sum to one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.windows import context_windows, window_weights


@given(num_frames=st.integers(1, 300), size=st.integers(1, 32), data=st.data())
@settings(max_examples=100, deadline=None)
def test_windows_cover_the_clip(num_frames, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    windows = context_windows(num_frames, size, overlap)
    assert windows[0].start == 0 and windows[-1].stop == num_frames
    assert all(len(window) == min(size, num_frames) for window in windows)
    for left, right in zip(windows, windows[1:], strict=False):
        assert right.start > left.start and left.stop - right.start >= overlap
    total = torch.zeros(num_frames)
    for window, weight in zip(windows, window_weights(windows, num_frames), strict=True):
        assert (weight > 0).all()
        total[window.start : window.stop] += weight
    assert torch.allclose(total, torch.ones(num_frames), atol=1e-5)


def test_known_windows():
    assert context_windows(24, 24, 4) == [range(24)]
    assert context_windows(25, 24, 4) == [range(24), range(1, 25)]
    assert context_windows(48, 24, 4) == [range(24), range(12, 36), range(24, 48)]


def test_weights_taper_towards_shared_ends_only():
    first, second = window_weights([range(0, 8), range(4, 12)], 12)
    assert torch.equal(first[:4], torch.ones(4)) and torch.equal(second[4:], torch.ones(4))
    assert (first[4:].diff() < 0).all() and (second[:4].diff() > 0).all()


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (8, 8), (8, -1)])
def test_impossible_windows_are_refused(size, overlap):
    with pytest.raises(ValueError, match="size|overlap"):
        context_windows(10, size, overlap)
