"""Pose images of filmed clips that another tool made, such as DensePose, in place of drawn figures.

A folder holds one for each clip, under the clip's name: a video `name.mp4` (any format that can be read) or a folder
`name/` of images, with an image for each frame and of the video's shape.
"""

from pathlib import Path

import cv2
import numpy as np
import torch

from core.errors import UserError
from data.clips.rendered import pixel_tensor
from data.preparation.layouts import VIDEO_SUFFIXES
from data.preparation.manifest import Clip
from data.video.images import list_images
from data.video.reading import VideoReader


def pose_images_of(folder: Path, clip: Clip) -> Path | None:
    """The video or folder with the pose images of a clip; None: there is none."""
    path = folder / clip.name
    if path.is_dir() and list_images(path):
        return path
    return next((file for ext in VIDEO_SUFFIXES if (file := folder / f"{clip.name}{ext}").is_file()), None)


def read_pose_images(
    source: Path, clip: Clip, frames: list[int], matrix: np.ndarray, size: tuple[int, int]
) -> torch.Tensor:
    """Pose images of some frames, cut as the clip's own images are, (3, f, H, W) in [0, 1].

    Pixels are taken, not averaged: they may hold coordinates on the body. What lies beyond the image is 0.

    Args:
        source: of `pose_images_of`.
        matrix: (3, 3), pixels of the clip -> pixels of the result; see `data.framing`.
        size: (width, height) of the result.

    Raises:
        UserError: another number of images than frames, or images of another shape.
    """
    with VideoReader(source, clip.fps if source.is_dir() else None, "pose_images") as reader:
        width, height = reader.size
        if len(reader) != clip.frames or abs(width / height * clip.size[1] / clip.size[0] - 1) > 0.02:
            raise UserError(
                f"{source} has {len(reader)} pose images of {width}x{height}, {clip.name} has {clip.frames} frames "
                f"of {clip.size[0]}x{clip.size[1]}"
            )
        images = reader.get(frames)
    resize = np.diag([clip.size[0] / width, clip.size[1] / height, 1.0])
    resize[:2, 2] = (resize[[0, 1], [0, 1]] - 1) / 2
    return pixel_tensor(
        [cv2.warpAffine(image, (matrix @ resize)[:2], size, flags=cv2.INTER_NEAREST) for image in images]
    ).div_(255)
