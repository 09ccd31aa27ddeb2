"""Rendered people: the shipped bodies, identities, keypoints, masks, and the kernels underneath."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import SPLITS
from data.people.bodies import (
    JOINT_INDEX,
    PEOPLE_FOLDER,
    Identity,
    Pose,
    build_person,
    load_people,
    neutral_pose,
    pose_joints,
    random_identity,
    rotations_from_angles,
)
from data.people.clothes import PARTS
from data.people.rasterizer import EMPTY_DEPTH, rasterize, resolve, vertex_normals
from data.people.renderer import HIDDEN_SCORE, Camera, Figure, project_keypoints, render_people, render_person

SIZE = (96, 128)


@pytest.fixture(scope="module")
def library():
    return load_people()


@pytest.fixture(scope="module")
def people(library):
    rng = np.random.default_rng(3)
    return [build_person(random_identity(rng, library), library, 64) for _ in range(6)]


def posed(**angles: tuple[float, float, float]) -> Pose:
    values = np.zeros((19, 3))
    for joint, angle in angles.items():
        values[JOINT_INDEX[joint]] = angle
    return Pose(rotations_from_angles(values), np.zeros(3, np.float32))


def similarity(points: np.ndarray, scale: float, rotation: float, center: np.ndarray) -> np.ndarray:
    cosine, sine = math.cos(rotation), math.sin(rotation)
    return scale * (points - center) @ np.array([[cosine, -sine], [sine, cosine]]).T + center


# The shipped bodies


def test_bodies_are_small_and_many():
    files = list(PEOPLE_FOLDER.glob("*.npz"))
    assert max(file.stat().st_size for file in files) < 400_000
    assert sum(file.stat().st_size for file in files) < 12_000_000


def test_splits_share_no_body(library):
    assert [len(library.names(split)) for split in SPLITS] == [72, 16, 8]
    names = [name for split in SPLITS for name in library.names(split)]
    assert len(set(names)) == len(names) == len(library.bodies)
    vertices = np.stack([library.bodies[name].vertices.ravel() for name in names])
    distances = np.abs(vertices[:, None, ::101] - vertices[None, :, ::101]).mean(-1)
    assert distances[~np.eye(len(vertices), dtype=bool)].min() > 1e-3  # metres, between any two


def test_bodies_are_adults_of_plausible_height(library):
    for name, body in library.bodies.items():
        with np.load(PEOPLE_FOLDER / f"{name}.npz") as file:
            assert file["phenotype"][1] >= 0.6
        assert 1.4 < body.height < 2.1
        assert abs(body.vertices[:, 2].min()) < 0.02  # soles on the ground


def test_bodies_are_symmetric_so_that_only_clothes_tell_sides_apart(library):
    mirror = np.array([-1, 1, 1])
    for body in list(library.bodies.values())[:5]:
        left, right = body.joints[JOINT_INDEX["left_hand"]], body.joints[JOINT_INDEX["right_hand"]]
        assert left[0] > 0.2
        np.testing.assert_allclose(left, right * mirror, atol=0.01)


def test_skinning_weights_sum_to_one(library):
    np.testing.assert_allclose(library.topology.joint_weights.sum(1), 1, atol=1e-6)


# Identities


def test_identity_seeds_of_the_splits_are_disjoint(library):
    rng = np.random.default_rng(0)
    for split, expected in (("train", (False, 0)), ("heldout", (False, 1)), ("development", (True, 0))):
        for _ in range(20):
            identity = random_identity(rng, library, split)
            assert identity.body.startswith(split)
            assert (identity.seed >= 2**31, identity.seed % 2) == expected


def test_person_is_a_function_of_the_identity(library):
    first, second = (build_person(Identity("train_01", 8), library, 32) for _ in range(2))
    other = build_person(Identity("train_01", 10), library, 32)
    assert np.array_equal(first.texture, second.texture) and np.array_equal(first.vertices, second.vertices)
    assert not np.array_equal(first.texture, other.texture)


def test_unknown_names_are_errors(library):
    with pytest.raises(ValueError, match="split"):
        random_identity(np.random.default_rng(0), library, "test")
    with pytest.raises(ValueError, match="identity.body"):
        build_person(Identity("nobody", 0), library)


def test_left_and_right_differ(library):
    """The mirrored image of a person facing the camera is clearly another image, for whoever it is."""
    rng = np.random.default_rng(11)
    for _ in range(40):
        person = build_person(random_identity(rng, library), library, 64)
        rendered = render_person(person, neutral_pose(), Camera(), SIZE)
        mirrored = rendered.image[:, ::-1].astype(float)
        both = rendered.mask & rendered.mask[:, ::-1]
        error = np.mean((rendered.image.astype(float) - mirrored)[both] ** 2)
        assert 10 * np.log10(255**2 / error) < 25


def test_everybody_is_dressed(library):
    """Around the hips no texel has the colour of the skin."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        person = build_person(random_identity(rng, library), library, 32)
        torso = person.texture[PARTS.index("torso")].astype(int)
        assert (np.abs(torso[8:] - person.outfit.skin.astype(int)).sum(-1) > 2).mean() > 0.9


