"""Rendered people: baked bodies, identities drawn from a seed, and the textured, skinned mesh made of both.

    library = load_people()
    identity = random_identity(np.random.default_rng(0), library, split="train")
    person = build_person(identity, library)

An identity is a body and a seed; the seed decides skin, hair, garments and their patterns. The splits share neither
bodies nor seeds: below 2**31 even ones are of "train" and odd ones of "heldout", those from there of "development".

World axes of a person: x towards the person's left, y towards the person's back, z up, metres. In the neutral pose
the person stands upright and looks along -y, arms hanging, and every joint rotation is the identity.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from data.config import PLAIN, SPLITS
from data.people.clothes import PARTS, Outfit, garment_offsets, kept_faces, random_outfit
from data.people.rasterizer import vertex_normals
from data.people.textures import paint_texture

PEOPLE_FOLDER = Path(__file__).parents[2] / "assets" / "people"
COORDINATE_UNIT = 1 / 12000  # metres in one step of the stored vertices; 16 bits reach 2.7 m
UV_UNIT = 1 / 32000  # one step of the stored texture coordinates, which reach 2


@dataclass(frozen=True)
class Topology:
    """Mesh that all bodies share: f faces over v vertices."""

    faces: np.ndarray  # (f, 3) int32, counter-clockwise seen from outside
    parts: np.ndarray  # (f,) uint8, index into `PARTS`
    corner_uv: np.ndarray  # (f, 3, 2) float32 texture coordinates within the part
    joint_indices: np.ndarray  # (v, 4) uint8, by falling weight
    joint_weights: np.ndarray  # (v, 4) float32
    face_marks: np.ndarray  # (6, 2) on the head's texture: nose, left and right eye, left and right ear, mouth


@dataclass(frozen=True)
class Body:
    """One baked body at rest, in metres, soles at z = 0."""

    vertices: np.ndarray  # (v, 3) float32
    joints: np.ndarray  # (19, 3) float32, order of `data.people.bodies.JOINTS`
    neutral: np.ndarray  # (19, 3, 3) rotations from rest to the neutral pose
    # (17, 19, 4) float32, the COCO keypoints as skinned points: the posed keypoint is the sum over joints of the
    # joint's (3, 4) transform times these homogeneous parts.
    keypoints: np.ndarray
    height: float


@dataclass(frozen=True)
class PeopleLibrary:
    """Shared topology, and the bodies by name: "train_00", ..., "heldout_00", ..., "development_00", ..."""

    topology: Topology
    bodies: dict[str, Body]

    def names(self, split: str) -> list[str]:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        return sorted(name for name in self.bodies if name.startswith(split))


@dataclass(frozen=True)
class Identity:
    """A body of the library, and the seed of everything worn."""

    body: str
    seed: int
    plain: float = PLAIN  # share of fabrics without a pattern


@dataclass(frozen=True)
class Person:
    """A dressed body, ready to be posed and rendered; arrays as in `Topology`."""

    identity: Identity
    body: Body
    outfit: Outfit
    vertices: np.ndarray  # (v, 3) float32 at rest, garments' thickness included
    normals: np.ndarray  # (v, 3)
    joint_indices: np.ndarray
    joint_weights: np.ndarray
    faces: np.ndarray
    corner_uv: np.ndarray
    parts: np.ndarray
    two_sided: np.ndarray  # (parts,) bool
    texture: np.ndarray  # (parts, t, t, 3) uint8 RGB


@cache
def load_people() -> PeopleLibrary:
    """Read the shared topology and every body that is shipped, once a process; not to be changed."""
    with np.load(PEOPLE_FOLDER / "topology.npz") as file:
        weights = file["joint_weights"].astype(np.float32)
        topology = Topology(
            faces=file["faces"].astype(np.int32),
            parts=file["parts"],
            corner_uv=file["corner_uv"].astype(np.float32) * np.float32(UV_UNIT),
            joint_indices=file["joint_indices"],
            joint_weights=weights / weights.sum(1, keepdims=True),
            face_marks=file["face_marks"],
        )
    bodies = {path.stem: _load_body(path) for split in SPLITS for path in sorted(PEOPLE_FOLDER.glob(f"{split}_*.npz"))}
    return PeopleLibrary(topology, bodies)


def random_identity(
    rng: np.random.Generator, library: PeopleLibrary, split: str = "train", plain: float = PLAIN
) -> Identity:
    """Draw a person of one of `SPLITS`, with this share of plain fabrics."""
    body = str(rng.choice(library.names(split)))
    seed = 2 * int(rng.integers(2**30)) + {"train": 0, "heldout": 1, "development": 2**31}[split]
    return Identity(body, seed, plain)


def build_person(identity: Identity, library: PeopleLibrary, texture_size: int = 256) -> Person:
    """Dress the identity's body; textures of 256 texels suit persons up to 512 px high, of 128 below 200 px."""
    if identity.body not in library.bodies:
        raise ValueError(f"identity.body must be one of the library's bodies, got {identity.body!r}")
    topology, body = library.topology, library.bodies[identity.body]
    outfit = random_outfit(identity.seed, identity.plain)
    kept = kept_faces(outfit, topology.parts, topology.corner_uv)
    faces, corner_uv, parts = topology.faces[kept], topology.corner_uv[kept], topology.parts[kept]
    offsets = garment_offsets(outfit, faces, corner_uv, parts, len(body.vertices))
    vertices = body.vertices + vertex_normals(body.vertices, faces) * offsets[:, None]
    return Person(
        identity=identity,
        body=body,
        outfit=outfit,
        vertices=vertices,
        normals=vertex_normals(vertices, faces),
        joint_indices=topology.joint_indices,
        joint_weights=topology.joint_weights,
        faces=faces,
        corner_uv=corner_uv,
        parts=parts,
        two_sided=np.array([name in ("skirt", "hair") for name in PARTS]),
        texture=paint_texture(outfit, topology.face_marks, texture_size),
    )


