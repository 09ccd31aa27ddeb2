"""Calibration by body part: maps of the parts, bends of the mesh, order of painting, and every degenerate input."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.poses.person import COCO_MIRROR
from tests.tpc_bodies import SIZE, bodies, body, image, place, poses, reference, silhouette
from tpc import Calibration, CalibrationConfig, SimilarityTransform, calibrate
from tpc.bends.bending import Pose, bend
from tpc.bends.parts import NAMES, PARTS
from tpc.config import resolve
from tpc.procrustes import apply_matrix
from tpc.report import draw_report, write_report
from tpc.trajectory import Track

ALL = np.ones(17, bool)
STEADY = {"transform": "articulated", "keypoints": "all", "smoothing": 0.0}
BENT = CalibrationConfig(**STEADY)


def moved(seed: int, height: float = 80, angle: float = 0.3) -> np.ndarray:
    """Another pose, size and turn of a body."""
    return place(body(np.random.default_rng(seed)), height, angle)


def maps(source: np.ndarray, targets: np.ndarray, seen: np.ndarray | None = None, **options):
    """Part maps (frames, 14, 3, 3) into the driving frame from keypoints (17, 2), (frames, 17, 2), and the `Bends`."""
    config = resolve(CalibrationConfig(**{**STEADY, **options}))
    seen = np.ones(targets.shape[:2], bool) if seen is None else seen
    whole = np.stack([SimilarityTransform.from_estimate(source, target).matrix for target in targets])
    flags = np.ones(len(targets), bool)
    frames = [Pose(t, s, np.ones(17), False, m) for t, s, m in zip(targets, seen, whole, strict=True)]
    bends = bend(source, ALL, frames, Track(whole, flags, ~flags), config)
    return whole[:, None] @ bends.matrices, bends


def run(points: np.ndarray, driving: np.ndarray, masks: bool = False, **options) -> Calibration:
    """Calibrate one person, keypoints (17, 2), to (frames, 17, 2), with drawn masks handed over or not."""
    given = {}
    if masks:
        given = {
            "reference_masks": silhouette(points)[None],
            "driving_masks": np.stack([silhouette(frame)[None] for frame in driving]),
        }
    config = CalibrationConfig(**{**STEADY, **options})
    return calibrate(image(), poses(points[None, None]), poses(driving[:, None]), SIZE, config, **given)


@pytest.mark.parametrize("masks", [False, True])
def test_an_infinite_radius_is_the_similarity(masks):
    points = reference()
    driving = np.stack([moved(seed) for seed in range(4)])
    whole = run(points, driving, masks, transform="procrustes")
    found = run(points, driving, masks, bend_radius=float("inf"))
    np.testing.assert_array_equal(found.matrices, whole.matrices)
    np.testing.assert_array_equal(found.images[:], whole.images[:])
    np.testing.assert_array_equal(np.asarray(found.masks), np.asarray(whole.masks))
    # And it is the limit of large ones.
    wide, bends = maps(points, driving, bend_radius=1e3)
    assert bends.bent.all() and np.abs(bends.matrices - np.eye(3)).max() < 1e-4
    assert (run(points, driving, masks).images[:] != whole.images[:]).any()


def test_an_unchanged_pose_is_the_identity():
    points = reference()
    found = run(points, points[None])
    assert found.records[0][0].status == "calibrated" and set(found.records[0][0].parts) == set(NAMES)
    for matrix in found.records[0][0].parts.values():
        np.testing.assert_allclose(matrix, np.eye(3), atol=1e-3)
    mask = silhouette(points)
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3))) > 0
    assert (np.abs(found.images[0].astype(int) - image())[inner].max()) <= 2
    assert np.count_nonzero(found.masks[0] ^ mask) <= 0.01 * mask.sum()


def test_parts_go_where_their_keypoints_go():
    points, target = reference(), moved(3)
    found, bends = maps(points, target[None])
    assert not bends.follows.any()
    for (name, (_, own)), matrix in zip(PARTS.items(), found[0], strict=True):
        own = [i for i in own if i < 17]
        if name == "head":
            continue  # five points, one similarity
        error = np.abs(apply_matrix(matrix, points[own]) - target[own]).max()
        assert error < (4 if name == "torso" else 1.5), name
    # A hand turns with its forearm and keeps the person's size.
    hand, forearm = (found[0, NAMES.index(f"left_{name}")][:2, :2] for name in ("hand", "forearm"))
    whole = SimilarityTransform.from_estimate(points, target).scale
    np.testing.assert_allclose(np.linalg.svd(hand)[1], whole, rtol=1e-6)
    bone = points[9] - points[7]
    cosine = (hand @ bone) @ (forearm @ bone) / np.linalg.norm(hand @ bone) / np.linalg.norm(forearm @ bone)
    assert cosine == pytest.approx(1, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 50),
    st.floats(0.4, 2.5),
    st.floats(-3.1, 3.1),
    st.floats(-200, 200),
    st.sampled_from(["from", "to"]),
)
def test_equivariance_under_a_similarity_of_either_side(seed, scale, angle, shift, side):
    points, target = reference(seed), moved(seed + 1)
    change = SimilarityTransform(np.float64(scale), np.float64(angle), np.array([shift, -shift])).matrix
    plain, _ = maps(points, target[None])
    if side == "to":
        other, _ = maps(points, apply_matrix(change, target)[None])
        expected = change @ plain[0]
    else:
        other, _ = maps(apply_matrix(change, points), target[None])
        expected = plain[0] @ np.linalg.inv(change)
    np.testing.assert_allclose(other[0], expected, atol=1e-5 * (1 + abs(shift)))


def test_a_bone_seen_head_on_does_not_explode():
    for changed in ("reference", "driving"):
        points, target = reference(), moved(2)
        (points if changed == "reference" else target)[9] = (points if changed == "reference" else target)[7] + 0.01
        found, _ = maps(points, target[None])
        scale = SimilarityTransform.from_estimate(points, target).scale
        stretches = np.linalg.svd(found[0, NAMES.index("left_forearm")][:2, :2])[1] / scale
        assert 0.2 < stretches.min() and stretches.max() < 2.1


def test_parts_without_keypoints_are_bridged_or_follow_their_parents():
    points = reference()
    targets = np.tile(moved(2), (30, 1, 1)) + np.arange(30)[:, None, None]
    seen = np.ones((30, 17), bool)
    seen[4:7, 9], seen[12:28, 9] = False, False
    found, bends = maps(points, targets, seen, max_gap=3)
    forearm, hand, upper = (NAMES.index(f"left_{name}") for name in ("forearm", "hand", "upper_arm"))
    assert np.flatnonzero(bends.follows[:, forearm]).tolist() == list(range(12, 28))
    for frame in range(4, 7):  # interpolated
        assert np.abs(apply_matrix(found[frame, forearm], points[9][None]) - targets[frame, 9]).max() < 1.5
    np.testing.assert_allclose(found[20, forearm], found[20, upper], atol=1e-9)
    np.testing.assert_allclose(found[20, hand], found[20, upper], atol=1e-9)
    scores = seen[:, None].astype(np.float32)
    config = CalibrationConfig(**STEADY | {"max_gap": 3})
    whole = calibrate(image(), poses(points[None, None]), poses(targets[:, None], scores=scores), SIZE, config)
    assert whole.records[20][0].following == ("left_forearm", "left_hand") and not whole.records[5][0].following
    assert "left_forearm in 16" in whole.notes()[-1]


def test_a_mirrored_torso_moves_as_a_whole():
    points = reference()
    behind = (points * [-1, 1] + [128, 0])[None]
    found = run(points, behind, back_view="keep", keypoints="trunk", min_iou=0.0).records[0][0]
    assert found.parts is None and "the torso is turned further" in found.reason
    swapped = run(points, (points * [-1, 1] + [128, 0])[COCO_MIRROR][COCO_MIRROR][None]).records[0][0]
    assert swapped.mirrored and swapped.parts is not None


def test_both_legs_folded_in_the_reference_keep_the_person_whole():
    standing = body(np.random.default_rng(0), 0.0)
    sitting = standing.copy()
    sitting[[15, 16]] = sitting[[11, 12]] + [[0.03, 0.02], [-0.03, 0.02]]  # ankles under the hips
    points, targets = place(sitting, 80), np.stack([place(standing, 80), place(sitting, 80), place(standing, 80)])
    seen = np.ones((3, 17), bool)
    _, bends = maps(points, targets, seen)
    assert bends.bent.tolist() == [False, True, False] and "both legs" in bends.reasons[0]
    seen[1:, 13:] = False
    assert not maps(points, targets, seen)[1].bent.any()  # out of sight they are taken to be as before
    one = sitting.copy()
    one[15] = standing[15]
    assert maps(place(one, 80), targets)[1].bent.all()


def test_cuts_part_what_is_averaged():
    points, still = reference(), np.ones(12, bool)
    targets = np.stack([moved(3)] * 6 + [moved(4)] * 6) + np.random.default_rng(0).normal(0, 0.3, (12, 1, 1))
    whole = np.stack([SimilarityTransform.from_estimate(points, target).matrix for target in targets])
    frames = [Pose(target, ALL, np.ones(17), False, matrix) for target, matrix in zip(targets, whole, strict=True)]
    config = resolve(CalibrationConfig(transform="articulated", smoothing=2.0))
    cut = bend(points, ALL, frames, Track(whole, still, ~still), config, (6,))
    for shot in (slice(0, 6), slice(6, 12)):
        alone = bend(points, ALL, frames[shot], Track(whole[shot], still[shot], ~still[shot]), config)
        np.testing.assert_array_equal(cut.matrices[shot], alone.matrices)
        np.testing.assert_array_equal(cut.depth[shot], alone.depth)


def test_a_bend_that_costs_silhouette_is_taken_back():
    points = reference()
    wrong = points.copy()
    wrong[[7, 9, 8, 10, 13, 15, 14, 16]] += np.random.default_rng(0).normal(0, 25, (8, 2))
    mask = silhouette(points)[None]
    found = {}
    for transform in ("articulated", "procrustes"):
        config = CalibrationConfig(**STEADY | {"keypoints": "torso", "transform": transform})
        call = image(), poses(points[None, None]), poses(wrong[None, None]), SIZE, config
        found[transform] = calibrate(*call, reference_masks=mask, driving_masks=mask[None])
    bent, whole = found["articulated"], found["procrustes"]
    record = bent.records[0][0]
    assert record.parts is None and "moves as a whole: bent" in record.reason
    np.testing.assert_array_equal(bent.images[bent.member[0, 0]], whole.images[0])
    np.testing.assert_array_equal(bent.masks[bent.member[0, 0]], whole.masks[0])


def test_silhouettes_correct_the_keypoints():
    points = reference(7)
    truth = np.stack([moved(seed) for seed in range(8)])
    noisy = truth + np.random.default_rng(1).normal(0, 2.5, truth.shape)
    masks = np.stack([silhouette(frame)[None] for frame in truth])
    ious = {}
    both = {"reference_masks": silhouette(points)[None], "driving_masks": masks}
    for name, arguments in (("with", both), ("without", {})):
        found = calibrate(image(), poses(points[None, None]), poses(noisy[:, None]), SIZE, BENT, **arguments)
        shown = [found.masks[m] for m in found.member[:, 0]]
        ious[name] = np.mean([(a & b).sum() / (a | b).sum() for a, b in zip(shown, masks[:, 0], strict=True)])
    assert ious["with"] > ious["without"] + 0.05 and ious["with"] > 0.85


@pytest.mark.parametrize("seed", range(12))
def test_a_bent_person_stays_in_one_piece_with_its_hands(seed):
    upright, target = body(np.random.default_rng(seed)), moved(seed + 100, 90)
    # Arms held out hide nothing of the body, whose pixels are then all there to be moved.
    upright[[7, 9]], upright[[8, 10]] = upright[5] + [(0.15, 0.02), (0.29, 0)], upright[6] - [(0.15, -0.03), (0.28, 0)]
    points = place(upright, 80, 2.0)
    found = run(points, target[None])
    mask = found.masks[0]
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    assert sorted(stats[1:, cv2.CC_STAT_AREA])[:-1] == []
    drawn = silhouette(target)
    assert (mask & drawn).sum() / (mask | drawn).sum() > 0.8
    for elbow, wrist in ((7, 9), (8, 10)):
        along = (target[wrist] - target[elbow]) / np.linalg.norm(target[wrist] - target[elbow])
        x, y = np.rint(target[wrist] + 0.05 * 90 * along).astype(int)
        assert mask[y, x]


def test_a_skirt_stays_whole_and_trousers_part():
    points = place(body(np.random.default_rng(1), 0.0), 90)
    points[[13, 15]], points[[14, 16]] = points[[13, 15]] + (4, 0), points[[14, 16]] - (4, 0)
    legs = silhouette(points)
    skirt = legs.copy().astype(np.uint8)
    hem = [points[11] + (6, 0), points[13] + (8, 6), points[14] + (-8, 6), points[12] - (6, 0)]
    cv2.fillPoly(skirt, [np.rint(hem).astype(np.int32)], 1)
    target = points.copy()
    target[[13, 15]], target[[14, 16]] = target[[13, 15]] + (9, -2), target[[14, 16]] + (-9, -2)
    between = tuple(
        np.rint((target[11] * 0.4 + target[13] * 0.6 + target[12] * 0.4 + target[14] * 0.6) / 2)[::-1].astype(int)
    )
    for mask, covered in ((legs, False), (skirt > 0, True)):
        found = calibrate(
            image(), poses(points[None, None]), poses(target[None, None]), SIZE, BENT, reference_masks=mask[None]
        )
        assert found.masks[0][between] == covered
        assert cv2.connectedComponents(found.masks[0].astype(np.uint8))[0] == 2


@pytest.mark.parametrize(("rule", "masks"), [("exhaustive", True), ("all", False)])
def test_degenerate_bodies_do_not_crash(rule, masks):
    line = np.stack([np.linspace(20, 100, 17), np.linspace(30, 90, 17)], -1)
    mirrored, outside, point = reference() * [-1, 1] + [128, 0], reference() + 500, np.full((17, 2), 60.0)
    for points in (line, point, mirrored, outside):
        for source, target in ((points, reference()), (reference(), points)):
            options = {"keypoints": rule, "min_iou": 0.0, "smoothing": 2.0}
            found = run(source, target[None], masks, **options)
            whole = run(source, target[None], masks, **options, transform="procrustes")
            assert found.status.tolist() == whole.status.tolist()
            assert all(np.isfinite(m).all() for m in (found.records[0][0].parts or {}).values())
            assert found.images[:].shape == whole.images[:].shape


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_keypoints(count):
    points = reference()
    keypoints, scores = np.tile(moved(2), (3, 1, 1, 1)), np.ones((3, 1, 17))
    scores[1, 0, count:] = 0
    found = {}
    for transform in ("articulated", "procrustes"):
        config = CalibrationConfig(transform=transform, max_gap=1, min_keypoints=2)
        found[transform] = calibrate(image(), poses(points[None, None]), poses(keypoints, scores=scores), SIZE, config)
    assert found["articulated"].status.tolist() == found["procrustes"].status.tolist()
    assert np.isfinite(found["articulated"].images[:].astype(float)).all()
    assert found["articulated"].records[0][0].parts


def test_crossing_persons():
    people = np.stack(bodies(2))
    shift = np.linspace(0, 60, 40)[:, None, None]
    driving = np.stack([people[0] + shift * [1, 0], people[1] - shift * [1, 0]], 1)
    config = CalibrationConfig(transform="articulated", keypoints="trunk")
    found = calibrate(image(), poses(people[None]), poses(driving), SIZE, config)
    assert (found.status == "calibrated").all() and all(r.parts for row in found.records for r in row)
    one = calibrate(image(), poses(people[None]), poses(driving[:1]), SIZE, config)
    assert one.records[0][0].parts and one.index(0).shape == (1, 2)


def test_long_clips():
    points = reference()
    driving = points + np.linspace(0, 200, 2000)[:, None, None] * [1, 0]
    found, bends = maps(points, driving, smoothing=2.0)
    assert bends.bent.all() and np.abs(apply_matrix(found[-1], points) - driving[-1]).max() < 0.01
    config = CalibrationConfig(transform="articulated", keypoints="torso")
    found = calibrate(image(), poses(points[None, None]), poses(driving[:150, None]), (32, 32), config)
    assert all(row[0].parts for row in found.records)
    # Masks are packed, and images are painted when they are asked for.
    assert found.masks.nbytes + found.target_masks.nbytes < 2 * 150 * 32 * 32 / 8
    assert found.images[len(found.images) - 1].shape == (32, 32, 3)


@pytest.mark.parametrize("fill", ["scene", "reference", "black", "mean"])
def test_fills_and_propagation(fill):
    points = reference()
    driving = np.stack([moved(seed) for seed in range(6)])
    found = run(points, driving, fill=fill, propagation="iterative", groups=2)
    assert len(found.used(1)) == 2 and found.images[:].shape[1:] == (128, 128, 3)
    shown, mask = found.images[0], found.masks[0]
    assert mask.any() and (
        fill != "black" or not shown[~cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))).astype(bool)].any()
    )


def test_save_load_and_report(tmp_path):
    points, seen = reference(), np.ones((3, 1, 17), np.float32)
    seen[1, 0, 9] = 0
    driving = poses(np.stack([moved(seed) for seed in range(3)])[:, None], scores=seen)
    config = CalibrationConfig(**STEADY | {"max_gap": 0})
    found = calibrate(image(), poses(points[None, None]), driving, SIZE, config)
    found.save(tmp_path / "out")
    again = Calibration.load(tmp_path / "out")
    assert again.records == found.records and again.report() == found.report()
    np.testing.assert_array_equal(again.images[:], found.images[:])
    assert found.records[1][0].following == ("left_forearm", "left_hand")
    write_report(tmp_path / "report.png", draw_report(found, image(), poses(points[None, None]), driving))
    assert cv2.imread(str(tmp_path / "report.png")).shape[0] > 500
    whole = run(points, driving.keypoints[:, 0].astype(float), transform="procrustes")
    assert "parts" not in whole.records[0][0].plain() and "following" not in whole.records[0][0].plain()
