"""Calibration of whole clips: geometry, matching of persons, gaps, and every degenerate input."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from core.errors import UserError
from data.poses.person import COCO_MIRROR
from tests.tpc_bodies import SIZE, TORSO, bodies, body, image, place, poses, reference, silhouette, walk
from tpc import Calibration, CalibrationConfig, SimilarityTransform, calibrate
from tpc.config import resolve
from tpc.procrustes import apply_matrix
from tpc.result import SHOWN
from tpc.trajectory import interpolate, smooth, to_matrices, to_parameters, unwrap


@pytest.mark.parametrize("preset", ["best", "paper", "release"])
@pytest.mark.parametrize("transform", ["procrustes", "affine"])
def test_recovers_a_moving_camera(preset, transform):
    points = reference()
    driving, truth = walk(points)
    config = CalibrationConfig(preset=preset, transform=transform, smoothing=0.0)
    found = calibrate(image(), poses(points[None, None]), poses(driving[:, None]), SIZE, config)
    assert (found.status == "calibrated").all()
    for matrix, goal in zip(found.matrices[:, 0], truth, strict=True):
        assert np.abs(apply_matrix(matrix, points) - apply_matrix(goal, points)).max() < 0.05
    assert all(row[0].mask_iou > 0.85 for row in found.records)
    angles = np.array([row[0].relative_angle_deg for row in found.records])
    np.testing.assert_allclose(angles, [row[0].rotation_deg for row in found.records], atol=0.1)


def test_smoothing_reduces_noise_and_leaves_steady_motion_alone():
    points = reference()
    driving, truth = walk(points, 40)
    noisy = driving + np.random.default_rng(0).normal(0, 1.5, driving.shape)
    errors = {}
    for sigma in (0.0, 2.0):
        for name, keypoints in (("clean", driving), ("noisy", noisy)):
            config = CalibrationConfig(keypoints="torso", smoothing=sigma)
            found = calibrate(image(), poses(points[None, None]), poses(keypoints[:, None]), SIZE, config)
            offset = [
                apply_matrix(m, points) - apply_matrix(t, points)
                for m, t in zip(found.matrices[:, 0], truth, strict=True)
            ]
            errors[name, sigma] = np.abs(offset).mean()
    assert errors["noisy", 2.0] < 0.6 * errors["noisy", 0.0]
    assert errors["clean", 2.0] < 0.1


def test_short_gaps_are_interpolated_and_long_ones_stay_uncalibrated():
    points = reference()
    driving, truth = walk(points, 30)
    scores = np.ones((30, 1, 17))
    scores[5:8], scores[12:25], scores[29] = 0, 0, 0
    driving[12:25] = 0
    config = CalibrationConfig(keypoints="all", smoothing=0.0, max_gap=3)
    found = calibrate(image(), poses(points[None, None]), poses(driving[:, None], scores=scores), SIZE, config)
    expected = np.full(30, "calibrated", object)
    expected[5:8], expected[12:25], expected[29] = "interpolated", "uncalibrated", "uncalibrated"
    np.testing.assert_array_equal(found.status[:, 0], expected)
    for frame in range(5, 8):
        offset = apply_matrix(found.matrices[frame, 0], points) - apply_matrix(truth[frame], points)
        assert np.abs(offset).max() < 0.5
    assert (found.member[12:25] == -1).all() and found.reason[13, 0] == "the person is not in the frame"
    assert np.isfinite(found.matrices).all()
    # A frame without a pose takes the calibrated person's place as its target.
    np.testing.assert_array_equal(found.target_masks[6, 0], found.masks[found.member[6, 0]])
    assert not found.target_masks[13, 0].any()
    assert found.summary()["interpolated"] == 3 and found.summary()["uncalibrated"] == 14


def test_interpolation_goes_the_shorter_way_and_round_the_person():
    angles = np.radians([170.0, 0, 0, -170.0])
    centre = np.array([50.0, 40.0])
    matrices = SimilarityTransform(np.array([1.0, 1, 1, 4]), angles, np.zeros((4, 2))).matrix
    goals = np.array([[10.0, 10], [0, 0], [0, 0], [40.0, 10]])
    matrices[:, :2, 2] = goals - (matrices[:, :2, :2] @ centre)
    known = np.array([True, False, False, True])
    filled, new = interpolate(unwrap(to_parameters(matrices, centre, True), known), known, 2)
    result = to_matrices(filled, centre, True)
    np.testing.assert_array_equal(new, [False, True, True, False])
    np.testing.assert_allclose(np.degrees(filled[:, 1]), [170, 176.667, 183.333, 190], atol=1e-3)
    np.testing.assert_allclose(np.exp(filled[:, 0]), [1, 4 ** (1 / 3), 4 ** (2 / 3), 4], atol=1e-9)
    np.testing.assert_allclose(
        apply_matrix(result, centre[None])[:, 0], [[10, 10], [20, 10], [30, 10], [40, 10]], atol=1e-9
    )
    assert not interpolate(filled, known, 1)[1].any()


def test_smoothing_stays_inside_unbroken_runs():
    values = np.zeros((10, 4))
    values[5:] = 100
    known = np.arange(10) != 5
    result = smooth(values, known, 2.0)
    np.testing.assert_allclose(result[:5], 0, atol=1e-9)
    np.testing.assert_allclose(result[6:], 100, atol=1e-9)
    line = np.arange(10.0)[:, None] * [1, 2, 3, 4]
    np.testing.assert_allclose(smooth(line, np.ones(10, bool), 1.5), line, atol=1e-9)
    np.testing.assert_array_equal(smooth(values, known, 0.0), values)
    np.testing.assert_array_equal(smooth(values[:1], known[:1], 3.0), values[:1])


@pytest.mark.parametrize("choice", ["swap", "keep", "reject"])
def test_back_view(choice):
    points = reference()
    behind = place(body(np.random.default_rng(0)), 80, 0.0)
    behind = (behind * [-1, 1] + [128, 0])[COCO_MIRROR][COCO_MIRROR]  # mirrored image: left and right are exchanged
    config = CalibrationConfig(keypoints="trunk", back_view=choice)
    found = calibrate(image(), poses(points[None, None]), poses(behind[None, None]), SIZE, config).records[0][0]
    if choice == "reject":
        assert found.status == "uncalibrated" and "from behind" in found.reason
    elif choice == "swap":
        assert found.status == "calibrated" and "exchanged" in found.reason
        assert found.scale == pytest.approx(1, abs=0.1) and found.mirrored
    else:
        assert not found.mirrored


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda k, s: s.__imul__(0), "not in the frame"),
        (lambda k, s: s[..., 1:].__imul__(0), "1 keypoints"),
        (lambda k, s: s[..., 2:].__imul__(0), "2 keypoints"),
        (lambda k, s: k.__imul__(0), "silhouette"),
        (lambda k, s: k.__iadd__(10_000), "silhouette"),
    ],
)
def test_hopeless_frames_are_explained(change, reason):
    points = reference()
    keypoints, scores = np.tile(points, (3, 1, 1, 1)), np.ones((3, 1, 17))
    change(keypoints[1:2], scores[1:2])
    config = CalibrationConfig(max_gap=0)
    found = calibrate(image(), poses(points[None, None]), poses(keypoints, scores=scores), SIZE, config)
    assert found.status[:, 0].tolist() == ["calibrated", "uncalibrated", "calibrated"]
    assert reason in found.reason[1, 0]


@pytest.mark.parametrize("mirror", [False, True])
def test_collinear_coincident_and_mirrored_references_do_not_crash(mirror):
    line = np.stack([np.linspace(20, 100, 17), np.linspace(30, 90, 17)], -1)
    for points in (line, np.full((17, 2), 60.0), reference() * [-1, 1] + [128, 0]):
        for transform in ("procrustes", "affine", "linear"):
            for rule in ("exhaustive", "consensus", "all", "face"):
                config = CalibrationConfig(keypoints=rule, transform=transform, min_iou=0.0)
                driving = poses((reference() * ([-1, 1] if mirror else [1, 1]) + [128 * mirror, 0])[None, None])
                found = calibrate(image(), poses(points[None, None]), driving, SIZE, config)
                assert np.isfinite(found.matrices).all()
                assert found.status[0, 0] == "calibrated" or found.reason[0, 0]


def test_bounds_and_the_confidence_gate():
    points = reference()
    driving = poses(place(body(np.random.default_rng(0)), 40, 0.0)[None, None])
    for options, reason in (
        ({"keypoints": "all", "min_scale": 0.8}, "scale"),
        ({"keypoints": "all", "max_rotation": 45.0}, "rotation"),
        ({"keypoints": "all", "transform": "linear", "min_iou": 1.0}, "IoU"),
    ):
        found = calibrate(image(), poses(points[None, None]), driving, SIZE, CalibrationConfig(**options))
        assert found.status[0, 0] == "uncalibrated" and reason in found.reason[0, 0]


def test_empty_masks_and_masks_as_a_sequence():
    points = reference()
    driving, _ = walk(points, 4)
    mask, masks = silhouette(points)[None], [silhouette(k)[None] for k in driving]
    call = (image(), poses(points[None, None]), poses(driving[:, None]), SIZE)
    listed = calibrate(*call, reference_masks=mask, driving_masks=masks)
    stacked = calibrate(*call, reference_masks=mask, driving_masks=np.stack(masks))
    np.testing.assert_array_equal(listed.matrices, stacked.matrices)
    np.testing.assert_array_equal(np.asarray(listed.target_masks), np.stack(masks))
    without, drawn = calibrate(*call, reference_masks=mask), CalibrationConfig(driving_silhouette="drawn")
    drawn = calibrate(*call, drawn, reference_masks=mask, driving_masks=masks)
    np.testing.assert_array_equal(drawn.matrices, without.matrices)
    assert not np.array_equal(drawn.matrices, listed.matrices)
    masks[2] = np.zeros_like(masks[2])
    config = CalibrationConfig(max_gap=0)
    drawn = calibrate(*call, config, reference_masks=mask, driving_masks=masks)
    assert drawn.status[2, 0] == "calibrated" and drawn.target_masks[2].sum() > 100
    empty = calibrate(*call, config, reference_masks=np.zeros_like(mask), driving_masks=masks)
    assert (empty.status == "uncalibrated").all() and len(empty.images) == 0


@pytest.mark.parametrize("size", [(1, 1), (5000, 300), (300, 5000)])
def test_images_of_any_size(size):
    points = place(body(np.random.default_rng(0)), min(size) * 0.8, 0, (size[0] / 2, size[1] / 2))
    other = image(0, size)
    found = calibrate(other, poses(points[None, None], size), poses(reference()[None, None]), (64, 48), TORSO)
    assert found.images[:].shape == (len(found.images), 48, 64, 3)
    assert found.status[0, 0] == ("uncalibrated" if size == (1, 1) else "calibrated")
    back = calibrate(image(), poses(reference()[None, None]), poses(points[None, None], size), (64, 48), TORSO)
    assert back.target_masks[0].shape == (1, 48, 64)


def test_one_frame_and_two_thousand_frames():
    points = reference()
    config = CalibrationConfig(keypoints="trunk")
    one = calibrate(image(), poses(points[None, None]), poses(points[None, None]), SIZE, config)
    assert one.status.tolist() == [["calibrated"]] and one.index(0).tolist() == [[0]]
    driving, _ = walk(points, 2000)
    many = calibrate(image(), poses(points[None, None]), poses(driving[:, None]), SIZE, config)
    assert (many.status == "calibrated").all() and many.index(7).shape == (2000, 1)
    assert many.masks.nbytes + many.target_masks.nbytes < 2 * 2000 * 128 * 128 / 8 / 4


def test_a_still_clip_has_one_image():
    points = reference()
    found = calibrate(image(), poses(points[None, None]), poses(np.tile(points, (9, 1, 1, 1))), SIZE)
    assert len(found.images) == 1 and (found.member == 0).all() and found.used(3).tolist() == [0]


def test_calibrated_pixels_are_those_of_the_reference():
    size = (256, 200)
    points = place(body(np.random.default_rng(2)), 120, 1.0, (128, 100))
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    image = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    driving, _ = walk(points, 3)
    frame_map = np.array([[0.5, 0, 4], [0, 0.5, 6], [0, 0, 1.0]])
    config = CalibrationConfig(transform="procrustes", keypoints="all", smoothing=0.0)
    found = calibrate(
        image, poses(points[None, None], size), poses(driving[:, None], size), (100, 90), config, frame_map=frame_map
    )
    for frame in range(3):
        mask, shown = found.masks[found.member[frame, 0]], found.images[found.member[frame, 0]]
        rows, columns = np.nonzero(cv2.erode(mask.astype(np.uint8), np.ones((5, 5))))
        back = np.linalg.inv(frame_map @ found.matrices[frame, 0])
        origin = apply_matrix(back, np.stack([columns, rows], -1))
        assert len(rows) > 30 and np.abs(shown[rows, columns, :2] - origin).max() < 1.6


@pytest.mark.parametrize("fill", ["scene", "reference", "black", "mean"])
def test_fills(fill):
    points = reference()
    image = np.full((128, 128, 3), (10, 120, 240), np.uint8)
    image[silhouette(points)] = 255
    driving, _ = walk(points, 2)
    config = CalibrationConfig(keypoints="all", fill=fill)
    found = calibrate(image, poses(points[None, None]), poses(driving[:, None]), SIZE, config)
    assert found.config.visibility == ("scene" if fill == "scene" else "exclusive")
    shown, mask = found.images[0], found.masks[0]
    corner = {"black": (0, 0, 0), "reference": (0, 0, 0)}.get(fill, (10, 120, 240))
    assert np.abs(shown[0, 0].astype(int) - corner).max() <= 2
    assert (shown[mask] > 200).mean() > 0.85
    if fill == "reference":
        return  # the whole image is carried along, and black beyond it
    away = ~mask & ~np.pad(mask, 4)[8:, 4:-4] & (np.indices(mask.shape).sum(0) < 60)
    assert np.abs(shown[away].astype(int) - corner).max() <= 3


def test_frames_start_from_images_that_show_everybody_in_them():
    first, second = bodies(2, 50.0)
    driving = np.stack([np.stack([first, second, second + 30])] * 5) + 5
    scores = np.ones((5, 3, 17))
    scores[:4, 2] = 0  # a stranger, in the last frame alone
    scores[1, 1] = 0  # absent
    scores[2, 1, 2:] = 0  # there, and not to be calibrated
    scores[3] = 0
    config = CalibrationConfig(keypoints="all", smoothing=0.0, max_gap=0, match="given", start=300)
    found = calibrate(image(), poses(np.stack([first, second])[None]), poses(driving, scores=scores), SIZE, config)
    assert found.status[2].tolist() == ["calibrated", "uncalibrated"] and found.other_masks[4].any()
    assert found.shows_everybody.tolist() == [True, True, False, False, False]
    assert found.start_timestep == 300 and "3 of 5 frames begin from noise" in found.notes()[0]
    shown = found.frame_image(0)
    for person in range(2):
        number = found.member[0, person]
        mask = found.masks[number] & (found.masks[found.member[0]].sum(0) == 1)
        assert mask.any() and (shown == found.images[number])[mask].all()
    # Frame 1 shows the first person alone, and too little of it; an absent person's silhouette is nobody's.
    records = [list(row) for row in found.records]
    records[1] = [replace(record, mask_iou=SHOWN - 0.1) for record in records[1]]
    cut = replace(found, records=tuple(map(tuple, records)))
    assert cut.shows_everybody.tolist() == [True, False, False, False, False]
    off = replace(found, config=replace(found.config, start=-1))
    assert off.start_timestep is None and not any("from noise" in note for note in off.notes())


def test_index_used_and_presets():
    points = reference()
    driving, _ = walk(points, 12)
    call = (image(), poses(points[None, None]), poses(driving[:, None]), SIZE)
    found = calibrate(*call, CalibrationConfig(keypoints="trunk", propagation="iterative"))
    draws = np.stack([found.index(step) for step in range(8)])
    np.testing.assert_array_equal(found.used(8), np.unique(draws))
    np.testing.assert_array_equal(draws[3], found.index(3))
    assert len(found.used(1)) == 3 and found.used(0).size == 0
    held = calibrate(*call, CalibrationConfig(preset="release"))
    np.testing.assert_array_equal(held.used(50), [0, 4, 8])
    off = calibrate(*call, CalibrationConfig(keypoints="trunk", propagation="off"))
    np.testing.assert_array_equal(off.index(3), off.member)


@pytest.mark.parametrize(("groups", "identity"), [(None, False), (0, False), (11, False), (12, True), (30, True)])
def test_propagation_in_groups_of_one_is_the_identity_and_noted(groups, identity):
    points = reference()
    driving, _ = walk(points, 12)
    config = CalibrationConfig(preset="paper", keypoints="trunk", groups=groups)
    found = calibrate(image(), poses(points[None, None]), poses(driving[:, None]), SIZE, config)
    drawn = [(found.index(step) == found.member).all() for step in range(20)]
    noted = [note for note in found.notes() if f"tpc.groups={groups} gives each of the 12 frames a group" in note]
    assert all(drawn) == identity == bool(noted) and found.summary()["notes"] == found.notes()
    assert not replace(found, config=resolve(replace(config, propagation="off"))).notes()


def test_save_and_load(tmp_path):
    points = reference()
    driving, _ = walk(points, 6)
    driving[3] = 0
    scores = np.ones((6, 1, 17))
    scores[3] = 0
    config = CalibrationConfig(keypoints="trunk", max_gap=0)
    found = calibrate(image(), poses(points[None, None]), poses(driving[:, None], scores=scores), (90, 70), config)
    found.save(tmp_path / "saved")
    loaded = Calibration.load(tmp_path / "saved")
    assert loaded.report() == found.report() and loaded.records == found.records
    for name in (
        "images",
        "masks",
        "target_masks",
        "other_masks",
        "member",
        "matrices",
        "reference_masks",
        "frame_map",
    ):
        np.testing.assert_array_equal(np.asarray(getattr(loaded, name)), np.asarray(getattr(found, name)))
    np.testing.assert_array_equal(loaded.index(4), found.index(4))
    assert loaded.images[[0, 2]].shape == (2, 70, 90, 3)
    found.save(tmp_path / "saved")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="does not hold a calibration"):
        found.save(tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"
    with pytest.raises(UserError, match="does not hold a calibration"):
        Calibration.load(tmp_path / "full")


def test_report_says_what_happened():
    points = reference()
    driving, _ = walk(points, 5)
    report = calibrate(image(), poses(points[None, None]), poses(driving[:, None]), SIZE, TORSO).report()
    assert report["driving"] == {"size": [128, 128], "frames": 5, "fps": 25.0}
    assert report["reference"] == {"size": [128, 128], "persons": 1} and report["config"]["keypoints"] == "trunk"
    first = report["frames"][0]["persons"][0]
    assert (
        first["keypoints"] == [0, 1, 2, 3, 4, 5, 6, 11, 12]
        and first["status"] == "calibrated"
        and first["reason"] is None
    )
    np.testing.assert_allclose(np.hypot(first["matrix"][0][0], first["matrix"][1][0]), first["scale"])
    assert first["matrix"][2] == [0, 0, 1] and 0 <= first["box_iou"] <= 1
    assert report["summary"]["calibrated"] == 5 and report["summary"]["seconds"] > 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"reference": np.zeros((128, 128), np.uint8)}, "reference must be"),
        ({"reference": np.zeros((64, 128, 3), np.uint8)}, "reference_poses are for"),
        ({"reference_poses": poses(np.zeros((2, 1, 17, 2)))}, "one frame"),
        ({"driving_poses": poses(np.zeros((0, 1, 17, 2)))}, "no frame"),
        ({"size": (0, 5)}, "size must be"),
        ({"reference_masks": np.zeros((1, 64, 64), bool)}, "reference_masks must be"),
        ({"driving_masks": np.zeros((2, 1, 128, 128), bool)}, "driving_masks must be for 1 frames"),
        ({"driving_masks": np.zeros((1, 1, 64, 128), bool)}, "driving_masks must be"),
        ({"frame_map": np.diag([1.0, 2.0, 1.0])}, "matrix must be"),
        ({"frame_map": np.eye(2)}, "frame_map must be"),
    ],
)
def test_shapes_that_do_not_belong_together(change, match):
    points = reference()
    arguments = {
        "reference": image(),
        "reference_poses": poses(points[None, None]),
        "driving_poses": poses(points[None, None]),
        "size": SIZE,
    }
    with pytest.raises(ValueError, match=match):
        calibrate(**{**arguments, **change})


def test_nobody_anywhere():
    nobody = poses(np.zeros((1, 0, 17, 2)))
    found = calibrate(image(), nobody, poses(np.zeros((3, 0, 17, 2))), SIZE)
    assert found.member.shape == (3, 0) and len(found.images) == 0 and found.used(5).size == 0
    assert found.report()["summary"]["calibrated"] == 0
