"""Measures against closed forms, against the libraries that define them, and against known answers."""

import cv2
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from metrics.features import WindowBuffer, window_starts
from metrics.frechet import Moments, frechet_distance
from metrics.image import (
    flicker,
    historical_l1,
    keypoint_error,
    mean_absolute_error,
    overflowing_psnr,
    part_colour_difference,
    part_colours,
    psnr,
    ssim,
)
from metrics.networks.perceptual import lpips_from_features
from metrics.protocols import MEASURES, PROTOCOLS, STAND_INS, brought_to_form, generated_to_form

LPIPS_KNOWN = (3.4463658, 3.3876286)


def noise(shape=(64, 48, 3), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class TestPixels:
    def test_l1_is_the_mean_in_grey_levels_at_every_resolution(self):
        for size in (32, 64):
            truth = np.full((size, size, 3), 100, np.uint8)
            generated = truth + np.array([10, 0, 20], np.uint8)
            assert mean_absolute_error(generated, truth) == 10
            assert mean_absolute_error(truth, generated) == 10, "no wrapping below zero"
            assert historical_l1(generated, truth) == pytest.approx(10 / size**2)
        # The published magnitude: 24.8 grey levels at 256 x 256 are 3.78e-4, a quarter of that at 512 x 512.
        assert 24.8 / 256**2 == pytest.approx(3.78e-4, rel=2e-3)

    def test_psnr_of_a_known_error(self):
        truth = np.full((16, 16, 3), 100, np.uint8)
        assert psnr(truth + np.uint8(5), truth) == pytest.approx(20 * np.log10(255 / 5))
        assert psnr(truth - np.uint8(5), truth) == pytest.approx(20 * np.log10(255 / 5))
        assert psnr(truth, truth) == 100

    def test_overflow_has_a_floor_and_a_plateau(self):
        """Squares modulo 256 are at most 255: no value below 24.07 dB; unrelated images give about 27.9."""
        assert 10 * np.log10(255) == pytest.approx(24.07, abs=0.005)
        truth = np.zeros((64, 64, 3), np.uint8)
        lowest = min(overflowing_psnr(truth + np.uint8(d), truth) for d in range(1, 256) if d * d % 256)
        assert lowest >= 10 * np.log10(255)
        # 15^2 = 225 is the largest square modulo 256 that occurs below 16; 249 = 5^2 mod 256 wrapped, and so on.
        assert lowest == pytest.approx(10 * np.log10(255**2 / max(d * d % 256 for d in range(256))))
        unrelated = overflowing_psnr(noise((256, 256, 3), 1), noise((256, 256, 3), 2))
        assert unrelated == pytest.approx(27.9, abs=0.1)
        smooth = np.clip(128 + 60 * np.random.default_rng(3).normal(size=(256, 256, 3)), 0, 255).astype(np.uint8)
        grey = np.full_like(smooth, 128)
        assert psnr(smooth, grey) < 14 and overflowing_psnr(smooth, grey) == pytest.approx(27.9, abs=0.3)

    def test_overflow_agrees_while_nothing_overflows(self):
        truth = noise()
        generated = np.clip(truth.astype(int) + noise(seed=1) % 16, 0, 255).astype(np.uint8)
        assert overflowing_psnr(generated, truth) == pytest.approx(psnr(generated, truth))

    def test_flicker_is_what_comes_and_goes(self):
        truth = noise(seed=1) // 2, noise(seed=2) // 2
        assert flicker(truth, truth) == 0
        brighter = tuple(frame + np.uint8(30) for frame in truth)
        assert flicker(brighter, truth) == 0, "a constant error"
        assert flicker((brighter[0], truth[1]), truth) == pytest.approx(30)
        assert flicker((truth[0], brighter[1]), truth) == pytest.approx(30)
        still = truth[0], truth[0]
        moved = np.abs(truth[1].astype(int) - truth[0].astype(int))
        assert flicker(still, truth) == pytest.approx(moved.mean()), "a clip that stands still"
        mask = np.zeros((64, 48), bool)
        mask[:10, :5] = True
        assert flicker(still, truth, mask) == pytest.approx(moved[mask].mean())
        with pytest.raises(ValueError, match="shape"):
            flicker((truth[0], truth[1][:5]), truth)

    def test_ssim_is_scikit_images(self):
        truth = noise()
        generated = (truth // 2 + noise(seed=1) // 2).astype(np.uint8)
        grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (generated, truth)]
        assert ssim(generated, truth, variant="grey-uniform") == pytest.approx(structural_similarity(*grey))
        expected = structural_similarity(
            generated,
            truth,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        assert ssim(generated, truth) == pytest.approx(expected)

    def test_regions_add_up_and_count_only_their_pixels(self):
        truth, mask = noise(), np.zeros((64, 48), bool)
        mask[:20] = True
        generated = truth.copy()
        generated[20:] = 255 - generated[20:]
        assert mean_absolute_error(generated, truth, mask) == 0 < mean_absolute_error(generated, truth, ~mask)
        assert psnr(generated, truth, mask) == 100 and np.isnan(psnr(generated, truth, mask & ~mask))
        parts = [mean_absolute_error(generated, truth, m) * m.mean() for m in (mask, ~mask)]
        assert sum(parts) == pytest.approx(mean_absolute_error(generated, truth))
        assert ssim(generated, truth, mask) > 0.8 > ssim(generated, truth, ~mask)

    def test_wrong_shapes_are_named(self):
        with pytest.raises(ValueError, match="one shape"):
            psnr(noise((8, 8, 3)), noise((8, 9, 3)))
        with pytest.raises(ValueError, match="uint8"):
            psnr(noise() / 255, noise())
        with pytest.raises(ValueError, match="mask"):
            psnr(noise(), noise(), np.ones((3, 3), bool))


class TestFrechet:
    def gaussian(self, seed: int, count: int, dimension: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return rng.normal(size=(count, dimension)) @ rng.normal(size=(dimension, dimension)) + rng.normal(
            size=dimension
        )

    def moments(self, vectors: np.ndarray, batch: int = 50) -> Moments:
        moments = Moments(vectors.shape[1])
        for start in range(0, len(vectors), batch):
            moments.update(vectors[start : start + batch])
        return moments

    def exactly(self, mean: np.ndarray, covariance: np.ndarray) -> Moments:
        moments = Moments(len(mean))
        moments.count, moments.mean, moments.scatter = 1001, mean, covariance * 1000
        return moments

    def test_gaussians_with_known_moments(self):
        """Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2. In general: the formula with scipy's square root."""
        first, second = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
        shift = np.array([1.0, 2.0, -2.0])
        distance = frechet_distance(self.exactly(shift, np.diag(first)), self.exactly(np.zeros(3), np.diag(second)))
        assert distance.value == pytest.approx(9 + (1 + 0 + 4))
        assert distance.warning is None and distance.samples == (1001, 1001)
        a, b = self.moments(self.gaussian(0, 400, 6)), self.moments(self.gaussian(1, 300, 6))
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
        expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root.real)
        assert frechet_distance(a, b).value == pytest.approx(expected)

    def test_samples_of_known_gaussians_come_near(self):
        rng = np.random.default_rng(0)
        a, b = rng.normal(0, 1, (20000, 4)), rng.normal(0.5, 2, (20000, 4))
        assert frechet_distance(self.moments(a), self.moments(b)).value == pytest.approx(4 * 0.25 + 4 * 1, rel=0.03)

    def test_of_a_set_with_itself_it_is_zero_whatever_the_order(self):
        vectors = self.gaussian(2, 300, 8)
        order = np.random.default_rng(0).permutation(300)
        same = frechet_distance(self.moments(vectors), self.moments(vectors[order], batch=7))
        assert same.value == pytest.approx(0, abs=1e-9 * np.trace(np.cov(vectors.T)))
        other = self.gaussian(3, 300, 8)
        values = [frechet_distance(self.moments(vectors[o]), self.moments(other)).value for o in (slice(None), order)]
        assert values[0] == pytest.approx(values[1], rel=1e-10)
        assert frechet_distance(self.moments(other), self.moments(vectors)).value == pytest.approx(values[0])

    def test_too_few_samples_are_a_warning_with_the_numbers(self):
        few = frechet_distance(self.moments(self.gaussian(0, 10, 32)), self.moments(self.gaussian(1, 20, 32)))
        assert np.isreal(few.value) and few.value > 0
        assert "10 generated and 20 true" in few.warning and "32 dimensions" in few.warning
        same = self.moments(self.gaussian(0, 10, 32))
        assert frechet_distance(same, same).value == pytest.approx(0, abs=1e-5)
        with pytest.raises(ValueError, match="two vectors"):
            frechet_distance(self.moments(np.zeros((1, 32))), same)

    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.floats(-1e6, 1e6))
    def test_batches_and_merges_give_numpys_moments(self, sizes, offset):
        vectors = np.random.default_rng(0).normal(size=(sum(sizes) + 2, 3)) + offset
        batched, merged = Moments(3), Moments(3)
        place = 0
        for size in [*sizes, 2]:
            part = Moments(3)
            part.update(vectors[place : place + size])
            merged.merge(part)
            batched.update(vectors[place : place + size])
            place += size
        for moments in (batched, merged):
            assert moments.count == len(vectors)
            assert np.allclose(moments.mean, vectors.mean(axis=0), rtol=1e-12)
            assert np.allclose(moments.covariance, np.cov(vectors.T), rtol=1e-6, atol=1e-9)

    def test_wrong_vectors(self):
        with pytest.raises(ValueError, match="shape"):
            Moments(3).update(np.zeros((2, 4)))
        with pytest.raises(ValueError, match="finite"):
            Moments(2).update(np.array([[0.0, np.nan]]))


class TestWindows:
    @pytest.mark.parametrize(
        ("frames", "stride_1", "stride_16"), [(15, 0, 0), (16, 1, 1), (17, 2, 1), (40, 25, 2), (0, 0, 0)]
    )
    def test_counted_exactly(self, frames, stride_1, stride_16):
        assert len(window_starts(frames, 16, 1)) == stride_1
        assert len(window_starts(frames, 16, 16)) == stride_16

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 6), st.integers(1, 7))
    def test_buffer_gives_those_windows_however_the_frames_come(self, sizes, length, stride):
        buffer, found, place = WindowBuffer(length, stride), [], 0
        for size in sizes:
            found += buffer.push(torch.arange(place, place + size)[:, None]).squeeze(-1).tolist()
            place += size
        assert found == [list(range(s, s + length)) for s in window_starts(place, length, stride)]


