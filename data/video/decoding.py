"""Stored frames of one video file with their true times; `VideoReader` is for everyday use."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError

from core.errors import UserError

# FFmpeg's own decoders of these codecs drop the alpha plane; libvpx's keep it.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# File formats with an index of key frames; in others a seek may land anywhere, so they are decoded from the start.
_INDEXED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# Where decord 0.6 gives the same pixels as PyAV does, in an indexed format: it has no AV1, ignores pixel aspect ratios
# and, of AVI files with B-frames, returns other frames than were asked for.
_DECORD_CODECS = ("h264", "hevc", "mpeg4", "vp9")


class VideoFile:
    """Stored frames of a video file as RGB images, in one form with `FolderOfFrames`.

    The file's rotation and pixel aspect ratio are applied; an alpha plane is laid over white. `times` counts frames
    that a truncated file announces but lacks; reading them is the error.
    """

    def __init__(self, path: str | Path, argument: str):
        self._path, self._name = Path(path), f"{argument}={path}"
        with self._opened() as (container, stream):
            self._read_first_frame(container, stream)
        with self._opened() as (container, stream):
            self._read_times(container, stream)
        self._decord = None

    def _read_first_frame(self, container: av.container.InputContainer, stream: av.VideoStream) -> None:
        codec = stream.codec_context.name
        # To use in place of FFmpeg's own.
        self._decoder = _ALPHA_DECODERS.get(codec) if stream.metadata.get("alpha_mode") == "1" else None
        try:
            frame = next(self._decoded(container, stream), None)
        except FFmpegError as error:
            raise UserError(f"{self._name}: decoding stopped at frame 0 ({error.strerror})") from None
        if frame is None:
            raise UserError(f"{self._name} is a video without frames")
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        self._unturned_size = (max(1, round(frame.width * aspect)), frame.height)
        self._quarter_turns = round(frame.rotation / 90) % 4  # counter-clockwise, from the decoded image
        self.size = self._unturned_size[::-1] if self._quarter_turns % 2 else self._unturned_size  # (width, height)
        self._indexed_format = container.format.name in _INDEXED_FORMATS
        self._decord_may_read = (
            self._indexed_format
            and codec in _DECORD_CODECS
            and frame.format.name == "yuv420p"
            and self._decoder is None
            and self.size == (frame.width, frame.height)
            and self._quarter_turns == 0
        )

    def _read_times(self, container: av.container.InputContainer, stream: av.VideoStream) -> None:
        """Read the times of the frames from the packets alone, without decoding."""
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        tick = float(stream.time_base)
        nominal = float(1 / (stream.average_rate or stream.guessed_rate or 25))
        stamps = [packet.pts for packet in packets]
        if None in stamps or len(set(stamps)) < len(stamps):
            ticks, missing = None, 0  # the file gives no presentation time stamps
            duration, times = len(packets) * nominal, np.arange(len(packets)) * nominal
        else:
            last = max(packets, key=lambda packet: packet.pts)
            ticks = np.sort(np.array(stamps, dtype=np.int64))
            times = (ticks - ticks[0]) * tick
            last_duration = last.duration * tick if last.duration else nominal
            duration = float(times[-1]) + last_duration
            missing = _missing_frames(container, stream, len(packets), duration, nominal)
            times = np.concatenate([times, times[-1] + nominal * np.arange(1, missing + 1)])
        self._ticks = ticks  # (count,) presentation time stamps in order, or None
        self._count = len(packets)  # frames in the file; fewer than `times` when it is cut short
        self.times = times  # (frames,) seconds at which each frame begins, the first at 0
        self.duration = duration + missing * nominal  # seconds
        self.nominal_fps = 1 / nominal  # by the header
        self._decord_may_read = self._decord_may_read and ticks is not None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_decord": None}  # an open decoder cannot travel to another process

    def close(self) -> None:
        self._decord = None

    def frames(self) -> Iterator[np.ndarray]:
        expected, image = 0, None
        for index, frame in self._decode_from(0):
            previous, image = image, self._image(frame)
            for _ in range(expected, index):  # a packet without an image leaves the one before it on display
                yield image if previous is None else previous
            yield image
            expected = index + 1
        if expected < len(self.times):
            raise self._stopped(expected)

    def pick(self, indices: np.ndarray) -> list[np.ndarray]:
        if (indices >= self._count).any():
            raise self._stopped(self._count)
        frames = self._pick_with_decord(indices) if self._decord_may_read else None
        return self._pick_by_seeking(indices) if frames is None else frames

    def _pick_with_decord(self, indices: np.ndarray) -> list[np.ndarray] | None:
        """Frames decoded by decord, which is faster at random access than seeking; None when it cannot."""
        try:
            import decord

            decord.logging.set_level(decord.logging.QUIET)
        except ImportError:
            self._decord_may_read = False
            return None
        try:
            if self._decord is None:
                self._decord = decord.VideoReader(str(self._path), num_threads=1)
            if len(self._decord) == self._count:
                return list(self._decord.get_batch(indices.tolist()).asnumpy())
        except (RuntimeError, decord.DECORDError):
            pass  # damaged: seeking finds out where
        self._decord_may_read = False
        return None

    def _pick_by_seeking(self, indices: np.ndarray) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        waiting = sorted(set(indices.tolist()))
        while waiting:
            for index, frame in self._decode_from(waiting[0]):
                while waiting and waiting[0] <= index:
                    found[waiting.pop(0)] = self._image(frame)
                # Seeking costs about as much as decoding 12 frames, so nearer frames are reached by decoding on.
                if not waiting or waiting[0] > index + 12:
                    break
            else:
                if waiting:
                    raise self._stopped(waiting[0])
        return [found[index] for index in indices.tolist()]

    def _decode_from(self, first: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Pairs of index and decoded frame, from `first` on."""
        seeking = first > 0 and self._ticks is not None and self._indexed_format
        index = -1
        try:
            for index, frame in self._indexed(seek_to=first if seeking else None):
                if frame.is_corrupt:
                    raise self._stopped(index)
                if index >= first:
                    yield index, frame
        except FFmpegError as error:
            raise self._stopped(max(index + 1, first), error.strerror) from None

    def _indexed(self, seek_to: int | None) -> Iterator[tuple[int, av.VideoFrame]]:
        ticks = self._ticks
        with self._opened() as (container, stream):
            if seek_to is not None:
                container.seek(int(ticks[seek_to]), stream=stream, backward=True)
            for position, frame in enumerate(self._decoded(container, stream)):
                index = position if ticks is None else int(np.searchsorted(ticks, frame.pts, side="right")) - 1
                if index >= 0:  # frames that an edit list hides come before the first
                    yield index, frame

    def _image(self, frame: av.VideoFrame) -> np.ndarray:
        width, height = self._unturned_size  # FFmpeg scales, numpy turns
        if any(component.is_alpha for component in frame.format.components):
            rgba = frame.reformat(width=width, height=height, format="rgba").to_ndarray().astype(np.uint16)
            colour, alpha = rgba[..., :3], rgba[..., 3:]
            image = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        else:
            image = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
        return np.ascontiguousarray(np.rot90(image, self._quarter_turns))

    def _stopped(self, index: int, reason: str = "the file is damaged or cut short") -> UserError:
        return UserError(f"{self._name}: decoding stopped at frame {index} of {len(self.times)} ({reason})")

    @contextmanager
    def _opened(self) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
        try:
            container = av.open(str(self._path))
        except (FFmpegError, OSError, ValueError) as error:
            raise UserError(f"{self._name} is not a video that can be read: {error.strerror}") from None
        with container:
            if not container.streams.video:
                raise UserError(f"{self._name} has no video stream")
            yield container, container.streams.video[0]

    def _decoded(self, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
        if self._decoder is None:
            stream.codec_context.thread_count = 1  # starting more costs more than they gain in clips of a few seconds
            yield from container.decode(stream)
            return
        context = av.CodecContext.create(self._decoder, "r")
        for packet in container.demux(stream):
            yield from context.decode(packet if packet.size else None)


def _missing_frames(
    container: av.container.InputContainer, stream: av.VideoStream, count: int, duration: float, nominal: float
) -> int:
    """Frames that a file that is cut short lacks, by the duration that its header states.

    An edit list may hide stored frames, so a smaller count of frames alone does not mean that any is missing.
    """
    if stream.duration:
        stated = float(stream.duration * stream.time_base)
    elif "DURATION" in stream.metadata:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        stated = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    elif container.duration and len(container.streams) == 1:
        stated = container.duration / 1e6
    else:
        return 0
    lacking = round((stated - duration) / nominal)
    if lacking < 2:
        return 0
    return max(0, stream.frames - count) if stream.frames else lacking
