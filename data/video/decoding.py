"""Stored frames of one video file with their true times; `VideoReader` is for everyday use.

Frame i is the i-th image that the decoder hands out, which is the order of display whatever a file's time stamps say.
The stamps give times; where they agree with what is decoded, they also serve to seek.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition

from core.errors import UserError
from data.video.images import wide_colours, wide_to_srgb

# FFmpeg's own decoders of these codecs drop the alpha plane; libvpx's keep it.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Codecs whose packets hold one image each; a packet of others may hold none, such as VP8's hidden references.
_ONE_IMAGE_A_PACKET = ("h264", "hevc", "vp9", "av1", "mjpeg", "prores")
_BESIDE_THE_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent


class _Packet(NamedTuple):
    pts: int | None
    duration: int  # 0: unknown
    is_key: bool
    is_hidden: bool  # by an edit list
    is_corrupt: bool
    unclaimed: int  # bytes of the file before it that belong to no packet


class VideoFile:
    """Stored frames of a video file as RGB images, in one form with `FolderOfFrames`.

    The display matrix and the pixel aspect ratio are applied; an alpha plane is laid over white. `times` counts
    frames that a damaged file announces but lacks; reading them is the error.
    """

    def __init__(self, path: str | Path, argument: str):
        # Absolute: of "take:2.mp4", FFmpeg takes "take" for a protocol.
        self._path, self._name = Path(path).absolute(), f"{argument}={path}"
        with self._open() as container:
            stream, packets = self._choose_stream(container)
            self._index, tick = stream.index, float(stream.time_base)
            nominal = float(1 / (stream.average_rate or stream.guessed_rate or 25))
            stated, announced = _stated_end(container, stream), stream.frames
        until = _last_before_a_hole(packets, nominal / tick)
        shown = [packet for packet in packets if not packet.is_hidden and (packet.pts or 0) <= until]
        stamps, complete = [packet.pts for packet in shown], until == np.inf
        self._keys, self.times, self._count = self._read_first_frame(shown), (), None
        made_up = self._keys is None
        if made_up:  # only decoding tells which images the packets hold
            stamps, self._keys = [], np.zeros(1, np.int64)
            try:
                for _, frame in self._from(0):
                    stamps.append(frame.pts)
            except UserError:
                complete = False
            stamps = [stamp for stamp in stamps if (stamp or 0) <= until]
        if not stamps:
            raise self._stopped(0)
        self._count = len(stamps)  # frames that can be read
        grid, timed = np.arange(len(stamps)) * nominal / tick, None not in stamps
        ticks = np.sort(np.array(stamps if timed else grid.round(), dtype=np.int64))
        # Where a file has no time stamps they are made up, some of them a frame or two late or twice the same.
        if (np.diff(ticks) <= 0).any() or (made_up and np.abs(ticks - ticks[0] - grid).max() < 2 * nominal / tick):
            ticks = ticks[0] + grid.round().astype(np.int64)
        self._ticks, times = ticks, (ticks - ticks[0]) * tick
        self.start = max(0.0, float(ticks[0] * tick))  # seconds in the file at which the first frame begins
        last = max(shown, key=lambda packet: packet.pts or 0).duration if timed else 0
        duration = float(times[-1]) + (last * tick or nominal)
        end = max(stated or 0.0, 0.0 if complete else max(packet.pts or 0 for packet in packets) * tick + nominal)
        missing = round((end - self.start - duration) / max(nominal, duration / len(times)))
        if complete and announced:  # of which an edit list may hide some
            missing = 0 if missing < 2 else max(0, announced - len(packets))
        missing = max(1, missing) if not complete else missing if missing > 1 else 0
        self.times = np.concatenate([times, times[-1] + nominal * np.arange(1, missing + 1)])  # seconds, the first 0
        self.duration = duration + missing * nominal  # seconds
        self.nominal_fps = 1 / nominal  # by the header

    def _choose_stream(self, container: InputContainer) -> tuple[av.VideoStream, list[_Packet]]:
        """The stream that players show and its packets in the order of decoding; nothing is decoded."""
        packets: dict[int, list[_Packet]] = {stream.index: [] for stream in container.streams.video}
        unclaimed, end, stored_in_order = 0, 0, container.format.name in ("matroska,webm", "flv")
        with suppress(FFmpegError):  # what cannot be reached is missing
            for packet in container.demux():
                if packet.size and stored_in_order:
                    unclaimed += max(0, (packet.pos or 0) - end)
                    end = (packet.pos or 0) + packet.size
                if packet.size and packet.stream_index in packets:
                    flags = packet.is_keyframe, packet.is_discard, packet.is_corrupt
                    packets[packet.stream_index].append(_Packet(packet.pts, packet.duration or 0, *flags, unclaimed))

        def merits(stream: av.VideoStream) -> tuple[bool, bool, bool, int]:
            moves, beside = len(packets[stream.index]) > 1, bool(stream.disposition & _BESIDE_THE_VIDEO)
            return not beside, moves, bool(stream.disposition & Disposition.default), stream.width * stream.height

        known = [stream for stream in container.streams.video if stream.codec_context is not None]
        if not known:
            raise UserError(f"{self._name} has no video stream that can be decoded")
        chosen = max(known, key=merits)
        return chosen, packets[chosen.index]

    def _read_first_frame(self, packets: list[_Packet]) -> np.ndarray | None:
        """Read size and orientation; return the indices of frames that decoding may begin at, the first of them 0.

        None where packets do not tell which images will come. Time stamps are believed when they are ordered as the
        decoder orders images, with B-frames or without.
        """
        try:
            with self._open() as container:
                stream, frame = container.streams[self._index], next(self._decoded(container), None)
                codec, most_delay = stream.codec_context.name, stream.codec_context.reorder_depth
                aspect = Fraction(stream.sample_aspect_ratio or 1)
        except FFmpegError as error:
            raise UserError(f"{self._name}: decoding stopped at frame 0 ({error.strerror})") from None
        if frame is None or not packets:
            raise UserError(f"{self._name} is a video without frames")
        self.note = wide_colours(frame.color_primaries, frame.color_trc)  # for the user, about colours; None: nothing
        self._stored_size = (max(1, round(frame.width * aspect)), frame.height)
        matrix = frame.side_data.get("DISPLAYMATRIX")  # x' = a x + c y, y' = b x + d y
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist() if matrix else (1, 0, 0, 0, 1)
        self._transposed = abs(b) + abs(c) > abs(a) + abs(d)
        x, y = (c, b) if self._transposed else (a, d)
        self._flips = (slice(None, None, -1 if y < 0 else 1), slice(None, None, -1 if x < 0 else 1))  # rows, columns
        self.size = self._stored_size[::-1] if self._transposed else self._stored_size  # (width, height)

        stamps = [packet.pts for packet in packets]
        if codec not in _ONE_IMAGE_A_PACKET or None in stamps or len(set(stamps)) < len(stamps):
            return None
        order = np.argsort(np.argsort(stamps))  # index of the frame of each packet, in the order of decoding
        delay = int((np.arange(len(order)) - order).max())
        if (delay > 0) != (most_delay > 0) or delay > most_delay or frame.pts != min(stamps):
            return None
        after_all_before = order == np.maximum.accumulate(order)
        return np.union1d([0], order[after_all_before & [packet.is_key for packet in packets]])

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
                    if not waiting or self._key_before(waiting[0]) > index + 12:
                        break
        return [found[index] for index in indices.tolist()]

    def _from(self, first: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Pairs of index and decoded frame from `first` on; `UserError` where damage begins."""
        key = self._key_before(first)
        for index, frame in self._after_seeking(key) if key else ():
            if index >= first:
                first = index + 1
                yield index, frame
        if first == self._count == len(self.times):
            return
        index = -1
        try:  # only decoding from the start tells damage from a seek that led astray
            with self._open() as container:
                for index, frame in enumerate(islice(self._decoded(container), self._count)):
                    if frame.is_corrupt:
                        raise self._stopped(index)
                    if index >= first:
                        yield index, frame
        except FFmpegError as error:
            raise self._stopped(index + 1, error.strerror) from None
        if index + 1 < len(self.times):
            raise self._stopped(index + 1)

    def _after_seeking(self, key: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Pairs of index and frame from a key frame on, as long as the time stamps are those that must come."""
        with suppress(FFmpegError), self._open() as container:
            container.seek(int(self._ticks[key]), stream=container.streams[self._index])
            packets = container.demux(container.streams[self._index])
            landed = next(packets)
            index = key + 1 if landed.pts is None else int(np.searchsorted(self._ticks, landed.pts))
            if index > key or index not in self._keys or self._ticks[index] != landed.pts:
                return
            for frame in self._decoded(container, chain([landed], packets)):
                if frame.pts is not None and frame.pts < landed.pts:
                    continue  # shown before the key frame, and in need of what comes before
                if frame.is_corrupt or index == len(self._ticks) or frame.pts != self._ticks[index]:
                    return
                yield index, frame
                index += 1

    def _key_before(self, index: int) -> int:
        return int(self._keys[np.searchsorted(self._keys, index, side="right") - 1])

    def _image(self, frame: av.VideoFrame) -> np.ndarray:
        width, height = self._stored_size  # FFmpeg scales, numpy turns
        if any(component.is_alpha for component in frame.format.components):
            rgba = frame.reformat(width=width, height=height, format="rgba").to_ndarray().astype(np.uint16)
            colour, alpha = rgba[..., :3], rgba[..., 3:]
            image = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        elif self.note:
            exact = frame.reformat(width=width, height=height, format="rgb48le").to_ndarray()
            image = wide_to_srgb(exact, frame.color_primaries, frame.color_trc)
        else:
            image = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
        return np.ascontiguousarray((image.transpose(1, 0, 2) if self._transposed else image)[self._flips])

    def _stopped(self, index: int, reason: str = "the file is damaged or cut short") -> UserError:
        return UserError(f"{self._name}: decoding stopped at frame {index} of {len(self.times)} ({reason})")

    def _open(self) -> InputContainer:
        try:
            return av.open(str(self._path))
        except (FFmpegError, OSError, ValueError) as error:
            raise UserError(f"{self._name} is not a video that can be read: {error.strerror}") from None

    def _decoded(self, container: InputContainer, packets: Iterable[av.Packet] = ()) -> Iterator[av.VideoFrame]:
        stream = container.streams[self._index]
        alpha = _ALPHA_DECODERS.get(stream.codec_context.name) if stream.metadata.get("alpha_mode") == "1" else None
        context = av.CodecContext.create(alpha, "r") if alpha else stream.codec_context
        context.thread_count = 1  # starting more costs more than they gain in clips of a few seconds
        for packet in packets or container.demux(stream):
            if packet.size:
                yield from context.decode(packet)
        yield from context.decode(None)


def _last_before_a_hole(packets: list[_Packet], interval: float) -> float:
    """Time stamp of the last frame before a gap where the file also has bytes of no packet; infinite without any."""
    stamps, bytes_before = np.array([packet.pts or 0 for packet in packets]), [packet.unclaimed for packet in packets]
    order, bytes_before = np.argsort(stamps), np.diff(bytes_before, prepend=bytes_before[:1])
    lost = (bytes_before > 8 * np.median([25, *bytes_before])) | [packet.is_corrupt for packet in packets]
    for gap in np.flatnonzero(np.diff(stamps[order]) > 1.5 * interval):
        then = order[gap + 1]  # stored a few packets after the hole where B-frames are
        if lost[max(0, then - 8) : then + 8].any():
            return stamps[order[gap]]
    return np.inf


def _stated_end(container: InputContainer, stream: av.VideoStream) -> float | None:
    """Seconds in the file at which the video ends by its header, or by tags that hold that or, less, the length."""
    if stream.duration:
        # Of MP4 files it is the length, of ASF and others the end.
        begins = (stream.start_time or 0) if "mp4" in container.format.name else 0
        return float((begins + stream.duration) * stream.time_base)
    ends = [container.duration / 1e6] if container.duration and len(container.streams) == 1 else []
    tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
    if tag and "matroska" in container.format.name:
        ends.append(int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3]))
    return min(ends, default=None)
