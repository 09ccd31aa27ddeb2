"""One calibrated reference for many frames, and the files that other animators read."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from data.poses.poses import Poses
from data.video.files import VideoReader, read_video
from tests.sound import loud, write_clip_with_a_beep
from tests.tpc_bodies import body, place, poses, silhouette
from tpc import calibrate
from tpc.__main__ import main
from tpc.config import TOOLS as NAMES
from tpc.config import CalibrationConfig
from tpc.export.segments import (
    RULES,
    Segment,
    segment_config,
    segment_notes,
    segment_reference,
    segment_references,
    split,
)
from tpc.export.tools import COLOURS, TOOLS

SIZE = (96, 80)
PERSON = body(np.random.default_rng(0))
PLAIN = CalibrationConfig(transform="procrustes", keypoints="all", smoothing=0, max_gap=0)


@given(st.integers(1, 400), st.integers(1, 100), st.integers(0, 99))
def test_segments_cover_every_frame_and_repeat_the_overlap(frames, length, overlap):
    if overlap >= length:
        with pytest.raises(UserError, match=f"segment_overlap={overlap} must be 0 to {length - 1}"):
            split(frames, length, overlap)
        return
    segments = split(frames, length, overlap)
    assert segments[0].start == 0 and segments[-1].stop == frames
    assert all(len(segment) == length for segment in segments[:-1]) and 0 < len(segments[-1]) <= length
    assert all(b.start == a.stop - overlap and b.stop > a.stop for a, b in zip(segments, segments[1:], strict=False))


def test_segments_as_wan_animate_and_scail_2_divide_a_clip():
    assert split(300, 77, 1) == [range(0, 77), range(76, 153), range(152, 229), range(228, 300)]
    assert split(157, 81, 5) == [range(0, 81), range(76, 157)]
    assert split(300, None) == split(300, 300) == [range(300)]


@pytest.mark.parametrize(
    ("given", "segments", "fill"),
    [
        ({}, 1, "reference"),
        ({}, 2, "scene"),
        # What is as it would be anyway changes nothing.
        ({"visibility": "exclusive"}, 1, "reference"),
        ({"start": -1}, 1, "reference"),
        # What needs the scene, and other presets, are left alone.
        ({"visibility": "scene"}, 1, None),
        ({"start": 0}, 1, None),
        ({"fill": "black"}, 2, "black"),
        ({"preset": "paper"}, 2, None),
    ],
)
def test_what_is_painted_around_the_person_of_segments(given, segments, fill):
    assert segment_config(CalibrationConfig(**given), 5, 5 * segments, persons=1).fill == fill


def calibrated(places, reference=(40, 40), scores=None):
    """A person of 40 px, calibrated to where (height, x) says that it stands in each frame."""
    driving = np.stack([place(PERSON, height, 0, (x, 40))[None] for height, x in places])
    image = np.random.default_rng(1).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
    own = place(PERSON, 40, 0, reference)
    masks = np.stack([[silhouette(points, SIZE) for points in frame] for frame in driving])
    mask = silhouette(own, SIZE)[None]
    given = poses(driving, SIZE, scores), SIZE, PLAIN
    return (
        image,
        mask,
        calibrate(image, poses(own[None, None], SIZE), *given, reference_masks=mask, driving_masks=masks),
    )


@pytest.mark.parametrize(("rule", "frame"), [("nearest", 2), ("median", 1), ("first", 0)])
def test_the_frame_of_a_segment_by_rule(rule, frame):
    # Far left, a median between, and three at about the same place on the right, of whom one is between the others.
    _, _, found = calibrated(
        [(40, 20), (40, 46), (40, 61), (40, 60), (40, 62)] if rule != "median" else [(40, x) for x in (20, 41, 60)]
    )
    assert [segment.frame for segment in segment_references(found, None, rule=rule)] == [frame]


def test_only_frames_with_the_most_persons_are_chosen_and_nobody_is_a_note():
    scores = np.ones((6, 1, 17), np.float32)
    scores[[0, 4, 5]] = 0
    image, mask, found = calibrated([(40, 40 + f) for f in range(6)], scores=scores)
    segments = segment_references(found, 2)
    assert [segment.frame for segment in segments] == [1, 2, None]
    assert segment_notes(segments, ()) == ["nobody is calibrated in segment 2; its reference is the image as it was"]
    plain, shown = segment_reference(found, segments[2], image, mask)
    np.testing.assert_array_equal(plain, image)
    np.testing.assert_array_equal(shown, mask)
    notes = segment_notes([Segment(range(0, 4), 0), Segment(range(4, 9), 4)], (4, 6))
    assert len(notes) == 1 and "the cuts before frames 6 lie within segments" in notes[0]
    with pytest.raises(ValueError, match="rule must be one of nearest, median, first, got 'last'"):
        segment_references(found, 2, rule="last")


@pytest.mark.parametrize("rule", RULES)
def test_the_person_of_a_reference_is_as_tall_as_the_driver(rule):
    image, mask, found = calibrated([(60, 48)] * 3, reference=(30, 42))
    segment = segment_references(found, None, rule=rule)[0]
    picture, shown = segment_reference(found, segment, image)
    driver = silhouette(place(PERSON, 60, 0, (48, 40)), SIZE)
    heights = [np.ptp(np.flatnonzero(m.any(1))) for m in (shown[0], driver, mask[0])]
    assert heights[0] == pytest.approx(heights[1], rel=0.03) and heights[2] < 0.7 * heights[1]
    np.testing.assert_array_equal(picture, found.images[found.member[segment.frame, 0]])


@pytest.mark.parametrize(
    ("tool", "driving", "max_side", "size"),
    [
        ("wan_animate", (1920, 1080), 0, (1280, 720)),
        ("wan_animate", (1080, 1920), 0, (720, 1280)),
        ("wan_animate", (640, 640), 0, (960, 960)),
        ("wan_animate", (1920, 1080), 832, (832, 464)),
        ("scail_2", (1080, 1920), 0, (704, 1280)),
        ("scail_2", (1920, 1080), 896, (896, 512)),
        ("one_to_all", (1920, 1080), 0, (1024, 576)),
        ("one_to_all", (480, 320), 0, (480, 320)),
        ("stable_animator", (1920, 1080), 0, (512, 512)),
        ("stable_animator", (1080, 1920), 0, (576, 1024)),
    ],
)
def test_sizes_of_tools(tool, driving, max_side, size):
    assert TOOLS[tool].size(driving, max_side) == size


def test_tools_are_those_of_the_configuration_and_know_their_sizes():
    assert tuple(TOOLS) == NAMES
    with pytest.raises(UserError, match="max_side=600 is less .* it knows 512 x 512 and 576 x 1024"):
        TOOLS["stable_animator"].size((1080, 1920), 600)


FRAMES, FPS = 60, 25


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A person of half the driver's size, and a clip of 2.4 seconds with a beep after 1.0."""
    folder = tmp_path_factory.mktemp("segments")
    frames = [np.full((SIZE[1], SIZE[0], 3), 4 * number, np.uint8) for number in range(FRAMES)]
    write_clip_with_a_beep(folder / "driving.mp4", frames, FPS, "libx264", "aac")
    cv2.imwrite(str(folder / "reference.png"), np.random.default_rng(0).integers(0, 256, (80, 96, 3), np.uint8))
    poses(place(PERSON, 30, 0, (30, 30))[None, None], SIZE).save(folder / "reference.npz")
    driving = np.stack([place(PERSON, 60, 0, (40 + 0.2 * f, 40)) for f in range(FRAMES)])
    replace(poses(driving[:, None], SIZE), fps=FPS).save(folder / "driving.npz")
    (folder / "masks").mkdir()
    for number, points in enumerate(driving):
        cv2.imwrite(str(folder / "masks" / f"{number:06d}.png"), silhouette(points, SIZE).astype(np.uint8) * 255)
    cv2.imwrite(str(folder / "mask.png"), silhouette(place(PERSON, 30, 0, (30, 30)), SIZE).astype(np.uint8) * 255)
    return folder


