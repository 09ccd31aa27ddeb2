"""Bake the bodies of the rendered people from anny (Apache-2.0 code, CC0 MakeHuman/MPFB data) into assets/people.

    python -m data.people.bake output=assets/people

The only module that needs anny, which is not a dependency of the project: `pip install anny==0.6.2` in an
environment of its own. Its first start takes minutes and writes a cache of 0.9 GB (`ANNY_CACHE_DIR` says where).
"""

from core.config import check_first
from data.config import BakeConfig

check_first(__name__, BakeConfig, __doc__, needs="anny")


from pathlib import Path

import anny
import numpy as np
import torch
from anny.face_segmentation import get_face_segmentation_mask
from anny.keypoints import KeypointsRegressor
from anny.paths import get_anny_root_dir

from core.config import load_config
from core.errors import run_command
from core.files import complete_file, output_folder
from data.config import SPLITS
from data.people.bodies import COORDINATE_UNIT, JOINT_INDEX, JOINTS, UV_UNIT
from data.people.clothes import PARTS

# anny's bones that hold each joint's position; the bones further down are merged into it by `_joint_of_bone`.
JOINT_BONES = {
    "pelvis": "root", "spine": "spine04", "chest": "spine02", "neck": "neck01", "head": "head",
    **{f"{side}_{joint}": f"{bone}.{letter}" for side, letter in (("left", "L"), ("right", "R")) for joint, bone in (
        ("clavicle", "clavicle"), ("upper_arm", "upperarm01"), ("forearm", "lowerarm01"), ("hand", "wrist"),
        ("thigh", "upperleg01"), ("shin", "lowerleg01"), ("foot", "foot"),
    )},
}  # fmt: skip
HEAD_GRID, HAND_GRID = 0.0045, 0.009  # metres; smaller detail of head and hands is below a pixel at 512 px


# anny's body parameters, each in [0, 1]; 2/3 of `age` is a young adult, 1 is old.
MEAN_PHENOTYPE = {"gender": 0.5, "age": 0.67, "muscle": 0.5, "weight": 0.5, "height": 0.5, "proportions": 0.5}


def random_phenotype(rng: np.random.Generator) -> dict[str, float]:
    """An adult body: gender mostly near one of the ends, the rest spread widely."""
    return {
        "gender": float(np.clip(rng.choice([0.08, 0.92]) + rng.normal(0, 0.12), 0, 1)),
        "age": float(rng.uniform(0.62, 0.9)),
        "muscle": float(rng.uniform(0.25, 0.85)),
        "weight": float(rng.beta(2, 2)),
        "height": float(rng.uniform(0.25, 0.6)),
        "proportions": float(rng.uniform(0.3, 0.95)),
    }


class Baker:
    """Parts of anny that baking needs, with the common topology worked out on the mean body."""

    def __init__(self) -> None:
        self.model = anny.Anny(topology="anny-full").float()
        self.bones = list(self.model.bone_labels)
        self.groups = _mesh_groups(get_anny_root_dir() / "data/mpfb2/3dobjs/base.obj")
        self.weights = self._joint_weights()
        self.regressor = KeypointsRegressor.coco(self.model).regression_weights[:17].numpy()
        self.mean_vertices, self.mean_joints = self.rest(MEAN_PHENOTYPE)

    def rest(self, phenotype: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
        """Rest vertices (v, 3) and joints (19, 3) in metres, feet on z = 0, pelvis above x = y = 0."""
        identity = torch.eye(4).repeat(1, self.model.bone_count, 1, 1)
        with torch.no_grad():
            output = self.model(pose_parameters=identity, phenotype_kwargs=phenotype)
        vertices = output["rest_vertices"][0].double().numpy()
        heads = output["rest_bone_heads"][0].double().numpy()
        joints = np.stack([heads[self.bones.index(JOINT_BONES[name])] for name in JOINTS])
        soles = vertices[np.unique(self.groups["body"]), 2].min()  # helpers of the mesh reach below them
        origin = np.array([0.0, joints[0, 1], soles])
        return vertices - origin, joints - origin

    def _joint_weights(self) -> np.ndarray:
        target = np.array([_joint_of_bone(bone) for bone in self.bones])
        indices = self.model.vertex_bone_indices.numpy()
        values = self.model.vertex_bone_weights.double().numpy()
        weights = np.zeros((len(indices), len(JOINTS)))
        for column in range(indices.shape[1]):
            np.add.at(weights, (np.arange(len(indices)), target[indices[:, column]]), values[:, column])
        return weights / weights.sum(1, keepdims=True)

    def triangles(self, group: str) -> np.ndarray:
        """Triangles (f, 3) of one group of the MakeHuman base mesh."""
        quads = self.groups[group]
        return np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])

    def skin_triangles(self, label: str, grid: float) -> np.ndarray:
        """Triangles of the part of the body with this label, thinned to `grid` metres."""
        chosen = get_face_segmentation_mask(self.model, [label])
        return _thin(np.asarray(self.model.faces)[chosen], self.mean_vertices, grid)


