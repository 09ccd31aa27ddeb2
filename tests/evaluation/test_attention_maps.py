"""Measures of recorded attention against closed forms, true places against what calibration does, and images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from data.config import COCO_KEYPOINTS
from data.poses.poses import Poses
from data.transforms import fit_matrix, map_points
from evaluation.attention.figures import (
    attended_images,
    layer_mean,
    mark,
    overlay,
    point_maps,
    point_maps_row,
    stacked,
)
from evaluation.attention.maps import (
    BACKGROUND,
    PERSON,
    SELF,
    BodyTruth,
    Pointing,
    body_points,
    body_truth,
    chance,
    mean_over,
    pck,
    pointing,
    pointing_of,
    shares,
    token_coverage,
)
from models.attention import measures
from models.attention.layers import LayerShape
from models.attention.maps import RecordedAttention
from models.attention.recording import AttentionConfig, AttentionRun, select
from tpc import CalibrationConfig, calibrate

GRIDS = {"down": (16, 16), "mid": (8, 8)}
SIZE = (128, 128)
X = np.array([0, 1, -1, 2, -2, 6, -6, 9, -9, 9, -9, 4, -4, 4, -4, 4, -4], np.float32) * 2
Y = np.array([8, 6, 6, 7, 7, 16, 16, 26, 26, 34, 34, 34, 34, 46, 46, 58, 58], np.float32) * 2


def standing(*persons: list[tuple[float, float, float]], size=SIZE) -> Poses:
    """Frame by frame (x, y, scale) of every standing person, about the middle of the image."""
    clips = [[np.stack([X * s + 64 + x, (Y - 64) * s + 64 + y], -1) for x, y, s in person] for person in persons]
    keypoints = np.stack(clips, axis=1)
    return Poses(keypoints, np.ones(keypoints.shape[:3]), size, 8.0)


def recorded_from(
    maps: dict[str, np.ndarray], points=None, names=None, images=1, steps=1, mean=()
) -> RecordedAttention:
    """Made-up maps layer -> (s, f, heads, p, k, r); own tokens get the rest."""
    first = next(iter(maps.values()))
    layers = {layer: LayerShape(GRIDS[layer], value.shape[2], 8) for layer, value in maps.items()}
    frames = first.shape[1] if points is None else len(points)
    run = AttentionRun(layers, SIZE, frames, steps, images)
    selection = select(AttentionConfig(mean=mean), run, None if points is None else points.shape[1])
    own = {layer: 1 - value.sum((-1, -2)) for layer, value in maps.items()}
    return RecordedAttention(selection, tuple(range(steps)), points, names, maps, own)


def spike(grid, place, share=0.5) -> np.ndarray:
    """(r,) all attention at the token that holds a place in pixels."""
    values = np.zeros(grid[0] * grid[1], np.float32)
    values[int(measures.token_indices(torch.tensor(place), SIZE, grid))] = share
    return values


class TestGeometry:
    @given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
    @settings(max_examples=30, deadline=None)
    def test_places_there_and_back(self, rows, columns, seed):
        size, grid = (3 * rows, 5 * columns), (rows, columns)
        generator = torch.Generator().manual_seed(seed)
        points = torch.rand(20, 2, generator=generator) * torch.tensor([size[1], size[0]]) - 0.5
        places = measures.token_coords(points, size, grid)
        assert torch.allclose(measures.pixel_coords(places, size, grid), points, atol=1e-3)
        numbers = measures.token_indices(points, size, grid)
        centres = measures.token_centres(grid, places)[numbers]
        assert ((places - centres).abs() <= 0.5 + 1e-4).all(), "the token holds the place"
        assert (measures.edge_distances(places, grid).gather(-1, numbers[:, None]) < 1e-4).all()

    def test_known_places(self):
        # Pixel 0's centre is half a pixel from the left edge; a token of 8 pixels is centred between pixels 3 and 4.
        points = torch.tensor([[3.5, 3.5], [-0.5, 127.5], [8.0, 7.0]])
        places = measures.token_coords(points, SIZE, (16, 16))
        assert places.tolist() == [[0, 0], [-0.5, 15.5], [0.5625, 0.4375]]
        assert measures.token_indices(points, SIZE, (16, 16)).tolist() == [0, 240, 1]
        outside = torch.tensor([[-50.0, 400.0]])
        assert measures.token_indices(outside, SIZE, (16, 16)).tolist() == [240]
        assert measures.edge_distances(torch.tensor([3.0, 0.0]), (1, 5)).tolist() == [2.5, 1.5, 0.5, 0, 0.5]

    def test_measures_of_known_distributions(self):
        grid = (4, 4)
        one, all_alike = torch.zeros(16), torch.full((16,), 1 / 16)
        one[6] = 1
        assert measures.entropy(one) == 0 and measures.entropy(all_alike) == pytest.approx(np.log(16))
        assert measures.centroid(one, grid).tolist() == [2, 1]
        assert measures.centroid(all_alike, grid).tolist() == [1.5, 1.5]
        assert measures.spread(one, grid) == 0 and measures.spread(all_alike, grid) == pytest.approx(np.sqrt(2.5))
        distances = measures.token_distances(torch.tensor([2.0, 1.0]), grid)
        assert measures.value_at_argmax(one, distances) == 0 and measures.gaussian_mass(one, distances, 0.5) == 1
        assert measures.mass_within(all_alike, distances, 1.0) == pytest.approx(5 / 16)

    def test_differentiable(self):
        maps = torch.rand(2, 3, 64, dtype=torch.float64, requires_grad=True)
        distances = measures.token_distances(torch.rand(2, 3, 2, dtype=torch.float64) * 8, (8, 8))

        def compute(maps: torch.Tensor) -> list[torch.Tensor]:
            parts = measures.normalised(maps)
            return [
                measures.gaussian_mass(parts, distances, 2.0),
                measures.mass_within(parts, distances, 2.0),
                measures.centroid(parts, (8, 8)),
                measures.spread(parts, (8, 8)),
                measures.entropy(parts),
            ]

        assert torch.autograd.gradcheck(compute, maps, fast_mode=True)


class TestPointing:
    def truth(self, place=(60.0, 40.0), height=100.0, images=1) -> BodyTruth:
        places = torch.full((2, 1, 1, images, 2), torch.nan, dtype=torch.float64)
        heights = torch.full((2, 1, 1, images), torch.nan, dtype=torch.float64)
        places[..., -1, :], heights[..., -1] = torch.tensor(place, dtype=torch.float64), height
        places[..., 0, :], heights[..., 0] = torch.tensor(place, dtype=torch.float64), height
        return BodyTruth(places, heights, SIZE)

    def pointing(self, first, second, truth, radius=0.15) -> Pointing:
        maps = torch.from_numpy(np.stack([first, second]))[:, None, None, None, None]
        return pointing_of(maps, truth, (16, 16), radius)

    def test_a_spike(self):
        """Right at first, then four tokens of 8 pixels to the left: its edge is 28.5 pixels from the place."""
        found = self.pointing(spike((16, 16), (60.0, 40.0)), spike((16, 16), (28.0, 40.0)), self.truth())
        # Pixels 56 to 63 are one token; the place 60 lies 28.5 pixels right of pixel 31.5, the other token's edge.
        assert found.strongest.ravel().tolist() == pytest.approx([0, 0.285])
        assert found.offset.reshape(2, 2).tolist() == [pytest.approx([-0.005, 0.035]), pytest.approx([-0.325, 0.035])]
        assert found.accuracy(0.2).ravel().tolist() == [1, 0] and found.accuracy(0.29).ravel().tolist() == [1, 1]
        assert found.accuracy(0.1, by="centroid").ravel().tolist() == [1, 0]
        assert found.drift().item() == pytest.approx(0.32, abs=1e-6)
        assert found.entropy.abs().max() < 1e-6 and found.near.ravel().tolist() == pytest.approx([1, 0])

    def test_small_persons_are_measured_by_their_size(self):
        first, second = spike((16, 16), (28.0, 40.0)), spike((16, 16), (60.0, 40.0))
        found = self.pointing(first, second, self.truth(height=50.0))
        assert found.strongest.ravel().tolist() == pytest.approx([0.57, 0])

    def test_nothing_to_say(self):
        """A query that does not see the images, and a point that the reference does not show."""
        nothing, something = np.zeros(256, np.float32), spike((16, 16), (60.0, 40.0))
        found = self.pointing(nothing, something, self.truth())
        assert found.strongest.isnan().ravel().tolist() == [True, False]
        unseen = self.pointing(something, something, self.truth(place=(np.nan, np.nan)))
        assert all(getattr(unseen, name).isnan().all() for name in ("strongest", "offset", "entropy", "near"))
        assert unseen.accuracy(0.1).isnan().all() and np.isnan(pck(unseen.strongest, [0.1])).all()

    def test_several_images(self):
        """The strongest token of all images counts, in its image; other persons' images are misses."""
        truth = self.truth(images=3)
        maps = torch.zeros(2, 1, 1, 1, 3, 256)
        maps[0, ..., 0, :] = 0.1 / 256
        maps[0, ..., 2, :] = torch.from_numpy(spike((16, 16), (60.0, 40.0), 0.3))
        maps[1, ..., 1, :] = torch.from_numpy(spike((16, 16), (60.0, 40.0), 0.3))
        found = pointing_of(maps, truth, (16, 16))
        assert found.strongest.ravel().tolist() == [0, np.inf] and found.near.ravel()[0] > 0.75
        assert found.centroid.ravel()[0] < 0.05

    def test_differentiable(self):
        maps = torch.rand(2, 1, 1, 1, 1, 256, requires_grad=True)
        found = pointing_of(maps, self.truth(), (16, 16))
        (found.offset.square().sum() + found.entropy.sum() + found.near.sum()).backward()
        assert (maps.grad.abs() > 0).all()

    def test_pck(self):
        curve = pck(torch.tensor([0.0, 0.1, 0.3, np.nan]), [0, 0.1, 0.2, 0.5])
        assert curve == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])

    def test_chance(self):
        """A person who covers a column of ten tokens, four of which touch the radius."""
        recorded = recorded_from({"down": np.zeros((2, 1, 1, 1, 1, 256))}, np.zeros((1, 1, 2)), steps=2)
        person = np.zeros((128, 128), bool)
        person[:80, 56:64] = True
        coverage = token_coverage(person, (16, 16))
        assert coverage.sum() == 10
        # Rows of tokens 8 pixels high; from y = 40, 10 pixels up and down reach the tokens of pixels 30 to 50.
        found = chance(recorded, self.truth(), "down", coverage, 0.1)
        assert found.ravel().tolist() == pytest.approx([0.4, 0.4])


