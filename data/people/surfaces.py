"""Surface maps: which point of the body, or of what it wears, every pixel of a rendered image shows.

A point of the surface is named by where it lies on the person at rest, in metres, so two images of one person say
exactly which of their pixels show the same point; keypoints say that of seventeen.
"""

from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from core.files import complete_folder
from data.clips.rendered import RenderedPeople
from data.people.bodies import Person
from data.people.rasterizer import EMPTY_DEPTH, rasterize
from data.people.renderer import Camera, Figure, project_vertices
from data.people.skeleton import Pose

FOLDER = "surfaces"  # beside the arrays of a clip cache
SHARE = 2  # pixels of an image's side per place of its map


def render_surface(person: Person, pose: Pose, camera: Camera, size: tuple[int, int]) -> np.ndarray:
    """Surface map of one person, (h, w, 3) float32: the point at rest in metres; NaN off the person.

    Args:
        camera: of the image; it counts in shares of the image, so a map of any size belongs to it.
        size: (width, height) of the map.
    """
    width, height = size
    screen, _ = project_vertices(Figure(person, pose, camera), size, factor=1)
    # What the rasterizer interpolates between vertices is brightness. On a texture of ones it writes just that.
    ones = np.ones((len(person.texture), 1, 1, 3), np.uint8)
    surface = np.empty((height, width, 3), np.float32)
    for axis in range(3):
        value = np.empty((height, width, 3), np.float32)
        depth = np.full((height, width), EMPTY_DEPTH, np.float32)
        along = np.ascontiguousarray(person.vertices[:, axis], np.float32)
        rasterize(screen, along, person.faces, person.corner_uv, person.parts, person.two_sided, ones, value, depth)
        surface[..., axis] = np.where(depth < EMPTY_DEPTH, value[..., 0], np.nan)
    return surface


class SurfaceMaps(Dataset):
    """Surface maps of the clips of `RenderedPeople`, (1 + frames, h, w, 3) float16: the reference's first."""

    def __init__(self, clips: RenderedPeople) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> np.ndarray:
        scene = self.clips.scene(index)
        size = (scene.size[0] // SHARE, scene.size[1] // SHARE)
        poses = [scene.reference_pose, *scene.poses]
        return np.stack([render_surface(scene.person, pose, scene.camera, size) for pose in poses]).astype(np.float16)


def ensure_surfaces(cache: Path, clips: RenderedPeople, workers: int) -> Path:
    """Make the surface maps of all clips of a cache, unless it has been done; the file that holds them.

    Args:
        cache: folder of a `data.clip_cache` that was made of `clips`.
        workers: loader processes.
    """
    folder = cache / FOLDER
    if not folder.is_dir():
        maps = SurfaceMaps(clips)
        with complete_folder(folder) as temporary:
            shape = (len(maps), *maps[0].shape)
            array = np.lib.format.open_memmap(temporary / "surfaces.npy", "w+", np.float16, shape)
            loader = DataLoader(maps, batch_size=None, num_workers=workers)
            for number, item in enumerate(tqdm(loader, desc="surface maps", total=len(maps))):
                array[number] = item
            array.flush()
    return folder / "surfaces.npy"