# Keypoints


def test_keypoints_lie_at_the_joints(people):
    """Elbows, wrists, hips, knees and ankles are where forward kinematics, done here again, puts the joints."""
    pose = posed(
        left_upper_arm=(0.4, 1.2, 0.3), right_forearm=(1.0, 0, 0), left_thigh=(0.8, 0.2, 0), left_shin=(1, 0, 0)
    )
    camera = Camera(scale=0.8, rotation=0.3, yaw=0.4, pitch=0.1, center=(0.45, 0.55))
    pairs = {7: "left_forearm", 8: "right_forearm", 9: "left_hand", 10: "right_hand", 11: "left_thigh"}
    pairs |= {12: "right_thigh", 13: "left_shin", 14: "right_shin", 15: "left_foot", 16: "right_foot"}
    for person in people:
        body = person.body
        transforms = pose_joints(body.joints, body.neutral, pose, body.height).astype(float)
        joints = np.einsum("jab,jb->ja", transforms[:, :, :3], body.joints) + transforms[:, :, 3]
        x, y, z = (joints - (0, 0, body.height / 2)).T
        x, y = x * math.cos(0.4) - y * math.sin(0.4), x * math.sin(0.4) + y * math.cos(0.4)
        y, z = y * math.cos(0.1) - z * math.sin(0.1), y * math.sin(0.1) + z * math.cos(0.1)
        distance = 2.6 * body.height
        plane = np.stack([x, -z], 1) * (distance / (distance + y))[:, None] * (0.8 * SIZE[1] / body.height)
        center = np.array([0.45 * SIZE[0] - 0.5, 0.55 * SIZE[1] - 0.5])
        expected = similarity(plane + center, 1.0, 0.3, center)
        keypoints = render_person(person, pose, camera, SIZE).keypoints
        for keypoint, joint in pairs.items():
            limit = 0.035 if "thigh" not in joint else 0.06  # the rig's hip lies higher than COCO's
            error = np.linalg.norm(keypoints[keypoint] - expected[JOINT_INDEX[joint]])
            assert error < limit * 0.8 * SIZE[1], (keypoint, joint)


def test_left_keypoints_are_the_persons_left(people):
    front = render_person(people[0], neutral_pose(), Camera(), SIZE).keypoints
    back = render_person(people[0], neutral_pose(), Camera(yaw=math.pi), SIZE).keypoints
    for left in range(1, 17, 2):
        assert front[left, 0] > front[left + 1, 0]
        assert back[left, 0] < back[left + 1, 0]
    assert front[0, 1] < front[5, 1] < front[11, 1] < front[13, 1] < front[15, 1]


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.2, 2.0), rotation=st.floats(-7, 7), x=st.floats(0, 1), y=st.floats(0, 1))
def test_camera_moves_keypoints_by_a_similarity(people, scale, rotation, x, y):
    pose = posed(left_upper_arm=(0.2, 1.4, 0), right_thigh=(1.0, 0, 0))
    base, _ = project_keypoints(people[1].body, pose, Camera(scale=1.0), SIZE)
    moved, _ = project_keypoints(people[1].body, pose, Camera(scale, rotation, (x, y)), SIZE)
    middle = np.array(SIZE) / 2 - 0.5
    shift = (np.array([x, y]) - 0.5) * SIZE
    np.testing.assert_allclose(moved, similarity(base, scale, rotation, middle) + shift, atol=1e-9 * 200)


@pytest.mark.parametrize("factor", [2, 3])
def test_keypoints_scale_with_the_image_from_edge_to_edge(people, factor):
    small, _ = project_keypoints(people[0].body, neutral_pose(), Camera(), SIZE)
    large, _ = project_keypoints(people[0].body, neutral_pose(), Camera(), (SIZE[0] * factor, SIZE[1] * factor))
    np.testing.assert_allclose((small + 0.5) * factor - 0.5, large, atol=1e-9 * 500)


