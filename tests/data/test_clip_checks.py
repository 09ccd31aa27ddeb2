"""The validator: every fault of a data set is found, named, and told what to do about; whole clips get none."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from core.errors import UserError
from data.config import CheckConfig, PrepareConfig
from data.poses.poses import Poses
from data.preparation.checks import check_dataset, pose_jumps
from data.preparation.layouts import find_clips
from data.preparation.manifest import write_manifest
from data.preparation.prepare import prepare_clips
from data.preparation.report import Report, report_table, summary, write_report
from tests.filmed import (
    FRAME,
    FigureEstimator,
    Film,
    damage,
    figure_film,
    save_frames,
    save_prepared_videos,
    save_video,
)

FILM = figure_film()


def prepare(source: Path, output: Path) -> Path:
    config = PrepareConfig(source=str(source), output=str(output))
    clips = find_clips(source)
    prepare_clips(clips, output, config, FigureEstimator)
    write_manifest(output, [clip.name for clip in clips], clips[0].layout, str(source))
    return output


def check(dataset: Path, **settings) -> Report:
    return check_dataset(CheckConfig(dataset=str(dataset), **settings))


def kinds(report: Report) -> dict[str, list[str]]:
    return {clip.name: [f"{found.severity}: {found.kind}" for found in clip.findings] for clip in report.clips}


@pytest.fixture
def root(tmp_path) -> Path:
    films = {name: figure_film(box=(20, 30, 24, 48 - number)) for number, name in enumerate("abcd")}
    return save_prepared_videos(tmp_path / "videos", films)


def test_whole_clips_have_no_findings(root, tmp_path):
    report = check(prepare(root, tmp_path / "set"), size=[64, 96], num_frames=6)
    assert kinds(report) == {name: [] for name in "abcd"} and report.errors == 0
    facts = report.clips[0]
    assert (facts.frames, facts.fps, facts.size, facts.persons) == (6, 25.0, FRAME, 1)
    assert (facts.missing_joints, facts.absent_frames) == (0.0, 0.0)


def test_faults_of_files_are_found(root, tmp_path):
    prepare(root, tmp_path / "set")
    (root / "a.mp4").unlink()
    save_video(root / "b.mp4", figure_film(5))
    content = (root / "c.mp4").read_bytes()
    (root / "c.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "set" / "d_masks" / "000002.png").unlink()
    (tmp_path / "set" / "d.npz").write_bytes(b"no poses")
    assert kinds(check(tmp_path / "set")) == {
        "a": ["error: missing"],
        "b": ["error: changed", "error: poses"],
        "c": ["error: changed", "error: damaged"],
        "d": ["error: poses", "error: masks"],
    }


def test_damage_behind_the_header_needs_decoding(root):
    damage(root / "a.mp4", 0.1)
    assert "error: damaged" in kinds(check(root))["a"]
    assert kinds(check(root, decode=False))["a"] == []


def test_clips_left_out_by_preparation_stay_in_the_report(root, tmp_path):
    (root / "broken.mp4").write_bytes(b"garbage")
    report = check(prepare(root, tmp_path / "set"))
    assert kinds(report)["broken"] == ["error: left out"] and report.found == 5 and report.errors == 1


def test_lengths_crops_and_enlargement_depend_on_what_is_trained(root, tmp_path):
    prepare(root, tmp_path / "set")
    assert set(sum(kinds(check(tmp_path / "set", num_frames=4, stride=2)).values(), [])) == {"error: too short"}
    assert set(sum(kinds(check(tmp_path / "set", size=[192, 48])).values(), [])) == {"error: crop"}
    assert set(sum(kinds(check(tmp_path / "set", size=[192, 48], crop="pad")).values(), [])) == set()
    assert set(sum(kinds(check(tmp_path / "set", size=[128, 192])).values(), [])) == {"warning: small"}


def test_rates_that_differ_and_rates_that_vary_are_found(tmp_path):
    for name, fps in (("a", 25.0), ("b", 25.0), ("c", 50.0), ("d", 8.0)):
        save_video(tmp_path / f"{name}.mp4", FILM, fps)
    write_variable(tmp_path / "e.mp4")
    found = kinds(check(tmp_path))
    assert found["a"] == [] and found["c"] == ["warning: other rate"]
    assert found["d"] == ["warning: frame rate", "warning: other rate"]
    assert "warning: variable rate" in found["e"]


def write_variable(path: Path) -> None:
    """A video whose frames are shown for one tick and for four by turns."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 96, "yuv420p"
        tick = 0
        for number, image in enumerate(figure_film(12).frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 25), tick
            tick += 4 if number % 2 else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_poses_that_miss_much_or_jump_are_found(tmp_path):
    keypoints, scores = FILM.poses.keypoints.copy(), FILM.poses.scores.copy()
    films = {"whole": FILM}
    few = scores.copy()
    few[..., 7:] = 0
    films["few"] = replace(FILM, poses=Poses(keypoints, few, FRAME, 25.0))
    gone = scores.copy()
    gone[2:4] = 0
    films["gone"] = replace(FILM, poses=Poses(keypoints, gone, FRAME, 25.0))
    moved = keypoints.copy()
    moved[3:] -= [0, 30]
    films["jump"] = replace(FILM, poses=Poses(moved, scores, FRAME, 25.0))
    films["pair"] = replace(FILM, poses=Poses(*(np.repeat(x, 2, 1) for x in (keypoints, scores)), FRAME, 25.0))
    report = check(save_prepared_videos(tmp_path, films))
    assert kinds(report) == {
        "few": ["warning: missing joints"],
        "gone": ["warning: absent"],
        "jump": ["warning: jump"],
        "pair": ["note: persons"],
        "whole": [],
    }
    facts = {clip.name: clip for clip in report.clips}
    assert facts["few"].missing_joints == pytest.approx(10 / 17, abs=1e-3)
    assert facts["gone"].absent_frames == pytest.approx(1 / 3, abs=1e-3)
    assert "first at frame 3" in facts["jump"].findings[0].message
    assert pose_jumps(FILM.poses).size == 0