def _joint_of_bone(bone: str) -> int:
    side = {"L": "left_", "R": "right_"}.get(bone[-1], "") if bone[-2:-1] == "." else ""
    stem = bone.split(".")[0]
    prefixes = (
        ("pelvis", "pelvis"), ("root", "pelvis"), ("spine05", "pelvis"), ("spine04", "spine"), ("spine03", "spine"),
        ("spine", "chest"), ("neck", "neck"), ("head", "head"), ("eye", "head"), ("clavicle", "clavicle"),
        ("shoulder", "clavicle"), ("upperarm", "upper_arm"), ("lowerarm", "forearm"), ("wrist", "hand"),
        ("finger", "hand"), ("metacarpal", "hand"), ("upperleg", "thigh"), ("lowerleg", "shin"), ("foot", "foot"),
        ("toe", "foot"),
    )  # fmt: skip
    joint = next(joint for prefix, joint in prefixes if stem.startswith(prefix))
    return JOINT_INDEX[joint] if joint in JOINT_INDEX else JOINT_INDEX[side + joint]


def _mesh_groups(path: Path) -> dict[str, np.ndarray]:
    groups: dict[str, list[list[int]]] = {}
    name = ""
    for line in path.read_text().splitlines():
        if line.startswith("g "):
            name = line.split()[1]
        elif line.startswith("f "):
            groups.setdefault(name, []).append([int(corner.split("/")[0]) - 1 for corner in line.split()[1:]])
    return {name: np.array(faces) for name, faces in groups.items()}


def _thin(faces: np.ndarray, vertices: np.ndarray, grid: float) -> np.ndarray:
    """Merge the vertices of each cell of a grid into the one nearest to their mean; drop triangles that collapse."""
    used = np.unique(faces)
    cells = np.unique(np.floor(vertices[used] / grid).astype(int), axis=0, return_inverse=True)[1].reshape(-1)
    representative = np.empty(cells.max() + 1, int)
    for cell in range(len(representative)):
        members = used[cells == cell]
        centre = vertices[members].mean(0)
        representative[cell] = members[np.linalg.norm(vertices[members] - centre, axis=1).argmin()]
    mapping = np.arange(len(vertices))
    mapping[used] = representative[cells]
    faces = mapping[faces]
    distinct = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    return faces[distinct]


def _limb_uv(points: np.ndarray, chain: np.ndarray) -> np.ndarray:
    """(n, 2): u around and v along a polyline of joints (k, 3)."""
    lengths = np.linalg.norm(np.diff(chain, axis=0), axis=1)
    total, starts = lengths.sum(), np.concatenate([[0], np.cumsum(lengths)])
    best, uv = np.full(len(points), np.inf), np.zeros((len(points), 2))
    for segment in range(len(lengths)):
        axis = (chain[segment + 1] - chain[segment]) / lengths[segment]
        along = (points - chain[segment]) @ axis
        low = -np.inf if segment == 0 else 0.0
        high = np.inf if segment == len(lengths) - 1 else lengths[segment]
        offset = points - chain[segment] - np.clip(along, low, high)[:, None] * axis
        distance = np.linalg.norm(offset, axis=1)
        front = np.array([0.0, -1.0, 0.0]) - axis * -axis[1]
        front /= np.linalg.norm(front)
        left = np.cross(axis, front)
        left *= np.sign(left[0])
        u = 0.5 + np.arctan2(offset @ left, offset @ front) / (2 * np.pi)
        closer = distance < best
        best[closer] = distance[closer]
        uv[closer] = np.stack([u, (starts[segment] + np.clip(along, low, high)) / total], 1)[closer]
    return uv


