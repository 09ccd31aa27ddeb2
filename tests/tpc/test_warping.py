"""Images and masks through affine maps: exact places, no aliasing, any size."""

import cv2
import numpy as np
import pytest

from data.poses.person import PackedMasks
from data.transforms import apply_fit, fit_matrix
from data.video.lazy import LazyImages
from tpc.warping import ImagePyramid, continued, mask_pyramid, place_person, quad_mask, remove_persons, warp_mask


def similarity(scale: float, angle: float, x: float, y: float) -> np.ndarray:
    a, b = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[a, -b, x], [b, a, y], [0, 0, 1]])


def ramp(width: int, height: int) -> np.ndarray:
    """Colour says where a pixel was: red is 2 x, green is 2 y."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([2 * x, 2 * y, x + y], -1).astype(np.uint8)


def test_identity_and_whole_pixel_shifts_are_exact():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    np.testing.assert_array_equal(ImagePyramid(image).warp(np.eye(3), (60, 40)), image)
    shifted = ImagePyramid(image).warp(similarity(1, 0, 7, -5), (60, 40))
    np.testing.assert_array_equal(shifted[:-5, 7:], image[5:, :-7])


@pytest.mark.parametrize("scale", [0.2, 0.37, 0.5, 0.8, 1.0, 1.9, 3.0])
@pytest.mark.parametrize("angle", [0.0, 0.7, 3.1])
def test_every_pixel_comes_from_where_the_matrix_says(scale, angle):
    image = ramp(120, 100)
    matrix = similarity(scale, angle, 60, 50) @ similarity(1, 0, -60, -50)
    warped = ImagePyramid(image).warp(matrix, (120, 100)).astype(float)
    x, y = np.meshgrid(np.arange(120), np.arange(100))
    back = np.linalg.inv(matrix)
    origin = [back[i, 0] * x + back[i, 1] * y + back[i, 2] for i in (0, 1)]
    margin = 3 + 3 / scale
    inside = (origin[0] > margin) & (origin[0] < 119 - margin) & (origin[1] > margin) & (origin[1] < 99 - margin)
    assert inside.sum() > 50
    for channel in (0, 1):
        # Half a grey level is a quarter of a pixel; every halving rounds once more.
        assert np.abs(warped[..., channel] / 2 - origin[channel])[inside].max() <= 0.6
        assert abs((warped[..., channel] / 2 - origin[channel])[inside].mean()) <= 0.15


@pytest.mark.parametrize("scale", [0.5, 0.3, 0.11])
def test_shrinking_averages_instead_of_aliasing(scale):
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    image = np.repeat(board[..., None], 3, -1)
    warped = ImagePyramid(image).warp(similarity(scale, 0.4, 0, 0), (40, 40))
    quad = (
        cv2.erode(quad_mask(similarity(scale, 0.4, 0, 0), (256, 256), (40, 40)).astype(np.uint8), np.ones((5, 5))) > 0
    )
    assert np.abs(warped[quad].astype(int) - 127).max() < 20
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    assert ImagePyramid(noise).warp(similarity(scale, 0.4, 0, 0), (40, 40))[quad].std() < 1.3 * scale * noise.std()


def test_a_large_image_is_warped_as_its_exact_reduction_is():
    rng = np.random.default_rng(0)
    small = cv2.GaussianBlur(rng.integers(0, 256, (60, 80, 3), np.uint8), (0, 0), 2)
    large = small.repeat(8, 0).repeat(8, 1)
    # Pixel i of the small image is the mean of 8i ... 8i + 7, whose middle is 8i + 3.5.
    matrix = similarity(0.9, 0.3, 5, 3)
    to_small = np.array([[1 / 8, 0, -3.5 / 8], [0, 1 / 8, -3.5 / 8], [0, 0, 1]])
    direct = ImagePyramid(small).warp(matrix, (80, 60)).astype(int)
    reduced = ImagePyramid(large).warp(matrix @ to_small, (80, 60)).astype(int)
    assert np.abs(direct - reduced).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (300, 5000), (5000, 300), (1, 40_000), (7, 3)])
def test_any_size_and_aspect(shape):
    image = np.full((*shape, 3), 77, np.uint8)
    for scale in (0.01, 1.0, 30.0):
        warped = ImagePyramid(image).warp(similarity(scale, 1.0, 3, 4), (32, 20))
        assert warped.shape == (20, 32, 3) and (warped == 77).all()
    if max(shape) <= 32766:
        mask = mask_pyramid(np.ones(shape, bool))
        assert warp_mask(mask, similarity(1, 0, 0, 0), (32, 20)).sum() == min(shape[0], 20) * min(shape[1], 32)


@pytest.mark.parametrize(
    "matrix", [np.zeros((3, 3)), np.full((3, 3), np.nan), similarity(1e-9, 0, 0, 0), similarity(1e9, 0, 0, 0)]
)
def test_a_hopeless_matrix_gives_black_not_a_crash(matrix):
    image = np.full((10, 10, 3), 200, np.uint8)
    assert ImagePyramid(image).warp(matrix, (8, 8)).shape == (8, 8, 3)


def test_quad_is_the_region_of_the_source_pixels():
    quad = quad_mask(similarity(2, 0, 10.5, 20.5), (5, 4), (40, 40))
    rows, columns = np.nonzero(quad)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 27, 10, 19)
    mask = warp_mask(mask_pyramid(np.ones((4, 5), bool)), similarity(2, 0, 10.5, 20.5), (40, 40))
    np.testing.assert_array_equal(mask, quad)


@pytest.mark.parametrize("scale", [0.15, 0.6, 1.7])
def test_mask_area_scales(scale):
    disc = np.hypot(*(np.indices((200, 200)) - 100)) < 60
    matrix = similarity(scale, 1.1, 200, 200) @ similarity(1, 0, -100, -100)
    warped = warp_mask(mask_pyramid(disc), matrix, (400, 400))
    assert warped.sum() == pytest.approx(disc.sum() * scale**2, rel=0.03)


def test_person_is_placed_and_the_rest_is_background():
    image = ramp(100, 80)
    mask = np.zeros((80, 100), bool)
    mask[20:60, 30:70] = True
    background = np.full((50, 60, 3), 9, np.uint8)
    matrix = similarity(0.5, 0, 3, 2)
    result = place_person(ImagePyramid(image), mask_pyramid(mask), matrix, background)
    placed = warp_mask(mask_pyramid(mask), matrix, (60, 50))
    far = cv2.dilate(placed.astype(np.uint8), np.ones((3, 3))) == 0
    assert (result[far] == 9).all() and (background == 9).all()
    inner = cv2.erode(placed.astype(np.uint8), np.ones((3, 3))) > 0
    np.testing.assert_allclose(result[inner], ImagePyramid(image).warp(matrix, (60, 50))[inner], atol=1)


def test_removed_persons_leave_their_surroundings():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32], image[:, 32:] = (200, 30, 30), (30, 30, 200)
    mask = np.zeros((64, 64), bool)
    mask[20:44, 20:44] = True
    spoilt = np.where(mask[..., None], np.uint8(255), image)
    filled = remove_persons(spoilt, mask)
    np.testing.assert_array_equal(filled[~mask], image[~mask])
    assert filled[32, 21, 0] > 150 > filled[32, 42, 0] and filled[mask].max() < 210
    assert (remove_persons(image, np.ones((64, 64), bool)) == 127).all()


def test_wrong_images_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        ImagePyramid(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="uint8"):
        ImagePyramid(np.zeros((0, 4, 3), np.uint8))


def test_stacks_are_indexed_like_arrays():
    rng = np.random.default_rng(0)
    masks = rng.random((3, 2, 5, 7)) < 0.5
    packed = PackedMasks.zeros((3, 2), (7, 5))
    for i in range(3):
        packed[i] = masks[i]
    assert packed.shape == masks.shape and len(packed) == 3 and packed.nbytes < masks.nbytes + 6 * 16
    packed[1] = masks[0]
    np.testing.assert_array_equal(packed[1], masks[0])
    packed[1] = masks[1]
    for index in (0, (1, 1), [2, 0], slice(0, 2), (slice(None), 1)):
        np.testing.assert_array_equal(packed[index], masks[index])
    np.testing.assert_array_equal(np.asarray(packed), masks)
    again = PackedMasks.from_arrays(*packed.to_arrays(), (7, 5))
    assert again.shape == masks.shape and again.select(slice(2)).shape == (2, 2, 5, 7)
    np.testing.assert_array_equal(np.asarray(again), masks)
    images = rng.integers(0, 256, (4, 5, 7, 3), np.uint8)
    made = []
    lazy = LazyImages(4, (7, 5), lambda i: made.append(i) or images[i])
    assert lazy.shape == images.shape and made == []
    np.testing.assert_array_equal(lazy[-1], images[-1])
    assert made == [3]
    for index in ([0, 2], slice(1, 3), np.array([[0, 1], [2, 3]]), slice(0, 0)):
        np.testing.assert_array_equal(lazy[index], images[index])
    np.testing.assert_array_equal(np.asarray(lazy), images)
    with pytest.raises(IndexError):
        lazy[4]


@pytest.mark.parametrize("size", [(96, 40), (40, 96)])
def test_a_fitted_image_goes_on_as_its_scene_and_not_in_bars(size):
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(60, 200, (6, 6, 3), np.uint8), (64, 64), interpolation=cv2.INTER_CUBIC)
    image[[0, -1]] = image[:, [0, -1]] = 255  # a white frame, as scans have it
    matrix = fit_matrix((64, 64), size, "contain")
    inside, fitted = quad_mask(matrix, (64, 64), size), apply_fit(image, matrix, size)
    result = continued(fitted, ~inside)
    inner = cv2.erode(inside.astype(np.uint8), np.ones((9, 9))).astype(bool)
    np.testing.assert_array_equal(result[inner], fitted[inner])
    assert result[~inside].max() < 230, "the frame is not drawn out"
    assert result[~inside].min() > 30, "nor is it black"
    # The furthest pixels are smoother along the edge than the edge is, which replicating them would not make them.
    wide, known = (x.transpose(1, 0, 2) if size[0] < size[1] else x for x in (result.astype(int), fitted.astype(int)))
    ends, edges = wide[4:-4, [0, -1]], known[4:-4, [34, -34]]
    assert np.abs(np.diff(ends, axis=0)).max() < 0.7 * np.abs(np.diff(edges, axis=0)).max()
    np.testing.assert_array_equal(continued(image, np.zeros((64, 64), bool)), image)
