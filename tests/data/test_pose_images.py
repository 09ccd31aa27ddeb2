"""Pose images of filmed clips from a folder: found by name, cut like the clip's images, never averaged."""

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from data.clips.videos import VideoFolder, pose_images_of, read_pose_images
from data.preparation.clips import list_clips
from data.transforms import fit_matrix
from tests.filmed import figure_film, save_prepared_videos
from training.config import DataConfig
from training.data import make_dataset

SIZE = (24, 40)  # (width, height)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return save_prepared_videos(tmp_path_factory.mktemp("filmed") / "videos", {"a": figure_film()})


@pytest.fixture(scope="module")
def clip(videos):
    (clip,), _ = list_clips(videos)
    return clip


def draw(clip, folder, factor: int = 1, frames: int | None = None) -> None:
    """Frame k of a clip has the part k in its left half and nothing in the right."""
    for number in range(clip.frames if frames is None else frames):
        image = np.zeros((clip.size[1] * factor, clip.size[0] * factor, 3), np.uint8)
        image[:, : image.shape[1] // 2] = (number, 100, 200)
        path = folder / clip.name / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def test_frames_are_the_clips_own_and_values_stay(clip, tmp_path):
    draw(clip, tmp_path)
    source = pose_images_of(tmp_path, clip)
    found = read_pose_images(source, clip, [3, 1], fit_matrix(clip.size, SIZE), SIZE)
    assert found.shape == (3, 2, SIZE[1], SIZE[0])
    assert [set(part.flatten().tolist()) for part in (found[0] * 255).round()] == [{0, 3}, {0, 1}]
    assert set((found[1] * 255).round().flatten().tolist()) == {0, 100}


def test_images_of_another_resolution_cover_the_same(clip, tmp_path):
    draw(clip, tmp_path / "one")
    draw(clip, tmp_path / "two", factor=2)
    matrix = fit_matrix(clip.size, SIZE)
    parts = [
        read_pose_images(pose_images_of(tmp_path / name, clip), clip, [2], matrix, SIZE) for name in ("one", "two")
    ]
    assert torch.equal(*parts)


def test_items_take_them_in_place_of_figures(videos, clip, tmp_path):
    draw(clip, tmp_path)
    drawn, given = (
        VideoFolder(videos, size=SIZE, num_frames=2, crop="centre", pose_images=folder)[0]
        for folder in (None, tmp_path)
    )
    assert torch.equal(drawn["frames"], given["frames"]) and drawn["poses"].shape == given["poses"].shape
    first = round(given["poses"][0].amax(dim=(1, 2))[0].item() * 255)
    assert (given["poses"][0].amax(dim=(1, 2)) * 255).round().tolist() == [first, first + 1]


def test_what_is_wrong_is_named(videos, clip, tmp_path):
    with pytest.raises(UserError, match="without pose images"):
        VideoFolder(videos, size=SIZE, crop="centre", pose_images=tmp_path)
    draw(clip, tmp_path, frames=clip.frames - 1)
    with pytest.raises(UserError, match=f"has {clip.frames - 1} pose images"):
        read_pose_images(pose_images_of(tmp_path, clip), clip, [0], np.eye(3), SIZE)
    for settings in ({"source": "rendered"}, {"source": "videos", "root": str(videos), "cache": str(tmp_path / "c")}):
        with pytest.raises(UserError, match="data.pose_images=.* needs data.source=videos, and no data.cache"):
            make_dataset(DataConfig(pose_images=str(tmp_path), **settings), 1)
