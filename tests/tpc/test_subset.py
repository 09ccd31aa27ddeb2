"""Choice of keypoints: the exhaustive search against brute force, the fixed rules, and the drawn silhouettes."""

from itertools import combinations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.poses.person import COCO_MIRROR
from tests.tpc_bodies import EVERY_POINT, body, place, silhouette
from tpc.config import CalibrationConfig, resolve
from tpc.estimation import ReferencePerson, drawn_silhouette, estimate, select_consensus, select_fixed
from tpc.procrustes import AffineTransform, LinearTransform, SimilarityTransform, apply_matrix, residual
from tpc.silhouettes import (
    BITMAP_SIDE,
    NUM_SAMPLES,
    ReferenceSilhouette,
    Silhouette,
    body_height,
    draw_silhouette,
    facing,
    silhouette_from_mask,
    silhouette_iou,
    visible,
)
from tpc.subsets import TRANSFORMS, SearchLimits, select_exhaustive, solve


def scene(seed: int, height: float = 90, size: tuple[int, int] = (128, 128)):
    """Two poses of one body, differently framed, and their silhouettes."""
    rng = np.random.default_rng(seed)
    middle = (size[0] / 2, size[1] / 2)
    source = place(body(rng), height * rng.uniform(0.7, 1.1), rng.uniform(-3, 3), middle)
    target = place(body(rng), height * rng.uniform(0.7, 1.1), rng.uniform(-0.2, 0.2), middle)
    reference = ReferenceSilhouette.of(silhouette_from_mask(silhouette(source, size), NUM_SAMPLES))
    return source, target, reference, silhouette_from_mask(silhouette(target, size), max_side=BITMAP_SIDE)


def search(source, target, reference, outline, weights=None, size=(128, 128), **options):
    weights = np.ones(17) if weights is None else weights
    limits = options.pop("limits", SearchLimits())
    return select_exhaustive(source, target, weights, reference, outline, size, limits=limits, **options)


def fitted(source, target, chosen, weights=None, transform="procrustes", origins=((0, 0), (0, 0))):
    """(3, 3), or None where the points determine no such transform."""
    used = np.zeros(17)
    used[list(chosen)] = 1 if weights is None else weights[list(chosen)]
    if transform == "linear":
        found = LinearTransform.from_estimate(source, target, used, *origins)
    else:
        kind = {"procrustes": SimilarityTransform, "affine": AffineTransform}[transform]
        found = kind.from_estimate(source, target, used)
    return found.matrix if found else None


def brute_force(source, target, reference, outline, points, size, *options):
    """The best IoU over all subsets of `points`, one at a time, with the plain measurement."""
    best = 0.0
    for count in range(3, len(points) + 1):
        for chosen in combinations(points, count):
            matrix = fitted(source, target, chosen, *options)
            if matrix is not None:
                best = max(best, silhouette_iou(matrix, reference, outline, size))
    return best


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("seed", range(4))
def test_search_equals_brute_force(seed, transform):
    size, rng = (64, 64), np.random.default_rng(seed)
    source, target, reference, outline = scene(seed, 45, size)
    points = np.sort(rng.choice(17, 9, replace=False))
    options = np.isin(np.arange(17), points) * rng.uniform(0.3, 1, 17), transform, ((31.5, 31.5), (33.0, 30.0))

    def found_by(other: str):
        return search(source, target, reference, outline, options[0], size, transform=other, origins=options[2])

    best = brute_force(source, target, reference, outline, points.tolist(), size, *options)
    assert found_by(transform).iou == pytest.approx(best, abs=1e-9)
    for other in TRANSFORMS:  # each has subsets of its own
        matrix = fitted(source, target, found_by(other).keypoints, *options)
        iou = silhouette_iou(matrix, reference, outline, size)
        assert iou == pytest.approx(best, abs=1e-9) if other == transform else iou <= best + 1e-9


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_all_subsets_are_those_of_one_at_a_time(transform):
    rng = np.random.default_rng(0)
    source, target, _, _ = scene(0)
    weights, origins = np.arange(17) < 8, np.array([[60.0, 50.0], [70.0, 66.0]])
    weights = weights * rng.uniform(0.3, 1, 17)
    source[3] = (source[1] + source[2]) / 2  # three on a line, which determine no affine map
    points = [values[:8] for values in (source, target, weights)]
    subsets, sizes, found = solve(*points, SearchLimits(), 1e-9, transform, origins)
    assert len(subsets) == sum(1 for n in range(1 << 8) if n.bit_count() >= 3) - (transform == "affine")
    for subset, size, (a, c, tx, ty, b, d, error) in zip(subsets.tolist(), sizes, found, strict=True):
        chosen = [i for i in range(17) if subset >> i & 1]
        matrix = fitted(source, target, chosen, weights, transform, origins)
        np.testing.assert_allclose([[a, b, tx], [c, d, ty]], matrix[:2], rtol=1e-6, atol=1e-6)
        expected = residual(matrix, source, target, weights * np.isin(np.arange(17), chosen))
        assert size == len(chosen) and np.sqrt(error) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("seed", range(3))
