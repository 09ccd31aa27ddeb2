"""Bodies of other proportions: bones of the asked lengths, one mesh without tears, keypoints and soles in place."""

from dataclasses import fields, replace

import numpy as np
import pytest

from data.people.bodies import JOINT_INDEX, Body, Pose, build_person, load_people, neutral_pose, random_identity
from data.people.proportions import PROPORTIONS, Proportions, in_own_steps, leg_share, rescaled
from data.people.renderer import Camera, render_person

NAMES = [name for name in PROPORTIONS if name != "own"]
# Measures -> bones that they are of, as (joint, its child).
BONES = {
    "trunk": [("pelvis", "spine"), ("spine", "chest"), ("chest", "neck")],
    "neck": [("neck", "head")],
    "shoulders": [("left_clavicle", "left_upper_arm"), ("right_clavicle", "right_upper_arm")],
    "arms": [("left_upper_arm", "left_forearm"), ("right_forearm", "right_hand")],
    "legs": [("left_thigh", "left_shin"), ("right_shin", "right_foot")],
}


@pytest.fixture(scope="module")
def library():
    return load_people()


@pytest.fixture(scope="module")
def body(library) -> Body:
    return library.bodies["development_03"]


def bone(body: Body, start: str, end: str) -> np.ndarray:
    return body.joints[JOINT_INDEX[end]].astype(float) - body.joints[JOINT_INDEX[start]]


def at_rest(body: Body) -> np.ndarray:
    """COCO keypoints (17, 3) of the body at rest."""
    return body.keypoints[..., :3].sum(1)


def test_own_proportions_are_the_body_itself(library, body):
    assert rescaled(body, library.topology, PROPORTIONS["own"]) is body
    nearly = rescaled(body, library.topology, Proportions(arms=1 + 1e-9))
    for field in fields(Body):
        np.testing.assert_allclose(getattr(nearly, field.name), getattr(body, field.name), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bones_have_the_asked_lengths(library, body, name):
    asked, made = PROPORTIONS[name], rescaled(body, library.topology, PROPORTIONS[name])
    for measure, bones in BONES.items():
        for ends in bones:
            old, new = bone(body, *ends), bone(made, *ends)
            if measure in ("trunk", "neck"):  # along the body, so that a bent spine stays as bent
                old, new = old[2], new[2]
            assert np.linalg.norm(new) == pytest.approx(getattr(asked, measure) * np.linalg.norm(old), rel=1e-4)
    eyes = [np.linalg.norm(np.diff(at_rest(shown)[1:3], axis=0)) for shown in (body, made)]
    assert eyes[1] == pytest.approx(asked.head * eyes[0], rel=1e-3)
    assert leg_share(made) * made.height == pytest.approx(asked.legs * leg_share(body) * body.height, rel=1e-4)
    # Limbs at rest point where they did, so the way to the neutral pose is the same.
    np.testing.assert_allclose(made.neutral, body.neutral, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_mesh_does_not_tear_and_keypoints_stay_on_it(library, body, name):
    faces, made = library.topology.faces, rescaled(body, library.topology, PROPORTIONS[name])
    assert made.vertices.shape == body.vertices.shape and made.vertices.dtype == body.vertices.dtype
    edges = np.unique(np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1), axis=0)
    lengths = [np.linalg.norm(np.diff(shown.vertices[edges], axis=1)[:, 0], axis=1) for shown in (body, made)]
    visible = lengths[0] > 0.004  # metres
    grown = lengths[1][visible] / lengths[0][visible]
    assert 0.3 < grown.min() and grown.max() < 3
    # Whatever a keypoint is nearest to at rest, it stays about as near to.
    nearest = [np.linalg.norm(body.vertices - point, axis=1).argmin() for point in at_rest(body)]
    offsets = [at_rest(shown) - shown.vertices[nearest] for shown in (body, made)]
    assert np.linalg.norm(offsets[1] - offsets[0], axis=1).max() < 0.04


@pytest.mark.parametrize("name", NAMES)
def test_it_stands_on_its_soles(library, body, name):
    made = rescaled(body, library.topology, PROPORTIONS[name])
    assert made.height == pytest.approx(made.vertices[:, 2].max())
    ankles = [shown.joints[JOINT_INDEX["left_foot"], 2] / shown.height for shown in (body, made)]
    assert ankles[1] == pytest.approx(ankles[0], rel=0.02)
    soles = [shown.vertices[:, 2].min() / shown.height for shown in (body, made)]
    assert soles[1] == pytest.approx(soles[0], abs=1e-3)


def test_ways_are_as_many_lengths_of_ones_own_legs(library, body):
    """A pose's translation counts in body heights; in metres it is multiplied by what the legs are."""
    child, pose = rescaled(body, library.topology, PROPORTIONS["child"]), Pose(np.eye(3), np.array([0.1, -0.2, 0.3]))
    found = in_own_steps(pose, body, child).translation * child.height
    np.testing.assert_allclose(found, PROPORTIONS["child"].legs * pose.translation * body.height, rtol=1e-5)
    np.testing.assert_array_equal(in_own_steps(pose, body, body).translation, pose.translation)


def test_it_is_dressed_and_rendered_as_any_other(library):
    identity = random_identity(np.random.default_rng(2), library, "development")
    made = rescaled(library.bodies[identity.body], library.topology, PROPORTIONS["large_headed"])
    people = (
        build_person(identity, library, 64),
        build_person(identity, replace(library, bodies={identity.body: made})),
    )
    plain, large = (render_person(person, neutral_pose(), Camera(), (64, 96)) for person in people)
    heads = [np.ptp(shown.keypoints[3:5, 0]) for shown in (plain, large)]  # from ear to ear
    assert heads[1] > 1.4 * heads[0]
    heights = [np.ptp(np.nonzero(shown.mask)[0]) for shown in (plain, large)]
    assert abs(heights[1] - heights[0]) <= 2  # cameras count in standing heights
