"""Stored frames of one video file with their true times; `VideoReader` is for everyday use.

Frame i is the i-th image that the decoder hands out, which is the order of display whatever a file's time stamps say.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from PIL import Image

from core.errors import UserError
from data.video.images import to_rgb, wide_colours, wide_to_srgb

# FFmpeg's own decoders of these codecs drop the alpha plane; libvpx's keep it.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Codecs whose packets hold one image each; a packet of others may hold none, such as VP8's hidden references.
_ONE_IMAGE_A_PACKET = ("h264", "hevc", "vp9", "av1", "mjpeg", "prores")
_BESIDE_THE_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent


class _Packet(NamedTuple):
    pts: int | None
    duration: int  # 0: unknown
    is_key: bool


class VideoFile:
    """Stored frames of a video file as RGB images, in one form with `FolderOfFrames`.

    The display matrix and the pixel aspect ratio are applied; an alpha plane is laid over white. `times` counts
    frames that a damaged file announces but lacks; reading them is the error.
    """

    def __init__(self, path: str | Path, argument: str):
        # Absolute: of "take:2.mp4", FFmpeg takes "take" for a protocol.
        self._path, self._name = Path(path).absolute(), f"{argument}={path}"
        with self._open() as container:
            stream, packets, complete = self._choose_stream(container)
            self._index, tick, codec = stream.index, float(stream.time_base), stream.codec_context
            nominal = float(1 / (stream.average_rate or stream.guessed_rate or 25))
            end, announced, aspect = _stated_end(container, stream), stream.frames, stream.sample_aspect_ratio
        self.times, self._count, self._keys = (), None, [0]
        frames = (frame for _, frame in self._from(0))
        first = next(frames, None)
        if first is None or not packets:
            raise UserError(f"{self._name} is a video without frames")
        self._read_size(first, float(aspect or 1))
        self.note = wide_colours(first.color_primaries, first.color_trc)  # for the user, about colours; None: nothing
        keys = _key_frames(packets, codec.reorder_depth, first.pts) if codec.name in _ONE_IMAGE_A_PACKET else None
        stamps = sorted(packet.pts for packet in packets) if keys is not None else [first.pts]
        if keys is None:  # only decoding tells which images the packets hold
            try:
                stamps.extend(frame.pts for frame in frames)  # as far as they come
            except UserError:
                complete = False
        if None in stamps or (np.diff(stamps) <= 0).any():  # FFmpeg's guesses in a file without time stamps
            stamps = (stamps[0] or 0) + np.rint(np.arange(len(stamps)) * nominal / tick)
        ticks, missing = np.array(stamps, np.int64), 0
        last = ({packet.pts: packet.duration for packet in packets}.get(int(ticks[-1]), 0) * tick) or nominal
        late = (end - ticks[-1] * tick - last) / max(nominal, np.ptp(ticks) * tick / len(ticks))  # in frames
        if not complete or (late > 1.5 and not 0 < announced <= len(packets)):  # headers round durations
            # Of the last images, those shown earlier may be lost, where there are B-frames.
            gaps = np.flatnonzero(np.diff(ticks) * tick > 1.5 * nominal) + 1
            ticks = ticks[: min([len(ticks), *gaps[gaps > len(ticks) - 8]])]
            missing = max(1, round((end - ticks[-1] * tick) / nominal) - 1, announced - len(ticks))
        self._ticks, self._count = ticks, len(ticks)  # of the frames that can be read
        self.start = max(0.0, float(ticks[0] * tick))  # seconds in the file at which the first frame begins
        lacking = ticks[-1] * tick + nominal * np.arange(1, missing + 1)
        self.times = np.concatenate([ticks * tick, lacking]) - ticks[0] * tick  # seconds, the first 0
        # Index of the frame that decoding begins at to reach each one.
        self._keys = [0] * len(self.times) if keys is None else np.pad(keys[: len(ticks)], (0, missing)).tolist()
        self.duration, self.nominal_fps = float(self.times[-1]) + last, 1 / nominal  # seconds; by the header

    def _choose_stream(self, container: InputContainer) -> tuple[av.VideoStream, list[_Packet], bool]:
        """The stream that players show, its packets as far as they are whole, and if all are; nothing is decoded."""
        packets = {stream.index: [] for stream in container.streams.video if stream.codec_context is not None}
        if not packets:
            raise UserError(f"{self._name} has no video stream that can be decoded")
        # Transport streams state no length; whole ones consist of packets of 188 bytes, on Blu-ray of 192.
        complete = container.format.name != "mpegts" or not (container.size % 188 and container.size % 192)
        # Packets that follow one another in a file have a few bytes between them. Transport streams say that some are
        # lost also where two files were joined, which leaves no gap in time.
        in_order, end, dts, corrupt = container.format.name in ("matroska,webm", "flv"), 0, {}, False
        with suppress(FFmpegError):  # what cannot be reached is missing
            for packet in (packet for packet in container.demux() if packet.size):
                begin, index, corrupt = packet.pos or 0, packet.stream_index, corrupt or packet.is_corrupt
                gap = (packet.dts or 0) - dts.get(index, np.inf) > 1.5 * (packet.duration or np.inf)
                if 0 < end < begin - 128 or (corrupt and gap):
                    complete = False
                    break
                end, dts[index] = in_order and max(begin, end) + packet.size, packet.dts or 0
                if index in packets and not packet.is_discard:  # as edit lists hide them
                    packets[index].append(_Packet(packet.pts, packet.duration or 0, packet.is_keyframe))

        def merits(index: int) -> tuple[bool, bool, bool, int]:
            stream, flags = container.streams[index], container.streams[index].disposition
            is_default, area = bool(flags & Disposition.default), stream.width * stream.height
            return not flags & _BESIDE_THE_VIDEO, len(packets[index]) > 1, is_default, area

        chosen = max(packets, key=merits)
        return container.streams[chosen], packets[chosen], complete

    def _read_size(self, frame: av.VideoFrame, aspect: float) -> None:
        self._stored_size = (max(1, round(frame.width * aspect)), frame.height)
        matrix = frame.side_data.get("DISPLAYMATRIX")  # x' = a x + c y, y' = b x + d y
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist() if matrix else (1, 0, 0, 0, 1)
        self._transposed = abs(b) + abs(c) > abs(a) + abs(d)
        signs = (b, c) if self._transposed else (d, a)  # of rows, of columns
        self._flips = tuple(slice(None, None, -1 if sign < 0 else 1) for sign in signs)
        self.size = self._stored_size[::-1] if self._transposed else self._stored_size  # (width, height)

    def frames(self) -> Iterator[np.ndarray]:
        return (self._image(frame) for _, frame in self._from(0))

    def pick(self, indices: np.ndarray) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        waiting = sorted(set(indices.tolist()))
        while waiting:
            for index, frame in self._from(waiting[0]):
                if index == waiting[0]:
                    found[waiting.pop(0)] = self._image(frame)
                    # Seeking costs about as much as decoding 12 frames, so nearer frames are reached by decoding on.
                    if not waiting or self._keys[waiting[0]] > index + 12:
                        break
        return [found[index] for index in indices.tolist()]

    def _from(self, first: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Pairs of index and decoded frame from `first` on; `UserError` where damage begins."""
        for key in sorted({0, self._keys[first]}, reverse=True):  # from the start if seeking led astray
            try:
                for index, frame in self._after(key):
                    if index >= first:
                        first = index + 1
                        yield index, frame
                return
            except UserError:
                if key == 0:
                    raise

    def _after(self, key: int) -> Iterator[tuple[int, av.VideoFrame]]:
        index = key - 1
        try:
            with self._open() as container:
                for index, frame in enumerate(islice(self._decoded(container, key), self._count), start=key):
                    if frame.is_corrupt or (key and (index == self._count or frame.pts != self._ticks[index])):
                        raise self._stopped(index)
                    yield index, frame
        except FFmpegError as error:
            raise self._stopped(index + 1, error.strerror) from None
        if index + 1 < len(self.times):
            raise self._stopped(index + 1)

    def _image(self, frame: av.VideoFrame) -> np.ndarray:
        alpha = any(component.is_alpha for component in frame.format.components)
        form = "rgba" if alpha else "rgb48le" if self.note else "rgb24"
        image = frame.reformat(*self._stored_size, form).to_ndarray()  # FFmpeg scales, numpy turns
        if alpha:
            image = to_rgb(Image.fromarray(image), self._name)
        elif self.note:
            image = wide_to_srgb(image, frame.color_primaries, frame.color_trc)
        return np.ascontiguousarray((image.transpose(1, 0, 2) if self._transposed else image)[self._flips])

    def _stopped(self, index: int, reason: str = "the file is damaged or cut short") -> UserError:
        return UserError(f"{self._name}: decoding stopped at frame {index} of {len(self.times)} ({reason})")

    def _open(self) -> InputContainer:
        try:
            return av.open(str(self._path))
        except (FFmpegError, OSError, ValueError) as error:
            raise UserError(f"{self._name} is not a video that can be read: {error.strerror}") from None

    def _decoded(self, container: InputContainer, key: int) -> Iterator[av.VideoFrame]:
        """Frames from a key frame on, or none if seeking led elsewhere."""
        stream = container.streams[self._index]
        alpha = _ALPHA_DECODERS.get(stream.codec_context.name) if stream.metadata.get("alpha_mode") == "1" else None
        context = av.CodecContext.create(alpha, "r") if alpha else stream.codec_context
        context.thread_count = 1  # starting more costs more than they gain in clips of a few seconds
        if key:
            container.seek(int(self._ticks[key]), stream=stream)
        for number, packet in enumerate(container.demux(stream)):
            if key and not number and packet.pts != self._ticks[key]:
                return
            for frame in context.decode(packet if packet.size else None):
                if not key or frame.pts >= self._ticks[key]:  # those before it need what comes before
                    yield frame


def _key_frames(packets: list[_Packet], most_delay: int, first: int | None) -> np.ndarray | None:
    """(frames,) where decoding begins to reach each frame; None unless time stamps are ordered as a decoder orders."""
    stamps = [packet.pts for packet in packets]
    if None in stamps or len(set(stamps)) < len(stamps) or first != min(stamps):
        return None
    order = np.argsort(np.argsort(stamps))  # index of the frame of each packet, in the order of decoding
    delay = int((np.arange(len(order)) - order).max())
    if (delay > 0) != (most_delay > 0) or delay > most_delay:
        return None
    after_all_before = order == np.maximum.accumulate(order)
    starts = np.where(after_all_before & [packet.is_key for packet in packets], order, 0)
    return np.maximum.accumulate(starts[np.argsort(stamps)])


def _stated_end(container: InputContainer, stream: av.VideoStream) -> float:
    """Seconds in the file at which the video ends by its header; 0: not stated."""
    if stream.duration:  # of MP4 files it is the length, of ASF and others the end
        begins = (stream.start_time or 0) if "mp4" in container.format.name else 0
        return float((begins + stream.duration) * stream.time_base)
    if tag := re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", "")):
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0
