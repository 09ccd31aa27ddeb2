"""Frames of a video at a constant rate.

    with VideoReader("dance.mp4") as video:
        for frame in video:                     # (h, w, 3) uint8 RGB, one at a time
            ...

A video is a video file, an animated GIF, WebP or PNG, a still image (one frame), or a folder of images.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from copy import copy
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import OutputContainer
from av.error import FFmpegError

from core.errors import UserError
from core.files import complete_file
from data.video.decoding import VideoFile
from data.video.images import AnimatedImage, FolderOfFrames, is_animated_image, refuse_heic

_COPIED_SOUND = ("aac", "mp3", "ac3", "eac3", "alac")
_STILL_FPS = 25.0  # of folders and still images, which have no times of their own


@dataclass(frozen=True)
class Video:
    """Frames (n, h, w, 3) uint8 RGB at a constant rate."""

    frames: np.ndarray
    fps: float

    @property
    def size(self) -> tuple[int, int]:
        return self.frames.shape[2], self.frames.shape[1]


class VideoReader:
    """Frames of a video at a constant rate, decoded when they are asked for.

    Frame k is the image on display at time k / fps, so a video of variable rate keeps its duration: frames are
    repeated or left out. The first frame begins at `start` seconds in the file. Rotation, mirroring and pixel aspect
    ratio of the file are applied, transparency is laid over white. An `fps` of None takes the average rate of the
    video (25 for folders and stills). Of these frames every `stride`-th is used, at most `max_frames`; `fps` becomes
    theirs. `UserError`, also while reading, for files that are missing, damaged or cut short, with the index of the
    frame.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float | None = None,
        argument: str = "video",
        stride: int = 1,
        max_frames: int | None = None,
    ):
        if fps is not None and not (np.isfinite(fps) and fps > 0):
            raise UserError(f"fps={fps} must be a positive number")
        self.path = Path(path)
        self._source = _open_source(self.path, fps, argument)
        self.size, self.start = self._source.size, self._source.start  # (width, height); seconds
        self.note = self._source.note  # for the user, about how it is read; None: nothing
        times = self._source.times
        interval = self._source.duration / len(times)
        grid = np.arange(len(times)) * interval
        # Time stamps are rounded to the container's clock; half a frame off and more is a truly variable rate.
        self.constant_rate = constant = bool(np.abs(times - grid).max() < interval / 2)
        # The header's rate is exact, the mean interval as exact as the time stamps.
        nominal = self._source.nominal_fps
        average = nominal if constant and abs(nominal * interval - 1) < 0.01 else 1 / interval
        self.fps = float(fps or average)
        # The index in the file of every frame that is read.
        if constant and fps is None:
            self._stored = np.arange(len(times))
        else:
            count = max(1, round(self._source.duration * self.fps))
            shown_at = np.arange(count) / self.fps + 0.1 * min(interval, 1 / self.fps)
            self._stored = np.searchsorted(grid if constant else times, shown_at, side="right") - 1
        self.stored_frames = len(self._stored)  # before `stride` and `max_frames`
        self._stored, self.fps = self._stored[::stride][:max_frames], self.fps / stride

    def __len__(self) -> int:
        return len(self._stored)

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is kept open: every reading opens the file anew."""

    def __iter__(self) -> Iterator[np.ndarray]:
        wanted = 0
        for index, frame in enumerate(self._source.frames()):
            while wanted < len(self) and self._stored[wanted] == index:
                yield frame
                wanted += 1
            if wanted == len(self):
                return

    def __getitem__(self, index: int) -> np.ndarray:
        return self.get([index])[0]

    def part(self, start: int, stop: int) -> "VideoReader":
        """A reader of frames `start` to `stop` - 1, and of the sound from there on."""
        shorter = copy(self)
        shorter._stored = self._stored[start:stop]
        shorter.start = self.start + start / self.fps
        return shorter

    @property
    def indices(self) -> np.ndarray:
        """(n,) int: the frames that are read, as the file counts them."""
        return self._stored

    def get(self, indices: Sequence[int]) -> np.ndarray:
        """Frames by index, in this order, (len(indices), h, w, 3); negative indices count from the end."""
        stored = self._stored[np.asarray(indices, dtype=np.int64).reshape(-1)]
        width, height = self.size
        return np.stack(self._source.pick(stored)) if len(stored) else np.zeros((0, height, width, 3), np.uint8)


def read_video(
    path: str | Path, max_frames: int | None = None, fps: float | None = None, argument: str = "video"
) -> Video:
    """Read a video, or its first `max_frames` frames, into memory. See `VideoReader`."""
    with VideoReader(path, fps=fps, argument=argument, max_frames=max_frames) as reader:
        frames = np.empty((len(reader), *reader.size[::-1], 3), np.uint8)
        for index, frame in enumerate(reader):
            frames[index] = frame
        return Video(frames, reader.fps)


def _open_source(path: Path, fps: float | None, argument: str) -> VideoFile | AnimatedImage | FolderOfFrames:
    if not path.exists():
        raise UserError(f"{argument}={path} does not exist")
    if path.is_dir():
        return FolderOfFrames(path, fps or _STILL_FPS, argument)
    if path.stat().st_size == 0:
        raise UserError(f"{argument}={path} is an empty file")
    if is_animated_image(path):
        return AnimatedImage(path, fps or _STILL_FPS, argument)
    refuse_heic(path, argument)  # FFmpeg would show one tile of it
    return VideoFile(path, argument)


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    fps: float,
    metadata: dict[str, Any] | None = None,
    crf: int = 18,
    sound: VideoReader | None = None,
) -> None:
    """Write frames (h, w, 3) uint8 RGB of one size as H.264 (yuv420p, BT.709), which every player shows.

    Metadata are JSON values in the file's comment, which `video_metadata` gives back. `crf` is x264's quality: 0 is
    the best, 18 hardly differs from the input, 51 is the worst. `sound`: the video whose sound it carries, if it has
    any, from its first frame on and no longer than the frames.
    """
    path = Path(path)
    if path.suffix.lower() not in (".mp4", ".mov", ".mkv"):
        raise UserError(f"{path} cannot be written: give a name that ends in .mp4, .mov, .mkv")
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("frames must hold at least one frame, got none")
    # Absolute: of "take:2.mp4", FFmpeg takes "take" for a protocol.
    with complete_file(path.absolute()) as temporary, av.open(str(temporary), "w") as container:
        if metadata is not None:
            container.metadata["comment"] = json.dumps(metadata, allow_nan=False)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        # Without B-frames: x264's choice of them depends, in small videos, on what freed memory held.
        stream.options = {"crf": str(crf), "bf": "0"}
        # yuv420p needs even sides: the last column or row of an odd one is repeated.
        stream.width, stream.height = (first.shape[1] + 1) // 2 * 2, (first.shape[0] + 1) // 2 * 2
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709, which players assume for large videos
        codec.color_range = 1  # 16 to 235
        with closing(_muxed_sound(container, sound)) as following:
            begins = next(following, np.inf)
            for count, frame in enumerate(chain([first], frames), start=1):
                container.mux(stream.encode(_video_frame(frame, first.shape)))
                while begins < count / fps:
                    begins = next(following, np.inf)
            container.mux(stream.encode())


def _muxed_sound(container: OutputContainer, video: VideoReader | None) -> Iterator[float]:
    """Mux the sound of a video, part by part; before each one, yield the seconds at which it begins.

    Codecs that players take in such files are copied, others become AAC. Where the sound is damaged, it ends.
    """
    if video is None or video.path.is_dir():
        return
    with suppress(FFmpegError, ValueError), av.open(str(video.path.absolute())) as source:
        stream = source.streams.best("audio")
        if stream is None or stream.codec_context is None:
            return
        copied = stream.codec_context.codec.canonical_name in _COPIED_SOUND
        if copied:
            target, parts = container.add_stream_from_template(stream), source.demux(stream)
        else:  # in short parts, where the file has long ones, for they end with the frames
            target, resampler = container.add_stream("aac", 48000), av.AudioResampler("fltp", "stereo", 48000, 1024)
            parts = chain.from_iterable(map(resampler.resample, chain(source.decode(stream), [None])))
        try:
            for part in parts:
                if part.pts is None:
                    continue
                length = (part.duration or 0) * part.time_base if copied else part.samples / part.sample_rate
                begins = float(part.pts * part.time_base) - video.start
                if begins + length < 0:
                    continue
                yield begins
                part.pts -= round(video.start / part.time_base)
                if copied:
                    part.dts, part.stream = part.pts, target
                container.mux(part if copied else target.encode(part))
        finally:
            container.mux([] if copied else target.encode(None))


def video_metadata(path: str | Path) -> dict[str, Any]:
    """Metadata that `write_video` put into a file; of other videos, the container's own tags."""
    try:
        with av.open(str(Path(path).absolute())) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
    except (FFmpegError, OSError, ValueError) as error:
        raise UserError(f"video={path} is not a video that can be read: {error}") from None
    try:
        stored = json.loads(tags.get("comment", ""))
    except json.JSONDecodeError:
        return tags
    return stored if isinstance(stored, dict) else tags


def _video_frame(frame: np.ndarray, shape: tuple[int, ...]) -> av.VideoFrame:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.shape != shape:
        raise ValueError(f"frames must be (h, w, 3) uint8 of one size {shape}, got {frame.dtype} {frame.shape}")
    padded = np.pad(frame, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")
    image = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
    return image.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range=1)
