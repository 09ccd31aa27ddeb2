"""Original and misaligned clips: which they are, of which kind, and `evaluate.py split`."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
from core.errors import UserError
from data.poses.poses import Poses
from evaluation.clips import open_clips
from evaluation.config import ClipsConfig, ThresholdConfig
from evaluation.misalignment import ClipSplit, classify, misalignment, split_clips
from tests.clips import posed

HIPS, NOSE, LEFT = [11, 12], [0], list(range(1, 17, 2))


def without(poses: Poses, keypoints: list[int]) -> Poses:
    scores = poses.scores.copy()
    scores[..., keypoints] = 0
    return replace(poses, scores=scores)


def shifted(poses: Poses, pixels: float) -> Poses:
    return replace(poses, keypoints=poses.keypoints + np.float32(pixels))


def split_of(driving: Poses, reference: Poses | None = None) -> ClipSplit:
    return classify("a", misalignment(posed([(0, 1)]) if reference is None else reference, driving), ThresholdConfig())


def test_known_angles_and_boxes():
    measured = misalignment(posed([(0, 1)]), posed([(0, 1), (40, 1), (-170, 1), (0, 0.5)]))
    assert np.degrees(measured.angle) == pytest.approx([0, 40, -170, 0], abs=1e-4)
    assert measured.box_iou[0] == pytest.approx(1) and measured.box_iou[3] == pytest.approx(0.25, abs=1e-4)
    assert measured.scale == pytest.approx([1, 1, 1, 0.5], abs=1e-5) and not measured.by_points.any()
    # Resizing explains a small box, but not a turned one; both together explain all.
    assert measured.unscaled_iou[[0, 3]] == pytest.approx([1, 1], abs=1e-4)
    assert max(measured.box_iou[1], measured.unscaled_iou[1]) < 0.7
    assert measured.undone_iou == pytest.approx([1] * 4, abs=1e-4)


@pytest.mark.parametrize(
    ("transforms", "kinds"),
    [
        ([(0, 1)] * 8, ()),
        ([(20, 0.95)] * 8, ()),
        ([(0, 1)] * 5 + [(60, 1)] * 3, ("temporal rotation",)),
        ([(180, 1)] * 8, ("consistent rotation",)),
        ([(0, 1)] * 4 + [(0, 2)] * 4, ("temporal scale",)),
        ([(0, 0.5)] * 8, ("consistent scale",)),
        ([(90, 0.4)] * 8, ("consistent rotation", "consistent scale")),
        ([(0, 1)] * 7 + [(90, 0.4)], ()),
        ([(29, 1)] * 3 + [(0, 1)] * 5, ("temporal rotation",)),
        ([(45, 1)] * 4 + [(0, 0.5)] * 4, ("temporal rotation", "temporal scale")),
        # Of the causes none is frequent enough alone.
        ([(0, 1)] * 6 + [(45, 1), (0, 0.5)], ("temporal rotation",)),
    ],
)
def test_kinds_and_how_long_they_last(transforms, kinds):
    split = split_of(posed(transforms))
    assert split.kinds == kinds and split.misaligned == bool(kinds) and split.frames == 8


@pytest.mark.parametrize("unseen", [[], HIPS, NOSE, LEFT], ids=["all seen", "no hips", "no nose", "one side"])
@pytest.mark.parametrize("scale", [0.5, 0.75, 1, 1.3, 2])
@pytest.mark.parametrize("angle", [0, 20, 29, 31, 45, 90, 180, -45])
def test_a_turn_and_a_scale_are_told_apart(angle, scale, unseen):
    """Whatever is unseen, in reference and frame alike."""
    reference, driving = without(posed([(0, 1)]), unseen), without(posed([(angle, scale)] * 4), unseen)
    measured, split = misalignment(reference, driving), split_of(driving, reference)
    assert split.angle_deg == pytest.approx(abs(angle), abs=1e-3)
    assert split.angles_by_points == (4 if unseen else 0)
    kinds = set()
    if abs(angle) > 30 or measured.box_iou[0] < 0.7:
        kinds |= {"consistent scale"} if scale != 1 else set()
        turned_alone = misalignment(reference, without(posed([(angle, 1)]), unseen)).box_iou[0]
        kinds |= {"consistent rotation"} if abs(angle) > 30 or turned_alone < 0.7 else set()
    assert set(split.kinds) == kinds and split.misaligned == bool(kinds)


@pytest.mark.parametrize("unseen", [HIPS, NOSE, LEFT])
@pytest.mark.parametrize(("angle", "scale"), [(45, 1), (180, 1), (90, 2), (31, 1)])
def test_what_only_the_frame_hides_does_not_hide_a_turn(angle, scale, unseen):
    split = split_of(without(posed([(angle, scale)] * 4), unseen))
    assert split.angle_deg == pytest.approx(angle, abs=1e-3)
    assert split.kinds == ("consistent rotation", *(["consistent scale"] if scale != 1 else []))


def test_a_turn_below_the_threshold_whose_boxes_lie_apart_is_a_turn():
    measured = misalignment(posed([(0, 1)]), posed([(29, 1)]))
    assert measured.box_iou[0] < 0.7
    assert split_of(posed([(29, 1)] * 4)).kinds == ("consistent rotation",)


def test_a_turn_and_a_scale_that_only_together_take_the_boxes_apart():
    kinds = ("consistent rotation", "consistent scale")
    for angle, scale in ((20, 1), (0, 1.18)):
        assert not split_of(posed([(angle, scale)] * 4)).misaligned
    assert split_of(posed([(20, 1.18)] * 4)).kinds == kinds


@pytest.mark.parametrize(
    ("driving", "kinds"),
    [
        (shifted(posed([(0, 1)] * 4), 30), ("consistent shift",)),
        (shifted(posed([(0, 1.1)] * 4), 30), ("consistent shift",)),
        (shifted(posed([(0, 1)] * 4), 2), ()),
        (shifted(posed([(0, 2)] * 4), 30), ("consistent scale",)),
        (shifted(posed([(45, 1)] * 4), 30), ("consistent rotation",)),
        (without(posed([(0, 1)] * 4), [13, 14, 15, 16]), ("consistent pose or crop",)),
        (without(posed([(0, 2)] * 4), [13, 14, 15, 16]), ("consistent scale",)),
        (without(posed([(0, 1)] * 4), LEFT), ("consistent pose or crop",)),
    ],
)
def test_boxes_apart_without_a_turn_or_a_scale(driving, kinds):
    split = split_of(driving)
    assert split.kinds == kinds and split.misaligned == bool(kinds)


def test_a_shift_for_a_part_of_the_time_is_temporal():
    poses = posed([(0, 1)] * 4)
    moved = replace(poses, keypoints=poses.keypoints + np.float32([0, 0, 30, 30])[:, None, None, None])
    assert split_of(moved).kinds == ("temporal shift",)


def test_another_pose_is_no_scale():
    """Arms and legs stretched out to the sides, at the same size of the body."""
    spread = posed([(0, 1)] * 4)
    spread.keypoints[:, 0, 9:11] = [[110, 25], [-10, 25]]
    spread.keypoints[:, 0, 15:17] = [[95, 80], [5, 80]]
    assert set(split_of(spread).kinds) & {"consistent rotation", "consistent shift"} == set()
    assert split_of(spread).misaligned


def test_thresholds_count():
    measured = misalignment(posed([(0, 1)]), posed([(29, 1)] * 4))
    assert not classify("a", measured, ThresholdConfig(box_iou=0.1)).misaligned
    assert classify("a", measured, ThresholdConfig(box_iou=0.1, angle=0.5)).misaligned


@pytest.mark.parametrize(("turned", "kinds"), [(1, ()), (2, ("consistent rotation",))])
def test_frames_without_a_person_are_left_out(turned, kinds):
    """Five frames that show nobody beside seven, then beside two that are turned: no share counts them."""
    poses = posed([(0, 1)] * (6 if turned == 1 else 0) + [(60, 1)] * turned + [(0, 1)] * 5)
    scores = poses.scores.copy()
    scores[-5:] = 0
    split = split_of(replace(poses, scores=scores))
    assert split.kinds == kinds and split.misaligned_frames == turned
    assert split.unseen_frames == 5 and split.frames == len(scores)


@pytest.mark.parametrize("seen", [[], [0], [0, 5]])
def test_a_clip_in_which_too_little_is_seen_is_neither(seen):
    split = split_of(without(posed([(0, 1)] * 4), [k for k in range(17) if k not in seen]))
    assert split.misaligned is None and split.subset == "unseen" and split.kinds == ()
    assert split.angle_deg is None and split.box_iou is None
    assert split.unseen_frames == split.frames == 4


def test_points_in_one_place_are_too_little():
    poses = posed([(0, 1)] * 4)
    poses.keypoints[:] = 50
    assert split_of(poses).misaligned is None


@settings(max_examples=30, deadline=None)
@given(st.floats(-180, 180), st.floats(0.3, 3), st.floats(-50, 50))
def test_every_misaligned_frame_has_a_cause(angle, scale, shift):
    driving = shifted(posed([(angle, scale)]), shift)
    measured, split = misalignment(posed([(0, 1)]), driving), split_of(driving)
    expected = abs(measured.angle[0]) > np.pi / 6 or measured.box_iou[0] < 0.7
    assert split.misaligned == expected == bool(split.kinds)
    assert "consistent pose or crop" not in split.kinds, "a similarity explains the boxes"
    if abs(angle) > 30.01:
        assert "consistent rotation" in split.kinds
    if expected and min(scale, 1 / scale) ** 2 < 0.699:
        assert "consistent scale" in split.kinds


def test_split_of_a_folder_of_pose_files(tmp_path, capsys):
    clips = {"still": [(0, 1)] * 6, "bends": [(0, 1)] * 3 + [(80, 1)] * 3, "small": [(0, 1)] + [(0, 0.4)] * 5}
    for name, transforms in clips.items():
        posed(transforms).save(tmp_path / "poses" / f"{name}.npz")
    hidden = without(posed([(0, 1)] * 3), list(range(2, 17)))
    hidden.save(tmp_path / "poses" / "hidden.npz")
    evaluate.main(["split", f"dataset={tmp_path / 'poses'}", f"output={tmp_path / 'o'}"])
    assert (tmp_path / "o" / "original.txt").read_text() == "still\n"
    assert (tmp_path / "o" / "misaligned.txt").read_text() == "bends\nsmall\n"
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["clips"]["bends"]["kinds"] == ["temporal rotation"]
    assert results["counts"]["consistent scale"] == 1 and results["counts"]["misaligned"] == 2
    assert (tmp_path / "o" / "unseen.txt").read_text() == "hidden\n" and results["counts"]["unseen"] == 1
    assert results["frames"] == {"all": 21, "unseen": 3, "angle by points": 0}
    shown = capsys.readouterr().out
    assert "| misaligned | 2 |" in shown and "| unseen | 1 |" in shown and "| unseen | 3 |" in shown
    assert np.asarray(Image.open(tmp_path / "o" / "histogram.png")).std() > 10
    assert (tmp_path / "o" / "histogram.pdf").read_bytes().startswith(b"%PDF")
    (tmp_path / "nobody").mkdir()
    hidden.save(tmp_path / "nobody" / "hidden.npz")
    clips = open_clips(ClipsConfig(dataset=str(tmp_path / "nobody"), clips=0, frames=0))
    with pytest.raises(UserError, match="none of 1 clips has a frame that shows 3 keypoints"):
        split_clips(clips, ThresholdConfig())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pose files"):
        evaluate.main(["split", f"dataset={tmp_path / 'empty'}", f"output={tmp_path / 'p'}"])
    with pytest.raises(UserError, match="dataset= is required"):
        evaluate.main(["split", f"output={tmp_path / 'p'}"])
    with pytest.raises(UserError, match="thresholds.angle=9"):
        evaluate.main(["split", f"dataset={tmp_path / 'poses'}", f"output={tmp_path / 'p'}", "thresholds.angle=9"])
