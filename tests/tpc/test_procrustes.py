"""Similarity, affine and linear estimation: closed forms, both libraries, and every way to fail."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpc.procrustes import (
    AffineTransform,
    FailedEstimation,
    LinearTransform,
    SimilarityTransform,
    apply_matrix,
    residual,
)

similarities = st.builds(
    lambda scale, angle, x, y: SimilarityTransform(np.float64(scale), np.float64(angle), np.array([x, y])),
    st.floats(0.05, 20),
    st.floats(-3.1, 3.1),
    st.floats(-500, 500),
    st.floats(-500, 500),
)
quick = settings(max_examples=30, deadline=None)


def points(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 100, (*shape, 2)) + 200


def svd_similarity(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Textbook weighted Procrustes analysis with an SVD, proper rotations only."""
    w = w / w.sum()
    mx, my = w @ x, w @ y
    u, s, vt = np.linalg.svd((y - my).T @ (w[:, None] * (x - mx)))
    flip = np.diag([1, np.sign(np.linalg.det(u @ vt))])
    rotation = u @ flip @ vt
    scale = (s * np.diag(flip)).sum() / (w @ ((x - mx) ** 2).sum(1))
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = scale * rotation, my - scale * rotation @ mx
    return matrix


@given(similarities, st.integers(0, 1000))
@quick
def test_recovers_a_similarity_exactly(truth, seed):
    source = points(seed, 5)
    found = SimilarityTransform.from_estimate(source, truth(source))
    np.testing.assert_allclose(found.matrix, truth.matrix, rtol=1e-9, atol=1e-7)
    np.testing.assert_allclose(found.rotation, np.arctan2(found.matrix[1, 0], found.matrix[0, 0]), atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_svd_solution_with_weights(seed):
    source, target = points(seed, 17), points(seed + 100, 17)
    weights = np.random.default_rng(seed).random(17)
    found = SimilarityTransform.from_estimate(source, target, weights)
    np.testing.assert_allclose(found.matrix, svd_similarity(source, target, weights), atol=1e-9)


def test_no_other_similarity_has_a_smaller_error():
    source, target, weights = points(0, 9), points(1, 9), np.random.default_rng(2).random(9)
    best = SimilarityTransform.from_estimate(source, target, weights)
    least = residual(best.matrix, source, target, weights)
    rng = np.random.default_rng(3)
    for _ in range(50):
        other = SimilarityTransform(
            best.scale * np.exp(rng.normal(0, 0.05)),
            best.rotation + rng.normal(0, 0.05),
            best.translation + rng.normal(0, 5, 2),
        )
        assert residual(other.matrix, source, target, weights) > least


@given(similarities, similarities, st.integers(0, 1000))
@quick
def test_equivariant_on_either_side(before, after, seed):
    source, target = points(seed, 6), points(seed + 7, 6)
    plain = SimilarityTransform.from_estimate(source, target)
    moved = SimilarityTransform.from_estimate(before(source), after(target))
    expected = after.matrix @ plain.matrix @ before.inverse().matrix
    corners = before(source)
    np.testing.assert_allclose(apply_matrix(moved.matrix, corners), apply_matrix(expected, corners), atol=1e-6)


@given(similarities)
@quick
def test_inverse_round_trip(transform):
    source = points(0, 4)
    np.testing.assert_allclose(transform.inverse()(transform(source)), source, atol=1e-7)
    np.testing.assert_allclose(transform.inverse().inverse().matrix, transform.matrix, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("kind", [SimilarityTransform, AffineTransform, LinearTransform])
@pytest.mark.parametrize("factor", [1e-12, 1e-3, 7.0, 1e200])
def test_only_ratios_of_weights_matter(kind, factor):
    source, target, weights = points(0, 6), points(1, 6), np.random.default_rng(2).random(6) + 0.1
    one, other = (kind.from_estimate(source, target, w) for w in (weights, factor * weights))
    np.testing.assert_allclose(one.matrix, other.matrix, rtol=1e-9, atol=1e-9)


def test_affine_recovers_shear_and_equals_least_squares():
    matrix = np.array([[1.2, 0.4, 5.0], [-0.3, 0.7, -8.0], [0, 0, 1]])
    source = points(0, 6)
    sheared = AffineTransform.from_estimate(source, apply_matrix(matrix, source))
    np.testing.assert_allclose(sheared.matrix, matrix, atol=1e-9)
    target = points(1, 6)
    solution = np.linalg.lstsq(np.c_[source, np.ones(6)], target, rcond=None)[0].T
    found = AffineTransform.from_estimate(source, target)
    np.testing.assert_allclose(found.matrix[:2], solution, atol=1e-8)
    np.testing.assert_allclose(found.inverse()(found(source)), source, atol=1e-7)


def test_linear_keeps_its_origin_and_takes_scale_from_the_boxes():
    truth = SimilarityTransform(np.float64(1.7), np.float64(0.6), np.array([30.0, -12.0]))
    source = points(0, 8)
    found = LinearTransform.from_estimate(source, truth(source), None, (50, 60), (100, 90))
    np.testing.assert_allclose([found.scale, found.rotation], [1.7, 0.6], atol=1e-9)
    np.testing.assert_allclose(found(np.array([50.0, 60.0])), [100, 90], atol=1e-9)
    assert np.abs(LinearTransform.from_estimate(source, truth(source)).translation).max() == 0


@pytest.mark.parametrize("kind", [SimilarityTransform, AffineTransform, LinearTransform])
def test_torch_equals_numpy_and_batches_equal_singles(kind):
    source, target = points(0, 4, 3, 7), points(1, 4, 3, 7)
    weights = np.random.default_rng(2).random((4, 3, 7))
    batch = kind.from_estimate(source, target, weights)
    tensors = kind.from_estimate(*(torch.from_numpy(a) for a in (source, target, weights)))
    assert isinstance(tensors.matrix, torch.Tensor)
    np.testing.assert_allclose(tensors.matrix.numpy(), batch.matrix, rtol=1e-12, atol=1e-9)
    single = kind.from_estimate(source[2, 1], target[2, 1], weights[2, 1])
    np.testing.assert_allclose(batch.matrix[2, 1], single.matrix, atol=1e-9)
    half = kind.from_estimate(source.astype(np.float32), target.astype(np.float32))
    assert half.matrix.dtype == np.float64


def test_leading_dimensions_broadcast():
    source, target = points(0, 7), points(1, 5, 7)
    batch = SimilarityTransform.from_estimate(source, target)
    assert batch.matrix.shape == (5, 3, 3)
    assert batch(source).shape == (5, 7, 2)


def test_gradients_are_finite_also_where_nothing_can_be_estimated():
    source = torch.zeros(2, 5, 2, dtype=torch.float64)
    source[0] = torch.from_numpy(points(0, 5))
    source.requires_grad_()
    found = SimilarityTransform.from_estimate(source, torch.from_numpy(points(1, 2, 5)))
    assert found.valid.tolist() == [True, False]
    found.matrix.sum().backward()
    assert torch.isfinite(source.grad).all() and source.grad[0].abs().sum() > 0


SQUARE = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float64)
LINE = np.array([[0, 0], [1, 2], [2, 4], [3, 6]], np.float64)


@pytest.mark.parametrize(
    ("kind", "source", "target", "weights", "reason"),
    [
        (SimilarityTransform, np.zeros((0, 2)), np.zeros((0, 2)), None, "no point"),
        (SimilarityTransform, SQUARE, SQUARE, np.zeros(4), "no point"),
        (SimilarityTransform, SQUARE, np.full((4, 2), np.nan), None, "no point"),
        (SimilarityTransform, SQUARE, SQUARE, np.array([0, 1, 0, 0]), "only one point"),
        (SimilarityTransform, np.full((4, 2), 7.7), SQUARE, None, "source coincide"),
        (SimilarityTransform, SQUARE, np.full((4, 2), 7.7), None, "target coincide"),
        (SimilarityTransform, SQUARE, SQUARE * [-1, 1], None, "mirrors"),
        (LinearTransform, SQUARE, SQUARE * [-1, 1], None, "mirrors"),
        (AffineTransform, SQUARE, SQUARE, np.array([1, 1, 0, 0]), "fewer than three"),
        (AffineTransform, LINE, SQUARE, None, "source lie on one line"),
        (AffineTransform, SQUARE, LINE, None, "target lie on one line"),
    ],
)
def test_explains_why_nothing_can_be_estimated(kind, source, target, weights, reason):
    for convert in (lambda a: a, lambda a: None if a is None else torch.from_numpy(np.asarray(a, np.float64))):
        found = kind.from_estimate(convert(source), convert(target), convert(weights))
        assert isinstance(found, FailedEstimation) and not found
        assert reason in found.reason


def test_two_points_collinear_points_and_nan_points_are_enough_for_a_similarity():
    truth = SimilarityTransform(np.float64(2.0), np.float64(-1.0), np.array([3.0, 4.0]))
    for source in (SQUARE[:2], LINE):
        found = SimilarityTransform.from_estimate(source, truth(source))
        np.testing.assert_allclose(found.matrix, truth.matrix, atol=1e-9)
    target = truth(SQUARE)
    target[3] = np.nan
    np.testing.assert_allclose(SimilarityTransform.from_estimate(SQUARE, target).matrix, truth.matrix, atol=1e-9)


def test_failed_elements_of_a_batch_hold_the_identity():
    source = np.stack([SQUARE, np.zeros((4, 2)), SQUARE])
    for kind in (SimilarityTransform, AffineTransform, LinearTransform):
        found = kind.from_estimate(source, np.stack([SQUARE + 5] * 3))
        assert found.valid.tolist() == [True, False, True]
        np.testing.assert_array_equal(found.matrix[1], np.eye(3))
        assert np.isfinite(found.matrix).all()


def test_programming_errors_name_the_argument():
    with pytest.raises(ValueError, match="source and target"):
        SimilarityTransform.from_estimate(SQUARE, SQUARE[:3])
    with pytest.raises(ValueError, match="source and target"):
        SimilarityTransform.from_estimate(SQUARE.T, SQUARE.T)
    with pytest.raises(ValueError, match="weights must be"):
        SimilarityTransform.from_estimate(SQUARE, SQUARE, np.ones(3))
    with pytest.raises(ValueError, match="negative"):
        SimilarityTransform.from_estimate(SQUARE, SQUARE, -np.ones(4))
    with pytest.raises(ValueError, match="matrix must be"):
        SimilarityTransform.from_matrix(np.diag([1.0, 2.0, 1.0]))


@given(similarities)
@quick
def test_from_matrix_reads_what_matrix_writes(transform):
    read = SimilarityTransform.from_matrix(transform.matrix)
    np.testing.assert_allclose(read.matrix, transform.matrix, rtol=1e-12, atol=1e-9)