def test_estimates_from_all_subsets_are_no_worse_than_from_all_points(seed, transform):
    source, target, reference, outline = scene(seed)
    person = ReferencePerson(source, np.ones(17), EVERY_POINT, reference, (128, 128))
    found = {}
    for rule in ("all", "exhaustive"):
        config = resolve(CalibrationConfig(transform=transform, keypoints=rule, min_iou=0.0))
        found[rule] = estimate(person, target, np.ones(17), outline, (128, 128), config)
    assert found["exhaustive"].iou >= found["all"].iou - 1e-9
    bounded = resolve(CalibrationConfig(transform=transform, min_iou=0.0, max_rotation=60.0, max_scale=1.5))
    estimated = estimate(person, target, np.ones(17), outline, (128, 128), bounded)
    assert estimated.matrix is not None or "outside the bounds" in estimated.reason


@pytest.mark.slow
def test_search_equals_brute_force_over_all_subsets_of_17_points_of_small_masks():
    size = (48, 48)
    source, target, reference, outline = scene(10, 34, size)
    numbers = np.arange(1 << 17)
    subsets = numbers[np.bitwise_count(numbers) >= 3]
    samples = reference.samples.listed()
    best = 0.0
    for block in np.array_split(subsets, 128):
        weights = (block[:, None] >> np.arange(17) & 1).astype(float)
        transform = SimilarityTransform.from_estimate(source, target, weights)
        moved = apply_matrix(transform.matrix, samples)
        on_frame = ((moved >= -0.5) & (moved < 47.5)).all(-1)
        x, y = np.floor(moved + 0.5 - outline.origin).astype(int).transpose(2, 0, 1)
        rows, columns = outline.mask.shape
        hit = on_frame & (x >= 0) & (x < columns) & (y >= 0) & (y < rows)
        hit &= outline.mask[y.clip(0, rows - 1), x.clip(0, columns - 1)]
        both = np.minimum(transform.scale**2 * hit.sum(-1), outline.area)
        best = max(best, (both / (outline.area + transform.scale**2 * on_frame.sum(-1) - both)).max())
    assert reference.sample_area == outline.cell == 1
    assert search(source, target, reference, outline, size=size).iou == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_dropping_subsets_by_pieces_loses_nothing(seed):
    source, target, reference, outline = scene(seed, 300, (512, 512))
    assert reference.samples.number > 600
    every = search(source, target, reference, outline, size=(512, 512), outright=True)
    found = search(source, target, reference, outline, size=(512, 512), outright=False)
    assert found.iou == pytest.approx(every.iou, abs=1e-9)


