"""What retargeting makes of exact poses: a rendered person drives, another one in the same motion is the answer.

    python -m benchmarks.retargeting [motions=40] [frames=24] [noise=0] [picture=docs/images/retargeting.png]

Motions are rotations of joints, which belong to no body. Numbers are distances of the keypoints from the answer's, in
parts of the standing height: the median, and in brackets nine tenths are below. The driver is a held-out person, the
reference another, with the proportions of the row; `the driver` is the same person, who must be left alone. Both are
seen by one camera, which is near, as in the other benchmarks.
"""

from benchmarks.config import RetargetingConfig
from core.config import check_first

check_first(__name__, RetargetingConfig, __doc__)


from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from core.config import load_config
from core.errors import run_command
from core.files import complete_file
from data.config import RETARGET_MODES
from data.people.bodies import (
    JOINT_INDEX,
    JOINTS,
    Body,
    Identity,
    PeopleLibrary,
    Pose,
    axis_rotation,
    build_person,
    load_people,
    neutral_pose,
    rotations_from_angles,
)
from data.people.motion import Motion, random_motion
from data.people.proportions import PROPORTIONS, rescaled
from data.people.renderer import Camera, project_keypoints, render_person
from data.people.scenes import CameraRanges, random_camera
from data.poses.drawing import draw_pose
from data.poses.poses import Poses
from data.poses.retarget import retarget

FPS, STRIDE, SIZE = 24.0, 3, (512, 512)
DRIVER = "the driver"
BODIES = (DRIVER, *PROPORTIONS)
# Of the reference's picture: how the person is posed and turned in it.
PICTURES = ("first frame", "standing", "from the side", "from behind", "seated", "any")
# Of the picture: reference's body, motion, frame, how much the reference shows, seed.
EXAMPLES = (
    ("child", "wave", 10, "all", 8),
    ("long_legged", "stretch", 14, "all", 3),
    ("child", "walk", 5, "half", 8),
)
CAMERAS = CameraRanges(height=(0.8, 1.0), close_ups=0.0)


@dataclass(frozen=True)
class RetargetingCase:
    """Keypoints (f, 17, 2) in pixels of one motion."""

    motion: str  # a key of `data.people.actions.MOTIONS`
    driving: np.ndarray
    truth: np.ndarray  # of the reference's person in the driver's place
    pictures: dict[str, np.ndarray]  # (1, 17, 2) of the reference by `PICTURES`
    height: float  # standing, pixels

    def errors(
        self, picture: str, mode: str, noise: float = 0.0, rng: np.random.Generator | None = None
    ) -> np.ndarray:
        """(f, 17) distances in standing heights after retargeting keypoints with errors of this deviation."""
        given = [self.driving, self.pictures[picture]]
        if noise > 0:
            given = [points + rng.normal(0, noise * self.height, points.shape) for points in given]
        driving, reference = (
            Poses(points[:, None], np.ones((len(points), 1, 17)), SIZE, FPS / STRIDE) for points in given
        )
        found = retarget(driving, reference, mode)[0].keypoints[:, 0]
        return np.linalg.norm(found - self.truth, axis=-1) / self.height


def cases(
    library: PeopleLibrary, bodies: str, motions: int, frames: int, seed: int, flat: bool = False
) -> Iterator[RetargetingCase]:
    """Drivers, motions and cameras that are the same for all `BODIES`; `flat` motions stay in the picture's plane."""
    for index in range(motions):
        rng = np.random.default_rng([seed, index])
        driver, person = (library.bodies[name] for name in rng.choice(library.names("heldout"), 2, replace=False))
        person = driver if bodies == DRIVER else rescaled(person, library.topology, PROPORTIONS[bodies])
        motion = random_motion(rng, frames * STRIDE, FPS)
        motion = flattened(motion) if flat else motion
        poses = [motion.pose(frame * STRIDE) for frame in range(frames)]
        camera = random_camera(rng, CAMERAS)
        camera = replace(camera, pitch=0.0) if flat else camera
        views = {
            "first frame": (poses[0], 0.0),
            "standing": (neutral_pose(), 0.0),
            "from the side": (neutral_pose(), np.pi / 2),
            "from behind": (neutral_pose(), np.pi),
            "seated": (seated_pose(), 0.0),
            "any": (random_motion(rng, 1, FPS).pose(0), 0.0),
        }
        pictures = {name: seen(person, [pose], replace(camera, yaw=yaw)) for name, (pose, yaw) in views.items()}
        driving, truth = (seen(body, poses, camera) for body in (driver, person))
        yield RetargetingCase(motion.name, driving, truth, pictures, camera.scale * SIZE[1])


