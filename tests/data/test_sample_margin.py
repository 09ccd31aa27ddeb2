"""References that keep a margin of frames from their clip."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import check_config
from core.errors import UserError
from data.clips.videos import VideoFolder
from data.poses.poses import Poses
from tests.filmed import figure_film, save_prepared_videos
from tests.items import same
from training.config import DataConfig
from training.data import make_dataset

SIZE, FRAMES = (160, 64), 120
LEFT = 4  # of the figure in the first frame; it moves by a pixel a frame


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    film = figure_film(FRAMES, SIZE, (LEFT, 8, 24, 48))
    return save_prepared_videos(tmp_path_factory.mktemp("margin"), {"long": film})


def poses_of(visible: np.ndarray) -> Poses:
    scores = np.repeat(visible[:, None, None], 17, axis=2).astype(float)
    return Poses(np.ones((len(visible), 1, 17, 2)), scores, SIZE, 25.0)


def pairs(folder: VideoFolder, visible: np.ndarray, draws: int) -> set[tuple[int, ...]]:
    """Drawn (reference, first frame, last frame) of a video in some of whose frames somebody is visible."""
    chosen = (folder._choose(poses_of(visible), np.random.default_rng(number)) for number in range(draws))
    return {(reference, frames[0], frames[-1]) for reference, *frames in chosen}


def between(reference: int, first: int, last: int) -> int:
    return max(first - reference, reference - last)


@settings(deadline=None, max_examples=40)
@given(
    visible=st.lists(st.booleans(), min_size=9, max_size=90),
    num_frames=st.integers(1, 3),
    stride=st.integers(1, 4),
    margin=st.integers(1, 50),
)
def test_references_keep_the_margin_or_are_as_far_as_can_be(root, visible, num_frames, stride, margin):
    visible = np.array(visible)
    shown = np.flatnonzero(visible)
    folder = VideoFolder(root, SIZE, num_frames, stride, sample_margin=margin)
    windows = [
        (start, start + folder.span - 1)
        for start in range(len(visible) - folder.span + 1)
        if visible[start : start + folder.span : stride].all()
    ]
    if not windows:
        with pytest.raises(UserError, match="show somebody throughout"):
            pairs(folder, visible, 1)
        return
    farthest = {window: max(between(reference, *window) for reference in shown) for window in windows}
    for reference, first, last in pairs(folder, visible, 40):
        far = farthest[first, last]
        # Where a clip takes all that is visible, its reference can only lie between its frames.
        assert visible[reference] and (far == 0 or between(reference, first, last) >= min(margin, far))
        assert far >= margin or max(farthest.values()) < margin


@pytest.mark.parametrize(("frames", "margin"), [(40, 30), (12, 30), (9, 0)])
def test_every_pair_at_the_margin_is_drawn(root, frames, margin):
    """Of a video too short for it every frame is a target still, with the end that is farther as its reference."""
    drawn = {
        (first, reference)
        for reference, first, _ in pairs(VideoFolder(root, SIZE, sample_margin=margin), np.ones(frames, bool), 3000)
    }
    every = {(a, b) for a in range(frames) for b in range(frames) if a != b}
    if margin < frames:
        assert drawn == {(a, b) for a, b in every if abs(a - b) >= margin}
    else:
        assert drawn == {(a, b) for a, b in every if abs(a - b) == max(a, frames - 1 - a)}


def test_items_keep_it_and_depend_on_seed_and_index_alone(root):
    config = DataConfig(source="videos", root=str(root), size=list(SIZE), crop="centre", seed=5, sample_margin=30)
    dataset = make_dataset(config, 150)
    distances = []
    for item in map(dataset.__getitem__, range(150)):
        distances.append(abs(float(item["reference_keypoints"][5, 0] - item["keypoints"][0, 5, 0])))
    assert min(distances) >= 29.9 and max(distances) > 80
    again = make_dataset(config, 1000)  # as a resumed run makes it
    assert all(same(dataset[index], again[index]) for index in (3, 70, 149))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sample_margin": -1}, "sample_margin=-1 must be an integer"),
        ({"sample_margin": 30}, "sample_margin=30 needs source=videos"),
        ({"sample_margin": 30, "source": "videos", "cache": "x"}, "no data.cache"),
    ],
)
def test_margins_that_could_not_hold_are_refused(change, named):
    with pytest.raises(UserError, match=named):
        check_config(DataConfig(**change))
