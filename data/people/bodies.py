"""Rendered people: baked bodies, identities drawn from a seed, and the textured, skinned mesh made of both.

    library = load_people()
    identity = random_identity(np.random.default_rng(0), library, split="train")
    person = build_person(identity, library)

An identity is a body and a seed; the seed decides skin, hair, garments and their patterns. The two splits share
neither bodies nor seeds: the seeds of "train" are even, those of "heldout" odd.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.people.clothes import PARTS, PLAIN, Outfit, garment_offsets, kept_faces, random_outfit
from data.people.rasterizer import vertex_normals
from data.people.skeleton import rest_to_neutral
from data.people.textures import paint_texture

PEOPLE_FOLDER = Path(__file__).parents[2] / "assets" / "people"
SPLITS = ("train", "heldout")
TWO_SIDED_PARTS = ("skirt", "hair")
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
    joints: np.ndarray  # (19, 3) float32, order of `data.people.skeleton.JOINTS`
    neutral: np.ndarray  # (19, 3, 3) rotations from rest to the neutral pose
    # (17, 19, 4) float32, the COCO keypoints as skinned points: the posed keypoint is the sum over joints of the
    # joint's (3, 4) transform times these homogeneous parts.
    keypoints: np.ndarray
    height: float


@dataclass(frozen=True)
class PeopleLibrary:
    """Shared topology, and the bodies by name: "train_00", ..., "heldout_00", ..."""

    topology: Topology
    bodies: dict[str, Body]

    def names(self, split: str) -> list[str]:
        """Sorted names of the bodies of a split."""
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


def load_people(folder: str | Path = PEOPLE_FOLDER) -> PeopleLibrary:
    """Read the shared topology and every body of `folder`."""
    folder = Path(folder)
    with np.load(folder / "topology.npz") as file:
        weights = file["joint_weights"].astype(np.float32)
        topology = Topology(
            faces=file["faces"].astype(np.int32),
            parts=file["parts"],
            corner_uv=file["corner_uv"].astype(np.float32) * np.float32(UV_UNIT),
            joint_indices=file["joint_indices"],
            joint_weights=weights / weights.sum(1, keepdims=True),
            face_marks=file["face_marks"],
        )
    bodies = {path.stem: _load_body(path) for split in SPLITS for path in sorted(folder.glob(f"{split}_*.npz"))}
    return PeopleLibrary(topology, bodies)


def random_identity(
    rng: np.random.Generator, library: PeopleLibrary, split: str = "train", plain: float = PLAIN
) -> Identity:
    """Draw a person of a split, "train" or "heldout", with this share of plain fabrics."""
    body = str(rng.choice(library.names(split)))
    seed = 2 * int(rng.integers(2**30)) + SPLITS.index(split)  # even for train, odd for heldout
    return Identity(body, seed, plain)


def build_person(identity: Identity, library: PeopleLibrary, texture_size: int = 256) -> Person:
    """Dress the identity's body.

    `texture_size` is the side of each part's square texture: 256 suits persons up to 512 px high, 128 below 200 px.
    """
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
        two_sided=np.array([name in TWO_SIDED_PARTS for name in PARTS]),
        texture=paint_texture(outfit, topology.face_marks, texture_size),
    )


def _load_body(path: Path) -> Body:
    with np.load(path) as file:
        vertices = file["vertices"].astype(np.float32) * np.float32(COORDINATE_UNIT)
        joints = file["joints"]
        return Body(vertices, joints, rest_to_neutral(joints), file["keypoints"], float(vertices[:, 2].max()))
