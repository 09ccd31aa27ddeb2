"""Sample inputs that the demo animates, made anew.

    python -m data.people.samples [output=assets/samples] [seed=5]

rendered.png   a held-out person, turned and small, at which animators fail
dance.mp4      another held-out person dances: the driving clip
photo.jpg      astronaut Eileen Collins, NASA, public domain, as scikit-image ships it
"""

from core.config import check_first
from data.config import SamplesConfig

check_first(__name__, SamplesConfig, __doc__)


from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.data import astronaut

from core.config import load_config
from core.errors import run_command
from core.files import complete_file, output_folder
from data.people.bodies import build_person, load_people, neutral_pose, random_identity
from data.people.motion import random_motion
from data.people.renderer import Camera, render_person
from data.people.scenes import random_background
from data.video.files import write_video

FRAMES, FPS = 16, 8.0
REFERENCE_SIZE, CLIP_SIZE = (384, 384), (256, 256)


def main(arguments: list[str]) -> None:
    config = load_config(SamplesConfig, arguments, about=__doc__)
    output = output_folder(config.output)
    rng = np.random.default_rng(config.seed)
    library = load_people()
    turned, dancer = (build_person(random_identity(rng, library, "heldout"), library) for _ in range(2))
    motion = random_motion(rng, FRAMES * 3, FPS * 3, "dance")

    camera = Camera(scale=config.scale, rotation=np.deg2rad(config.rotation), center=(0.5, 0.5))
    background = random_background(rng, REFERENCE_SIZE)
    reference = render_person(turned, neutral_pose(), camera, REFERENCE_SIZE, background)
    with complete_file(Path(output) / "rendered.png") as path:
        Image.fromarray(reference.image).save(path)

    background = random_background(rng, CLIP_SIZE)
    upright = replace(camera, scale=0.85, rotation=0.0, center=(0.5, 0.51))
    frames = [
        render_person(dancer, motion.pose(3 * frame), upright, CLIP_SIZE, background).image for frame in range(FRAMES)
    ]
    write_video(Path(output) / "dance.mp4", frames, FPS, {"made": "data/people/samples.py", "seed": config.seed})

    with complete_file(Path(output) / "photo.jpg") as path:
        Image.fromarray(astronaut()).save(path, quality=92)


if __name__ == "__main__":
    run_command(main)
