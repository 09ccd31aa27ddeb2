import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from core.errors import UserError
from data.video.files import Video, VideoReader, read_video, video_metadata, write_video
from tests.sound import loud, write_clip_with_a_beep

WIDTH, HEIGHT = 64, 48
RED = (200, 40, 30)


def numbered_frame(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Grey, with the number in eight black or white blocks at the top left and a red patch at the bottom left."""
    frame = np.full((height, width, 3), 60, np.uint8)
    for bit in range(8):
        if number >> bit & 1:
            frame[8:24, bit * 7 : (bit + 1) * 7] = 220
    frame[30:40, :20] = RED
    return frame


def number_of(frame: np.ndarray) -> int:
    return sum(int(frame[16, bit * 7 + 3].mean() > 140) << bit for bit in range(8))


def encode(path, codec="libx264", count=24, pixels="yuv420p", options=None, times=None, container=None, aspect=None):
    """Encode numbered frames at 30 fps, or at `times` in units of 1/600 s; 10-bit and alpha formats get a clear right
    half."""
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        stream.options = options or {}
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 600)
        for number in range(count):
            pixel_rows = numbered_frame(number)
            if "a" in pixels:
                opacity = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
                opacity[:, WIDTH // 2 :] = 0
                frame = av.VideoFrame.from_ndarray(np.concatenate([pixel_rows, opacity], axis=-1), format="rgba")
            else:
                frame = av.VideoFrame.from_ndarray(pixel_rows, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 600)
            output.mux(stream.encode(frame.reformat(format=pixels)))
        output.mux(stream.encode())


def set_rotation(path, matrix: tuple[int, int, int, int]) -> None:
    """Write a display matrix into the track header of an MP4 file, as phones do."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4
    start += 4 + (32 if content[start] else 20) + 16
    a, b, c, d = (value * 65536 for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


FORMATS = {
    "h264.mp4": {"options": {"g": "12", "bf": "2"}},
    "h264.mkv": {},
    "h264.ts": {"options": {"bf": "2"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "ten_bit.mkv": {"codec": "libx265", "pixels": "yuv420p10le", "options": {"x265-params": "log-level=none"}},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12"}},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "grey.mkv": {"codec": "ffv1", "pixels": "gray"},
    "raw.h264": {},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_frame_of_every_format_in_order_and_at_random(tmp_path, name):
    encode(tmp_path / name, **FORMATS[name])
    with VideoReader(tmp_path / name) as video:
        frames = list(video)
        assert [number_of(frame) for frame in frames] == list(range(24))
        assert len(video) == 24 and video.size == (WIDTH, HEIGHT)
        assert video.fps == pytest.approx(25 if name == "raw.h264" else 30, abs=0.01)  # a raw stream states no rate
        asked = [23, 0, 13, 13, -2, 5]
        np.testing.assert_array_equal(video.get(asked), np.stack(frames)[asked])
        if name != "grey.mkv":
            np.testing.assert_allclose(frames[0][35, 8], RED, atol=8)
        assert video.get([]).shape == (0, HEIGHT, WIDTH, 3)
        with pytest.raises(IndexError):
            video.get([24])


def test_an_independent_decoder_gives_the_same_frames(tmp_path):
    decord = pytest.importorskip("decord")
    encode(tmp_path / "clip.mp4", options={"g": "8", "bf": "2"})
    indices = [20, 3, 3, 11]
    theirs = decord.VideoReader(str(tmp_path / "clip.mp4"), num_threads=1).get_batch(indices).asnumpy()
    np.testing.assert_array_equal(VideoReader(tmp_path / "clip.mp4").get(indices), theirs)


@pytest.mark.parametrize("matrix, turns", [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_rotation_by_a_phone_is_applied(tmp_path, matrix, turns):
    encode(tmp_path / "clip.mp4")
    upright = read_video(tmp_path / "clip.mp4").frames
    set_rotation(tmp_path / "clip.mp4", matrix)
    with VideoReader(tmp_path / "clip.mp4") as video:
        assert video.size == ((HEIGHT, WIDTH) if turns % 2 else (WIDTH, HEIGHT))
        np.testing.assert_array_equal(np.stack(list(video)), np.rot90(upright, turns, axes=(1, 2)))
        np.testing.assert_array_equal(video.get([7])[0], np.rot90(upright[7], turns))


@pytest.mark.parametrize(
    "name, codec, pixels", [("clip.webm", "libvpx-vp9", "yuva420p"), ("clip.mov", "prores_ks", "yuva444p10le")]
)
def test_transparent_parts_are_laid_over_white(tmp_path, name, codec, pixels):
    encode(tmp_path / name, codec, pixels=pixels, count=5)
    with VideoReader(tmp_path / name) as video:
        frame = list(video)[4]
        np.testing.assert_allclose(frame[35, 8], RED, atol=6)
        np.testing.assert_allclose(frame[35, 50], 255, atol=2)
        np.testing.assert_array_equal(video.get([4])[0], frame)


def test_oblong_pixels_are_made_square(tmp_path):
    encode(tmp_path / "clip.mp4", aspect=Fraction(3, 2), count=3)
    with VideoReader(tmp_path / "clip.mp4") as video:
        assert video.size == (96, 48)
        assert next(iter(video)).shape == (48, 96, 3) == video.get([1])[0].shape
        np.testing.assert_allclose(next(iter(video))[35, 25], RED, atol=8)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_rate_keeps_duration_and_true_times(tmp_path, suffix):
    steps = np.random.default_rng(0).integers(10, 60, 23)
    times = np.concatenate([[0], np.cumsum(steps)])  # in 1/600 s
    encode(tmp_path / f"clip{suffix}", times=times.tolist())
    video = VideoReader(tmp_path / f"clip{suffix}")
    assert len(video) / video.fps == pytest.approx(times[-1] / 600, abs=0.1)
    shown = [number_of(frame) for frame in video]
    assert len(shown) == len(video)
    for k, number in enumerate(shown):
        at = 600 * k / video.fps
        assert times[number] <= at + 5  # the frame is on display already,
        assert number == 23 or times[number + 1] >= at - 1  # and the next one is not
    np.testing.assert_array_equal([number_of(frame) for frame in video.get(range(len(video)))], shown)


@pytest.mark.parametrize("fps, expected", [(30, range(24)), (15, range(0, 24, 2)), (60, np.repeat(range(24), 2))])
def test_reading_at_another_rate(tmp_path, fps, expected):
    encode(tmp_path / "clip.mp4")
    video = read_video(tmp_path / "clip.mp4", fps=fps)
    assert video.fps == fps
    assert [number_of(frame) for frame in video.frames] == list(expected)


def test_max_frames_and_the_whole_video(tmp_path):
    encode(tmp_path / "clip.mp4")
    assert [number_of(frame) for frame in read_video(tmp_path / "clip.mp4", max_frames=5).frames] == list(range(5))
    video = read_video(tmp_path / "clip.mp4", max_frames=500)
    assert isinstance(video, Video) and len(video.frames) == 24 and video.size == (WIDTH, HEIGHT)


def test_animated_images_keep_their_durations(tmp_path):
    frames = [Image.fromarray(numbered_frame(k)) for k in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[100, 200, 100, 400])
    video = read_video(tmp_path / "a.gif", fps=10)
    assert [number_of(frame) for frame in video.frames] == [0, 1, 1, 2, 3, 3, 3, 3]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=50, lossless=True)
    video = VideoReader(tmp_path / "a.webp")
    assert video.fps == pytest.approx(20) and [number_of(frame) for frame in video] == [0, 1, 2, 3]
    np.testing.assert_array_equal(video.get([2, 0]), np.stack([numbered_frame(2), numbered_frame(0)]))


def test_transparent_gif_over_white_frame_by_frame(tmp_path):
    frames = []
    for k in range(3):
        pixels = np.zeros((20, 30, 4), np.uint8)
        pixels[:, 10 * k : 10 * k + 10] = (255, 0, 0, 255)
        frames.append(Image.fromarray(pixels))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100, disposal=2)
    for k, frame in enumerate(VideoReader(tmp_path / "a.gif")):
        expected = np.full((20, 30, 3), 255)
        expected[:, 10 * k : 10 * k + 10] = (255, 0, 0)
        np.testing.assert_allclose(frame, expected, atol=3)


def test_folder_of_frames_in_natural_order(tmp_path):
    for k in range(12):
        Image.fromarray(numbered_frame(k)).save(tmp_path / f"frame{k}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    video = VideoReader(tmp_path, fps=12)
    assert video.fps == 12 and [number_of(frame) for frame in video] == list(range(12))
    assert [number_of(frame) for frame in video.get([11, 2])] == [11, 2]
    assert VideoReader(tmp_path).fps == 25


def test_still_image_is_a_video_of_one_frame(tmp_path):
    Image.fromarray(numbered_frame(9)).save(tmp_path / "still.png")
    video = read_video(tmp_path / "still.png", fps=8)
    assert [number_of(frame) for frame in video.frames] == [9] and video.fps == 8


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 70), st.integers(2, 70), st.integers(1, 7), st.sampled_from([8, 23.976, 25, 29.97, 60, 12.5]))
def test_written_videos_read_back(tmp_path_factory, width, height, count, fps):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    y, x = np.mgrid[:height, :width]
    frames = [np.stack([2 * x, 3 * y, x + y + 9 * k], axis=-1).astype(np.uint8) for k in range(count)]
    write_video(path, iter(frames), fps, crf=1)
    video = read_video(path)
    assert video.fps == pytest.approx(fps, rel=2e-3)
    assert video.frames.shape == (count, height + height % 2, width + width % 2, 3)  # padded to even sizes
    difference = video.frames[:, :height, :width].astype(float) - np.stack(frames)
    assert np.abs(difference).mean() < 4
    if width % 2:
        edges = video.frames[:, :height, -2:].astype(float)
        assert np.abs(edges[:, :, 1] - edges[:, :, 0]).mean() < 6


def test_the_same_frames_are_the_same_file_whatever_memory_held(tmp_path):
    draw = np.random.default_rng(1)
    for side in (96, 160, 192):
        noise = draw.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
        frames = [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)) for image in noise]
        files = set()
        for _ in range(6):
            held = [draw.integers(0, 256, size, dtype=np.uint8) for size in draw.integers(1000, 100_000, 300)]
            del held
            write_video(tmp_path / "a.mp4", frames, 12)
            files.add((tmp_path / "a.mp4").read_bytes())
        assert len(files) == 1


def test_colours_survive_the_round_trip_and_are_tagged(tmp_path):
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (230, 190, 170)], np.uint8)
    frame = np.repeat(np.repeat(colours[None], 32, axis=0), 16, axis=1)
    write_video(tmp_path / "clip.mp4", [frame] * 3, 25, crf=1)
    with VideoReader(tmp_path / "clip.mp4") as video:
        for shown in (next(iter(video)), video.get([1])[0]):
            np.testing.assert_allclose(shown[16, 8::16], colours, atol=4)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, codec.colorspace) == ("h264", "yuv420p", 1)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_metadata_round_trip(tmp_path, suffix):
    metadata = {"generated": True, "by": "TPC-Animate", "settings": {"steps": 25, "text": 'ä "quoted" \\ ; = #'}}
    write_video(tmp_path / f"clip{suffix}", [numbered_frame(0)] * 2, 10, metadata)
    assert video_metadata(tmp_path / f"clip{suffix}") == metadata
    write_video(tmp_path / f"bare{suffix}", [numbered_frame(0)] * 2, 10)
    assert "generated" not in video_metadata(tmp_path / f"bare{suffix}")


