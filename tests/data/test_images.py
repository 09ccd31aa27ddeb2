import logging
import struct

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from core.errors import UserError
from data.inputs import load_driving
from data.video.files import VideoReader, write_video
from data.video.images import BT2020, HLG, IMAGE_SUFFIXES, PQ, list_images, read_image, wide_to_srgb

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


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1"])
def test_heic_is_refused_with_the_command_that_converts_it(tmp_path, brand):
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
    for read in (read_image, VideoReader):
        with pytest.raises(
            UserError, match=r"reference=.*HEIC.*convert it, as with `heif-convert IMG_1.HEIC IMG_1.png`"
        ):
            read(path, argument="reference")


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_of_an_image_is_read(tmp_path, suffix):
    image = Image.fromarray(image_with_a_mark())
    image.convert("1" if suffix == ".pbm" else "L" if suffix == ".pgm" else "RGB").save(tmp_path / f"frame{suffix}")
    (file,) = list_images(tmp_path)
    assert read_image(file).shape == (HEIGHT, WIDTH, 3) == VideoReader(tmp_path).get([0]).shape[1:]


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


# CIE XYZ of red, green and blue adapted to the D50 of profiles, columns: sRGB and Display P3.
SRGB_XYZ = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
P3_XYZ = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])


def srgb(light) -> np.ndarray:
    """Linear light in [0, 1] as sRGB's 0 to 255, without rounding."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def icc_profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 2 with these tags."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    text = b"made for a test\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0" + text,
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249),
        **{
            name: value if isinstance(value, bytes) else b"XYZ \0\0\0\0" + fixed(*value)
            for name, value in tags.items()
        },
    }
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    size, kind = start + len(data), b"prtr" if space == b"CMYK" else b"mntr"
    header = (
        struct.pack(">I4sI4s4s4s", size, b"", 0x02100000, kind, space, connection) + bytes(12) + b"acsp" + bytes(28)
    )
    return header + fixed(0.9642, 1, 0.8249) + bytes(48) + struct.pack(">I", len(tags)) + table + data


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + bytes(2)


def p3_profile() -> bytes:
    columns = {name: P3_XYZ[:, i] for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return icc_profile(b"RGB ", {**columns, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(2.2))})


def ink_profile() -> bytes:
    """CMYK whose lightness is 1 - K, and whose other inks do nothing."""
    identity = bytes(range(256))
    corners = b"".join(bytes([0 if k else 255, 128, 128]) for k in (0, 1) * 8)  # Lab; K varies fastest
    matrix = struct.pack(">9i", *(65536, 0, 0, 0, 65536, 0, 0, 0, 65536))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + corners + identity * 3
    return icc_profile(b"CMYK", {b"A2B0": table}, connection=b"Lab ")


COLOUR = np.array([170, 90, 60])
AS_P3 = srgb(np.linalg.inv(SRGB_XYZ) @ P3_XYZ @ (COLOUR / 255) ** 2.2)  # what it is in Display P3
GREY = 120
LINEAR_GREY = icc_profile(b"GRAY", {b"kTRC": gamma(1.0)})


@pytest.mark.parametrize(
    "mode, suffix, profile, expected",
    [
        ("RGB", ".png", p3_profile(), AS_P3),
        ("RGB", ".jpg", p3_profile(), AS_P3),
        ("RGB", ".tif", p3_profile(), AS_P3),
        ("RGB", ".webp", p3_profile(), AS_P3),
        ("P", ".png", p3_profile(), AS_P3),
        ("RGBA", ".png", p3_profile(), (AS_P3 + 255) / 2),
        ("RGB", ".png", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), COLOUR),
        ("L", ".png", LINEAR_GREY, [srgb(GREY / 255)] * 3),
        ("LA", ".png", LINEAR_GREY, [(srgb(GREY / 255) + 255) / 2] * 3),
        ("I;16", ".png", LINEAR_GREY, [srgb(GREY / 255)] * 3),
        ("CMYK", ".jpg", ink_profile(), [119] * 3),  # Lab lightness 50
        ("LAB", ".tif", None, [119] * 3),
    ],
)
def test_colours_are_converted_to_srgb(tmp_path, mode, suffix, profile, expected):
    rgb = np.broadcast_to(COLOUR, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    grey = np.full((HEIGHT, WIDTH), GREY, np.uint8)
    half = np.full((HEIGHT, WIDTH), 128, np.uint8)
    lab = Image.frombytes("LAB", (WIDTH, HEIGHT), bytes([128, 0, 0]) * WIDTH * HEIGHT)
    image = {
        "RGB": Image.fromarray(rgb),
        "P": Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE),
        "RGBA": Image.fromarray(np.dstack([rgb, half])),
        "L": Image.fromarray(grey),
        "LA": Image.merge("LA", (Image.fromarray(grey), Image.fromarray(half))),
        "I;16": Image.fromarray(grey.astype(np.uint16) * 257),
        "CMYK": Image.merge("CMYK", [Image.fromarray(half * 0)] * 3 + [Image.fromarray(half)]),
        "LAB": lab,
    }[mode]
    options = {"quality": 98} if suffix in (".jpg", ".webp") else {}
    image.save(tmp_path / f"image{suffix}", **options, **({"icc_profile": profile} if profile else {}))
    shown = read_image(tmp_path / f"image{suffix}")
    assert shown.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(shown.reshape(-1, 3).mean(axis=0), expected, atol=3)


@pytest.mark.parametrize("profile", [LINEAR_GREY, b"no profile at all", p3_profile()[:200]])
def test_profiles_that_cannot_be_used_are_left_out_with_a_warning(tmp_path, caplog, profile):
    Image.fromarray(image_with_a_mark()).save(tmp_path / "image.png", icc_profile=profile)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(read_image(tmp_path / "image.png"), image_with_a_mark())
    assert "ICC profile" in caplog.text


def test_animations_are_converted_too(tmp_path):
    frames = [Image.fromarray(np.broadcast_to(COLOUR // k, (HEIGHT, WIDTH, 3)).astype(np.uint8)) for k in (1, 2)]
    for suffix in (".png", ".webp"):
        path = tmp_path / f"clip{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], icc_profile=p3_profile(), lossless=True)
        shown = list(VideoReader(path))
        assert len(shown) == 2
        np.testing.assert_allclose(shown[0][0, 0], AS_P3, atol=2)


@pytest.mark.parametrize("suffix, sizes, frames", [("mpo", [1, 1], 1), ("tif", [1, 2], 1), ("tif", [1, 1], 2)])
def test_further_views_and_copies_of_a_photograph_are_no_frames(tmp_path, suffix, sizes, frames):
    photo, *others = (Image.fromarray(image_with_a_mark()[::size, ::size]) for size in sizes)
    photo.save(tmp_path / f"photo.{suffix}", save_all=True, append_images=others)
    shown = list(VideoReader(tmp_path / f"photo.{suffix}"))
    assert len(shown) == frames
    assert np.abs(shown[0].astype(int) - image_with_a_mark()).mean() < 4


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_picture_for_still_viewers_is_no_frame_of_an_animated_png(tmp_path, count):
    path = tmp_path / "clip.png"
    frames = [Image.new("RGB", (WIDTH, HEIGHT), (40 * k, 0, 0)) for k in range(1, count + 1)]
    still = Image.new("RGB", (WIDTH, HEIGHT), (0, 0, 200))
    still.save(path, save_all=True, append_images=frames, default_image=True, duration=[200] * count)
    video = VideoReader(path)
    assert [frame[0, 0].tolist() for frame in video] == [[40 * k, 0, 0] for k in range(1, count + 1)]
    assert video.fps == pytest.approx(5) and video.get([-1])[0, 0, 0, 0] == 40 * count
    np.testing.assert_array_equal(read_image(path)[0, 0], [40, 0, 0])


RGB_TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])  # BT.2087


def as_hdr(light: np.ndarray, transfer: int) -> np.ndarray:
    """16-bit BT.2020 signal of BT.709 light (..., 3) in cd/m2, by SMPTE ST 2084 or by HLG at 1000 cd/m2 (BT.2100)."""
    light = light @ RGB_TO_BT2020.T
    if transfer == PQ:
        power = (light / 10000) ** (2610 / 16384)
        signal = ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    else:
        luminance = light @ (0.2627, 0.6780, 0.0593) / 1000
        scene = light / 1000 * np.maximum(luminance, 1e-9)[..., None] ** (1 / 1.2 - 1)
        logarithm = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene), logarithm)
    return np.rint(np.clip(signal, 0, 1) * 65535).astype(np.uint16)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_keeps_colours_and_rolls_off_highlights(transfer):
    colours = np.array([[[200, 30, 30], [30, 200, 30], [30, 30, 200], [218, 168, 138], [60, 60, 60], [0, 0, 0]]])
    light = np.where(colours <= 10.3, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4) * 203
    np.testing.assert_allclose(wide_to_srgb(as_hdr(light, transfer), BT2020, transfer), colours, atol=2)
    greys = np.linspace(0, 990, 100)[None, :, None].repeat(3, axis=2)
    shown = wide_to_srgb(as_hdr(greys, transfer), BT2020, transfer)[0].astype(int)
    assert np.ptp(shown, axis=-1).max() <= 1
    assert (np.diff(shown[:, 0]) >= 0).all() and shown[-1, 0] in (253, 254)
    assert shown[20, 0] == pytest.approx(srgb(1 - 0.04 / (greys[0, 20, 0] / 203 - 0.6)), abs=1)  # 200 cd/m2
    # A highlight keeps its hue, and tends to white.
    orange = wide_to_srgb(as_hdr(np.array([[[900.0, 300, 100]]]), transfer), BT2020, transfer)[0, 0].astype(int)
    assert orange[0] > orange[1] > orange[2] > 100


def test_wide_colours_without_hdr_are_converted():
    p3 = np.rint(srgb((COLOUR / 255) ** 2.2) / 255 * 65535).astype(np.uint16)[None, None]
    np.testing.assert_allclose(wide_to_srgb(p3, 12, 1)[0, 0], AS_P3, atol=2)
    white = np.full((1, 1, 3), 65535, np.uint16)
    for primaries in (BT2020, 12):
        assert (wide_to_srgb(white, primaries, 1) == 255).all()


def write_signal(path, codec: str, pixels: str, rgb: np.ndarray, primaries: int, transfer: int, matrix: int) -> None:
    """A video of three frames of one colour, (3,) signal in [0, 1], in 10 bits of a matrix' limited range."""
    red, blue = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}[matrix]
    luma = rgb @ (red, 1 - red - blue, blue)
    values = [64 + 876 * luma, 512 + 448 * (rgb[2] - luma) / (1 - blue), 512 + 448 * (rgb[0] - luma) / (1 - red)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = (
            primaries,
            transfer,
            matrix,
            1,
        )
        for _ in range(3):
            frame = av.VideoFrame(WIDTH, HEIGHT, pixels)
            for plane, value in zip(frame.planes, values, strict=True):
                plane.update(np.full(plane.buffer_size // 2, round(value), "<u2").tobytes())
            frame.color_primaries, frame.color_trc, frame.colorspace = primaries, transfer, matrix
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    "suffix, codec, pixels, kind",
    [
        (".mov", "libx265", "yuv420p10le", "HLG"),
        (".mp4", "libx264", "yuv420p10le", "PQ"),
        (".mkv", "ffv1", "yuv444p10le", "PQ"),
        (".mov", "prores_ks", "yuv422p10le", "BT.2020"),
        (".mkv", "libsvtav1", "yuv420p10le", "Display P3"),
    ],
)
def test_videos_of_wide_colours_are_read_as_srgb(tmp_path, caplog, suffix, codec, pixels, kind):
    light = np.where(COLOUR <= 10.3, COLOUR / 255 / 12.92, ((COLOUR / 255 + 0.055) / 1.055) ** 2.4)
    signal, primaries, transfer, matrix = {
        "PQ": (as_hdr(light * 203, PQ) / 65535, BT2020, PQ, 9),
        "HLG": (as_hdr(light * 203, HLG) / 65535, BT2020, HLG, 9),
        "BT.2020": (srgb(RGB_TO_BT2020 @ light) / 255, BT2020, 14, 9),
        "Display P3": (srgb(np.linalg.inv(P3_XYZ) @ SRGB_XYZ @ light) / 255, 12, 1, 1),
    }[kind]
    path = tmp_path / f"clip{suffix}"
    write_signal(path, codec, pixels, signal, primaries, transfer, matrix)
    video = VideoReader(path)
    assert (f"HDR ({kind}) is tone-mapped" if transfer in (PQ, HLG) else "wide colours are converted") in video.note
    load_driving(path, None, None, None, images=path, poses_wanted=False)
    assert video.note in caplog.text
    for frame in (*video, video.get([1])[0]):
        np.testing.assert_allclose(frame[HEIGHT // 2, WIDTH // 2], COLOUR, atol=4)
