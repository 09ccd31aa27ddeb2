"""Videos as people have them: a staircase of greys shows every lost, doubled, exchanged or foreign frame."""

from fractions import Fraction
from itertools import islice

import av
import numpy as np
import pytest
from av.stream import Disposition

from core.errors import UserError
from data.video.files import VideoReader

WIDTH, HEIGHT, COUNT, FPS = 96, 64, 20, 10


def stair(number: int) -> np.ndarray:
    """Grey by number, with a red corner at the top left."""
    frame = np.full((HEIGHT, WIDTH, 3), 8 + 12 * number, np.uint8)
    frame[: HEIGHT // 4, : WIDTH // 4] = (200, 20, 20)
    return frame


def encoded(container, stream, frames, times, scale: int = FPS) -> list[av.Packet]:
    packets = []
    for frame, time in zip(frames, times, strict=True):
        image = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=stream.pix_fmt)
        image.pts, image.time_base = time, Fraction(1, scale)
        packets += stream.encode(image)
    return packets + stream.encode()


def write(
    path, codec="libx264", options=None, start=0.0, cover=None, matrix=None, sound=None, times=None, small=False
):
    """A staircase that begins at `start` seconds; `cover`: disposition flags of a still before it; `sound`: seconds at
    which 5 s of silence begin; `small`: a second staircase, turned round, before it in half the size."""
    fmt = {"m4v": "mp4", "mts": "mpegts", "wmv": "asf"}.get(path.suffix[1:])
    with av.open(str(path), "w", format=fmt) as output:
        packets = []
        if cover is not None:
            still = output.add_stream("mjpeg", rate=25)
            still.width, still.height, still.pix_fmt, still.disposition = 160, 160, "yuvj420p", cover
            packets += encoded(output, still, [np.full((160, 160, 3), 90, np.uint8)], [0])
        sizes = [(WIDTH // 2, HEIGHT // 2), (WIDTH, HEIGHT)] if small else [(WIDTH, HEIGHT)]
        streams = []
        for width, height in sizes:
            stream = output.add_stream(codec, rate=FPS)
            stream.width, stream.height = width, height
            stream.pix_fmt = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}.get(codec, "yuv420p")
            stream.options = options or {}
            if codec.startswith(("mpeg", "wmv", "flv")):
                stream.options, stream.bit_rate = {"qmax": "2", "g": "8", **(options or {})}, 4_000_000
            stream.set_display_matrix(matrix)
            streams.append(stream)
        if small:
            streams[1].disposition, streams[0].disposition = Disposition.default, 0
        if sound is not None:
            audio = output.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=48000)
            for index in range(5 * 48000 // 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.time_base = 48000, Fraction(1, 48000)
                silence.pts = index * 1024 + round(sound * 48000)
                packets += audio.encode(silence)
            packets += audio.encode()
        first = round(start * FPS)
        times = times or range(first, first + COUNT)
        for (width, _), stream in zip(sizes, streams, strict=True):
            stairs = [stair(number) if width == WIDTH else stair(19 - number)[::2, ::2] for number in range(COUNT)]
            packets += encoded(output, stream, stairs, times)
        for packet in packets:
            output.mux(packet)


def remux(source, target, stamps) -> None:
    """Copy a video with other presentation time stamps, in tenths of a second by place in the order of decoding."""
    with av.open(str(source)) as read, av.open(str(target), "w") as output:
        stream = output.add_stream_from_template(read.streams.video[0])
        for index, packet in enumerate(packet for packet in read.demux(video=0) if packet.size):
            unit = 0.1 / float(packet.time_base)
            packet.pts, packet.dts = round(stamps[index] * unit), round((index - COUNT) * unit)
            packet.stream = stream
            output.mux(packet)


def steps(frames: np.ndarray) -> list[int]:
    return ((frames[:, HEIGHT // 2 :].mean(axis=(1, 2, 3)) - 8) / 12).round().astype(int).tolist()


def check_staircase(path, count: int = COUNT) -> None:
    with VideoReader(path) as video:
        frames = np.stack(list(video))
        assert steps(frames) == list(range(count))
        assert len(video) == count and video.size == (WIDTH, HEIGHT) and video.fps == pytest.approx(FPS, rel=0.01)
        assert np.array_equal(video.get(range(count)), frames)
        asked = np.random.default_rng(0).permutation(count)[:7]
        assert np.array_equal(video.get(asked), frames[asked])
        assert all(np.array_equal(video.get([index])[0], frames[index]) for index in (count - 1, 11, 9))


X264 = {"qp": "4", "g": "8"}
MPEG4, MPEG2 = ("mpeg4", {"bf": "2"}), ("mpeg2video", {"bf": "2"})
VP8 = ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "8", "b": "2M"})
STAIRCASES = [  # each container and each way of ordering frames
    ("mp4", "libx264", {"bf": "3", **X264}),
    ("mp4", *MPEG4),
    ("m4v", "libx264", {"bf": "0", **X264}),
    ("mov", "prores_ks", {}),
    ("mov", "mjpeg", {}),
    ("mkv", "libx264", {"bf": "3", "x264-params": "open-gop=1", **X264}),
    ("mkv", "libx265", {"x265-params": "log-level=none:keyint=6:bframes=3"}),
    ("mkv", *VP8),
    ("mkv", "ffv1", {}),
    ("webm", "libvpx-vp9", {"g": "8"}),
    ("avi", "libx264", {"bf": "0", **X264}),
    ("avi", "libx264", {"bf": "2", **X264}),
    ("avi", *MPEG4),
    ("ts", "libx264", {"bf": "3", **X264}),
    ("mts", *MPEG2),
    ("flv", "libx264", {"bf": "2", **X264}),
    ("flv", "flv", {}),
    ("wmv", "wmv2", {}),
    ("mpg", *MPEG2),
]


@pytest.mark.parametrize("suffix, codec, options", STAIRCASES, ids=lambda value: str(value)[:40])
def test_frames_come_in_the_order_of_display(tmp_path, suffix, codec, options):
    # MPEG-4 in AVI and MPEG-1's writer fill the time before with copies or refuse.
    late = suffix != "mpg" and (suffix, codec) != ("avi", "mpeg4")
    write(tmp_path / f"clip.{suffix}", codec, options, start=1.7 if late else 0)
    check_staircase(tmp_path / f"clip.{suffix}")


def test_joined_transport_streams_are_whole(tmp_path):
    for start in (0, 2):
        write(tmp_path / f"{start}.ts", options={"bf": "2", **X264}, start=start)
    (tmp_path / "both.ts").write_bytes(b"".join((tmp_path / f"{start}.ts").read_bytes() for start in (0, 2)))
    assert steps(np.stack(list(VideoReader(tmp_path / "both.ts")))) == 2 * list(range(COUNT))


SHUFFLED = {
    "counted": list(range(COUNT)),
    "swapped": [index ^ 1 for index in range(COUNT)],
    "turned": [index // 4 * 4 + (index + 1) % 4 for index in range(COUNT)],
    "random": np.random.default_rng(3).permutation(COUNT).tolist(),
}


@pytest.mark.parametrize(
    "stamps, b_frames, suffix",
    [
        ("counted", "3", "mkv"),
        ("counted", "2", "flv"),
        ("swapped", "0", "ts"),
        ("swapped", "2", "mkv"),
        ("turned", "3", "ts"),
        ("random", "0", "flv"),
        ("random", "3", "mkv"),
    ],
)
def test_frames_come_once_whatever_the_time_stamps(tmp_path, stamps, b_frames, suffix):
    write(tmp_path / "true.mp4", options={"bf": b_frames, **X264})
    remux(tmp_path / "true.mp4", tmp_path / f"false.{suffix}", SHUFFLED[stamps])
    check_staircase(tmp_path / f"false.{suffix}")


@pytest.mark.parametrize(
    "suffix, start, sound",
    [("mp4", 0, 3), ("mp4", 3, 0), ("mkv", 3, 0), ("webm", 0, 3), ("webm", 3, 0), ("flv", 0, 0), ("ts", 0, 3)],
)
def test_longer_sound_and_late_pictures_are_no_damage(tmp_path, suffix, start, sound):
    codec, options = ("libvpx-vp9", {}) if suffix == "webm" else ("libx264", {"qp": "4"})
    write(tmp_path / f"clip.{suffix}", codec, options, start=start, sound=sound)
    check_staircase(tmp_path / f"clip.{suffix}")
    assert VideoReader(tmp_path / f"clip.{suffix}").start == pytest.approx(start, abs=1.6 if suffix == "ts" else 0.21)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_pause_is_no_damage(tmp_path, suffix):
    write(tmp_path / f"clip.{suffix}", options={"qp": "4"}, times=[*range(8), *range(25, 37)])
    video = VideoReader(tmp_path / f"clip.{suffix}")
    assert not video.constant_rate and len(list(video)) == len(video)
    assert video.get(range(len(video))).shape[0] == len(video) and len(video) / video.fps == pytest.approx(
        3.7, abs=0.1
    )


@pytest.mark.parametrize(
    "suffix, cover",
    [("mkv", Disposition.default), ("mov", Disposition.attached_pic | Disposition.default), ("ts", 0)],
)
def test_cover_art_is_not_the_video(tmp_path, suffix, cover):
    write(tmp_path / f"clip.{suffix}", options={"qp": "4"}, cover=cover)
    check_staircase(tmp_path / f"clip.{suffix}")


def test_the_default_stream_is_the_video(tmp_path):
    write(tmp_path / "clip.mkv", options={"qp": "4"}, small=True)
    check_staircase(tmp_path / "clip.mkv")


@pytest.mark.parametrize(
    "a, b, c, d, shown",
    [
        (1, 0, 0, 1, lambda image: image),
        (-1, 0, 0, 1, lambda image: image[:, ::-1]),
        (1, 0, 0, -1, lambda image: image[::-1]),
        (-1, 0, 0, -1, lambda image: image[::-1, ::-1]),
        (0, 1, 1, 0, lambda image: image.transpose(1, 0, 2)),
        (0, -1, -1, 0, lambda image: image[::-1, ::-1].transpose(1, 0, 2)),
        (0, 1, -1, 0, lambda image: np.rot90(image, -1)),
        (0, -1, 1, 0, lambda image: np.rot90(image, 1)),
    ],
)
def test_display_matrices_are_applied_as_players_do(tmp_path, a, b, c, d, shown):
    """x' = a x + c y, y' = b x + d y."""
    write(tmp_path / "plain.mp4", options={"qp": "4"})
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    write(tmp_path / "turned.mp4", options={"qp": "4"}, matrix=matrix)
    plain, turned = (VideoReader(tmp_path / f"{name}.mp4") for name in ("plain", "turned"))
    for expected, frame in zip(plain, turned, strict=True):
        assert np.array_equal(shown(expected), frame)
    assert turned.size == shown(np.zeros((HEIGHT, WIDTH, 3))).shape[1::-1]
    assert np.array_equal(turned.get([13])[0], shown(plain.get([13])[0]))


def textured(path, codec, options) -> bytes:
    """A clip of 60 frames of moving texture at 10 fps, a key frame every 10."""
    texture = np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as output:
        stream = output.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt, stream.options = WIDTH, HEIGHT, "yuv420p", {"g": "10", **options}
        frames = [np.ascontiguousarray(texture[k : k + HEIGHT, 2 * k : 2 * k + WIDTH]) for k in range(60)]
        for packet in encoded(output, stream, frames, range(60)):
            output.mux(packet)
    return path.read_bytes()


def flipped(content: bytes) -> bytes:
    damaged, rng = bytearray(content), np.random.default_rng(1)
    for position in rng.integers(len(content) * 4 // 10, len(content) * 8 // 10, 60):
        damaged[position] = rng.integers(256)
    return bytes(damaged)


def lost(content: bytes) -> bytes:
    start, count = (len(content) // part // 188 * 188 for part in (2, 8))  # whole packets of a transport stream
    return content[:start] + bytes(count) + content[start + count :]


DAMAGE = {"cut short": lambda content: content[: len(content) * 6 // 10 + 1], "lost": lost, "flipped": flipped}
KINDS = [("mp4", "libx264", damage) for damage in DAMAGE]
KINDS += [(suffix, "libx264", "lost") for suffix in ("mkv", "avi", "flv", "ts")]
KINDS += [(suffix, "libx264", "cut short") for suffix in ("mkv", "avi", "ts")]
KINDS += [("mkv", "mpeg4", "lost"), ("webm", "libvpx-vp9", "lost")]


@pytest.mark.parametrize("suffix, codec, damage", KINDS)
def test_damage_is_refused_by_iteration_and_by_random_reads(tmp_path, suffix, codec, damage):
    path = tmp_path / f"clip.{suffix}"
    content = textured(path, codec, {})
    assert len(list(VideoReader(path))) == 60
    path.write_bytes(DAMAGE[damage](content))
    video, good = VideoReader(path, argument="driving"), []
    with pytest.raises(UserError, match=r"driving=.*: decoding stopped at frame (\d+) of \d+") as error:
        good.extend(video)
    assert f"frame {len(good)} of" in str(error.value) and 5 < len(good) < 60
    assert np.array_equal(video.get(range(len(good))), np.stack(good))  # what comes before can be used
    assert len(list(islice(video, 5))) == 5
    with pytest.raises(UserError, match=f"frame {len(good)} of"):
        video.get([len(good)])
    with pytest.raises(UserError, match="decoding stopped"):
        video.get(range(len(video)))
