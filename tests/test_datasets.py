"""Data sets: what an item holds, determinism, splits, workers, and folders of videos."""

import math

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from core.errors import UserError
from data.datasets import RenderedPeople, VideoFolder
from data.drawing import draw_pose
from data.people import load_people
from data.pose import Poses
from data.scenes import CameraRanges, misaligned_reference, random_camera
from data.video import write_video

SIZE = (48, 64)
KEYS = {"reference", "frames", "poses", "reference_mask", "masks", "reference_keypoints", "keypoints"}


@pytest.fixture(scope="module")
def library():
    return load_people()


def rendered(library, **arguments) -> RenderedPeople:
    return RenderedPeople(**{"size": SIZE, "num_frames": 2, "length": 6, "library": library} | arguments)


def check_item(item: dict[str, torch.Tensor], size: tuple[int, int], frames: int) -> None:
    width, height = size
    assert set(item) == KEYS
    assert all(value.dtype == torch.float32 for value in item.values())
    assert item["reference"].shape == (3, height, width)
    assert item["frames"].shape == item["poses"].shape == (3, frames, height, width)
    assert item["reference_mask"].shape == (1, height, width)
    assert item["masks"].shape == (1, frames, height, width)
    assert item["reference_keypoints"].shape == (17, 3)
    assert item["keypoints"].shape == (frames, 17, 3)
    for name, low, high in (("reference", -1, 1), ("frames", -1, 1), ("poses", 0, 1)):
        assert low <= item[name].min() < item[name].max() <= high
    assert item["frames"].min() < -0.1
    for name in ("masks", "reference_mask"):
        assert set(item[name].unique().tolist()) <= {0.0, 1.0}
    assert 0 <= item["keypoints"][..., 2].min() and item["keypoints"][..., 2].max() <= 1


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in KEYS)


# Rendered people


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
        for split in ("train", "heldout")
    }
    assert not {person.body for person in people["train"]} & {person.body for person in people["heldout"]}
    assert not {person.seed for person in people["train"]} & {person.seed for person in people["heldout"]}


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


def test_pose_pictures_are_drawn_from_the_keypoints(library):
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


# Folders of videos


@pytest.fixture(scope="module")
def folder(library, tmp_path_factory):
    """Two videos of rendered people, 96 x 64 pixels and 8 frames; the first with masks, the second in a subfolder."""
    root = tmp_path_factory.mktemp("videos")
    dataset = rendered(library, size=(96, 64), num_frames=8, cameras=CameraRanges(close_ups=0.0))
    for index, name in enumerate(("first", "sub/second")):
        (root / name).parent.mkdir(exist_ok=True)
        item = dataset[index]
        frames = ((item["frames"].permute(1, 2, 3, 0) + 1) * 127.5).round().numpy().astype(np.uint8)
        write_video(root / f"{name}.mp4", frames, fps=8)
        keypoints = item["keypoints"].numpy()[:, None]
        Poses(keypoints[..., :2], keypoints[..., 2], (96, 64), 8.0).save(root / f"{name}.npz")
        if index == 0:
            np.save(root / "frames.npy", frames)
            write_masks(root / "first_masks", item["masks"][0].numpy().astype(bool))
    return root


def write_masks(folder, masks: np.ndarray, suffix: str = "") -> None:
    folder.mkdir(exist_ok=True)
    for number, mask in enumerate(masks):
        cv2.imwrite(str(folder / f"{number:06d}{suffix}.png"), mask.astype(np.uint8) * 255)


def test_video_items_have_the_documented_shapes_and_ranges(folder):
    dataset = VideoFolder(folder, size=(32, 32), num_frames=3, stride=2, length=8)
    for index in range(8):
        check_item(dataset[index], (32, 32), 3)
    assert len(VideoFolder(folder, size=(32, 32))) == 2
    assert same(dataset[3], VideoFolder(folder, size=(32, 32), num_frames=3, stride=2, length=8)[3])
    assert not same(dataset[3], VideoFolder(folder, size=(32, 32), num_frames=3, stride=2, length=8, seed=1)[3])


def matching_frames(dataset: VideoFolder, poses: Poses, scale: float, shift: float) -> list[tuple[dict, list[int]]]:
    """Items of the video with these poses, with the frame numbers found by comparing the expected keypoints."""
    found = []
    expected = poses.keypoints[:, 0] * scale + shift * np.array([1, 0])
    for index in range(len(dataset)):
        item = dataset[index]
        keypoints = torch.cat([item["reference_keypoints"][None], item["keypoints"]]).numpy()[..., :2]
        distances = np.abs(keypoints[:, None] - expected[None]).max((-1, -2))
        if distances.min(1).max() < 1e-3:
            found.append((item, distances.argmin(1).tolist()))
    return found