def run(files: Path, output: Path, *options: str) -> Path:
    given = [f"reference={files}/reference.png", f"reference_poses={files}/reference.npz", f"output={output}"]
    given += [f"driving={files}/driving.mp4", f"driving_poses={files}/driving.npz", f"driving_masks={files}/masks"]
    main([*given, f"reference_mask={files}/mask.png", "tpc.keypoints=all", *options])
    return output


# Tool -> files of a segment; of images of frames, the last. `mask.png`, `person.png` and `poses.npz` are in each.
LAYOUTS = {
    "wan_animate": ["image.png", "video.mp4"],
    "scail_2": ["driving.mp4", "ref.png", "ref_mask.png", "rendered_mask_v2.mp4", "rendered_v2.mp4"],
    "one_to_all": ["image.png", "video.mp4"],
    "stable_animator": ["reference.png", "target_images"],
}


@pytest.mark.parametrize("tool", LAYOUTS)
def test_the_files_of_tools(tool, files, tmp_path, capsys):
    small = [] if tool == "stable_animator" else ["max_side=96"]
    output = run(files, tmp_path / "out", f"tool={tool}", "max_frames=6", "stride=10", *small)
    folder = output / tool
    written = sorted(path.name for path in folder.iterdir())
    assert written == sorted([*LAYOUTS[tool], "mask.png", "person.png", "poses.npz", "segments.json", "segments.png"])
    plan = json.loads((folder / "segments.json").read_text())
    size, rate = tuple(plan["size"]), TOOLS[tool].fps or FPS
    assert [entry["folder"] for entry in plan["segments"]] == ["."] and plan["segments"][0]["frames"] == 6
    assert plan["fps"] == pytest.approx(rate / 10)
    # The driver's keypoints, and the calibrated person where they are.
    cut = Poses.load(folder / "poses.npz")
    driver = np.ptp(cut.keypoints[:, 0, :, 1], axis=1).mean()
    rgba = cv2.imread(str(folder / "person.png"), cv2.IMREAD_UNCHANGED)
    rows = np.flatnonzero(rgba[..., 3].any(1))
    outline = np.flatnonzero(silhouette(cut.keypoints[0, 0], size).any(1))
    assert cut.size == size and rgba.shape == (size[1], size[0], 4) and driver > 0.6 * size[1]
    assert np.ptp(rows) == pytest.approx(np.ptp(outline), rel=0.03)
    np.testing.assert_array_equal(cv2.imread(str(folder / TOOLS[tool].reference)), rgba[..., :3])
    if tool == "stable_animator":
        names = sorted(path.name for path in (folder / "target_images").iterdir())
        assert names == sorted(f"frame_{number}.png" for number in range(6))
        assert cv2.imread(str(folder / "target_images" / "frame_3.png")).mean() == pytest.approx(120, abs=3)
    else:
        video = VideoReader(folder / TOOLS[tool].driving)
        assert video.size == size and len(video) == 6 and video.fps == pytest.approx(rate / 10)
        assert [frame.mean() for frame in video] == pytest.approx(4 * np.floor(np.arange(6) * 10 * FPS / rate), abs=3)
    if tool == "scail_2":
        mask = cv2.imread(str(folder / "mask.png"), cv2.IMREAD_GRAYSCALE) > 0
        labels = cv2.imread(str(folder / "ref_mask.png"))[..., ::-1]
        assert (labels[mask] == COLOURS[0]).all() and (labels[~mask] == 255).all()
        labels = read_video(folder / "rendered_mask_v2.mp4").frames
        inside = labels[0, int(cut.keypoints[0, 0, 0, 1]), int(cut.keypoints[0, 0, 0, 0])]
        assert np.abs(inside.astype(int) - COLOURS[0]).max() < 20 and labels[0, 2, 2].max() < 20
        assert (folder / "rendered_v2.mp4").read_bytes() == (folder / "driving.mp4").read_bytes()
    assert f"calibrated reference in {folder}" in capsys.readouterr().out


