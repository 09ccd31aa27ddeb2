"""A rendered reference and driving clip written as a user would have them, and poses of a standing person."""

from pathlib import Path

import numpy as np
from PIL import Image

from data.clips.rendered import RenderedPeople
from data.poses.poses import Poses
from data.video.files import write_video

# The keypoints of a standing person, 100 pixels high.
STANDING = np.array(
    [[50, 10], [52, 8], [48, 8], [55, 9], [45, 9], [62, 25], [38, 25], [66, 40], [34, 40], [68, 54], [32, 54]]
    + [[56, 55], [44, 55], [57, 75], [43, 75], [58, 94], [42, 94]],
    np.float64,
)


def save_rendered_pair(folder: Path, size: int = 96, frames: int = 6, seed: int = 1) -> None:
    """Write reference.png, driving.mp4, exact poses (.npz) and masks of a held-out person."""
    item = RenderedPeople(size=(size, size), num_frames=frames, stride=3, split="heldout", seed=seed, length=1)[0]

    def images(tensor):
        return ((tensor.movedim(0, -1) + 1) * 127.5).round().byte().numpy()

    Image.fromarray(images(item["reference"])).save(folder / "reference.png")
    write_video(folder / "driving.mp4", images(item["frames"]), 8.0)
    for name, points in (("reference", item["reference_keypoints"][None]), ("driving", item["keypoints"])):
        points = points.numpy()[:, None]
        Poses(points[..., :2], points[..., 2], (size, size), 8.0).save(folder / f"{name}.npz")
    Image.fromarray((item["reference_mask"][0].numpy() * 255).astype(np.uint8)).save(folder / "reference_mask.png")
    (folder / "driving_masks").mkdir()
    for number, mask in enumerate(item["masks"][0].numpy()):
        Image.fromarray((mask * 255).astype(np.uint8)).save(folder / "driving_masks" / f"{number:06d}.png")


def given(folder: Path) -> list[str]:
    """What `save_rendered_pair` wrote, as arguments of `infer.py`."""
    return [
        f"reference={folder / 'reference.png'}",
        f"driving={folder / 'driving.mp4'}",
        f"reference_poses={folder / 'reference.npz'}",
        f"driving_poses={folder / 'driving.npz'}",
        f"reference_mask={folder / 'reference_mask.png'}",
        f"driving_masks={folder / 'driving_masks'}",
    ]


def posed(transforms: list[tuple[float, float]]) -> Poses:
    """A standing person (angle in degrees, scale) frame by frame, about the pelvis."""
    pelvis = STANDING[11:13].mean(0)
    frames = []
    for angle, scale in transforms:
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        frames.append((STANDING - pelvis) @ (scale * np.array([[c, s], [-s, c]])) + pelvis)
    return Poses(np.stack(frames)[:, None], np.ones((len(frames), 1, 17)), (100, 100), 8.0)