class TestTruth:
    def recorded(self, poses: Poses, images=2, steps=3, mean=(), frame_map=None) -> RecordedAttention:
        names, points = body_points(poses, np.eye(3) if frame_map is None else frame_map, SIZE)
        shape = (1 if "steps" in mean else steps, poses.frames, 1, len(names), images, 64)
        maps = {"mid": np.full(shape, 1e-3, np.float32)}
        return recorded_from(maps, points, tuple(names), images, steps, mean)

    @pytest.mark.parametrize("propagation", ["off", "iterative"])
    def test_calibrated_images_show_the_pose_of_their_frame(self, propagation):
        """The reference person is half as large; a bright spot at the right hip is where the truth says."""
        driving = standing([(0, 0, 1.0), (5, -3, 0.9), (10, 2, 0.8), (12, 2, 0.8), (14, 3, 0.75)])
        reference = standing([(-20, 10, 0.5)])
        dot = np.zeros((128, 128, 3), np.uint8)
        column, row = reference.keypoints[0, 0, 12].astype(int)
        dot[row - 2 : row + 3, column - 2 : column + 3] = 255
        config = CalibrationConfig(propagation=propagation, keypoints="all", smoothing=0.0)
        calibration = calibrate(dot, reference, driving, SIZE, config)
        recorded = self.recorded(driving)
        truth = body_truth(recorded, reference, calibration)
        drawn = set()
        for step in recorded.selection.steps:
            for frame, image in enumerate(calibration.index(step)[:, 0]):
                source = np.flatnonzero(calibration.member[:, 0] == image)[0]
                drawn.add((frame, source))
                assert np.abs(truth.coords[step, frame, :, 1].numpy() - driving.keypoints[source, 0]).max() < 0.1
                ratio = truth.heights[step, frame, :, 1] / truth.heights[step, frame, :, 0]
                shown = np.argwhere(calibration.images[int(image)][..., 0] > 127).mean(axis=0)[::-1]
                assert truth.coords[step, frame, 12, 1].numpy() == pytest.approx(shown, abs=0.6)
                scale = np.ptp(driving.keypoints[source, 0, :, 1]) / np.ptp(reference.keypoints[0, 0, :, 1])
                assert ratio.numpy() == pytest.approx(scale, rel=1e-3)
        assert any(frame != source for frame, source in drawn) == (propagation == "iterative")
        expected = map_points(reference.keypoints[0, 0], fit_matrix(reference.size, SIZE, "contain"))
        assert truth.coords[1, 2, :, 0].numpy() == pytest.approx(expected, abs=1e-4)
        averaged = self.recorded(driving, mean=("steps",))
        if propagation == "iterative":
            with pytest.raises(UserError, match="mean: steps saw different calibrated images"):
                body_truth(averaged, reference, calibration)
        else:
            assert torch.equal(body_truth(averaged, reference, calibration).coords[0], truth.coords[0])

    def test_keypoints_of_a_bent_person_move_with_their_parts(self):
        """The arm that hangs in the reference is stretched out sideways in the frame."""
        reference, driving = standing([(0, 0, 1.0)]), standing([(0, 0, 1.0)])
        shoulder = driving.keypoints[0, 0, 5]
        for joint in (7, 9):
            length = np.linalg.norm(driving.keypoints[0, 0, joint] - shoulder)
            driving.keypoints[0, 0, joint] = shoulder + [length, 0]
        image = np.zeros((128, 128, 3), np.uint8)
        config = CalibrationConfig(transform="articulated", keypoints="torso", min_iou=0.0)
        calibration = calibrate(image, reference, driving, SIZE, config)
        coords = body_truth(self.recorded(driving, steps=1), reference, calibration).coords[0, 0, :, 1].numpy()
        assert coords == pytest.approx(driving.keypoints[0, 0], abs=1.0)
        assert np.abs(coords - reference.keypoints[0, 0])[[7, 9]].max(1).min() > 10

    def test_several_persons_and_points_that_are_missing(self):
        scores = np.ones((2, 2, 17))
        scores[1, 1, 3] = 0
        driving = standing([(-30, 0, 0.5)] * 2, [(30, 0, 0.5), (300, 0, 0.5)])
        driving = Poses(driving.keypoints, scores, SIZE, 8.0)
        names, points = body_points(driving, np.eye(3), SIZE)
        assert names[0] == "nose" and names[17] == "nose 1" and len(names) == 34
        assert not np.isnan(points[0]).any() and not np.isnan(points[1, :17]).any()
        assert np.isnan(points[1, 17:]).all(), "outside the image"
        recorded = self.recorded(driving, images=1)
        swapped = body_truth(recorded, driving[0], persons=[1, 0]).coords[0, 0, :, 0]
        assert swapped[:17].numpy() == pytest.approx(driving.keypoints[0, 1], abs=1e-4)
        with pytest.raises(UserError, match="persons=.*the reference shows 1"):
            body_truth(recorded, driving.person(0)[0])
        with pytest.raises(UserError, match="give the same"):
            body_truth(self.recorded(driving), driving[0])
        whole = recorded_from({"mid": np.zeros((1, 1, 1, 64, 1, 64))})
        with pytest.raises(UserError, match="record the keypoints"):
            body_truth(whole, driving[0])

    def test_from_record_to_accuracy(self):
        """Every keypoint attends to itself but the wrists, which look at the nose."""
        driving, reference = standing([(0, 0, 0.9), (4, 0, 0.9)]), standing([(-10, 6, 0.6)])
        recorded = self.recorded(driving, images=1, steps=1)
        places = reference.keypoints[0, 0].astype(np.float64)
        looked = [places[0] if "wrist" in name else place for name, place in zip(COCO_KEYPOINTS, places, strict=True)]
        for frame in range(2):
            recorded.maps["mid"][0, frame, 0, :, 0] = [spike((8, 8), place) for place in looked]
        found = pointing(recorded, body_truth(recorded, reference), "mid").accuracy(0.15)[0, :, 0]
        assert found[0].tolist() == [float("wrist" not in name) for name in COCO_KEYPOINTS] == found[1].tolist()