def _unwrap(corner_uv: np.ndarray) -> np.ndarray:
    """Let the three corners (f, 3, 2) of a triangle across the seam u = 0 = 1 lie beside each other."""
    u = corner_uv[..., 0]
    corner_uv[..., 0] = u + ((u.max(1, keepdims=True) - u) > 0.5)
    return corner_uv


class SharedMesh:
    """Triangles, parts, texture coordinates and weights that all bodies share, built on the mean body."""

    def __init__(self, baker: Baker) -> None:
        self.vertices, self.joints = baker.mean_vertices, baker.mean_joints
        pieces: list[tuple[str, np.ndarray]] = [("head", self._head(baker))]
        for side, letter in (("left", "L"), ("right", "R")):
            pieces.append(("hands", baker.skin_triangles(f"hand.{letter}", HAND_GRID)))
            pieces.append((f"{side}_eye", baker.triangles(f"helper-{letter.lower()}-eye")))
        pieces += self._garment(baker)
        pieces.append(("skirt", baker.triangles("helper-skirt")))
        pieces.append(("hair", self._hair(baker.triangles("helper-hair"))))
        faces = np.concatenate([piece for _, piece in pieces])
        self.parts = np.repeat(
            np.array([PARTS.index(name) for name, _ in pieces], np.uint8), [len(piece) for _, piece in pieces]
        )
        self.corner_uv = np.concatenate([_unwrap(self._uv(name, piece)) for name, piece in pieces])
        self.used, faces = np.unique(faces, return_inverse=True)
        self.faces = faces.reshape(-1, 3).astype(np.uint16)
        self.weights = baker.weights[self.used]

    def _head(self, baker: Baker) -> np.ndarray:
        """The head, and the neck down to where the garment covers it."""
        head = np.asarray(baker.model.faces)[get_face_segmentation_mask(baker.model, ["head"])]
        body = np.asarray(baker.model.faces)[get_face_segmentation_mask(baker.model, ["body"])]
        collar = self.joints[JOINT_INDEX["neck"], 2] - 0.06
        centre = self.vertices[body].mean(1)
        neck = body[(centre[:, 2] > collar) & (np.abs(centre[:, 0]) < 0.09)]
        return _thin(np.concatenate([head, neck]), self.vertices, HEAD_GRID)

    def _hair(self, faces: np.ndarray) -> np.ndarray:
        """The hair without the triangles in front of the face."""
        centre = self.vertices[faces].mean(1)
        head = self.joints[JOINT_INDEX["head"]]
        over_face = (centre[:, 1] < head[1] - 0.035) & (centre[:, 2] < head[2] + 0.105)
        return faces[~over_face]

    def _garment(self, baker: Baker) -> list[tuple[str, np.ndarray]]:
        """Split the tights into torso, sleeves, legs and shoes by what moves most of a quadrilateral."""
        owners = np.array([_garment_part(joint) for joint in JOINTS])
        names = np.unique(owners)
        weights = baker.weights[baker.groups["helper-tights"]].sum(1)
        shares = np.stack([weights[:, owners == name].sum(1) for name in names], 1)
        chosen = np.tile(names[shares.argmax(1)], 2)
        triangles = baker.triangles("helper-tights")
        return [(str(name), triangles[chosen == name]) for name in names]

    def _trunk_centre(self, z: np.ndarray, faces: np.ndarray) -> np.ndarray:
        """y (n,) halfway between breast and back at heights z, from the triangles of the torso."""
        points = self.vertices[np.unique(faces)]
        points = points[np.abs(points[:, 0]) < 0.06]
        levels = np.linspace(points[:, 2].min(), points[:, 2].max(), 12)
        near = [points[np.abs(points[:, 2] - level) < 0.05, 1] for level in levels]
        return np.interp(z, levels, [(y.min() + y.max()) / 2 for y in near])

    def _uv(self, part: str, faces: np.ndarray) -> np.ndarray:
        """Texture coordinates (f, 3, 2) as in `data.people.clothes`; v of shoes runs from heel to toe."""
        points = self.vertices[faces.reshape(-1)]
        joint = {name: self.joints[index] for name, index in JOINT_INDEX.items()}
        side = part.split("_")[0]
        if part.endswith("sleeve"):
            uv = _limb_uv(points, np.stack([joint[f"{side}_{bone}"] for bone in ("upper_arm", "forearm", "hand")]))
        elif part.endswith("leg"):
            uv = _limb_uv(points, np.stack([joint[f"{side}_{bone}"] for bone in ("thigh", "shin", "foot")]))
        elif part.endswith("eye"):
            centre = points.mean(0)
            radius = np.abs(points - centre).max()
            uv = 0.5 + (points - centre)[:, [0, 2]] * (0.5, -0.5) / radius
            uv[points[:, 1] > centre[1]] = 0.02
        else:
            skull = joint["head"] + (0, 0.012, 0)
            centre = {"head": skull, "hair": skull, "skirt": joint["pelvis"]}.get(part, points.mean(0))
            y = self._trunk_centre(points[:, 2], faces) if part == "torso" else centre[1]
            u = 0.5 + np.arctan2(points[:, 0] - centre[0], y - points[:, 1]) / (2 * np.pi)
            down = -points[:, 1 if part.endswith("shoe") else 2]
            uv = np.stack([u, (down - down.min()) / np.ptp(down)], 1)
        return np.clip(uv, 0, 1).reshape(-1, 3, 2)

    def mark_uv(self, part: str, point: np.ndarray) -> np.ndarray:
        """Texture coordinates (2,) of the corner of `part` nearest to a point on the mean body."""
        chosen = self.parts == PARTS.index(part)
        corners = self.vertices[self.used][self.faces[chosen]].reshape(-1, 3)
        nearest = np.linalg.norm(corners - point, axis=1).argmin()
        return self.corner_uv[chosen].reshape(-1, 2)[nearest] % 1.0

    def save(self, path: Path, baker: Baker) -> None:
        order = np.argsort(-self.weights, axis=1)[:, :4]
        weights = np.take_along_axis(self.weights, order, 1)
        weights = np.rint(weights / weights.sum(1, keepdims=True) * 255)
        landmarks = (baker.regressor @ self.vertices)[:5]
        mouth = landmarks[0] + (0, 0.01, -0.042)
        with complete_file(path) as temporary:
            np.savez_compressed(
                temporary,
                faces=self.faces,
                parts=self.parts,
                corner_uv=np.rint(self.corner_uv / UV_UNIT).astype(np.uint16),
                joint_indices=order.astype(np.uint8),
                joint_weights=weights.astype(np.uint8),
                face_marks=np.stack([self.mark_uv("head", point) for point in [*landmarks, mouth]]).astype(np.float32),
            )