def test_the_same_video_twice_is_found_and_worse_in_both_parts(tmp_path):
    for name in ("train/a", "train/b", "test/c"):
        save_video(tmp_path / f"videos/{name}.mp4", FILM)
    save_video(tmp_path / "videos/train/other.mp4", figure_film(7))
    report = check(prepare(tmp_path / "videos", tmp_path / "set"))
    assert kinds(report)["test/c"] == ["error: duplicate"] and kinds(report)["train/other"] == []
    assert kinds(report)["train/a"] == ["error: duplicate"]
    assert "which is in the other part" in report.clips[0].findings[0].message


def test_data_sets_are_checked_before_they_are_prepared(tmp_path):
    save_frames(tmp_path / "TikTok/00001/images", FILM.frames, "{:04d}.png")
    save_frames(tmp_path / "TikTok/00002/images", FILM.frames[:3], "{:04d}.png")
    save_frames(tmp_path / "TikTok/00002/images", FILM.frames[3:], "{:04d}.png", start=9)
    save_frames(tmp_path / "TikTok/00003/images", FILM.frames, "frame_{}.png", start=8)
    small = Film(FILM.frames[:2, ::2, ::2], FILM.masks, FILM.poses)
    save_frames(tmp_path / "TikTok/00004/images", FILM.frames[:4])
    save_frames(tmp_path / "TikTok/00004/images", small.frames, start=5)
    report = check(tmp_path / "TikTok")
    assert report.layout == "tiktok"
    assert kinds(report) == {
        "00001": [],
        "00002": ["warning: gaps"],
        "00003": ["note: padding"],
        "00004": ["error: damaged"],
    }
    (tmp_path / "x_meta.json").write_text(json.dumps([{"video_path": "gone.mp4"}]))
    assert list(kinds(check(tmp_path / "x_meta.json")).values()) == [["error: missing"]]


def test_processes_find_what_one_finds(root):
    (root / "b.mp4").write_bytes(b"garbage")
    assert check(root, workers=2).clips == check(root).clips


def test_reports_are_json_and_a_table(root, tmp_path):
    prepare(root, tmp_path / "set")
    (root / "a.mp4").unlink()
    report = check(tmp_path / "set")
    paths = write_report(report, tmp_path / "set")
    stored = json.loads(paths[0].read_text())
    assert stored["errors"] == 1 and stored["findings"] == {"error: missing": 1} and stored["frames"] == 18
    assert stored["clips"][0]["findings"][0]["advice"] == "bring it back, or run the same preparation again"
    assert stored["sizes"] == {"64x96": 3} and summary(report)["fps"] == {"25": 3}
    table = paths[1].read_text()
    lines = table.splitlines()
    assert "3 of 4 clips without errors, 18 frames" in lines[0]
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 6 and len({len(row) for row in rows}) == 1
    assert rows[2].split()[1] == "a" and "error: missing" in rows[2]
    assert lines[-1].startswith("* error: missing (a):") and "-> bring it back" in lines[-1]
    assert "... and 2 more clips" in report_table(report, 2)


def test_settings_that_cannot_work_are_user_errors(tmp_path):
    for settings, named in (
        ({"size": [4]}, "size="),
        ({"crop": "all"}, "crop=all"),
        ({"num_frames": 0}, "num_frames=0"),
    ):
        with pytest.raises(UserError, match=named):
            check(tmp_path, **settings)
    with pytest.raises(UserError, match="dataset=.*nowhere does not exist"):
        check(tmp_path / "nowhere")