def test_nothing_is_left_when_writing_fails(tmp_path):
    def frames():
        yield numbered_frame(0)
        raise RuntimeError("the generator stopped")

    with pytest.raises(RuntimeError, match="the generator stopped"):
        write_video(tmp_path / "clip.mp4", frames(), 25)
    with pytest.raises(ValueError, match="one size"):
        write_video(tmp_path / "clip.mp4", [numbered_frame(0), numbered_frame(0, 32)], 25)
    with pytest.raises(ValueError, match="at least one frame"):
        write_video(tmp_path / "clip.mp4", [], 25)
    with pytest.raises(UserError, match=r"\.mp4"):
        write_video(tmp_path / "clip.xyz", [numbered_frame(0)], 25)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_video_says_where_it_stops(tmp_path):
    path = tmp_path / "clip.mp4"
    encode(path, count=100, options={"g": "12"}, container={"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    with VideoReader(path, argument="driving") as video:
        good = []
        with pytest.raises(UserError, match=r"driving=.*clip\.mp4: decoding stopped at frame (\d+) of 100") as error:
            for frame in video:
                good.append(number_of(frame))
        assert good == list(range(len(good))) and len(good) > 5
        assert f"frame {len(good)} of" in str(error.value)
        assert number_of(video.get([2])[0]) == 2
        with pytest.raises(UserError, match="decoding stopped at frame"):
            video.get([99])
    assert len(read_video(path, max_frames=5).frames) == 5  # what comes before the damage can be used


def test_bit_rot_says_where_decoding_stops(tmp_path):
    path = tmp_path / "clip.mp4"
    encode(path, count=60, options={"g": "6"}, container={"movflags": "faststart"})
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    for position in rng.integers(len(content) * 6 // 10, len(content) * 9 // 10, 150):
        content[position] = rng.integers(256)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"decoding stopped at frame \d+ of 60"):
        read_video(path)
    assert [number_of(frame) for frame in read_video(path, max_frames=8).frames] == list(range(8))


def test_a_truncated_gif_says_where_it_stops(tmp_path):
    frames = [Image.fromarray(numbered_frame(k)) for k in range(6)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    content = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut short: decoding stopped at frame \d"):
        read_video(tmp_path / "a.gif")


def test_every_bad_video_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"driving=.*missing\.mp4 does not exist"):
        VideoReader(tmp_path / "missing.mp4", argument="driving")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(UserError, match="is an empty file"):
        VideoReader(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    with pytest.raises(UserError, match="not a video that can be read") as error:
        VideoReader(tmp_path / "text.mp4")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="not a video that can be read"):
        video_metadata(tmp_path / "text.mp4")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder without images"):
        VideoReader(tmp_path / "folder")
    Image.fromarray(numbered_frame(0)).save(tmp_path / "folder" / "0.png")
    Image.fromarray(numbered_frame(1)).resize((50, 50)).save(tmp_path / "folder" / "1.png")
    with pytest.raises(UserError, match=r"1\.png has size 50x50, the first frame 64x48"):
        read_video(tmp_path / "folder")
    with pytest.raises(UserError, match="fps=0 must be a positive number"):
        VideoReader(tmp_path / "folder", fps=0)


def test_a_video_without_images_is_refused(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for _ in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 44100
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="no video stream"):
        VideoReader(tmp_path / "sound.mp4")


# Suffix of the video, its codecs, seconds at which it begins, and the codec of the result's sound.
SOUNDS = {
    "mp4": (".mp4", "libx264", "aac", 0, "aac"),
    "five seconds late": (".mkv", "libx264", "aac", 5, "aac"),
    "transport stream": (".ts", "libx264", "aac", 0, "aac"),
    "mp3": (".mp4", "libx264", "libmp3lame", 0, "mp3"),
    "flv": (".flv", "libx264", "aac", 0, "aac"),
    "uncompressed, at a rate that AAC has not": (".avi", "mpeg4", "pcm_u8", 0, "aac"),
    "opus": (".mkv", "libx264", "libopus", 0, "aac"),
}


@pytest.mark.parametrize("case", SOUNDS)
def test_results_carry_the_sound_in_time_and_no_longer_than_the_frames(case, tmp_path):
    suffix, video_codec, sound_codec, begins, expected = SOUNDS[case]
    clip = tmp_path / f"clip{suffix}"
    frames = [np.full((48, 64, 3), 4 * number, np.uint8) for number in range(50)]
    write_clip_with_a_beep(clip, frames, 25, video_codec, sound_codec, begins)
    video = VideoReader(clip, stride=2, max_frames=15)
    assert len(video) == 15 and video.fps == 12.5 and video.stored_frames == 50
    write_video(tmp_path / "result.mp4", video, video.fps, sound=video)
    assert len(VideoReader(tmp_path / "result.mp4")) == 15
    codec, first, last, end = loud(tmp_path / "result.mp4")
    assert codec == expected and abs(first - 1) < 0.03 and abs(last - 1.1) < 0.03
    assert abs(end - 15 / 12.5) < 0.06


def test_no_sound_is_no_error(tmp_path):
    write_video(tmp_path / "silent.mp4", [numbered_frame(0)] * 3, 25)
    (tmp_path / "folder").mkdir()
    Image.fromarray(numbered_frame(0)).save(tmp_path / "folder" / "0.png")
    for source in ("silent.mp4", "folder"):
        write_video(tmp_path / "result.mp4", [numbered_frame(0)] * 3, 25, sound=VideoReader(tmp_path / source))
        with av.open(str(tmp_path / "result.mp4")) as container:
            assert not container.streams.audio


def test_every_third_frame_by_iteration_and_by_index(tmp_path):
    write_video(tmp_path / "clip.mp4", [np.full((32, 48, 3), 20 * n, np.uint8) for n in range(12)], 30)
    video = VideoReader(tmp_path / "clip.mp4", stride=3, max_frames=3)
    assert (len(video), video.fps) == (3, 10.0)
    assert [round(frame.mean(), -1) for frame in video] == [0, 60, 120]
    assert [round(video[k].mean(), -1) for k in (2, 0)] == [120, 0] and round(video.part(0, 2)[-1].mean(), -1) == 60
    assert len(list(video.part(0, 2))) == 2
