"""Folders of filmed people: items, crops, masks, what is left out and why, damage that shows only in training."""

import json
import logging

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from core.errors import UserError
from data.clips.rendered import RenderedPeople
from data.clips.videos import VideoFolder
from data.config import PrepareConfig
from data.people.bodies import load_people
from data.people.scenes import CameraRanges
from data.poses.poses import Poses
from data.preparation.layouts import find_clips
from data.preparation.manifest import write_manifest
from data.preparation.prepare import prepare_clips
from data.video.files import write_video
from tests.filmed import (
    FRAME,
    FigureEstimator,
    damage,
    figure_film,
    rendered_film,
    save_frames,
    save_prepared_videos,
    save_video,
)
from tests.items import check_item, same


@pytest.fixture(scope="module")
def library():
    return load_people()


def people(library) -> RenderedPeople:
    return RenderedPeople((96, 64), num_frames=8, length=6, cameras=CameraRanges(close_ups=0.0), library=library)


@pytest.fixture(scope="module")
def folder(library, tmp_path_factory):
    """Two videos of rendered people, 96 x 64 pixels and 8 frames; the first with masks, the second in a subfolder."""
    root = tmp_path_factory.mktemp("videos")
    dataset = people(library)
    for index, name in enumerate(("first", "sub/second")):
        (root / name).parent.mkdir(exist_ok=True)
        item = dataset[index]
        frames = ((item["frames"].permute(1, 2, 3, 0) + 1) * 127.5).round().numpy().astype(np.uint8)
        write_video(root / f"{name}.mp4", frames, fps=8)
        keypoints = item["keypoints"].numpy()[:, None]
        Poses(keypoints[..., :2], keypoints[..., 2], (96, 64), 8.0).save(root / f"{name}.npz")
        if index == 0:
            np.save(root / "frames.npy", frames)
            write_masks(root / "first_masks", item["masks"][0].numpy().astype(bool))
    return root


def write_masks(folder, masks: np.ndarray, suffix: str = "") -> None:
    folder.mkdir(exist_ok=True)
    for number, mask in enumerate(masks):
        cv2.imwrite(str(folder / f"{number:06d}{suffix}.png"), mask.astype(np.uint8) * 255)


def test_video_items_have_the_documented_shapes_and_ranges(folder):
    dataset = VideoFolder(folder, crop="centre", size=(32, 32), num_frames=3, stride=2, length=8)
    for index in range(8):
        check_item(dataset[index], (32, 32), 3)
    assert len(VideoFolder(folder, crop="centre", size=(32, 32))) == 2
    assert same(dataset[3], VideoFolder(folder, crop="centre", size=(32, 32), num_frames=3, stride=2, length=8)[3])
    assert not same(
        dataset[3], VideoFolder(folder, crop="centre", size=(32, 32), num_frames=3, stride=2, length=8, seed=1)[3]
    )


def matching_frames(dataset: VideoFolder, poses: Poses, scale: float, shift: float) -> list[tuple[dict, list[int]]]:
    """Items of the video with these poses, with the frame numbers found by comparing the expected keypoints."""
    found = []
    expected = poses.keypoints[:, 0] * scale + shift * np.array([1, 0])
    for index in range(len(dataset)):
        item = dataset[index]
        keypoints = torch.cat([item["reference_keypoints"][None], item["keypoints"]]).numpy()[..., :2]
        distances = np.abs(keypoints[:, None] - expected[None]).max((-1, -2))
        if distances.min(1).max() < 1e-3:
            found.append((item, distances.argmin(1).tolist()))
    return found