def test_keypoints_pictures_and_masks_are_cropped_alike(folder):
    """96 x 64 to 64 x 64: the crop takes columns 16 to 79, without scaling, so all numbers are known."""
    source = np.load(folder / "frames.npy")
    dataset = VideoFolder(folder, size=(64, 64), num_frames=2, stride=3, length=12)
    items = matching_frames(dataset, Poses.load(folder / "first.npz"), scale=1.0, shift=-16.0)
    assert len(items) >= 2
    for item, (reference, first, second) in items:
        assert second == first + 3 and reference not in (first, second)
        for picture, number in ((item["reference"], reference), (item["frames"][:, 1], second)):
            difference = (picture.permute(1, 2, 0).numpy() + 1) * 127.5 - source[number][:, 16:80]
            assert np.abs(difference).mean() < 8  # the video is compressed
        person = np.linalg.norm(source[second][:, 16:80].astype(float), axis=-1)[item["masks"][0, 1].numpy() > 0]
        assert len(person) > 50


def test_masks_are_those_of_the_frames(folder, library):
    expected = rendered(library, size=(96, 64), num_frames=8, cameras=CameraRanges(close_ups=0.0))[0]["masks"]
    dataset = VideoFolder(folder, size=(64, 64), num_frames=2, stride=3, length=12)
    for item, (reference, first, second) in matching_frames(dataset, Poses.load(folder / "first.npz"), 1.0, -16.0):
        assert torch.equal(item["masks"], expected[:, [first, second], :, 16:80])
        assert torch.equal(item["reference_mask"], expected[:, reference, :, 16:80])


def test_scaling_keeps_pixel_centres(folder):
    """96 x 64 to 48 x 32: half the size, edges to edges, so x becomes (x + 0.5) / 2 - 0.5."""
    poses = Poses.load(folder / "first.npz")
    item = VideoFolder(folder, size=(48, 32), num_frames=8, length=6)
    shifted = Poses(poses.keypoints - [0.0, 0.5], poses.scores, poses.size, poses.fps)
    found = matching_frames(item, shifted, scale=0.5, shift=-0.25)
    assert found and all(numbers[1:] == list(range(8)) for _, numbers in found)


def test_keypoints_outside_the_crop_are_not_visible(folder):
    for index in range(8):
        keypoints = VideoFolder(folder, size=(16, 64), length=8)[index]["keypoints"].numpy()
        outside = (keypoints[..., 0] < -0.5) | (keypoints[..., 0] > 15.5)
        assert (keypoints[outside][:, 2] == 0).all()


def test_without_masks_every_pixel_is_the_persons(folder):
    for index in range(8):
        item = VideoFolder(folder / "sub", size=(32, 32), length=8)[index]
        assert (item["masks"] == 1).all() and (item["reference_mask"] == 1).all()


def test_several_persons_are_drawn_together(folder, tmp_path):
    poses = Poses.load(folder / "first.npz")
    both = np.concatenate([poses.keypoints, poses.keypoints + [20.0, 0.0]], 1)
    Poses(both, np.repeat(poses.scores, 2, 1), poses.size, poses.fps).save(tmp_path / "pair.npz")
    (tmp_path / "pair.mp4").write_bytes((folder / "first.mp4").read_bytes())
    masks = np.zeros((2, 8, 64, 96), bool)
    masks[0, :, :, 30:40] = masks[1, :, :, 60:70] = True
    for person in range(2):
        write_masks(tmp_path / "pair_masks", masks[person], f"_p{person}")
    item = VideoFolder(tmp_path, size=(96, 64))[0]
    assert torch.equal(item["masks"][0, 0].bool(), torch.from_numpy(masks.any(0)[0]))
    alone = VideoFolder(folder, size=(96, 64), length=20)
    single = next(alone[i] for i in range(20) if torch.equal(alone[i]["keypoints"], item["keypoints"]))
    assert (item["poses"] > 0).sum() > 1.5 * (single["poses"] > 0).sum()


def test_folders_without_usable_videos_are_user_errors(folder, tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        VideoFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no video with a pose file"):
        VideoFolder(tmp_path)
    with pytest.raises(UserError, match="15 frames or more"):
        VideoFolder(folder, num_frames=8, stride=2)


def test_poses_of_another_video_are_a_user_error(folder, tmp_path):
    (tmp_path / "clip.mp4").write_bytes((folder / "first.mp4").read_bytes())
    Poses.load(folder / "first.npz")[:5].save(tmp_path / "clip.npz")
    with pytest.raises(UserError, match="8 frames"):
        VideoFolder(tmp_path, size=(32, 32))[0]


def test_a_missing_mask_is_a_user_error(folder, tmp_path):
    (tmp_path / "clip.mp4").write_bytes((folder / "first.mp4").read_bytes())
    (tmp_path / "clip.npz").write_bytes((folder / "first.npz").read_bytes())
    (tmp_path / "clip_masks").mkdir()
    with pytest.raises(UserError, match="no mask of frame"):
        VideoFolder(tmp_path, size=(32, 32))[0]
