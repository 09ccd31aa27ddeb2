import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from data.video.files import write_video
from data.video.images import list_images, read_image

WIDTH, HEIGHT = 64, 48
RED = (200, 40, 30)


def image_with_a_mark() -> np.ndarray:
    """Grey with a red patch at the bottom left, so that no rotation or mirror image of it is itself."""
    image = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
    image[30:40, :20] = RED
    image[8:24, 7:14] = 220
    return image


def test_images_are_listed_in_natural_order(tmp_path):
    for name in ("10.png", "9.PNG", "b2.jpg", "b10.jpg", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [file.name for file in list_images(tmp_path)] == ["9.PNG", "10.png", "b2.jpg", "b10.jpg"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_camera_orientation_is_applied(tmp_path, orientation):
    upright = image_with_a_mark()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "photo.png"), upright)


def test_images_of_all_kinds_become_rgb(tmp_path):
    rgb = image_with_a_mark()
    image = Image.fromarray(rgb)
    path = tmp_path / "image.png"
    image.convert("L").save(path)
    grey = read_image(path)
    assert grey.shape == rgb.shape and (grey[..., 0] == grey[..., 2]).all() and grey[35, 8, 0] == 87
    Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)).save(path)
    np.testing.assert_array_equal(read_image(path)[..., 1], np.arange(256).reshape(16, 16))
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(path)
    np.testing.assert_allclose(read_image(path), rgb, atol=3)
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, 40:], alpha[:, 50:] = 128, 0
    Image.fromarray(np.dstack([rgb, alpha])).save(path)
    shown = read_image(path)
    np.testing.assert_array_equal(shown[:, :40], rgb[:, :40])
    np.testing.assert_allclose(shown[:, 45], (rgb[:, 45] + 255.0) / 2, atol=1)
    np.testing.assert_array_equal(shown[:, 50:], 255)
    image.convert("CMYK").save(tmp_path / "image.jpg", quality=98)
    np.testing.assert_allclose(read_image(tmp_path / "image.jpg")[35, 8], RED, atol=12)
    image.convert("1").save(path)
    assert set(np.unique(read_image(path))) == {0, 255}


def test_every_bad_image_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"reference=.*missing\.png does not exist"):
        read_image(tmp_path / "missing.png", argument="reference")
    with pytest.raises(UserError, match="is a folder; give a file"):
        read_image(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="is not an image"):
        read_image(tmp_path / "text.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(tmp_path / "cut.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="floating-point"):
        read_image(tmp_path / "float.tif")
    write_video(tmp_path / "clip.mp4", [image_with_a_mark()] * 2, 25)
    with pytest.raises(UserError, match="is not an image"):
        read_image(tmp_path / "clip.mp4")
