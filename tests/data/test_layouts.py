"""Layouts of data sets: each is recognised, and its clips, parts, masks and poses are found."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from data.preparation.checks import frame_order_findings
from data.preparation.layouts import VIDEO_SUFFIXES, SourceClip, detect_layout, find_clips, other_files, video_named
from tests.filmed import figure_film, save_frames, save_video

FILM = figure_film(frames=2, size=(16, 24), box=(4, 4, 6, 12))


def films(root: Path, *names: str) -> None:
    for name in names:
        save_video(root / f"{name}.mp4", FILM)


def found(source: Path, layout: str = "auto") -> dict[str, SourceClip]:
    return {clip.name: clip for clip in find_clips(source, layout)}


def test_moore_lists_name_videos_relative_to_where_the_list_was_made(tmp_path):
    films(tmp_path / "videos", "a", "sub/b")
    entries = [
        {"video_path": f"./videos/{name}.mp4", "kps_path": f"./videos_dwpose/{name}.mp4"} for name in ("a", "b")
    ]
    entries[1]["video_path"] = str(tmp_path / "videos/sub/b.mp4")
    entries.append({"video_path": "./videos/gone.mp4"})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "fashion_meta.json").write_text(json.dumps(entries))
    clips = found(tmp_path / "data")
    assert clips["videos/a"].layout == "moore" and clips["videos/a"].video.samefile(tmp_path / "videos/a.mp4")
    assert clips["sub/b"].video.is_file() and clips["sub/b"].poses is None
    assert not clips["videos/gone"].video.exists()  # stays in the list, so that it is reported
    assert found(tmp_path / "data" / "fashion_meta.json").keys() == clips.keys()


def test_musepose_lists_lie_in_meta_and_rendered_poses_are_no_clips(tmp_path):
    films(tmp_path, "UBC_fashion/test/a", "UBC_fashion/test_dwpose/a")
    (tmp_path / "meta").mkdir()
    entry = {"video_path": "./UBC_fashion/test/a.mp4", "kps_path": "./UBC_fashion/test_dwpose/a.mp4"}
    (tmp_path / "meta" / "fashion_meta.json").write_text(json.dumps([entry]))
    (clip,) = find_clips(tmp_path)
    assert (clip.layout, clip.name) == ("musepose", "test/a") and clip.video.is_file()


def test_every_suffix_of_a_video_is_a_clip_and_the_rest_is_named(tmp_path):
    films(tmp_path, "take:2", "two words", "дубль")
    for suffix in VIDEO_SUFFIXES:
        (tmp_path / f"clip_{suffix[1:]}{suffix.upper()}").write_bytes((tmp_path / "two words.mp4").read_bytes())
    stills = [Image.fromarray(frame) for frame in FILM.frames]
    for suffix in ("webp", "png"):
        stills[0].save(tmp_path / f"moves_{suffix}.{suffix}", save_all=True, append_images=stills[1:])
        stills[0].save(tmp_path / f"still.{suffix}")
    for name in ("notes.txt", "photo.heic", ".hidden", "dance.npz"):
        (tmp_path / name).touch()
    clips = find_clips(tmp_path)
    names = {"take:2", "two words", "дубль", "moves_webp", "moves_png", *(f"clip_{end[1:]}" for end in VIDEO_SUFFIXES)}
    assert {clip.name for clip in clips} == names
    assert [file.name for file in other_files(tmp_path, clips)] == [
        "notes.txt",
        "photo.heic",
        "still.png",
        "still.webp",
    ]
    assert video_named(tmp_path / "clip_ts") == tmp_path / "clip_ts.TS" and video_named(tmp_path / "notes") is None


@pytest.mark.parametrize("folder", ["", "TikTok_dataset"])
def test_tiktok_folders_have_frames_masks_and_openpose_files(tmp_path, folder):
    for name in ("00001", "00010"):
        save_frames(tmp_path / folder / name / "images", FILM.frames)
        save_frames(tmp_path / folder / name / "masks", FILM.masks)
        save_frames(tmp_path / folder / name / "densepose", FILM.frames)
    (tmp_path / folder / "00001" / "openpose_json").mkdir()
    clips = found(tmp_path)
    assert list(clips) == ["00001", "00010"] and clips["00001"].layout == "tiktok"
    assert clips["00010"].video.name == "images" and clips["00010"].masks.name == "masks"
    assert clips["00001"].poses.name == "openpose_json" and clips["00010"].poses is None


@pytest.mark.parametrize(("layout", "root"), [("ted", "TED384-v2"), ("ubc", "UBC"), ("auto", "any")])
def test_folders_of_parts_are_train_and_held_out(tmp_path, layout, root):
    films(tmp_path / root, "train/a", "train/b", "test/c", "train_densepose/a")
    clips = found(tmp_path / root, layout)
    assert {name: clip.split for name, clip in clips.items()} == {
        "train/a": "train",
        "train/b": "train",
        "test/c": "heldout",
    }
    assert clips["test/c"].layout == ("splits" if layout == "auto" else layout)


def test_stableanimator_lists_say_which_folders_count(tmp_path):
    root = tmp_path / "animation_data"
    for part in ("rec", "vec"):
        for name in ("00001", "00002"):
            save_frames(root / part / name / "images", FILM.frames, "frame_{}.png", 0)
            save_frames(root / part / name / "poses", FILM.frames, "frame_{}.png", 0)
    (root / "video_rec_path.txt").write_text("animation_data/rec/00002\n\n")
    clips = found(root)
    assert list(clips) == ["rec/00002", "vec/00001", "vec/00002"]
    assert all(clip.video.is_dir() and clip.layout == "stableanimator" for clip in clips.values())


def test_plain_folders_have_videos_with_or_without_poses_and_masks(tmp_path):
    films(tmp_path, "a", "b", "deep/er/c", ".hidden/d")
    FILM.poses.save(tmp_path / "a.npz")
    save_frames(tmp_path / "b_masks", FILM.masks)
    clips = found(tmp_path)
    assert list(clips) == ["a", "b", "deep/er/c"]
    assert clips["a"].poses.name == "a.npz" and clips["b"].poses is None and clips["b"].masks.name == "b_masks"
    assert all(clip.layout == "videos" for clip in clips.values())


def test_clips_that_would_share_a_name_get_names_of_their_own(tmp_path):
    films(tmp_path, "a")
    (tmp_path / "a.mov").write_bytes((tmp_path / "a.mp4").read_bytes())
    assert sorted(found(tmp_path)) == ["a_mov", "a_mp4"]
    entries = [{"video_path": str(tmp_path / "a.mp4")}] * 2
    (tmp_path / "list_meta.json").write_text(json.dumps(entries))
    assert len(found(tmp_path / "list_meta.json")) == 2


def test_folders_of_images_are_clips(tmp_path):
    for name in ("000", "001"):
        save_frames(tmp_path / name, FILM.frames)
    save_frames(tmp_path / "001_masks", FILM.masks)
    clips = found(tmp_path)
    assert list(clips) == ["000", "001"] and clips["001"].masks.name == "001_masks"
    assert detect_layout(tmp_path) == "frames"


def test_links_that_lead_in_circles_end(tmp_path):
    films(tmp_path, "a")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    assert list(found(tmp_path)) == ["a"]


def test_what_cannot_be_a_data_set_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="source=.*does not exist"):
        find_clips(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither videos nor folders of images"):
        find_clips(tmp_path)
    films(tmp_path, "a")
    with pytest.raises(UserError, match="layout=tiktak is not one of auto, moore"):
        find_clips(tmp_path, "tiktak")
    with pytest.raises(UserError, match="no clip of layout=tiktok"):
        find_clips(tmp_path, "tiktok")
    with pytest.raises(UserError, match="is a file"):
        find_clips(tmp_path / "a.mp4")
    for content, message in (("{", "not JSON"), ("{}", "not a list"), ('[{"video": 1}]', "no 'video_path'")):
        (tmp_path / "x_meta.json").write_text(content)
        with pytest.raises(UserError, match=message):
            find_clips(tmp_path / "x_meta.json")


# The order of frames


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["000000.png", "000001.png", "000002.png"], []),
        ([f"frame_{number:03d}.png" for number in range(0, 12, 3)], []),  # every third frame, evenly
        ([f"frame_{number}.png" for number in range(12)], ["padding"]),
        (["0001.png", "0002.png", "0009.png", "0010.png"], ["gaps"]),
        (["frame_1.jpg", "frame_1.png", "frame_2.png"], ["order"]),
        (["one.png", "two.png"], ["order"]),
        (["a_2.png", "b_1.png"], ["order"]),
    ],
)
def test_orders_that_are_not_of_time_are_found(tmp_path, names, kinds):
    for name in names:
        save_frames(tmp_path, np.zeros((1, 2, 2, 3), np.uint8), name)
    assert [finding.kind for finding in frame_order_findings(tmp_path)] == kinds