def seen(body: Body, poses: Sequence[Pose], camera: Camera) -> np.ndarray:
    """Keypoints (f, 17, 2) in pixels."""
    return np.stack([project_keypoints(body, pose, camera, SIZE)[0] for pose in poses])


def flattened(motion: Motion) -> Motion:
    """The motion with every joint turning by its angle, but about the axis towards the camera."""
    angles = np.arccos(np.clip((np.trace(motion.rotations, axis1=2, axis2=3) - 1) / 2, -1, 1))
    outwards = np.array([-1 if name.startswith("right") else 1 for name in JOINTS])
    outwards[JOINT_INDEX["pelvis"]] = 0  # whose turn is where the person faces
    rotations = axis_rotation(1, angles * outwards).astype(np.float32)
    return Motion(motion.name, rotations, motion.translations * np.float32([1, 0, 1]))


def seated_pose() -> Pose:
    angles = np.zeros((1, len(JOINTS), 3))
    for side in ("left", "right"):
        for joint, bend in (("thigh", 1.5), ("shin", 1.5), ("upper_arm", 0.5), ("forearm", 1.2)):
            angles[:, JOINT_INDEX[f"{side}_{joint}"], 0] = bend
    return Pose(rotations_from_angles(angles)[0], np.zeros(3, np.float32))


def cell(errors: Sequence[np.ndarray]) -> str:
    values = 100 * np.concatenate(errors)
    return f"{np.median(values):.1f} % ({np.quantile(values, 0.9):.1f})"


def draw_examples(library: PeopleLibrary, path: str) -> None:
    """Save a row for each of `EXAMPLES`: reference, driver, and the answer under the poses by each mode."""
    rows = []
    for body, motion, frame, shown, seed in EXAMPLES:
        rng = np.random.default_rng(seed)
        names = rng.choice(library.names("heldout"), 2, replace=False)
        driver, person = (build_person(Identity(name, seed + k), library) for k, name in enumerate(names))
        baked = rescaled(person.body, library.topology, PROPORTIONS[body])
        person = build_person(person.identity, replace(library, bodies={person.identity.body: baked}))
        poses, camera = random_motion(rng, 24 * STRIDE, FPS, motion), Camera(scale=0.9)
        views = [
            (person, neutral_pose(), replace(camera, scale=1.6, center=(0.5, 0.85)) if shown == "half" else camera)
        ]
        views += [(who, poses.pose(frame * STRIDE), camera) for who in (driver, person)]
        images = [render_person(who, pose, camera, SIZE) for who, pose, camera in views]
        driving = np.stack(
            [project_keypoints(driver.body, poses.pose(f * STRIDE), camera, SIZE)[0] for f in range(24)]
        )
        given = Poses(driving[:, None], np.ones((24, 1, 17)), SIZE, FPS / STRIDE)
        reference = Poses(images[0].keypoints[None, None], images[0].scores[None, None], SIZE, 1.0)
        tiles = [image.image for image in images[:2]]
        for mode in RETARGET_MODES:
            found = retarget(given, reference, mode)[0][frame]
            figure = draw_pose(found.keypoints[0], found.scores[0], SIZE)
            tiles.append(np.where(figure.any(-1, keepdims=True), figure, images[2].image // 2 + 64))
        rows.append(np.hstack(tiles))
    with complete_file(path) as temporary:
        Image.fromarray(np.vstack(rows)[::2, ::2]).save(temporary, "PNG")


def main(arguments: list[str]) -> None:
    config = load_config(RetargetingConfig, arguments, about=__doc__)
    library, rng = load_people(), np.random.default_rng(config.seed)
    if config.picture is not None:
        draw_examples(library, config.picture)
        return
    print("|", " | ".join(("reference's body, motion", "unchanged", f"similarity, {PICTURES[0]}", *PICTURES)), "|")
    print("|---" * (3 + len(PICTURES)) + "|")
    for flat in (False, True):
        for bodies in BODIES:
            found = list(cases(library, bodies, config.motions, config.frames, config.seed, flat=flat))
            columns = [("standing", "off"), (PICTURES[0], "similarity"), *((name, "bones") for name in PICTURES)]
            cells = [cell([case.errors(*column, config.noise, rng) for case in found]) for column in columns]
            label = f"{bodies.replace('_', ' ')}, {'in the plane' if flat else 'any'}"
            print("|", " | ".join([label, *cells]), "|", flush=True)


if __name__ == "__main__":
    run_command(main)