def test_scores_tell_front_from_back_and_inside_from_outside(people):
    person = people[0]
    assert render_person(person, neutral_pose(), Camera(), SIZE).scores[[0, 1, 2]].tolist() == [1, 1, 1]
    assert render_person(person, neutral_pose(), Camera(yaw=math.pi), SIZE).scores[[0, 1, 2]].tolist() == [0, 0, 0]
    low = render_person(person, neutral_pose(), Camera(scale=0.9, center=(0.5, 1.0)), SIZE)
    assert (low.scores[13:] == 0).all() and (low.scores[5:7] == 1).all()
    outside = (low.keypoints[:, 1] > SIZE[1] - 0.5) | (low.keypoints[:, 1] < -0.5)
    assert (low.scores[outside] == 0).all()


def test_wrist_behind_the_body_is_hidden(people):
    pose = posed(right_upper_arm=(1.2, 0.04, -0.3), right_forearm=(1.2, 0, 0))
    front = render_person(people[0], pose, Camera(), SIZE)
    back = render_person(people[0], pose, Camera(yaw=math.pi), SIZE)
    assert front.scores[10] == 1
    assert back.scores[10] == np.float32(HIDDEN_SCORE)


# Images and masks


def test_mask_is_as_high_as_the_camera_says(people):
    for person in people:
        rows = np.flatnonzero(render_person(person, neutral_pose(), Camera(scale=0.8), (200, 200)).mask.any(1))
        assert rows[-1] + 1 - rows[0] == pytest.approx(160, rel=0.05)
        assert (rows[0] + rows[-1]) / 2 == pytest.approx(99.5, abs=5)


def test_mask_bounds_the_visible_keypoints(people):
    for person in people:
        rendered = render_person(person, posed(left_upper_arm=(0, 1.3, 0)), Camera(rotation=0.7), (200, 200))
        visible = np.rint(rendered.keypoints[rendered.scores == 1]).astype(int)
        assert len(visible) >= 10
        assert rendered.mask[visible[:, 1], visible[:, 0]].mean() > 0.9  # the nose's tip may be a pixel off
        ys, xs = np.nonzero(rendered.mask)
        assert (visible >= (xs.min() - 1, ys.min() - 1)).all() and (visible <= (xs.max() + 1, ys.max() + 1)).all()


def test_quarter_turn_turns_image_and_mask(people):
    camera = {"scale": 0.8, "center": (0.45, 0.55)}
    upright = render_person(people[2], neutral_pose(), Camera(**camera), (128, 128))
    # Turning by 90 degrees clockwise takes (x, y) to (1 - y, x), as shares of the image.
    turned = render_person(people[2], neutral_pose(), Camera(0.8, math.pi / 2, (0.45, 0.45)), (128, 128))
    expected = np.rot90(upright.mask, -1)
    assert (turned.mask & expected).sum() / (turned.mask | expected).sum() > 0.99
    difference = np.abs(turned.image.astype(int) - np.rot90(upright.image, -1).astype(int))
    assert np.median(difference[expected]) <= 2


def test_only_the_person_changes_the_background(people):
    background = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    kept = background.copy()
    rendered = render_person(people[0], neutral_pose(), Camera(), SIZE, background)
    assert np.array_equal(background, kept)
    changed = (rendered.image != background).any(-1)
    assert rendered.mask[changed].mean() > 0.85  # the rest are the half-covered pixels of the edge
    grown = sum(np.roll(rendered.mask, shift, axis) for axis in (0, 1) for shift in (-1, 0, 1)) > 0
    assert not (changed & ~grown).any()


def test_supersampling_averages_edges(people):
    """A white background shines through a share of the edge: many more grey levels than inside and outside alone."""
    dark, bright = (np.full((*SIZE[::-1], 3), level, np.uint8) for level in (0, 255))
    first = render_person(people[0], neutral_pose(), Camera(), SIZE, dark).image.astype(int)
    second = render_person(people[0], neutral_pose(), Camera(), SIZE, bright).image.astype(int)
    coverage = 1 - (second - first)[..., 0] / 255
    assert set(np.unique(np.rint(coverage * 4))) == {0, 1, 2, 3, 4}
    np.testing.assert_allclose(coverage * 4, np.rint(coverage * 4), atol=0.02)


def test_rendering_is_deterministic(people):
    first, second = (render_person(people[0], neutral_pose(), Camera(yaw=0.3), SIZE) for _ in range(2))
    assert np.array_equal(first.image, second.image) and np.array_equal(first.keypoints, second.keypoints)