def test_pieces_share_the_silhouette_evenly():
    mask = silhouette(place(body(np.random.default_rng(0)), 300, 0.4, (200, 200)), (400, 400))
    reference = ReferenceSilhouette.of(silhouette_from_mask(mask, NUM_SAMPLES))
    points = reference.samples.listed()
    assert len(points) == reference.samples.number and len(np.unique(points, axis=0)) == len(points)
    for pieces in reference.pieces:
        counts = pieces.counts[pieces.counts > 0]
        assert counts.sum() == pieces.left[0] == len(points) and counts.max() - counts.min() <= 1
        middle = (pieces.listed() * counts[:, None]).sum(0) / len(points)
        np.testing.assert_allclose(middle, points.mean(0), rtol=1e-5)
    assert [pieces.number for pieces in reference.pieces] == [64, 256]
    few = ReferenceSilhouette.of(silhouette_from_mask(mask, 100))
    assert few.pieces == () and not few.empty


@given(st.integers(0, 10_000), st.sets(st.integers(0, 16), min_size=3), st.sampled_from(TRANSFORMS))
@settings(max_examples=40, deadline=None)
def test_search_is_never_worse_than_all_points(seed, points, transform):
    source, target, reference, outline = scene(seed)
    weights = np.isin(np.arange(17), list(points)) * np.random.default_rng(seed).uniform(0.3, 1, 17)
    found = search(source, target, reference, outline, weights, transform=transform)
    matrix = fitted(source, target, sorted(points), weights, transform)
    everything = 0.0 if matrix is None else silhouette_iou(matrix, reference, outline, (128, 128))
    assert found.iou >= everything - 1e-9 if found.keypoints else everything < 1e-3
    assert set(found.keypoints) <= points