def test_keypoints_images_and_masks_are_cropped_alike(folder):
    """96 x 64 to 64 x 64: the crop takes columns 16 to 79, without scaling, so all numbers are known."""
    source = np.load(folder / "frames.npy")
    dataset = VideoFolder(folder, crop="centre", size=(64, 64), num_frames=2, stride=3, length=12)
    items = matching_frames(dataset, Poses.load(folder / "first.npz"), scale=1.0, shift=-16.0)
    assert len(items) >= 2
    for item, (reference, first, second) in items:
        assert second == first + 3 and reference not in (first, second)
        for image, number in ((item["reference"], reference), (item["frames"][:, 1], second)):
            difference = (image.permute(1, 2, 0).numpy() + 1) * 127.5 - source[number][:, 16:80]
            assert np.abs(difference).mean() < 8  # the video is compressed
        person = np.linalg.norm(source[second][:, 16:80].astype(float), axis=-1)[item["masks"][0, 1].numpy() > 0]
        assert len(person) > 50


def test_masks_are_those_of_the_frames(folder, library):
    expected = people(library)[0]["masks"]
    dataset = VideoFolder(folder, crop="centre", size=(64, 64), num_frames=2, stride=3, length=12)
    for item, (reference, first, second) in matching_frames(dataset, Poses.load(folder / "first.npz"), 1.0, -16.0):
        assert torch.equal(item["masks"], expected[:, [first, second], :, 16:80])
        assert torch.equal(item["reference_mask"], expected[:, reference, :, 16:80])


def test_scaling_keeps_pixel_centres(folder):
    """96 x 64 to 48 x 32: half the size, edges to edges, so x becomes (x + 0.5) / 2 - 0.5."""
    poses = Poses.load(folder / "first.npz")
    item = VideoFolder(folder, crop="centre", size=(48, 32), num_frames=8, length=6)
    shifted = Poses(poses.keypoints - [0.0, 0.5], poses.scores, poses.size, poses.fps)
    found = matching_frames(item, shifted, scale=0.5, shift=-0.25)
    assert found and all(numbers[1:] == list(range(8)) for _, numbers in found)


def test_keypoints_outside_the_crop_are_not_visible(folder):
    for index in range(8):
        keypoints = VideoFolder(folder, crop="centre", size=(16, 64), length=8)[index]["keypoints"].numpy()
        outside = (keypoints[..., 0] < -0.5) | (keypoints[..., 0] > 15.5)
        assert (keypoints[outside][:, 2] == 0).all()


def test_without_masks_every_pixel_is_the_persons(folder):
    for index in range(8):
        item = VideoFolder(folder / "sub", crop="centre", size=(32, 32), length=8)[index]
        assert (item["masks"] == 1).all() and (item["reference_mask"] == 1).all()


def test_several_persons_are_drawn_together(folder, tmp_path):
    poses = Poses.load(folder / "first.npz")
    both = np.concatenate([poses.keypoints, poses.keypoints + [20.0, 0.0]], 1)
    Poses(both, np.repeat(poses.scores, 2, 1), poses.size, poses.fps).save(tmp_path / "pair.npz")
    (tmp_path / "pair.mp4").write_bytes((folder / "first.mp4").read_bytes())
    masks = np.zeros((2, 8, 64, 96), bool)
    masks[0, :, :, 30:40] = masks[1, :, :, 60:70] = True
    for person in range(2):
        write_masks(tmp_path / "pair_masks", masks[person], f"_p{person}")
    item = VideoFolder(tmp_path, size=(96, 64), crop="centre")[0]
    assert torch.equal(item["masks"][0, 0].bool(), torch.from_numpy(masks.any(0)[0]))
    alone = VideoFolder(folder, crop="centre", size=(96, 64), length=20)
    single = next(alone[i] for i in range(20) if torch.equal(alone[i]["keypoints"], item["keypoints"]))
    assert (item["poses"] > 0).sum() > 1.5 * (single["poses"] > 0).sum()