def _garment_part(joint: str) -> str:
    if "_" not in joint or joint.endswith("clavicle"):
        return "torso"
    side, bone = joint.split("_", 1)
    return f"{side}_" + {"thigh": "leg", "shin": "leg", "foot": "shoe"}.get(bone, "sleeve")


def save_body(path: Path, baker: Baker, topology: SharedMesh, phenotype: dict[str, float]) -> None:
    """Write one body: its vertices and joints at rest, and its COCO keypoints as skinned points."""
    vertices, joints = baker.rest(phenotype)
    homogeneous = np.concatenate([vertices, np.ones((len(vertices), 1))], 1)
    # Skinning is linear in the vertices, so a keypoint, a weighted sum of vertices, is a sum over joints.
    keypoints = np.einsum("kv,vj,vc->kjc", baker.regressor, baker.weights, homogeneous, optimize=True)
    with complete_file(path) as temporary:
        np.savez_compressed(
            temporary,
            vertices=np.rint(vertices[topology.used] / COORDINATE_UNIT).astype(np.int16),
            joints=joints.astype(np.float32),
            keypoints=keypoints.astype(np.float32),
            phenotype=np.array(list(phenotype.values()), np.float32),
        )


def main(arguments: list[str]) -> None:
    config = load_config(BakeConfig, arguments, about=__doc__)
    folder = output_folder(config.output)
    baker = Baker()
    topology = SharedMesh(baker)
    topology.save(folder / "topology.npz", baker)
    for number, split in enumerate(SPLITS):
        rng = np.random.default_rng([config.seed, number])
        for index in range(getattr(config, split)):
            save_body(folder / f"{split}_{index:02d}.npz", baker, topology, random_phenotype(rng))


if __name__ == "__main__":
    run_command(main)