def _load_body(path: Path) -> Body:
    with np.load(path) as file:
        vertices = file["vertices"].astype(np.float32) * np.float32(COORDINATE_UNIT)
        joints = file["joints"]
        return Body(vertices, joints, rest_to_neutral(joints), file["keypoints"], float(vertices[:, 2].max()))


JOINTS = (
    "pelvis", "spine", "chest", "neck", "head",
    "left_clavicle", "left_upper_arm", "left_forearm", "left_hand",
    "right_clavicle", "right_upper_arm", "right_forearm", "right_hand",
    "left_thigh", "left_shin", "left_foot",
    "right_thigh", "right_shin", "right_foot",
)  # fmt: skip
PARENTS = (-1, 0, 1, 2, 3, 2, 5, 6, 7, 2, 9, 10, 11, 0, 13, 14, 0, 16, 17)
JOINT_INDEX = {name: index for index, name in enumerate(JOINTS)}

# Where the limbs of the neutral pose point. The bodies are stored with spread arms and legs, which skin best.
NEUTRAL_DIRECTIONS = {
    "upper_arm": (0.14, 0.02, -1.0),
    "forearm": (0.06, -0.06, -1.0),
    "thigh": (0.03, 0.0, -1.0),
    "shin": (0.02, 0.03, -1.0),
}

ANKLE_HEIGHT = 0.053  # height of the ankles above the soles in body heights


@dataclass(frozen=True)
class Pose:
    rotations: np.ndarray  # (19, 3, 3) of every joint relative to its parent; the pelvis turns the whole person
    # (3,) in body heights: x and y of the pelvis from where the person stands, and the height of the lower ankle above
    # its standing height (0 = on the ground).
    translation: np.ndarray


def neutral_pose() -> Pose:
    return Pose(np.tile(np.eye(3, dtype=np.float32), (len(JOINTS), 1, 1)), np.zeros(3, np.float32))


