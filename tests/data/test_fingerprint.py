"""Fingerprints: any change of content is seen, a mere copy is not."""

import os

import numpy as np
import pytest

from core.errors import UserError
from data.preparation.manifest import Fingerprint
from tests.filmed import save_frames


def test_content_decides_and_time_is_only_a_short_cut(tmp_path):
    file = tmp_path / "a.mp4"
    file.write_bytes(b"abc")
    stored = Fingerprint.of(file)
    assert stored.matches(file) and stored.is_fresh(file)
    os.utime(file, ns=(5, 5))
    assert stored.matches(file) and not stored.is_fresh(file)
    file.write_bytes(b"abd")
    assert not stored.matches(file)
    file.unlink()
    assert not stored.matches(file) and not stored.is_fresh(file)
    with pytest.raises(UserError, match="does not exist"):
        Fingerprint.of(file)


def test_folders_of_openpose_files_count_too(tmp_path):
    (tmp_path / "0.json").write_text("{}")
    (tmp_path / "1.json").write_text("{}")
    stored = Fingerprint.of(tmp_path)
    (tmp_path / "1.json").write_text("[]")
    assert not stored.matches(tmp_path)


@pytest.mark.parametrize("change", ["content", "name", "more", "fewer"])
def test_folders_of_frames_are_their_images_and_names(tmp_path, change):
    frames = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    folder = save_frames(tmp_path / "frames", frames)
    stored = Fingerprint.of(folder)
    (folder / "notes.txt").write_text("not a frame")
    assert stored.matches(folder)
    if change == "content":
        save_frames(folder, frames[::-1])
    elif change == "name":
        (folder / "0001.png").rename(folder / "0009.png")
    elif change == "more":
        save_frames(folder, frames[:1], start=4)
    else:
        (folder / "0002.png").unlink()
    assert not stored.matches(folder)
