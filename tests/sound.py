"""Videos with sound, and what is heard in them."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATES = {"libopus": 48000, "pcm_u8": 22000}  # samples a second; 44100 of others


def write_clip_with_a_beep(
    path: Path, frames: Sequence[np.ndarray], fps: int, video_codec: str, sound_codec: str, begins: int = 0
) -> None:
    """Frames from the second `begins` on, with a beep from 1.0 to 1.1 seconds."""
    rate = RATES.get(sound_codec, 44100)
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream(video_codec, rate=fps), container.add_stream(sound_codec, rate)
        video.width, video.height, video.pix_fmt = *frames[0].shape[1::-1], "yuv420p"
        sound.codec_context.layout = "mono"
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image)
            frame.pts, frame.time_base = number + fps * begins, Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        seconds = np.arange(len(frames) * rate // fps) / rate
        beep = np.sin(2 * np.pi * 440 * seconds) * ((seconds >= 1) & (seconds < 1.1))
        heard = av.AudioFrame.from_ndarray(beep.astype(np.float32)[None], format="fltp", layout="mono")
        heard.sample_rate, heard.pts, heard.time_base = rate, begins * rate, Fraction(1, rate)
        container.mux(sound.encode(heard))
        container.mux(sound.encode(None))


def loud(path: Path) -> tuple[str, float, float, float]:
    """Codec, seconds at which the sound is loud first and last, and those at which it ends."""
    with av.open(str(path)) as container:
        stream = container.streams.best("audio")
        codec, parts = stream.codec_context.codec.canonical_name, list(container.decode(stream))
    seconds = np.concatenate(
        [float(part.pts * part.time_base) + np.arange(part.samples) / part.rate for part in parts]
    )
    level = np.concatenate([np.abs(part.to_ndarray().astype(float)).max(0) for part in parts])
    heard = seconds[level > 0.3 * level.max()]
    return codec, heard[0], heard[-1], seconds[-1]