def test_segments_cut_frames_poses_and_sound_alike(files, tmp_path):
    output = run(files, tmp_path / "out", "segments=20", "segment_overlap=2", "segment_videos=true", "max_side=48")
    plan = json.loads((output / "segments" / "segments.json").read_text())["segments"]
    assert [(entry["first_frame"], entry["frames"]) for entry in plan] == [(0, 20), (18, 20), (36, 20), (54, 6)]
    whole = Poses.load(files / "driving.npz")
    for entry in plan:
        folder, first = output / "segments" / entry["folder"], entry["first_frame"]
        assert first <= entry["reference_frame"] < first + entry["frames"]
        cut = Poses.load(folder / "poses.npz")
        own = whole.keypoints[first : first + entry["frames"]]
        np.testing.assert_allclose(cut.keypoints + 0.5, (own + 0.5) / 2, atol=1e-4)  # edges at halves
        assert VideoReader(folder / "driving.mp4")[0].mean() == pytest.approx(4 * first, abs=3)
        assert len(VideoReader(folder / "poses.mp4")) == entry["frames"]
    assert cv2.imread(str(output / "segments" / "segments.png")).shape[0] > 1000
    # The beep of 1.0 to 1.1 seconds is in frames 25 to 27: 7 frames after the second segment's first.
    begins, ends = loud(output / "segments" / "001" / "driving.mp4")[1:3]
    assert begins == pytest.approx(7 / FPS, abs=0.03) and ends == pytest.approx(0.1 + 7 / FPS, abs=0.03)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["segments=0"], "segments=0 must be clip, or a number of frames"),
        (["segments=all"], "segments=all must be clip, or a number of frames"),
        (["segment_overlap=3"], "segment_overlap=3 is of segments; give segments= too"),
        (["segments=4", "segment_overlap=4"], "segment_overlap=4 must be 0 to 3, below segments=4"),
        (["tool=scail_2", "segments=5"], "segment_overlap=5 must be 0 to 4, below segments=5"),
        (["tool=comfy"], "tool=comfy must be one of wan_animate, scail_2, one_to_all, stable_animator"),
        (["tool=stable_animator", "max_side=200"], "max_side=200 is less than this tool's frames have"),
        (["fps=0"], "fps=0"),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(options, match, files, tmp_path):
    with pytest.raises(UserError, match=match) as error:
        run(files, tmp_path / "out", "max_frames=2", *options)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("given", ["tool=wan_animate", "fps=12"])
def test_the_driving_video_is_needed_for_it(given, files, tmp_path):
    with pytest.raises(UserError, match="give driving= too"):
        main([f"reference={files}/reference.png", f"driving_poses={files}/driving.npz", f"output={tmp_path}", given])