def test_person_in_front_covers_the_one_behind(people):
    behind = Figure(people[0], neutral_pose(), Camera(scale=0.6))
    front = Figure(people[1], neutral_pose(), Camera(scale=0.9))
    group = render_people([behind, front], SIZE)
    assert not (group.masks[0] & group.masks[1]).any()
    alone = render_person(people[1], neutral_pose(), Camera(scale=0.9), SIZE)
    assert np.array_equal(group.masks[1], alone.mask)
    agree = (group.image == alone.image).all(-1)[alone.mask & ~edge(alone.mask)]
    assert agree.mean() > 0.99  # between fingers and strands the person behind shines through
    assert group.scores[1].min() == 1
    assert set(group.scores[0].tolist()) <= {0.0, 1.0, float(np.float32(HIDDEN_SCORE))}
    assert group.scores[0, 0] == 0 and group.scores[0, 11] == np.float32(HIDDEN_SCORE)


def edge(mask: np.ndarray) -> np.ndarray:
    return sum(np.roll(~mask, shift, axis) for axis in (0, 1) for shift in (-1, 0, 1)) > 0


def test_background_of_another_size_is_an_error(people):
    with pytest.raises(ValueError, match="background"):
        render_person(people[0], neutral_pose(), Camera(), SIZE, np.zeros((8, 8, 3), np.uint8))


# Kernels


def test_vertex_normals_of_an_octahedron_point_outwards():
    vertices = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0], [0, -1, 0], [0, 0, -1], [9, 9, 9]], np.float32)
    faces = np.array(
        [[0, 1, 2], [1, 3, 2], [3, 4, 2], [4, 0, 2], [1, 0, 5], [3, 1, 5], [4, 3, 5], [0, 4, 5]], np.int32
    )
    normals = vertex_normals(vertices, faces)
    np.testing.assert_allclose(normals[:6], vertices[:6], atol=1e-6)
    np.testing.assert_array_equal(normals[6], 0)  # belongs to no face


def draw_triangles(triangles: list[list[tuple[float, float, float]]], colors: list[int], side: int = 8):
    """Triangles given by (x, y, depth), each of one grey, facing the camera or not."""
    screen = np.array(triangles, np.float32).reshape(-1, 3)
    faces = np.arange(len(screen), dtype=np.int32).reshape(-1, 3)
    texture = np.stack([np.full((4, 4, 3), color, np.uint8) for color in colors])
    color = np.zeros((side, side, 3), np.float32)
    depth = np.full((side, side), EMPTY_DEPTH, np.float32)
    rasterize(
        screen,
        np.ones(len(screen), np.float32),
        faces,
        np.zeros((len(faces), 3, 2), np.float32),
        np.arange(len(faces), dtype=np.uint8),
        np.zeros(len(faces), bool),
        texture,
        color,
        depth,
    )
    return color, depth


def test_rasterizer_fills_the_pixels_whose_centres_are_inside():
    corner = [(-0.5, -0.5, 2.0), (-0.5, 7.4, 2.0), (7.4, -0.5, 2.0)]
    color, depth = draw_triangles([corner], [200])
    y, x = np.mgrid[:8, :8]
    inside = x + y <= 6  # the long side runs from (-0.5, 7.4) to (7.4, -0.5): x + y = 6.9
    np.testing.assert_array_equal(depth < EMPTY_DEPTH, inside)
    np.testing.assert_allclose(color[inside], 200, atol=1e-3)
    np.testing.assert_allclose(depth[inside], 2, atol=1e-5)


def test_rasterizer_keeps_the_nearest_and_drops_back_faces():
    near = [(-1.0, -1.0, 1.0), (-1.0, 30.0, 1.0), (30.0, -1.0, 1.0)]
    far = [(x, y, 3.0) for x, y, _ in near]
    for order in ([near, far], [far, near]):
        color, depth = draw_triangles(order, [10 if triangle is near else 90 for triangle in order])
        np.testing.assert_allclose(color, 10, atol=1e-3)
        np.testing.assert_allclose(depth, 1, atol=1e-5)
    _, depth = draw_triangles([near[::-1]], [10])
    assert (depth == EMPTY_DEPTH).all()


def test_resolve_averages_over_the_background():
    color = np.full((4, 4, 3), 100, np.float32)
    depth = np.full((4, 4), EMPTY_DEPTH, np.float32)
    depth[0, 0] = depth[0, 2] = depth[1, 3] = depth[2:, :2] = 1  # 1, 2, 4 and 0 samples of the four pixels
    image, mask = np.full((2, 2, 3), 20, np.uint8), np.zeros((2, 2), bool)
    resolve(color, depth, 2, image, mask)
    np.testing.assert_array_equal(image[..., 0], [[40, 60], [100, 20]])
    np.testing.assert_array_equal(mask, [[False, True], [True, False]])
