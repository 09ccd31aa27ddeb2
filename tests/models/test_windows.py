"""Context windows: every frame covered, none wraps, weights sum to one. Segments: every frame new once."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from models.images import ImageSequence
from models.sampling import context_windows, step_shift, window_weights
from models.segments import SegmentImages, clip_segments


@given(
    num_frames=st.integers(1, 300),
    size=st.integers(1, 32),
    shift=st.sampled_from([0.0, 0.25, 0.5, 0.75]) | st.floats(0, 1, exclude_max=True),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_windows_cover_the_clip(num_frames, size, shift, data):
    overlap = data.draw(st.integers(0, size - 1))
    windows = context_windows(num_frames, size, overlap, shift)
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


@pytest.mark.parametrize("num_frames", [1, 2, 24, 25, 2000])
def test_clips_of_any_length_are_planned(num_frames):
    windows = context_windows(num_frames, 24, 4)
    assert len(windows) == max(1, -(-(num_frames - 24) // 20) + 1)
    assert {frame for window in windows for frame in window} == set(range(num_frames))


def test_steps_shift_the_seams():
    plans = [context_windows(96, 24, 4, step_shift(step)) for step in range(30)]
    starts = {window.start for plan in plans for window in plan}
    assert plans[0] == context_windows(96, 24, 4) and len(starts) > 40
    assert all(0 <= len(plan) - len(plans[0]) <= 1 for plan in plans)
    with pytest.raises(ValueError, match="shift"):
        context_windows(96, 24, 4, 1.0)


def test_weights_taper_towards_shared_ends_only():
    first, second = window_weights([range(0, 8), range(4, 12)], 12)
    assert torch.equal(first[:4], torch.ones(4)) and torch.equal(second[4:], torch.ones(4))
    assert (first[4:].diff() < 0).all() and (second[:4].diff() > 0).all()


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (8, 8), (8, -1)])
def test_impossible_windows_are_refused(size, overlap):
    with pytest.raises(ValueError, match="size|overlap"):
        context_windows(10, size, overlap)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 11), st.sets(st.integers(1, 59)))
@settings(max_examples=100, deadline=None)
def test_every_frame_is_new_in_one_segment(frames, size, carried, cuts):
    assume(carried < size)
    cuts = sorted(cut for cut in cuts if cut < frames)
    segments = clip_segments(frames, size, carried, cuts)
    assert [frame for segment in segments for frame in segment.new] == list(range(frames))
    for before, segment in pairwise([None, *segments]):
        assert len(segment.frames) == len(segment.sources()) == size
        assert set(segment.sources()) <= set(segment.shot) and segment.sources()[0] == segment.frames.start
        if segment.frames.start in (0, *cuts):
            assert segment.carried == 0
        else:  # it begins with the last frames of the one before, in the same shot
            assert segment.carried == carried and segment.shot == before.shot
            assert segment.frames[:carried] == before.frames[size - carried :]


def test_beyond_the_end_a_shot_is_seen_backwards():
    assert clip_segments(5, 10, 1)[0].sources() == [0, 1, 2, 3, 4, 3, 2, 1, 0, 1]
    assert clip_segments(7, 4, 1, [5])[-1].sources() == [5, 6, 5, 6]
    assert clip_segments(1, 3, 0)[0].sources() == [0, 0, 0]
    shades = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 3, 2, 2) / 10
    poses = ImageSequence(shades, (2, 2), torch.device("cpu"), torch.float32)
    decoded = torch.arange(4.0).view(4, 1, 1, 1)
    last = clip_segments(7, 4, 1)[1]
    images = SegmentImages(poses, last, None, decoded)
    assert images[range(4)][:, 0, 0, 0].tolist() == pytest.approx([0.3, 0.4, 0.5, 0.6]) and images.faces is None
    assert images.carried.tolist() == decoded[3:].tolist()
    assert SegmentImages(poses, clip_segments(7, 7, 1)[0], poses, None).images is poses.images, "no copy of a clip"