class TestShares:
    def test_they_sum_to_one(self):
        draw = np.random.default_rng(0).random((2, 3, 2, 4, 3, 64)).astype(np.float32)
        maps = draw / draw.sum((-1, -2), keepdims=True) * 0.7
        recorded = recorded_from({"mid": maps}, np.zeros((3, 4, 2)), images=3, steps=2)
        mask = np.zeros((128, 128), bool)
        mask[:, :40] = True
        found = shares(recorded, "mid", mask, mean_heads=False)
        assert list(found) == [SELF, PERSON, BACKGROUND, "calibrated 0", "calibrated 1"]
        assert torch.stack(list(found.values())).sum(0).numpy() == pytest.approx(1, abs=1e-5)
        columns = maps[..., 0, :].reshape(2, 3, 2, 4, 8, 8).sum(-2)
        expected = columns[..., :2].sum(-1) + columns[..., 2] / 2  # 40 pixels are two tokens and a half
        assert found[PERSON].numpy() == pytest.approx(expected, abs=1e-6)
        mean = shares(recorded, "mid", mask)[SELF]
        assert mean.shape == (2, 3, 1, 4) and mean.numpy() == pytest.approx(0.3, abs=1e-5)

    def test_queries_of_the_person_and_of_the_background(self):
        values = torch.tensor([[1.0, 2.0, 5.0, np.nan]])
        assert mean_over(values) == pytest.approx(8 / 3)
        assert mean_over(values, torch.tensor([1, 1, 0, 1.0])) == 1.5
        assert mean_over(values, torch.tensor([0, 0, 0, 1.0])) is None