class TestPerceptual:
    def test_lpips_arithmetic_is_that_of_the_lpips_package(self):
        """The known answers are those of `lpips.LPIPS(net="vgg")` of lpips 0.1.4 when its network returned these
        features and its heads were these ramps."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512, 1, 1)]
        first, second = ([torch.randn(2, *shape, generator=generator).relu() for shape in shapes] for _ in range(2))
        heads = [torch.linspace(0, 1, shape[0])[None, :, None, None] for shape in shapes]
        distance = lpips_from_features(first, second, heads)
        assert distance.tolist() == pytest.approx(LPIPS_KNOWN, rel=1e-5)
        assert lpips_from_features(first, first, heads).abs().max() == 0


class TestPerson:
    def person(self) -> tuple[np.ndarray, np.ndarray]:
        return np.random.default_rng(0).uniform(10, 50, (17, 2)), np.ones(17)

    def test_keypoint_error_is_in_heights(self):
        target, scores = self.person()
        assert keypoint_error(target, scores, target, scores, 50) == 0
        assert keypoint_error(target + [3, 4], scores, target, scores, 50) == pytest.approx(0.1)
        seen = scores.copy()
        seen[:8] = 0
        assert keypoint_error(target, seen, target, scores, 50) == pytest.approx(8 / 17), "a lost keypoint is 1 off"
        assert keypoint_error(target + [3, 4], scores, target, seen, 50) == pytest.approx(0.1)
        assert keypoint_error(target, 0 * scores, target, scores, 50) == 1
        assert np.isnan(keypoint_error(target, scores, target, 0 * scores, 50))

    def test_colours_follow_the_person_and_notice_other_clothes(self):
        keypoints = np.array(
            [[32, 8], [33, 7], [31, 7], [35, 8], [29, 8], [40, 18], [24, 18], [44, 28], [20, 28], [46, 38], [18, 38]]
            + [[37, 40], [27, 40], [38, 55], [26, 55], [39, 70], [25, 70]],
            np.float64,
        )
        scores = np.ones(17)
        image = np.full((96, 96, 3), 200, np.uint8)
        image[14:42, 18:48] = [180, 30, 40]
        moved = np.roll(image, (10, 20), axis=(0, 1))
        dressed = image.copy()
        dressed[14:42, 18:48] = [30, 60, 180]
        here = part_colours(image, keypoints, scores, 70)
        assert "chest" in here and len(here) == 11
        there = part_colours(moved, keypoints + [20, 10], scores, 70)
        other = part_colours(dressed, keypoints, scores, 70)
        assert part_colour_difference(there, here) < 0.5 < 10 < part_colour_difference(other, here)
        assert np.isnan(part_colour_difference({}, here))


class TestProtocols:
    def test_every_measure_is_defined_and_every_protocol_says_what_it_does(self):
        for protocol in PROTOCOLS.values():
            assert set(protocol.measures) <= set(MEASURES)
            text = " ".join(protocol.lines())
            assert protocol.name in text and protocol.version in text and "windows of 16" in text
        assert set(STAND_INS) | set(STAND_INS.values()) <= set(MEASURES)
        assert not any(MEASURES[stand_in].label == MEASURES[name].label for name, stand_in in STAND_INS.items())

    def test_centre_square_then_resize(self):
        image = np.zeros((40, 20, 3), np.uint8)
        image[10:30] = 255
        formed = brought_to_form(image, PROTOCOLS["disco-fixed"])
        assert formed.shape == (256, 256, 3) and (formed == 255).all()
        assert brought_to_form(image, PROTOCOLS["native"]) is image

    def test_generated_images_of_other_sizes(self):
        protocol = PROTOCOLS["disco-2023"]
        assert generated_to_form(np.zeros((128, 128, 3), np.uint8), (54, 96), protocol).shape == (256, 256, 3)
        with pytest.raises(ValueError, match="is 30x20; protocol disco-2023 needs 54x96, or square"):
            generated_to_form(np.zeros((20, 30, 3), np.uint8), (54, 96), protocol)
        with pytest.raises(ValueError, match="protocol native needs 54x96"):
            generated_to_form(np.zeros((128, 128, 3), np.uint8), (54, 96), PROTOCOLS["native"])
