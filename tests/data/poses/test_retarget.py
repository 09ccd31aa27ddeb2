"""Retargeting of poses: against the truth of rendered people, against closed forms, and on poor input."""

import json

import numpy as np
import pytest

from benchmarks.retargeting import BODIES, DRIVER, PICTURES, cases
from core.errors import UserError
from data.people.bodies import load_people, neutral_pose, pose_joints
from data.poses.files import load_poses, save_openpose
from data.poses.lengths import PARTS, SEGMENTS, length_ratios, proportions, segment_lengths, with_middles
from data.poses.poses import Poses
from data.poses.retarget import main, retarget

SIZE, FPS = (512, 512), 8.0


@pytest.fixture(scope="module")
def library():
    return load_people()


@pytest.fixture(scope="module")
def found(library):
    """Cases of a few motions by reference's body and flatness."""
    return {(body, flat): list(cases(library, body, 3, 8, 5, flat)) for body in BODIES[:3] for flat in (False, True)}


@pytest.fixture(scope="module")
def child(found):
    return found["child", False][0]


def clip(points, scores=None) -> Poses:
    points = np.asarray(points, np.float32)
    points = points[:, None] if points.ndim == 3 else points
    return Poses(points, np.ones(points.shape[:3]) if scores is None else scores, SIZE, FPS)


def hidden(points, missing) -> Poses:
    """Poses without the points `missing` (f, 17) bool, which are at zero."""
    return clip(np.where(missing[..., None], 0, points), (~missing[:, None]).astype(float))


def test_population_is_that_of_the_training_bodies(library):
    measured = []
    for body in (library.bodies[name] for name in library.names("train")):
        transforms = pose_joints(body.joints, body.neutral, neutral_pose(), body.height)
        points = np.tensordot(body.keypoints, transforms, axes=((1, 2), (0, 2)))  # (17, 3) metres
        points = np.concatenate([points, [points[pair].mean(0) for pair in ([11, 12], [5, 6], [3, 4])]])
        measured.append([np.linalg.norm(points[a] - points[b]) / body.height for _, a, b, _ in SEGMENTS])
    assert np.mean(measured, axis=0) == pytest.approx([length for *_, length in SEGMENTS], rel=0.02)


@pytest.mark.parametrize("flat, limit", [(True, 0.03), (False, 0.06)])
@pytest.mark.parametrize("picture", PICTURES)
def test_another_body_in_the_same_motion_is_recovered(found, flat, limit, picture):
    for body in BODIES[:3]:
        for case in found[body, flat]:
            assert np.median(case.errors(picture, "bones")) < limit, (body, case.motion)
    errors = {mode: np.median([c.errors(picture, mode) for c in found["child", flat]]) for mode in ("off", "bones")}
    assert errors["bones"] < 0.6 * errors["off"]


def test_the_drivers_own_picture_changes_nothing(found):
    """In whatever frame, size, turn and place it is taken."""
    for case in found[DRIVER, False]:
        turned = 0.4 * case.driving[5:6] @ [[0.6, -0.8], [0.8, 0.6]] + [30, -20]
        result, notes = retarget(clip(case.driving), clip(turned), "bones")
        np.testing.assert_allclose(result.keypoints[:, 0], case.driving, atol=1e-3)
        assert notes == []


def test_bones_have_the_drivers_directions_and_the_references_ratios(child):
    driving = clip(child.driving)
    result, _ = retarget(driving, clip(child.pictures["standing"]))
    points, seen = with_middles(child.driving, np.ones((8, 17), bool))
    own, own_seen = with_middles(child.pictures["standing"], np.ones((1, 17), bool))
    ratios = dict(zip(PARTS, length_ratios(points, seen, own[0], own_seen[0], FPS), strict=True))
    for name, a, b, _ in SEGMENTS:
        if max(a, b) < 17:
            before, after = (p.keypoints[:, 0, b] - p.keypoints[:, 0, a] for p in (driving, result))
            np.testing.assert_allclose(after, ratios[name] * before, atol=1e-2)
    assert ratios["head"] > 1.3
    assert ratios["shin"] < 0.9


def test_feet_stay_on_the_ground_and_do_not_slide():
    """Somebody passes by, a foot planted at a time; the reference's legs are short."""
    person = np.array(
        [[0, -90], [3, -93], [-3, -93], [8, -91], [-8, -91], [18, -72], [-18, -72], [20, -56], [-20, -56], [20, -42]]
        + [[-20, -42], [11, -43], [-11, -43], [12, -21], [-12, -21], [12, 0], [-12, 0]], float
    )  # fmt: skip
    short = person.copy()
    short[13:15, 1], short[15:17, 1] = -27, -11  # ankles are 11 higher, as all of it is larger in its picture
    hips = np.linspace(-30, 30, 9)
    walking = np.array([person + [x, 0] for x in hips])
    walking[:, [13, 15], 0] = [[x / 2 + 6, 6] for x in hips]  # the left foot stays, the knee is halfway
    driving = 2 * walking + 250
    result, _ = retarget(clip(driving), clip(2 * short[None] + 250))
    feet = result.keypoints[:, 0, [15, 16]]
    assert feet[..., 1].max(1) == pytest.approx(driving[:, [15, 16], 1].max(1), abs=1e-3)
    assert np.ptp(feet[:, 0, 0]) < 2.5  # pixels, of a way of 120