def test_ties_go_to_the_larger_subset():
    source, _, reference, _ = scene(0)
    truth = SimilarityTransform(np.float64(0.83), np.float64(0.4), np.array([20.0, -15.0]))
    target = truth(source)
    outline = silhouette_from_mask(silhouette(target), max_side=BITMAP_SIDE)
    found = search(source, target, reference, outline)
    assert found.keypoints == tuple(range(17))
    np.testing.assert_allclose(fitted(source, target, found.keypoints), truth.matrix, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_within_a_tolerance_the_largest_subset_of_least_residual_serves(seed):
    source, target, reference, outline = scene(seed)
    weights = np.isin(np.arange(17), np.random.default_rng(seed).choice(17, 9, replace=False)).astype(float)
    ranked = []
    for count in range(3, 10):
        for chosen in combinations(np.flatnonzero(weights).tolist(), count):
            matrix = fitted(source, target, chosen)
            error = residual(matrix, source, target, np.isin(np.arange(17), chosen))
            ranked.append((silhouette_iou(matrix, reference, outline, (128, 128)), count, -error, chosen))
    best = max(ranked)
    _, count, _, chosen = max((entry for entry in ranked if entry[0] >= best[0] - 0.03), key=lambda entry: entry[1:])
    found = search(source, target, reference, outline, weights, tolerance=0.03)
    assert found.keypoints == chosen and count > best[1]
    assert search(source, target, reference, outline, weights).keypoints == best[-1]


@pytest.mark.parametrize("seed", range(3))
def test_dropping_subsets_by_pieces_keeps_what_is_within_the_tolerance(seed):
    scenery, size = scene(seed, 300, (512, 512)), (512, 512)
    every, found = (search(*scenery, size=size, tolerance=0.02, outright=outright) for outright in (True, False))
    assert found == every


def test_only_drawn_silhouettes_have_a_tolerance():
    """Of drawn silhouettes the highest IoU fits the errors of the keypoints that they are drawn around."""
    size, errors = (512, 512), {}
    for seed in range(6):
        rng = np.random.default_rng(seed)
        points = place(body(rng), 300, 0.2, (256, 256))
        noisy = points + rng.normal(0, 3, (2, 17, 2))
        mask = silhouette(points, size)
        for masks in (None, mask):
            person = ReferencePerson.of(noisy[0], np.ones(17), size, masks, 0.3)
            outline = drawn_silhouette(noisy[1], EVERY_POINT, size)
            if masks is not None:
                outline = silhouette_from_mask(masks, max_side=BITMAP_SIDE)
            for preset in ("best", "paper"):
                found = estimate(person, noisy[1], np.ones(17), outline, size, resolve(CalibrationConfig(preset)))
                offsets = np.linalg.norm(apply_matrix(found.matrix, points) - points, axis=-1)
                errors.setdefault((masks is None, preset), []).append((len(found.keypoints), offsets.mean()))
    (size_best, error_best), (size_paper, error_paper) = (np.mean(errors[True, p], 0) for p in ("best", "paper"))
    assert size_best > size_paper + 3 and error_best < 0.9 * error_paper
    assert errors[False, "best"] == errors[False, "paper"]  # both take the highest IoU


@pytest.mark.parametrize("seed", range(3))
def test_measured_iou_is_that_of_warped_masks(seed):
    size = (512, 512)
    source, target, _, outline = scene(seed, 300, size)
    mask, goal = silhouette(source, size), silhouette(target, size)
    reference = ReferenceSilhouette.of(silhouette_from_mask(mask, NUM_SAMPLES))
    for chosen in (range(17), (5, 6, 11, 12), (0, 1, 2)):
        matrix = fitted(source, target, chosen)
        warped = cv2.warpAffine(mask.astype(np.uint8), matrix[:2], size, flags=cv2.INTER_NEAREST) > 0
        expected = (warped & goal).sum() / (warped | goal).sum()
        assert silhouette_iou(matrix, reference, outline, size) == pytest.approx(expected, abs=0.02)


def test_what_leaves_the_frame_does_not_count():
    mask = np.zeros((100, 100), bool)
    mask[20:80, 30:70] = True
    reference = ReferenceSilhouette.of(silhouette_from_mask(mask))
    half = np.zeros((100, 100), bool)
    half[:, :20] = mask[:, 50:70]
    shift = np.array([[1, 0, -50], [0, 1, 0], [0, 0, 1.0]])
    assert silhouette_iou(shift, reference, silhouette_from_mask(half), (100, 100)) == pytest.approx(1)


def test_limits_exclude_transforms():
    source, target, reference, outline = scene(3)
    scale = np.hypot(*fitted(source, target, search(source, target, reference, outline).keypoints)[0, :2])
    limited = search(source, target, reference, outline, limits=SearchLimits(max_scale=0.9 * scale))
    assert np.hypot(*fitted(source, target, limited.keypoints)[0, :2]) <= 0.9 * scale
    nothing = search(source, target, reference, outline, limits=SearchLimits(min_scale=100, max_scale=200))
    assert nothing.keypoints == () and "outside the bounds" in nothing.reason
    turned = search(source, -target + 128, reference, outline, limits=SearchLimits(max_rotation=0.0))
    assert turned.keypoints == ()
    six = search(source, target, reference, outline, limits=SearchLimits(min_points=6))
    assert len(six.keypoints) >= 6


@pytest.mark.parametrize(
    ("weights", "masked", "reason"),
    [
        (np.zeros(17), True, "0 keypoints"),
        (np.eye(17)[0], True, "1 keypoints"),
        (np.eye(17)[0] + np.eye(17)[5], True, "2 keypoints"),
        (np.ones(17), False, "no silhouette"),
    ],
)
def test_search_explains_why_there_is_no_subset(weights, masked, reason):
    source, target, reference, outline = scene(0)
    if not masked:
        outline = silhouette_from_mask(np.zeros((128, 128), bool))
    found = search(source, target, reference, outline, weights)
    assert found.keypoints == () and reason in found.reason


def test_coincident_and_distant_points_give_a_reason():
    source, target, reference, outline = scene(0)
    assert search(np.full((17, 2), 50.0), target, reference, outline).keypoints == ()
    assert search(source, np.full((17, 2), 50.0), reference, outline).keypoints == ()
    away = search(source, target + 5000, reference, outline)
    assert away.keypoints == () and "overlap" in away.reason


def test_fixed_rules_need_their_points():
    common = np.ones(17, bool)
    assert select_fixed("face", common, 2).keypoints == (0, 1, 2, 3, 4)
    assert select_fixed("torso", common, 3).keypoints == (5, 6, 11, 12)
    assert select_fixed("trunk", common, 3).keypoints == (0, 1, 2, 3, 4, 5, 6, 11, 12)
    assert select_fixed("all", common, 3).keypoints == tuple(range(17))
    common[:4] = False
    failed = select_fixed("face", common, 2)
    assert failed.keypoints == () and "1 keypoints of the face" in failed.reason


def test_consensus_leaves_out_what_disagrees():
    rng = np.random.default_rng(0)
    source = place(body(rng), 100)
    target = SimilarityTransform(np.float64(1.3), np.float64(2.0), np.array([5.0, 6.0]))(source)
    target[[7, 9, 10, 16]] += [[40, 0], [0, 50], [-60, 10], [30, 30]]
    expected = tuple(i for i in range(17) if i not in (7, 9, 10, 16))
    assert select_consensus(source, target, np.ones(17), 2.0, 3).keypoints == expected
    some = np.ones(17)
    some[:5] = 0
    assert select_consensus(source, target, some, 2.0, 3).keypoints == expected[5:]
    assert "keypoints" in select_consensus(source, target, np.zeros(17), 2.0, 3).reason
    assert "coincide" in select_consensus(source * 0, target, np.ones(17), 2.0, 3).reason


def test_silhouette_grid_covers_the_mask():
    mask = silhouette(place(body(np.random.default_rng(0)), 400, 0.3, (300, 300)), (600, 600))
    fine, coarse = silhouette_from_mask(mask), silhouette_from_mask(mask, max_samples=500, max_side=100)
    assert fine.area == coarse.area == mask.sum() and fine.cell == 1
    np.testing.assert_array_equal(np.sort(fine.points()[:, 0]), np.sort(np.nonzero(mask)[1]))
    rows = coarse.points().astype(int)
    assert mask[rows[:, 1], rows[:, 0]].all() and max(coarse.mask.shape) <= 100
    assert len(rows) * coarse.cell**2 == pytest.approx(mask.sum(), rel=0.05)
    empty = silhouette_from_mask(np.zeros((5, 5), bool))
    assert empty.area == 0 and len(empty.points()) == 0


def test_drawn_silhouette_follows_the_body():
    points = place(body(np.random.default_rng(0)), 400, 0.5, (300, 300))
    full = draw_silhouette(points, EVERY_POINT, (600, 600))
    small: Silhouette = drawn_silhouette(points, EVERY_POINT, (600, 600))
    assert small.area == pytest.approx(full.sum(), rel=0.03)
    inside = np.round(small.points()).astype(int)
    assert full[inside[:, 1], inside[:, 0]].mean() > 0.97
    joints = np.round(points).astype(int)
    assert full[joints[:, 1], joints[:, 0]].all()
    assert not draw_silhouette(points, np.zeros(17, bool), (600, 600)).any()
    assert draw_silhouette(points * 1e9, EVERY_POINT, (60, 60)).shape == (60, 60)


def test_measures_of_a_body_do_not_depend_on_its_framing():
    points = body(np.random.default_rng(1))
    for height, angle in ((50, 0.0), (400, 2.5)):
        placed = place(points, height, angle)
        assert body_height(placed, EVERY_POINT) == pytest.approx(height, rel=0.1)
        assert facing(placed, EVERY_POINT) == pytest.approx(facing(points, EVERY_POINT))
    assert facing(points, EVERY_POINT) > 0.5
    assert facing(points[COCO_MIRROR], EVERY_POINT) == pytest.approx(-facing(points, EVERY_POINT))
    assert body_height(points, np.zeros(17, bool)) == 0 and facing(points, np.arange(17) < 5) == 0


def test_visible_ignores_nan_and_score_zero():
    points = np.zeros((17, 2))
    points[3] = np.nan
    scores = np.linspace(0, 1, 17)
    assert visible(scores, points, 0.0).sum() == 15
    assert visible(scores, points, 0.5).sum() == 8
