"""Small data sets of filmed people in the layouts of other projects, and a pose estimator that needs no networks.

People are rendered, so keypoints and masks are exact; where only files matter, a bright figure moves over dark ground.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from data.clips.rendered import RenderedPeople
from data.people.scenes import CameraRanges
from data.poses.person import PersonEstimate
from data.poses.poses import Poses
from data.video.files import write_video

FRAME = (64, 96)  # upright, as phones film
# The 17 COCO points within the figure's box, as parts of its sides.
_PLACES = np.array(
    [(0.5, 0.1), (0.45, 0.07), (0.55, 0.07), (0.4, 0.1), (0.6, 0.1), (0.3, 0.25), (0.7, 0.25), (0.2, 0.4)]
    + [(0.8, 0.4), (0.1, 0.55), (0.9, 0.55), (0.35, 0.55), (0.65, 0.55), (0.35, 0.75), (0.65, 0.75)]
    + [(0.35, 0.97), (0.65, 0.97)]
)


@dataclass(frozen=True)
class Film:
    """Frames (n, h, w, 3) uint8, masks (n, h, w) bool, and the poses."""

    frames: np.ndarray
    masks: np.ndarray
    poses: Poses


@cache
def rendered_film(number: int = 0, frames: int = 6, size: tuple[int, int] = FRAME) -> Film:
    """A rendered person who is wholly inside the image."""
    cameras = CameraRanges(height=(0.5, 0.6), close_ups=0.0)
    item = RenderedPeople(size=size, num_frames=frames, stride=2, length=9, cameras=cameras)[number]
    images = ((item["frames"].permute(1, 2, 3, 0) + 1) * 127.5).round().numpy().astype(np.uint8)
    keypoints = item["keypoints"].numpy()[:, None]
    return Film(images, item["masks"][0].numpy() > 0, Poses(keypoints[..., :2], keypoints[..., 2], size, 25.0))


def figure_film(
    frames: int = 6, size: tuple[int, int] = FRAME, box: tuple[int, int, int, int] = (20, 30, 24, 48)
) -> Film:
    """A bright figure that moves to the right by a pixel a frame; `box` is x, y, width, height in the first frame."""
    left, top, width, height = box
    images = np.full((frames, size[1], size[0], 3), 20, np.uint8)
    masks = np.zeros(images.shape[:3], bool)
    for number in range(frames):
        masks[number, top : top + height, left + number : left + number + width] = True
        images[number][masks[number]] = 230
    keypoints = _PLACES * [width - 1, height - 1] + [left, top]
    moved = keypoints + np.arange(frames)[:, None, None] * [1, 0]
    poses = Poses(moved[:, None], np.ones((frames, 1, 17)), size, 25.0)
    return Film(images, masks, poses)


class FigureEstimator:
    """Finds the figures of `figure_film`: everything bright is the one person."""

    def __init__(self) -> None:
        self.frames = 0

    def image(self, image: np.ndarray, max_persons: int = 1) -> list[PersonEstimate]:
        self.frames += 1
        mask = image.mean(axis=-1) > 128
        if not mask.any():
            return []
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        low, high = np.array([columns[0], rows[0]]), np.array([columns[-1], rows[-1]])
        keypoints = (low + _PLACES * (high - low)).astype(np.float32)
        return [PersonEstimate(keypoints, np.ones(17, np.float32), mask, 1.0)]

    def video(self, frames: Iterable[np.ndarray], max_persons: int = 1) -> Iterator[list[PersonEstimate | None]]:
        for frame in frames:
            yield (self.image(frame) + [None] * max_persons)[:max_persons]


def save_video(path: Path, film: Film, fps: float = 25.0) -> Path:
    """Write the frames as a video file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, film.frames, fps, crf=10)
    return path


def save_frames(folder: Path, images: np.ndarray, pattern: str = "{:04d}.png", start: int = 1) -> Path:
    """Write images or masks as numbered files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        image = image.astype(np.uint8) * 255 if image.dtype == bool else image
        Image.fromarray(image).save(folder / pattern.format(start + number))
    return folder


def save_prepared_videos(root: Path, films: dict[str, Film]) -> Path:
    """Videos with pose files and masks beside them: what needs no estimation to be prepared."""
    for name, film in films.items():
        save_video(root / f"{name}.mp4", film)
        film.poses.save(root / f"{name}.npz")
        save_frames(root / f"{name}_masks", film.masks, "{:06d}.png", 0)
    return root


def damage(video: Path, part: float = 1.0) -> None:
    """Overwrite the last part of an .mp4 file's coded images with zeros; its header stays whole."""
    content = video.read_bytes()
    start, end = content.find(b"mdat") + 44, content.find(b"moov") - 4
    start = end - round(part * (end - start))
    video.write_bytes(content[:start] + bytes(end - start) + content[end:])