def test_sizes_in_the_image_do_not_count(child):
    """A reference of another size and resolution, and a driver who comes nearer."""
    driving, reference = clip(child.driving), clip(child.pictures["standing"])
    usual, _ = retarget(driving, reference)
    small, _ = retarget(driving, Poses(reference.keypoints / 4, reference.scores, (128, 128), 1.0))
    np.testing.assert_allclose(small.keypoints, usual.keypoints, atol=1e-2)
    doubled, _ = retarget(driving, reference, height_ratio=2.0)
    heights = [np.ptp(p.keypoints[:, 0, :, 1], axis=1) for p in (usual, doubled)]
    assert heights[1] == pytest.approx(2 * heights[0], rel=1e-3)
    nearer = np.linspace(0.5, 1, 8)[:, None, None]
    result, _ = retarget(clip(child.driving * nearer), reference)
    errors = np.linalg.norm(result.keypoints[:, 0] - child.truth * nearer, axis=-1) / child.height
    assert np.median(errors) < 0.03


@pytest.mark.parametrize(
    "missing",
    [(15, 16), (11, 12, 13, 14, 15, 16), (0, 1, 2, 3, 4), (6, 8, 10, 12, 14, 16)],
    ids=["ankles", "lower body", "face", "one side"],
)
def test_people_of_whom_a_part_is_never_seen(child, missing):
    absent = np.isin(np.arange(17), missing)[None].repeat(8, 0)
    result, _ = retarget(hidden(child.driving, absent), clip(child.pictures["standing"]))
    errors = np.linalg.norm(result.keypoints[:, 0] - child.truth, axis=-1)[~absent] / child.height
    assert np.median(errors) < 0.03
    assert (result.keypoints[:, 0][absent] == 0).all()


def test_points_that_come_and_go_do_not_move_the_others(child):
    absent = np.random.default_rng(0).random((8, 17)) < 0.2
    absent[3] = True  # the person is missing for a frame
    reference = clip(child.pictures["standing"])
    whole, _ = retarget(clip(child.driving), reference)
    holes, _ = retarget(hidden(child.driving, absent), reference)
    away = np.linalg.norm(whole.keypoints - holes.keypoints, axis=-1)[:, 0][~absent]
    assert np.quantile(away, 0.95) < 0.03 * child.height
    assert (holes.keypoints[3] == 0).all()


def test_persons_from_left_to_right_or_as_told(child, found):
    other = found["own", False][0]
    driving = np.stack([child.driving + [300, 0], child.driving - [300, 0]], 1)
    driving = np.concatenate([driving, driving[:, :1] + [600, 0]], 1)  # a third one, whom the reference lacks
    pictures = [other.pictures["standing"] - [400, 0], child.pictures["standing"]]
    reference = clip(np.stack(pictures, 1))
    alone = [retarget(clip(child.driving), clip(picture))[0].keypoints[:, 0] for picture in pictures]
    result, _ = retarget(clip(driving), reference)
    np.testing.assert_allclose(result.keypoints[:, 1] + [300, 0], alone[0], atol=1e-2)
    np.testing.assert_allclose(result.keypoints[:, 0] - [300, 0], alone[1], atol=1e-2)
    np.testing.assert_array_equal(result.keypoints[:, 2], clip(driving).keypoints[:, 2])
    slots = np.tile([2, -1], (8, 1))
    told, notes = retarget(clip(driving), reference, slots=slots)
    np.testing.assert_allclose(told.keypoints[:, 2] - [900, 0], alone[0], atol=1e-2)
    np.testing.assert_array_equal(told.keypoints[:, :2], clip(driving).keypoints[:, :2])
    assert notes == ["person 1 of the reference is not in the driving poses"]


def test_similarity_fits_the_first_whole_frame(child):
    scores = np.ones((8, 1, 17))
    scores[0, :, 9:] = 0  # the first frame shows half of the person
    driving, truth = clip(child.driving, scores), 0.5 * child.driving + [40, 60]
    result, _ = retarget(driving, clip(truth[1:2]), "similarity")
    np.testing.assert_allclose(result.keypoints[:, 0], truth, atol=1e-3)
    small = Poses(np.float32(truth[1:2, None] / 2), np.ones((1, 1, 17)), (256, 256), 1.0)
    shown, _ = retarget(driving, small, "similarity")  # the reference's picture fills the frame
    np.testing.assert_allclose(shown.keypoints[:, 0], truth + 0.5, atol=1e-3)


def test_off_is_off(child):
    driving = clip(child.driving)
    assert retarget(driving, clip(child.pictures["seated"]), "off") == (driving, [])


ONLY = {"nobody": (), "one joint": (9,), "no hips, no head": (5, 6), "legs": range(11, 17), "face": range(5)}


