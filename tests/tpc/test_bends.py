"""Pieces of calibration by body part: meshes, their order, gaps between outlines, hands, the filter over time."""

import cv2
import numpy as np

from tests.tpc_bodies import SIZE, body, place, reference, silhouette
from tpc.bends.bending import painting_depth
from tpc.bends.layers import Coverage, build_layers, lay
from tpc.bends.outlines import Nudge
from tpc.bends.parts import NAMES, with_neck
from tpc.trajectory import filter_jitter

ALL = np.ones(17, bool)


def test_gaps_between_outlines_are_closed_when_small():
    mask = np.zeros((96, 64), bool)
    mask[20:70, 25:40] = True
    for shift, expected in ((0, 0.0), (2, 1.5), (12, 0.0)):
        nudge = Nudge.between(mask, np.roll(mask, shift, 1), 100, 3.0)
        moves = nudge(np.array([[3 * 25.0, 3 * 45], [3 * 39.0, 3 * 45]]))
        np.testing.assert_allclose(moves, [[3 * expected, 0]] * 2, atol=0.5)
    nobody = Nudge.between(mask & False, mask & False, 100, 1.0)
    assert not nobody(np.zeros((3, 2))).any()


def test_hands_are_told_by_their_colours():
    points = place(body(np.random.default_rng(0), 0.0), 100)
    points[[9, 10]] = points[[11, 12]] + [[6, 6], [-6, 6]]  # wrists before the thighs
    points[[7, 8]] = (points[[5, 6]] + points[[9, 10]]) / 2
    mask, colours = silhouette(points), np.full((128, 128, 3), (20, 20, 120), np.uint8)
    hand = np.zeros((128, 128), np.uint8)
    tip = points[9] + 8 * (points[9] - points[7]) / np.linalg.norm(points[9] - points[7])
    cv2.line(hand, *(tuple(np.rint(place_).astype(int).tolist()) for place_ in (points[9], tip)), 1, 5)
    colours[hand > 0] = (230, 180, 150)
    still, whole = np.tile(np.eye(3), (len(NAMES), 1, 1)), Coverage(mask.astype(np.uint8) * 255, 1.0, 0.0, 1.0)
    shown = {}
    for name, image_ in (("told", colours), ("alike", np.full_like(colours, 90)), ("geometry", None)):
        layers = build_layers(points, ALL, np.ones(17), mask, 0.05, image_)
        forearm = next(layer for layer in layers if NAMES[layer.part] == "left_forearm")
        patch = lay(forearm, still, whole, SIZE)
        shown[name] = np.zeros((128, 128), bool)
        shown[name][patch.box] = patch.share > 0.5
    np.testing.assert_array_equal(shown["alike"], shown["geometry"])
    below = mask & (((np.indices((128, 128))[::-1].transpose(1, 2, 0) - points[9]) @ (tip - points[9])) > 0)
    wrong = {name: ((covered ^ (hand > 0)) & below).sum() for name, covered in shown.items()}
    assert wrong["told"] < 0.6 * wrong["geometry"]


def test_what_is_nearer_is_painted_later():
    points, seen = with_neck(place(body(np.random.default_rng(0)), 80)[None], ALL[None])
    left, torso, right = (NAMES.index(name) for name in ("left_forearm", "torso", "right_forearm"))
    scores, no = np.ones((1, 17)), np.zeros(1, bool)
    front = painting_depth(points, seen, scores, no, 80)[0]
    assert front[left] > front[torso] and front[right] > front[torso]
    mirrored = points * [-1, 1]
    behind = painting_depth(mirrored, seen, scores, no, 80)[0]
    assert behind[left] < behind[torso] and behind[right] < behind[torso]
    hidden = scores.copy()
    hidden[0, 9] = 0.5
    assert painting_depth(points, seen, hidden, no, 80)[0, left] < front[torso]
    # From the side, looking to the right of the image: the right side is near.
    side = points.copy()
    side[..., 0] *= 0.15
    side[:, 0, 0] += 4
    depth = painting_depth(side, seen, scores, no, 80)[0]
    assert depth[right] > depth[torso] > depth[left]
    assert painting_depth(side * [-1, 1], seen, scores, no, 80)[0, left] > 0


def test_jitter_is_filtered_and_quick_motion_is_not():
    rng, known = np.random.default_rng(0), np.ones(60, bool)
    jitter = rng.normal(0, 0.3, (60, 1))
    assert filter_jitter(jitter, jitter, known, 2.0).std() < 0.6 * jitter.std()
    steps = np.repeat(np.arange(6.0) * 50, 10)[:, None]
    np.testing.assert_allclose(filter_jitter(steps, steps, known, 2.0), steps, atol=1e-6)
    np.testing.assert_array_equal(filter_jitter(jitter, jitter, known, 0.0), jitter)
    known[30] = False
    values = np.where(known[:, None], 1.0, 1e9)
    np.testing.assert_array_equal(filter_jitter(values, values[:, :0], known, 2.0), values)


def test_meshes_are_exact_and_what_is_turned_over_is_left_out():
    points = reference()
    layers = build_layers(points, ALL, np.ones(17), silhouette(points), 0.05)
    still = np.tile(np.eye(3), (len(NAMES), 1, 1))
    whole = Coverage(silhouette(points).astype(np.uint8) * 255, 1.0, 0.0, 1.0)
    x, y = np.meshgrid(np.arange(128), np.arange(128))
    covered = np.zeros((128, 128), bool)
    for layer in layers:
        patch = lay(layer, still, whole, SIZE)
        inside = patch.share > 0.99
        np.testing.assert_allclose(patch.places[..., 0][inside], x[patch.box][inside], atol=1e-3)
        np.testing.assert_allclose(patch.places[..., 1][inside], y[patch.box][inside], atol=1e-3)
        covered[patch.box] |= inside
    assert covered[silhouette(points)].all()
    assert all(lay(layer, still + [[0, 0, 500], [0, 0, 0], [0, 0, 0]], whole, SIZE) is None for layer in layers)
    mirrored = np.diag([-1.0, 1, 1]) @ still + [[0, 0, 128], [0, 0, 0], [0, 0, 0]]
    assert all((lay(layer, mirrored, whole, SIZE).share == 0).all() for layer in layers)
    assert build_layers(points, ALL, np.ones(17), np.zeros((128, 128), bool), 0.05) == []


def test_masks_that_show_a_piece_of_a_person_have_layers_of_that_piece():
    points = place(body(np.random.default_rng(0)), 100)
    whole = silhouette(points)
    for top, left in np.ndindex(4, 4):
        box = slice(32 * top, 32 * top + 32), slice(32 * left, 32 * left + 32)
        piece = np.zeros_like(whole)
        piece[box] = whole[box]
        layers = build_layers(points, ALL, np.ones(17), piece, 0.05)
        assert bool(layers) == bool(piece.any())
        assert all(layer.basis.shape[1] == 3 * len(layer.parts) and len(layer.faces) for layer in layers)