def axis_rotation(axis: int, angle: np.ndarray) -> np.ndarray:
    """Right-handed rotation matrices (..., 3, 3) about axis 0, 1 or 2 by `angle` (...) in radians."""
    angle = np.asarray(angle, np.float64)
    matrix = np.zeros((*angle.shape, 3, 3))
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix[..., axis, axis] = 1
    matrix[..., first, first] = matrix[..., second, second] = np.cos(angle)
    matrix[..., second, first] = np.sin(angle)
    matrix[..., first, second] = -np.sin(angle)
    return matrix


def rotations_from_angles(angles: np.ndarray) -> np.ndarray:
    """Joint rotations (..., 19, 3, 3) from anatomical angles (..., 19, 3) in radians: `bend`, `side` and `twist`.

        bend: trunk, neck and head forward; arm, forearm and thigh forward (flexion); shin backward (knee flexion);
            toes up.
        side: limbs away from the body's middle; clavicle up; trunk and head towards the person's left.
        twist: limbs outward (external rotation); trunk, head and pelvis towards the person's left.
    A positive number means the same for the left and the right limb, so equal angles are a mirrored pose.
    """
    signs = np.array([_angle_signs(name) for name in JOINTS])  # (19, 3)
    bend, side, twist = np.moveaxis(angles * signs, -1, 0)
    return (axis_rotation(1, side) @ axis_rotation(0, bend) @ axis_rotation(2, twist)).astype(np.float32)


def _angle_signs(name: str) -> tuple[int, int, int]:
    """Signs that turn anatomical angles into right-handed angles about x, y and z."""
    if "_" not in name:
        return 1, 1, 1
    mirror = 1 if name.startswith("left") else -1
    bend = 1 if name.endswith("shin") else -1
    return bend, -mirror, mirror


def align_rotation(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Smallest rotation (3, 3) that turns direction `source` (3,) into `target` (3,), not its opposite."""
    source, target = source / np.linalg.norm(source), target / np.linalg.norm(target)
    x, y, z = np.cross(source, target)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + cross + cross @ cross / (1 + source @ target)


def rest_to_neutral(joints: np.ndarray) -> np.ndarray:
    """Rotations (19, 3, 3) that bring each bone of a body at rest, with joints (19, 3), to the neutral pose."""
    rotations = np.tile(np.eye(3), (len(JOINTS), 1, 1))
    for side, mirror in (("left", 1.0), ("right", -1.0)):
        for bone, end in (("upper_arm", "forearm"), ("forearm", "hand"), ("thigh", "shin"), ("shin", "foot")):
            here, there = JOINT_INDEX[f"{side}_{bone}"], JOINT_INDEX[f"{side}_{end}"]
            target = np.array(NEUTRAL_DIRECTIONS[bone]) * (mirror, 1, 1)
            rotations[here] = align_rotation(joints[there] - joints[here], target)
        rotations[JOINT_INDEX[f"{side}_hand"]] = rotations[JOINT_INDEX[f"{side}_forearm"]]
    return rotations


def pose_joints(joints: np.ndarray, neutral: np.ndarray, pose: Pose, height: float) -> np.ndarray:
    """Skinning transforms (19, 3, 4), rest -> world, of a posed `Body` with these joints, `neutral` and height."""
    world = np.empty((len(JOINTS), 3, 3))
    position = np.zeros((len(JOINTS), 3))
    for joint, parent in enumerate(PARENTS):
        if parent < 0:
            world[joint] = pose.rotations[joint]
            continue
        world[joint] = world[parent] @ pose.rotations[joint]
        bone = neutral[parent] @ (joints[joint] - joints[parent])  # in the parent's axes
        position[joint] = position[parent] + world[parent] @ bone
    # The ground is z = 0: the lower ankle is put at its standing height, plus the translation's.
    ankles = [JOINT_INDEX["left_foot"], JOINT_INDEX["right_foot"]]
    position[:, :2] += pose.translation[:2] * height
    position[:, 2] += ANKLE_HEIGHT * height + pose.translation[2] * height - position[ankles, 2].min()
    transforms = np.empty((len(JOINTS), 3, 4), np.float32)
    transforms[:, :, :3] = world @ neutral
    transforms[:, :, 3] = position - np.einsum("jab,jb->ja", transforms[:, :, :3], joints)
    return transforms