class TestImages:
    def recorded(self) -> RecordedAttention:
        """Two layers that look at pixel (100, 20), in three steps."""
        maps = {
            layer: np.broadcast_to(spike(grid, (100.0, 20.0), 0.5), (3, 2, 1, 17, 1, grid[0] * grid[1])).copy()
            for layer, grid in GRIDS.items()
        }
        names, points = body_points(standing([(0, 0, 1.0)] * 2), np.eye(3), SIZE)
        points[1, 3] = np.nan
        for layer in maps:
            maps[layer][:, 1, :, 3] = np.nan
        return recorded_from(maps, points, tuple(names), steps=3)

    def test_layer_mean_keeps_the_share(self):
        density = layer_mean(self.recorded(), "nose", step=1, frame=0)
        assert density.shape == (1, 128, 128) and density.sum() == pytest.approx(0.5, abs=1e-3)
        row, column = np.unravel_index(density[0].argmax(), density[0].shape)
        assert abs(row - 20) <= 4 and abs(column - 100) <= 4
        with pytest.raises(UserError, match="point=left_ear is not visible in frame 1"):
            layer_mean(self.recorded(), "left_ear", frame=1)

    def test_overlay(self):
        """Grey where nothing is, coloured where attention is; nothing moves."""
        image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        density = np.zeros((8, 8))
        density[2, 5] = 1
        shown = overlay(image, density).astype(int)
        colour = np.ptp(shown, axis=-1)
        assert colour[:8].max() == 0 and colour[40:].max() == 0 and colour[16:24, 40:48].min() > 50
        marked = mark(np.zeros((96, 96, 3), np.uint8), np.array([10.0, 20.0]), 2.0, (255, 0, 0), cross=False)
        rows, columns = np.nonzero(marked[..., 0])
        assert (rows.mean(), columns.mean()) == pytest.approx((40.5, 20.5), abs=0.6)
        assert mark(marked, np.array([np.nan, 1]), 2.0, (0, 0, 0), cross=True) is marked

    def test_a_row_of_figure_2(self):
        recorded, reference = self.recorded(), np.full((128, 128, 3), 90, np.uint8)
        truth = body_truth(recorded, standing([(0, 0, 0.5)]))
        found = point_maps(recorded, truth, reference, None, "left_wrist", 0, [0, 2])
        assert [look.name for look in found] == ["reference"] * 2 and found[0].share == pytest.approx(0.5, abs=1e-3)
        assert found[0].truth == pytest.approx(standing([(0, 0, 0.5)]).keypoints[0, 0, 9], abs=1e-4)
        row = point_maps_row(found, reference, recorded.points[0, 9], "left wrist", [0, 2], height=96)
        assert row.shape[1] == 3 * (96 + 4) and row.shape[2] == 3
        both = stacked([row, row[:, :150]])
        assert both.shape[1:] == row.shape[1:] and (both[row.shape[0] : 2 * row.shape[0], 150:] == 255).all()
        assert (both[2 * row.shape[0] :] < 128).any(), "the legend"
        with pytest.raises(UserError, match="step=5 was not recorded"):
            point_maps(recorded, truth, reference, None, "nose", 0, [5])

    def test_which_image_is_shown(self):
        """The one that gets most, or the one that is asked for."""
        poses = standing([(0, 0, 1.0)])
        calibration = calibrate(
            np.zeros((128, 128, 3), np.uint8), standing([(0, 0, 0.5)]), poses, SIZE, CalibrationConfig(keypoints="all")
        )
        names, points = body_points(poses, np.eye(3), SIZE)
        maps = np.zeros((1, 1, 1, 17, 2, 64), np.float32)
        maps[..., 0, 9], maps[..., 1, 20] = 0.4, 0.2
        recorded = recorded_from({"mid": maps}, points, tuple(names), images=2)
        truth = body_truth(recorded, standing([(0, 0, 0.5)]), calibration)
        grey = np.full((128, 128, 3), 90, np.uint8)
        (most,) = point_maps(recorded, truth, grey, calibration, "nose", 0, [0])
        (asked,) = point_maps(recorded, truth, grey, calibration, "nose", 0, [0], image=1)
        assert (most.name, asked.name) == ("reference", "calibrated")
        assert (most.share, asked.share) == (pytest.approx(0.4, abs=1e-3), pytest.approx(0.2, abs=1e-3))
        assert most.image is grey and np.array_equal(asked.image, calibration.images[0])
        assert asked.truth == pytest.approx(truth.coords[0, 0, 0, 1].numpy()) and not np.allclose(
            asked.truth, most.truth
        )

    def test_images_that_a_frame_sees(self):
        poses = standing([(0, 0, 0.8)] * 3)
        scores = np.ones((3, 1, 17))
        scores[1] = 0
        driving = Poses(poses.keypoints, scores, SIZE, 8.0)
        image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        config = CalibrationConfig(propagation="off", max_gap=0)
        calibration = calibrate(image, standing([(0, 0, 0.5)]), driving, SIZE, config)
        seen = attended_images(image, calibration, 0, 0)
        assert seen[0] is image and np.array_equal(seen[1], calibration.images[int(calibration.member[0, 0])])
        assert (attended_images(image, calibration, 0, 1)[1] == 128).all()
        assert len(attended_images(image, None, 0, 1)) == 1
