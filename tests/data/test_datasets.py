"""Rendered data sets: what an item holds, determinism, splits, workers."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from data.clips.rendered import RenderedPeople
from data.config import SPLITS, PeopleConfig
from data.people.bodies import load_people
from data.people.scenes import CameraRanges, misaligned_reference, random_camera
from data.poses.drawing import draw_pose
from tests.items import check_item, same
from tpc.procrustes import SimilarityTransform

SIZE = (48, 64)


@pytest.fixture(scope="module")
def library():
    return load_people()


def rendered(library, **arguments) -> RenderedPeople:
    return RenderedPeople(**{"size": SIZE, "num_frames": 2, "length": 6, "library": library} | arguments)


@pytest.mark.parametrize(("size", "frames"), [((48, 64), 1), ((64, 48), 3)])
def test_items_have_the_documented_shapes_and_ranges(library, size, frames):
    dataset = rendered(library, size=size, num_frames=frames)
    for index in range(3):
        check_item(dataset[index], size, frames)


def test_items_depend_on_seed_split_and_index_alone(library):
    item = rendered(library)[1]
    assert same(item, rendered(library)[1])
    assert same(item, rendered(library, length=99)[1])
    for other in (rendered(library)[2], rendered(library, seed=1)[1], rendered(library, split="heldout")[1]):
        assert not torch.equal(item["frames"], other["frames"])


def test_splits_show_different_people(library):
    people = {
        split: {rendered(library, split=split, length=40).scene(index).person.identity for index in range(20)}
        for split in SPLITS
    }
    for one, other in combinations(SPLITS, 2):
        assert not {person.body for person in people[one]} & {person.body for person in people[other]}
        assert not {person.seed for person in people[one]} & {person.seed for person in people[other]}


def test_reference_shares_camera_background_and_person_with_the_frames(library):
    dataset = rendered(library, cameras=CameraRanges(height=(0.6, 0.7), close_ups=0.0))
    for index in range(4):
        item = dataset[index]
        person = (item["reference_mask"] + item["masks"].amax(1)).clamp(max=1)
        person = torch.nn.functional.max_pool2d(person[None], 3, 1, 1)[0]  # and the half-covered pixels of the edge
        away = (person == 0).expand(3, -1, -1)
        assert away.float().mean() > 0.3
        for frame in range(2):
            assert torch.equal(item["reference"][away], item["frames"][:, frame][away])


def test_references_show_another_pose(library):
    dataset = rendered(library, num_frames=1, length=20)
    moved = []
    for index in range(20):
        scene = dataset.scene(index)
        moved.append(np.abs(scene.reference_pose.rotations - scene.poses[0].rotations).max())
    assert np.median(moved) > 0.3


def test_pose_images_are_drawn_from_the_keypoints(library):
    item = rendered(library)[0]
    for frame in range(2):
        keypoints = item["keypoints"][frame].numpy()
        expected = draw_pose(keypoints[None, :, :2], keypoints[None, :, 2], SIZE)
        drawn = (item["poses"][:, frame].permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)
        assert np.array_equal(drawn, expected)


def test_frames_of_a_clip_move_with_the_stride(library):
    """Frame k at stride 4 is frame 4 k at stride 1 when both clips start together: same motion, same rate."""
    long = rendered(library, num_frames=5, stride=1)
    short = rendered(library, num_frames=2, stride=4)
    for index in range(3):
        fine, coarse = long.scene(index), short.scene(index)
        assert np.array_equal(fine.poses[0].rotations, coarse.poses[0].rotations)
        assert np.array_equal(fine.poses[4].rotations, coarse.poses[1].rotations)


def test_cameras_stay_in_their_ranges():
    ranges = CameraRanges()
    cameras = [random_camera(np.random.default_rng(seed), ranges) for seed in range(400)]
    scales = np.array([camera.scale for camera in cameras])
    ordinary = (scales >= ranges.height[0]) & (scales <= ranges.height[1])
    close = (scales >= ranges.close_up_height[0]) & (scales <= ranges.close_up_height[1])
    assert (ordinary | close).all()
    assert 0.05 < close.mean() < 0.2
    assert max(abs(camera.rotation) for camera in cameras) <= ranges.rotation
    assert scales[ordinary].std() > 0.1


def test_close_ups_show_the_head(library):
    dataset = rendered(library, cameras=CameraRanges(close_ups=1.0), length=20)
    rows = np.array([dataset[index]["reference_keypoints"][0, 1].item() for index in range(10)]) / SIZE[1]
    assert np.median(rows) > 0 and np.median(rows) < 0.4


@pytest.mark.parametrize(("scale", "rotation"), [(0.5, 0.0), (1.0, 2.5), (0.7, -1.0)])
def test_misaligned_reference_is_the_reference_after_a_similarity(library, scale, rotation):
    scene = rendered(library).scene(0)
    aligned = misaligned_reference(scene)
    moved = misaligned_reference(scene, scale=scale, rotation=rotation)
    center = np.array(scene.camera.center) * SIZE - 0.5
    matrix = scale * np.array([[math.cos(rotation), -math.sin(rotation)], [math.sin(rotation), math.cos(rotation)]])
    np.testing.assert_allclose(moved.keypoints, (aligned.keypoints - center) @ matrix.T + center, atol=1e-3)
    np.testing.assert_array_equal(aligned.image, scene.render(scene.reference_pose).image)
    assert moved.mask.sum() == pytest.approx(scale**2 * aligned.mask.sum(), rel=0.15)


def test_reframed_references_show_the_person_elsewhere_before_the_same_background(library):
    plain = rendered(library, length=24, size=(96, 96), num_frames=1)
    moved = rendered(library, length=24, size=(96, 96), num_frames=1, people=PeopleConfig(reframed=0.6))
    scenes = [moved.scene(index) for index in range(24)]
    others = [index for index, scene in enumerate(scenes) if scene.reference_camera is not None]
    assert 0.4 < len(others) / 24 < 0.8
    scales = [scenes[i].reference_camera.scale / scenes[i].camera.scale for i in others]
    turns = [scenes[i].reference_camera.rotation - scenes[i].camera.rotation for i in others]
    shifts = np.array([np.subtract(scenes[i].reference_camera.center, scenes[i].camera.center) for i in others])
    assert 0.55 <= min(scales) < 0.75 and 1.2 < max(scales) <= 1.5
    assert 4 < np.ptp(turns) and np.abs(turns).max() <= np.pi and 0.08 < np.abs(shifts).max() <= 0.12
    index = others[0]
    ours, theirs = moved[index], plain[index]
    for name in ("frames", "masks", "keypoints"):
        assert torch.equal(ours[name], theirs[name]), "the clip itself is the same"
    away = (torch.nn.functional.max_pool2d(ours["reference_mask"] + theirs["reference_mask"], 3, 1, 1) == 0)[0]
    assert torch.equal(ours["reference"][:, away], theirs["reference"][:, away])
    # Keypoints move as the camera does: the two references differ by its similarity.
    seen = (ours["reference_keypoints"][:, 2] > 0) & (theirs["reference_keypoints"][:, 2] > 0)
    points = [item["reference_keypoints"][:, :2].double() for item in (theirs, ours)]
    found = SimilarityTransform.from_estimate(*points, seen.double())
    assert abs(found.scale.item() / scales[0] - 1) < 0.1


def test_misaligned_reference_on_another_background(library):
    scene = rendered(library).scene(0)
    background = np.full((80, 100, 3), 7, np.uint8)
    moved = misaligned_reference(scene, shift=(0.1, -0.1), background=background)
    assert moved.image.shape == (80, 100, 3)
    assert (moved.image == 7).all(-1).mean() > 0.3


def test_items_collate_and_workers_agree_with_the_main_process(library):
    dataset = rendered(library, length=4)
    expected = default_collate([dataset[index] for index in range(4)])
    loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context="fork")
    batch = next(iter(loader))
    assert batch["frames"].shape == (4, 3, 2, SIZE[1], SIZE[0])
    assert same(batch, expected)


def test_spawned_workers_agree_too(library):
    dataset = rendered(library, length=1)
    loader = DataLoader(dataset, num_workers=1, multiprocessing_context="spawn")
    assert same(next(iter(loader)), default_collate([dataset[0]]))


def test_wrong_arguments_are_errors(library):
    with pytest.raises(ValueError, match="num_frames"):
        rendered(library, num_frames=0)
    with pytest.raises(ValueError, match="split"):
        rendered(library, split="test")
    with pytest.raises(IndexError):
        rendered(library)[6]
    assert len(list(rendered(library))) == 6