@pytest.mark.parametrize("whose", ["reference", "driver"])
@pytest.mark.parametrize("shown", ONLY)
def test_too_little_to_measure_leaves_the_poses_with_a_reason(child, shown, whose):
    standing = child.pictures["standing"]
    points, other = (standing, child.driving) if whose == "reference" else (child.driving, standing)
    poor = hidden(points, ~np.isin(np.arange(17), list(ONLY[shown]))[None].repeat(len(points), 0))
    driving, reference = (clip(other), poor) if whose == "reference" else (poor, clip(other))
    result, notes = retarget(driving, reference)
    np.testing.assert_array_equal(result.keypoints, driving.keypoints)
    assert len(notes) == 1
    assert notes[0].startswith("person 0 ")


def test_odd_lengths_and_clips(child):
    standing = clip(child.pictures["standing"])
    pointlike = np.full((8, 17, 2), 100.0)
    for driving, reference in ((clip(pointlike), standing), (clip(child.driving), clip(pointlike[:1]))):
        result, notes = retarget(driving, reference)
        np.testing.assert_array_equal(result.keypoints, driving.keypoints)
        assert "shoulders with hips or head" in notes[0]
    folded = child.driving.copy()
    folded[:, 9] = folded[:, 7]  # a forearm without length
    for points in (folded, child.driving[:1], child.driving * 1e-6, child.driving * 1e6):
        result, notes = retarget(clip(points), standing)
        assert np.isfinite(result.keypoints).all()
        assert notes == []
    empty = Poses(np.zeros((2, 0, 17, 2)), np.zeros((2, 0, 17)), SIZE, FPS)
    assert retarget(empty, standing)[0].persons == 0


def test_what_the_reference_does_not_show_is_said(child):
    legs = np.isin(np.arange(17), range(13, 17))[None]
    _, notes = retarget(clip(child.driving), hidden(child.pictures["standing"], legs))
    assert notes == ["person 0: the reference does not show thigh, shin; taken to be as people are"]


def test_lengths_do_not_depend_on_frames_in_which_bones_are_foreshortened(child):
    points, seen = with_middles(child.driving, np.ones((8, 17), bool))
    lengths = segment_lengths(points, seen)
    shortened = np.concatenate([lengths, lengths * np.random.default_rng(0).uniform(0.3, 1, lengths.shape)])
    # Frames by turns, so that no line over time tells them apart.
    mixed = shortened.reshape(2, 8, -1).swapaxes(0, 1).reshape(16, -1)
    ratio = proportions(mixed, FPS) / proportions(lengths, FPS)
    assert np.ptp(ratio) < 0.12 * ratio.mean()


def test_wrong_arguments_of_the_function(child):
    driving, standing = clip(child.driving), clip(child.pictures["standing"])
    for arguments, message in (
        ((driving, standing, "bone"), "mode must be one of"),
        ((driving, driving), "reference must be one frame, got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            retarget(*arguments)
    with pytest.raises(ValueError, match="slots must be"):
        retarget(driving, standing, slots=np.zeros((8, 2), int))


@pytest.fixture
def files(child, tmp_path):
    clip(child.driving).save(tmp_path / "d.npz")
    save_openpose(clip(child.pictures["standing"]), tmp_path / "r.json")
    return [f"reference_poses={tmp_path}/r.json", f"driving_poses={tmp_path}/d.npz"]


@pytest.mark.parametrize("name", ["out.npz", "deep/out.json"])
def test_command(files, child, tmp_path, name, capsys):
    main([*files, f"output={tmp_path / name}"])
    expected, _ = retarget(clip(child.driving), clip(child.pictures["standing"]))
    written = load_poses(tmp_path / name)
    assert written.size == SIZE
    np.testing.assert_allclose(written.keypoints, expected.keypoints, atol=0.01)
    assert capsys.readouterr().out == f"{tmp_path / name}: 8 frames of 1 persons\n"


def test_wrong_arguments_of_the_command(files, tmp_path):
    not_finite = {"keypoints": np.full((8, 1, 17, 2), np.nan), "scores": np.ones((8, 1, 17)), "size": SIZE, "fps": 8}
    np.savez(tmp_path / "nan.npz", **not_finite)
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    out = f"output={tmp_path / 'o.npz'}"
    for arguments, message in (
        ([*files, "output=out.mp4"], "output=out.mp4 must end in .npz, or in .json"),
        ([*files, out, "mode=off"], "mode=off must be one of similarity, bones"),
        ([*files, out, "mode=similarity", "height_ratio=2"], "height_ratio=2 belongs to mode=bones"),
        ([files[0], out], "driving_poses"),
        ([files[0], f"driving_poses={tmp_path}/none.npz", out], "none.npz"),
        ([files[0], f"driving_poses={tmp_path}/nan.npz", out], "nan.npz is not a pose file: .*finite"),
        ([files[0], f"driving_poses={tmp_path}/other.json", out], "other.json cannot be read as poses"),
        ([f"reference_poses={tmp_path}/d.npz", files[1], out], "has 8 frames; a picture has one"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)
    assert not (tmp_path / "o.npz").exists()
