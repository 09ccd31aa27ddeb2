"""Videos written as H.264 with metadata, and the metadata read again."""

import json
from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from core.errors import UserError
from core.files import complete_file

_SUFFIXES = (".mp4", ".mov", ".mkv")


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    fps: float,
    metadata: dict[str, Any] | None = None,
    crf: int = 18,
) -> None:
    """Write frames as H.264 (yuv420p, BT.709), which every player shows; the file appears when it is complete.

    Args:
        path: .mp4, .mov or .mkv.
        frames: (h, w, 3) uint8 RGB each, all of one size; any iterable, read once.
        metadata: JSON values, kept in the file's comment; `video_metadata` gives them back.
        crf: x264's quality: 0 is the best, 18 hardly differs from the input, 51 is the worst.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{path} cannot be written: give a name that ends in {', '.join(_SUFFIXES)}")
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("frames must hold at least one frame, got none")
    with complete_file(path) as temporary, av.open(str(temporary), "w") as container:
        if metadata is not None:
            container.metadata["comment"] = json.dumps(metadata, allow_nan=False)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.options = {"crf": str(crf)}
        # yuv420p needs even sides: the last column or row of an odd one is repeated.
        stream.width, stream.height = (first.shape[1] + 1) // 2 * 2, (first.shape[0] + 1) // 2 * 2
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709, which players assume for large videos
        codec.color_range = 1  # 16 to 235
        for frame in chain([first], frames):
            container.mux(stream.encode(_video_frame(frame, first.shape)))
        container.mux(stream.encode())


def video_metadata(path: str | Path, argument: str = "video") -> dict[str, Any]:
    """Metadata that `write_video` put into a file; of other videos, the container's own tags."""
    try:
        with av.open(str(path)) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
    except (FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{argument}={path} is not a video that can be read: {error}") from None
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
