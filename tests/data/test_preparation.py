"""Preparation: poses, masks, records and manifest; what is done again and what is not; shards; killed runs."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core.config import check_config
from core.errors import UserError
from data.config import PoseConfig, PrepareConfig, Shard, process_shard
from data.poses.person import Box
from data.poses.poses import Poses
from data.preparation.clips import read_union
from data.preparation.layouts import find_clips
from data.preparation.manifest import Fingerprint, Manifest, read_manifest, read_record, record_path, write_manifest
from data.preparation.prepare import PreparedClips, hold_out, prepare_clips
from tests.filmed import FRAME, FigureEstimator, Film, figure_film, save_frames, save_prepared_videos, save_video

ROOT = Path(__file__).parents[2]
FILM = figure_film()


def no_estimator():
    raise AssertionError("nothing should be estimated")


def prepare(source: Path, output: Path, estimator=FigureEstimator, **settings) -> tuple[PreparedClips, Manifest]:
    config = PrepareConfig(source=str(source), output=str(output), **settings)
    clips = find_clips(source)
    done = prepare_clips(clips, output, config, estimator)
    return done, write_manifest(output, [clip.name for clip in clips], clips[0].layout, str(source))


@pytest.fixture
def videos(tmp_path) -> Path:
    for name in ("a", "deep/b"):
        save_video(tmp_path / "videos" / f"{name}.mp4", FILM)
    return tmp_path / "videos"


def test_poses_and_masks_are_estimated_and_the_manifest_says_where_everything_is(videos, tmp_path):
    done, manifest = prepare(videos, tmp_path / "set", origin="ours, CC0")
    assert (done.prepared, done.done_before, done.left_out) == (2, 0, {})
    assert [clip.name for clip in manifest.clips] == ["a", "deep/b"] and manifest.missing == 0
    clip = manifest.clips[1]
    assert clip.video == videos / "deep/b.mp4" and clip.fingerprint.matches(clip.video)
    assert (clip.frames, clip.size, clip.fps, clip.split) == (6, FRAME, 25.0, None)
    poses = Poses.load(clip.poses)
    np.testing.assert_allclose(poses.keypoints, FILM.poses.keypoints, atol=1)
    for number in range(6):
        different = (read_union(clip.masks, number, clip.size) > 0) != FILM.masks[number]
        assert different.mean() < 0.02  # the video is compressed
    # The figure takes columns 20 to 48 and rows 30 to 77 over the whole clip.
    np.testing.assert_allclose(clip.box, Box(19.5, 29.5, 48.5, 77.5), atol=1)
    record = manifest.records[1]
    assert record["origin"] == "ours, CC0" and record["keypoints"] == "estimated: blazepose"
    assert record["inputs"]["video"]["sha256"] == Fingerprint.of(clip.video).sha256


def test_a_second_run_does_nothing(videos, tmp_path):
    prepare(videos, tmp_path / "set")
    before = (tmp_path / "set" / "a.npz").stat().st_mtime_ns
    done, _ = prepare(videos, tmp_path / "set", no_estimator)
    assert (done.prepared, done.done_before) == (0, 2)
    assert (tmp_path / "set" / "a.npz").stat().st_mtime_ns == before


def test_what_changes_is_made_again_and_nothing_else(videos, tmp_path):
    prepare(videos, tmp_path / "set")
    save_video(videos / "a.mp4", figure_film(frames=7))
    done, manifest = prepare(videos, tmp_path / "set")
    assert (done.prepared, done.done_before) == (1, 1) and manifest.clips[0].frames == 7
    done, _ = prepare(videos, tmp_path / "set", pose=PoseConfig(smoothing=1.0))
    assert done.prepared == 2
    (tmp_path / "set" / "a.npz").unlink()
    assert prepare(videos, tmp_path / "set", pose=PoseConfig(smoothing=1.0))[0].prepared == 1
    assert prepare(videos, tmp_path / "set", pose=PoseConfig(smoothing=1.0, threads=1))[0].prepared == 0


def test_copied_videos_are_the_same_videos(videos, tmp_path):
    """Another time of change alone asks for a look at the content; the new time is noted."""
    prepare(videos, tmp_path / "set")
    os.utime(videos / "a.mp4", ns=(1, 1))
    stored = read_manifest(tmp_path / "set").clips[0].fingerprint
    assert stored.matches(videos / "a.mp4") and not stored.is_fresh(videos / "a.mp4")
    _, manifest = prepare(videos, tmp_path / "set", no_estimator)
    assert manifest.clips[0].fingerprint.is_fresh(videos / "a.mp4")


def test_moved_data_and_new_words_need_no_estimation(videos, tmp_path):
    prepare(videos, tmp_path / "set")
    moved = videos.rename(tmp_path / "elsewhere")
    done, manifest = prepare(moved, tmp_path / "set", no_estimator, origin="ours")
    assert done.prepared == 0 and manifest.clips[0].video == moved / "a.mp4"
    assert manifest.records[0]["origin"] == "ours"


def test_given_poses_and_masks_are_taken_over(tmp_path):
    save_prepared_videos(tmp_path / "videos", {"a": FILM})
    _, manifest = prepare(tmp_path / "videos", tmp_path / "set", no_estimator)
    (clip,) = manifest.clips
    assert np.array_equal(Poses.load(clip.poses).keypoints, FILM.poses.keypoints)
    assert np.array_equal(read_union(clip.masks, 2, FRAME) > 0, FILM.masks[2])
    assert manifest.records[0]["keypoints"].endswith("a.npz")
    assert np.allclose(clip.box, Box(19.5, 29.5, 48.5, 77.5))


def test_given_poses_that_do_not_fit_leave_the_clip_out(tmp_path):
    save_prepared_videos(tmp_path / "videos", {"a": FILM, "b": FILM})
    FILM.poses[:4].save(tmp_path / "videos" / "b.npz")
    (tmp_path / "videos" / "a_masks" / "000003.png").unlink()
    done, manifest = prepare(tmp_path / "videos", tmp_path / "set", no_estimator)
    assert "poses of 4 frames" in done.left_out["b"] and "no mask of frame 3" in done.left_out["a"]
    assert not manifest.clips and manifest.left_out == done.left_out
    _, manifest = prepare(tmp_path / "videos", tmp_path / "set", poses="estimate", masks="estimate")
    assert len(manifest.clips) == 2 and not manifest.left_out


def test_frames_of_tiktok_are_prepared_with_its_masks(tmp_path):
    save_frames(tmp_path / "TikTok/00001/images", FILM.frames)
    save_frames(tmp_path / "TikTok/00001/masks", FILM.masks)
    estimator = FigureEstimator()
    _, manifest = prepare(tmp_path / "TikTok", tmp_path / "set", lambda: estimator, frame_fps=30.0)
    (clip,) = manifest.clips
    assert estimator.frames == 6 and clip.fps == 30.0 and manifest.layout == "tiktok"
    assert np.array_equal(read_union(clip.masks, 5, FRAME) > 0, FILM.masks[5])
    assert np.allclose(clip.box, Box(19.5, 29.5, 48.5, 77.5))


def test_frames_are_taken_by_number_not_by_name(tmp_path):
    film = figure_film(frames=12)
    save_frames(tmp_path / "clips/one", film.frames, "frame_{}.png", 0)
    _, manifest = prepare(tmp_path / "clips", tmp_path / "set")
    found = Poses.load(manifest.clips[0].poses).keypoints[:, 0, 0, 0]
    assert np.array_equal(np.argsort(found), np.arange(12))


def test_several_persons_and_missing_ones_get_masks_for_every_frame(tmp_path):
    class Two(FigureEstimator):
        """The figure, and from the third frame on its right half as another person, in the third slot."""

        def video(self, frames, max_persons=1):
            for number, frame in enumerate(frames):
                (person,) = self.image(frame)
                half = person.mask.copy()
                half[:, :30] = False
                yield [person, None, replace(person, mask=half) if number > 1 else None]

    save_video(tmp_path / "videos/a.mp4", FILM)
    _, manifest = prepare(tmp_path / "videos", tmp_path / "set", Two, pose=PoseConfig(max_persons=3))
    (clip,) = manifest.clips
    assert manifest.records[0]["persons"] == 2
    names = sorted(file.name for file in clip.masks.iterdir())
    assert names == [f"{number:06d}_p{person}.png" for number in range(6) for person in range(2)]


def test_estimators_without_masks_leave_none(videos, tmp_path):
    class NoMasks(FigureEstimator):
        def image(self, image, max_persons=1):
            return [replace(person, mask=None) for person in super().image(image)]

    _, manifest = prepare(videos, tmp_path / "set", NoMasks)
    assert manifest.clips[0].masks is None and not (tmp_path / "set" / "a_masks").exists()
    assert manifest.clips[0].box.height > np.ptp(FILM.poses.keypoints[..., 1])  # the skeleton with a margin


def test_unusable_clips_are_left_out_with_the_reason(tmp_path):
    root = tmp_path / "videos"
    save_video(root / "good.mp4", FILM)
    content = (root / "good.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(content[: len(content) // 2])
    (root / "garbage.mp4").write_bytes(b"nothing of a video" * 50)
    (root / "empty.mp4").touch()
    save_video(root / "nobody.mp4", Film(FILM.frames * 0, FILM.masks, FILM.poses))
    done, manifest = prepare(root, tmp_path / "set")
    assert [clip.name for clip in manifest.clips] == ["good"]
    assert set(manifest.left_out) == {"cut", "garbage", "empty", "nobody"} == set(done.left_out)
    assert "nobody was found in any of 6 frames" in manifest.left_out["nobody"]
    assert "empty file" in manifest.left_out["empty"]
    # They are looked at again only when they change.
    assert prepare(root, tmp_path / "set", no_estimator)[0].prepared == 0
    (root / "cut.mp4").write_bytes(content)
    done, manifest = prepare(root, tmp_path / "set")
    assert done.prepared == 1 and "cut" not in manifest.left_out


def test_lists_with_missing_videos_say_so(videos, tmp_path):
    entries = [{"video_path": str(videos / "a.mp4")}, {"video_path": str(videos / "gone.mp4")}]
    (tmp_path / "x_meta.json").write_text(json.dumps(entries))
    done, manifest = prepare(tmp_path / "x_meta.json", tmp_path / "set")
    assert len(manifest.clips) == 1 and "does not exist" in done.left_out["videos/gone"]
    save_video(videos / "gone.mp4", FILM)
    assert prepare(tmp_path / "x_meta.json", tmp_path / "set")[0].prepared == 1


# In the folder of the videos itself


def test_own_files_beside_the_videos_are_not_taken_for_given_ones(videos):
    prepare(videos, videos)
    assert (videos / "deep/b.npz").is_file() and (videos / "deep/b_masks/000000.png").is_file()
    done, manifest = prepare(videos, videos, no_estimator)
    assert done.prepared == 0
    assert {record["keypoints"] for record in manifest.records} == {"estimated: blazepose"}
    assert manifest.records[0]["video"] == "a.mp4"  # so the whole folder may move
    record_path(videos, "a").write_text(json.dumps(read_record(videos, "a") | {"state": "started"}))
    (done, manifest) = prepare(videos, videos)
    assert done.prepared == 1 and manifest.records[0]["keypoints"] == "estimated: blazepose"


def test_an_estimator_that_cannot_be_opened_is_no_fault_of_the_clips(videos, tmp_path):
    def missing():
        raise UserError("pose model x is missing")

    with pytest.raises(UserError, match="pose model x is missing"):
        prepare(videos, tmp_path / "set", missing)
    assert read_record(tmp_path / "set", "a") is None
    assert len(prepare(videos, tmp_path / "set")[1].clips) == 2


def test_given_files_beside_the_videos_stay_as_they_are(tmp_path):
    root = save_prepared_videos(tmp_path / "videos", {"a": FILM})
    before = [(path, path.stat().st_mtime_ns) for path in (root / "a.npz", root / "a_masks" / "000002.png")]
    for _ in range(2):
        _, manifest = prepare(root, root, no_estimator)
        assert manifest.records[0]["keypoints"] == "a.npz" and manifest.records[0]["given_masks"] == "a_masks"
    assert [(path, path.stat().st_mtime_ns) for path, _ in before] == before


def test_files_of_others_are_never_overwritten(tmp_path):
    root = save_prepared_videos(tmp_path / "videos", {"a": FILM})
    with pytest.raises(UserError, match="a.npz was not made by prepare.py"):
        prepare(root, root, poses="estimate")
    with pytest.raises(UserError, match="a_masks was not made by prepare.py"):
        prepare(root, root, masks="estimate")


def test_a_disk_that_cannot_be_written_to_is_a_user_error(videos, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "deep").touch()  # where a folder must be made
    with pytest.raises(UserError, match="cannot be written.*the same command goes on"):
        prepare(videos, tmp_path / "set")
    assert read_record(tmp_path / "set", "a")["state"] == "done"


def test_leftovers_of_killed_runs_are_cleared_away_and_nothing_else(videos, tmp_path):
    output = tmp_path / "set"
    output.mkdir()
    mine = [".a.npz.partial", ".a.clip.json.partial", ".a_masks.partial"]
    others = [".a.b.npz.partial", ".ab.npz.partial", ".a_masks2.partial"]
    for name in mine + others:
        (output / name).mkdir()
        (output / name / "half").touch()
    prepare(videos, output)
    assert {path.name for path in output.iterdir() if path.name.startswith(".")} == set(others)


# Parts and shards


def test_held_out_clips_depend_on_names_alone(videos):
    clips = find_clips(videos) * 1
    many = [replace(clips[0], name=f"clip{number}") for number in range(400)]
    marked = hold_out(many, 0.25)
    share = np.mean([clip.split == "heldout" for clip in marked])
    assert 0.15 < share < 0.35
    assert [clip.split for clip in hold_out(many[:50], 0.25)] == [clip.split for clip in marked[:50]]
    assert hold_out([replace(many[0], split="train")], 0.99)[0].split == "train"
    assert hold_out(many, 0.0) == many


def test_shards_share_everything_and_the_last_manifest_is_whole(videos, tmp_path, monkeypatch):
    clips, output = find_clips(videos), tmp_path / "set"
    config = PrepareConfig(source=str(videos), output=str(output))
    names = [clip.name for clip in clips]
    prepare_clips(Shard(0, 2).part(clips), output, config, FigureEstimator)
    assert write_manifest(output, names, "videos", "x").missing == 1
    prepare_clips(Shard(1, 2).part(clips), output, config, FigureEstimator)
    manifest = write_manifest(output, names, "videos", "x")
    assert manifest.missing == 0 and [clip.name for clip in manifest.clips] == names
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = []
    for shard in range(2):
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            parts += process_shard(shard, 2).part(range(20))
    assert sorted(parts) == list(range(20))
    with pytest.raises(UserError, match="shard=2"):
        process_shard(2, 2)


def test_broken_manifests_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="holds no manifest.json"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 1}')
    with pytest.raises(UserError, match="not a manifest that can be read"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 7}')
    with pytest.raises(UserError, match="version 7"):
        read_manifest(tmp_path)


def test_settings_that_cannot_work_are_user_errors():
    for settings, named in (
        ({"poses": "guess"}, "poses=guess"),
        ({"masks": "all"}, "masks=all"),
        ({"frame_fps": 0.0}, "frame_fps=0"),
        ({"heldout": 1.0}, "heldout=1"),
    ):
        with pytest.raises(UserError, match=named):
            check_config(PrepareConfig(**settings))


# The command, killed


def run(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "prepare.py"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """The real estimator on the shipped clip, killed without warning in the middle of a clip's frames."""
    source, output = tmp_path / "videos", tmp_path / "set"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.mp4").write_bytes((ROOT / "assets/samples/dance.mp4").read_bytes())
    arguments = (f"source={source}", f"output={output}", "pose.threads=1")
    first = run(*arguments)
    for _ in range(600):
        if list(output.glob(".1_masks.partial/*/*.png")) or first.poll() is not None:
            break
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (output / "manifest.json").exists() and not (output / "1.npz").exists()
    assert read_record(output, "0")["state"] == "done" and read_record(output, "1")["state"] == "started"
    before = (output / "0.npz").stat().st_mtime_ns
    second = run(*arguments)
    printed, errors = second.communicate()
    assert second.returncode == 0, errors
    assert "2 clips prepared, 1 were done before" in printed
    assert (output / "0.npz").stat().st_mtime_ns == before
    assert not list(output.glob(".*partial*"))
    manifest = read_manifest(output)
    poses = [Poses.load(clip.poses) for clip in manifest.clips]
    assert len(poses) == 3 and all(np.array_equal(poses[0].keypoints, other.keypoints) for other in poses)
    assert poses[0].present().all() and all(len(list(clip.masks.iterdir())) == 16 for clip in manifest.clips)