def test_folders_without_usable_videos_are_user_errors(folder, tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        VideoFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no video with a pose file"):
        VideoFolder(tmp_path)
    with pytest.raises(UserError, match="2 too short .*needs 15 frames, the longest clip has 8"):
        VideoFolder(folder, num_frames=8, stride=2)


def test_poses_of_another_video_are_a_user_error(folder, tmp_path):
    (tmp_path / "clip.mp4").write_bytes((folder / "first.mp4").read_bytes())
    Poses.load(folder / "first.npz")[:5].save(tmp_path / "clip.npz")
    with pytest.raises(UserError, match="8 frames"):
        VideoFolder(tmp_path, size=(32, 32))[0]


def test_a_missing_mask_is_a_user_error(folder, tmp_path):
    (tmp_path / "clip.mp4").write_bytes((folder / "first.mp4").read_bytes())
    (tmp_path / "clip.npz").write_bytes((folder / "first.npz").read_bytes())
    (tmp_path / "clip_masks").mkdir()
    with pytest.raises(UserError, match="no mask of frame"):
        VideoFolder(tmp_path, size=(32, 32))[0]


# What is left out, and why


def prepared(root, output, **settings) -> None:
    config = PrepareConfig(source=str(root), output=str(output), **settings)
    clips = find_clips(root)
    prepare_clips(clips, output, config, FigureEstimator)
    write_manifest(output, [clip.name for clip in clips], clips[0].layout, str(root))


@pytest.fixture
def three(tmp_path):
    """Videos of 6, 8 and 12 frames with poses and masks."""
    films = {name: figure_film(frames) for name, frames in (("a", 6), ("b", 8), ("c", 12))}
    return save_prepared_videos(tmp_path / "videos", films)


def names(dataset: VideoFolder) -> list[str]:
    return [usable.clip.name for usable in dataset.clips]


def test_clips_shorter_than_the_span_are_left_out_and_counted(three):
    dataset = VideoFolder(three, size=FRAME, num_frames=3, stride=3)
    assert names(dataset) == ["b", "c"] and dataset.left_out == {"a": "too short: below 7 frames"}
    assert dataset.left_out_summary() == "1 of 3 clips are left out: 1 too short (a)"
    with pytest.raises(
        UserError, match=r"3 of 3 clips are left out: 3 too short \(a, b, c\); num_frames=20 .* has 12"
    ):
        VideoFolder(three, size=FRAME, num_frames=20)


def test_videos_of_every_suffix_are_trained_on_and_those_without_poses_are_counted(three):
    (three / "a.mp4").rename(three / "a.M4V")
    (three / "c.mp4").rename(three / "take:2.ts")
    (three / "c.npz").rename(three / "take:2.npz")
    for name in ("d.mov", "b.mkv"):
        (three / name).write_bytes((three / "b.mp4").read_bytes())
    dataset = VideoFolder(three, size=FRAME, length=6)
    assert names(dataset) == ["a", "b", "take:2"] and all(check_item(item, FRAME, 1) is None for item in dataset)
    assert dataset.left_out_summary() == (
        "2 of 5 clips are left out: 1 without poses (d.mov); 1 of the name of another clip (b.mp4)"
    )


def test_every_walk_sees_every_clip_once_in_another_order(three):
    dataset = VideoFolder(three, size=FRAME, length=30)
    walks = [[next(dataset._candidates(3 * walk + place)) for place in range(3)] for walk in range(10)]
    assert all(sorted(walk) == [0, 1, 2] for walk in walks) and len({tuple(walk) for walk in walks}) > 2


def test_unreadable_poses_leave_the_clip_out(three):
    (three / "b.npz").write_bytes(b"no poses")
    dataset = VideoFolder(three, size=FRAME)
    assert names(dataset) == ["a", "c"] and dataset.left_out["b"].startswith("poses cannot be read")


def test_prepared_folders_are_read_by_their_manifest(three, tmp_path):
    prepared(three, tmp_path / "set")
    dataset = VideoFolder(tmp_path / "set", size=FRAME, num_frames=2, length=6)
    assert names(dataset) == ["a", "b", "c"] and not dataset.left_out
    assert same(dataset[4], VideoFolder(tmp_path / "set" / "manifest.json", size=FRAME, num_frames=2, length=6)[4])
    check_item(dataset[0], FRAME, 2)
    (three / "a.mp4").unlink()
    save_video(three / "b.mp4", figure_film(9))
    (three / "d.mp4").write_bytes(b"garbage")
    prepared_before = VideoFolder(tmp_path / "set", size=FRAME)
    assert names(prepared_before) == ["c"]
    assert "is missing" in prepared_before.left_out["a"]
    assert "has changed since it was prepared" in prepared_before.left_out["b"]


def test_clips_that_could_not_be_prepared_are_counted(three, tmp_path):
    (three / "d.mp4").write_bytes(b"garbage")
    prepared(three, tmp_path / "set")
    dataset = VideoFolder(tmp_path / "set", size=FRAME)
    assert dataset.left_out_summary() == "1 of 4 clips are left out: 1 not prepared (d)"


def test_held_out_clips_are_kept_from_training(tmp_path):
    for name in ("train/a", "train/b", "test/c"):
        save_video(tmp_path / "videos" / f"{name}.mp4", figure_film(4))
    prepared(tmp_path / "videos", tmp_path / "set")
    read = {split: names(VideoFolder(tmp_path / "set", FRAME, split=split)) for split in ("train", "heldout", None)}
    assert read == {"train": ["train/a", "train/b"], "heldout": ["test/c"], None: ["test/c", "train/a", "train/b"]}


def test_damage_that_shows_in_training_is_reported_and_counted(three, caplog):
    whole = VideoFolder(three, size=FRAME, length=30)
    expected = [whole[index] for index in range(30)]
    damage(three / "b.mp4")
    dataset = VideoFolder(three, size=FRAME, length=30)
    with caplog.at_level(logging.WARNING):
        found = [dataset[index] for index in range(30)]
    assert dataset.broken_clips == 1
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and "clip b is left out from now on (1 of 3 are)" in warnings[0]
    unchanged = [same(one, other) for one, other in zip(expected, found, strict=True)]
    assert unchanged.count(False) == 10  # every third item was of clip b
    again = VideoFolder(three, size=FRAME, length=30)
    assert all(same(again[index], found[index]) for index in reversed(range(30)))


def test_loader_processes_share_the_count(three):
    damage(three / "b.mp4")
    dataset = VideoFolder(three, size=FRAME, length=12)
    assert len(list(DataLoader(dataset, batch_size=4, num_workers=2))) == 3
    assert dataset.broken_clips == 1


def test_when_every_clip_is_broken_training_ends_clearly(three):
    for name in "abc":
        damage(three / f"{name}.mp4")
    dataset = VideoFolder(three, size=FRAME)
    with pytest.raises(UserError, match="none of 3 clips can be read.*prepare.py check dataset="):
        dataset[0]


def test_frames_without_anybody_are_not_trained_on(tmp_path):
    """Frames 4 and 5 of 10 show nobody: no clip crosses them, no reference is one of them."""
    film = figure_film(10)
    scores = film.poses.scores.copy()
    scores[4:6] = 0
    poses = Poses(film.poses.keypoints, scores, FRAME, 25.0)
    save_video(tmp_path / "a.mp4", film)
    poses.save(tmp_path / "a.npz")
    dataset = VideoFolder(tmp_path, FRAME, num_frames=3, length=40)
    first = film.poses.keypoints[0, 0, 0, 0]
    starts, references = set(), set()
    for index in range(40):
        item = dataset[index]
        starts.add(round(float(item["keypoints"][0, 0, 0] - first)))
        references.add(round(float(item["reference_keypoints"][0, 0] - first)))
    assert starts == {0, 1, 6, 7} and references == {0, 1, 2, 3, 6, 7, 8, 9}
    with pytest.raises(UserError, match="no 5 frames at stride 1 show somebody throughout"):
        VideoFolder(tmp_path, FRAME, num_frames=5)[0]


# Crops


def test_nobody_is_cut(tmp_path):
    """Upright videos in a square frame: a figure at the top, one at the foot, and one as tall as the video."""
    boxes = {"top": (20, 2, 20, 40), "foot": (20, 50, 20, 45), "tall": (20, 1, 20, 94)}
    films = {name: figure_film(box=box) for name, box in boxes.items()}
    root = save_prepared_videos(tmp_path / "videos", films)
    prepared(root, tmp_path / "set")
    dataset = VideoFolder(tmp_path / "set", size=(64, 64), length=12)
    assert names(dataset) == ["foot", "top"]
    assert dataset.left_out == {"tall": "does not fit: people would be cut at 64x64"}
    areas = {round(float(dataset[index]["masks"].sum())) for index in range(12)}
    assert areas == {20 * 40, 20 * 45}  # every pixel of the person is there
    cut = VideoFolder(tmp_path / "set", size=(64, 64), length=12, crop="centre")
    assert len(cut.clips) == 3 and min(float(cut[index]["masks"].sum()) for index in range(12)) < 20 * 40
    with pytest.raises(UserError, match="does not fit.*crop=pad shows them whole"):
        VideoFolder(tmp_path / "set", size=(96, 32))


def test_padding_shows_everybody_between_black_borders(tmp_path):
    film = figure_film(box=(20, 1, 20, 94))
    prepared(save_prepared_videos(tmp_path / "videos", {"tall": film}), tmp_path / "set")
    item = VideoFolder(tmp_path / "set", size=(64, 64), crop="pad")[0]
    scale = 64 / 94
    assert float(item["masks"].sum()) == pytest.approx(20 * 94 * scale**2, rel=0.06)
    assert (item["frames"][:, 0, :, :9] == -1).all() and (item["frames"][:, 0, :, -9:] == -1).all()
    assert (item["masks"][..., :9] == 0).all() and (item["keypoints"][..., 2] == 1).all()
    without = save_video(tmp_path / "plain" / "tall.mp4", film)
    film.poses.save(without.with_suffix(".npz"))
    item = VideoFolder(tmp_path / "plain", size=(64, 64), crop="pad")[0]
    assert (item["masks"][..., 32, 20:44] == 1).all() and (item["masks"][..., :9] == 0).all()


def test_frame_folders_are_read_like_videos(tmp_path):
    film = rendered_film()
    save_frames(tmp_path / "clips/one/images", film.frames)
    save_frames(tmp_path / "clips/one/masks", film.masks)
    (tmp_path / "clips/one/openpose_json").mkdir()
    frames = Poses(film.poses.keypoints, film.poses.scores, film.poses.size, 30.0)
    write_openpose(tmp_path / "clips/one/openpose_json", frames)
    prepared(tmp_path / "clips", tmp_path / "set")
    dataset = VideoFolder(tmp_path / "set", size=FRAME, num_frames=6)
    item = dataset[0]
    assert np.array_equal(((item["frames"] + 1) * 127.5).round().permute(1, 2, 3, 0).numpy(), film.frames)
    assert np.array_equal(item["masks"][0].numpy() > 0, film.masks)
    seen = film.poses.scores[:, 0] > 0
    assert np.abs(item["keypoints"][..., :2].numpy() - film.poses.keypoints[:, 0])[seen].max() < 1e-3
    np.testing.assert_allclose(item["keypoints"][..., 2], film.poses.scores[:, 0], atol=1e-6)


def write_openpose(folder, poses: Poses) -> None:
    """COCO-18 files of one person a frame, as DisCo keeps them: 0001.png.json."""
    order = [0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
    for number in range(poses.frames):
        points = []
        for joint in order:
            known = joint is not None
            points += (
                [*poses.keypoints[number, 0, joint].tolist(), float(poses.scores[number, 0, joint])]
                if known
                else [0, 0, 0]
            )
        record = {"people": [{"pose_keypoints_2d": points}]}
        (folder / f"{number + 1:04d}.png.json").write_text(json.dumps(record))


def test_unknown_crops_are_errors(three):
    with pytest.raises(ValueError, match="crop"):
        VideoFolder(three, crop="middle")
