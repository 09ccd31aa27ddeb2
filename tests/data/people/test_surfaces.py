"""Surface maps of rendered people, their cache, and attention supervised by them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import check_config
from core.errors import UserError
from data.people.bodies import build_person, load_people, random_identity
from data.people.renderer import Camera, Light, project_keypoints, render_person, render_surface
from data.people.renderer import Figure as Posed
from tests.networks import TINY
from tpc.config import CompositionConfig
from training.attention_loss import SAME_POINT, surface_points
from training.config import AttentionLossConfig, AugmentationConfig, DataConfig, TrainConfig
from training.data import make_dataset
from training.objective import sample_generators

SIZE = (96, 96)
NOSE, EYES = 0, (1, 2)


@pytest.fixture(scope="module")
def scenes():
    """Clips with other poses in reference and frame."""
    data = make_dataset(DataConfig(size=list(SIZE), num_frames=1, stride=4), 8)
    return [data.scene(i) for i in range(8)]


@pytest.fixture(scope="module")
def person():
    library = load_people()
    return build_person(random_identity(np.random.default_rng(5), library), library, 64)


def surface_batch(frames: list[np.ndarray], references: list[np.ndarray], side: int = 64) -> dict[str, torch.Tensor]:
    def tensor(maps: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(maps)).permute(0, 3, 1, 2).float()

    return {
        "surfaces": tensor(frames)[:, :, None],
        "reference_surface": tensor(references),
        "poses": torch.zeros(len(frames), 3, 1, side, side),
    }


def test_map_covers_the_person(scenes):
    for scene in scenes:
        mask = render_person(scene.person, scene.poses[0], scene.camera, SIZE).mask
        shown = np.isfinite(render_surface(scene.person, scene.poses[0], scene.camera, SIZE)).all(-1)
        assert (mask & shown).sum() > 0.9 * (mask | shown).sum()


def test_points_lie_on_the_person_at_rest(scenes):
    for scene in scenes:
        surface = render_surface(scene.person, scene.poses[0], scene.camera, SIZE)
        points = surface[np.isfinite(surface).all(-1)]
        vertices = scene.person.vertices
        distances = np.linalg.norm(points[::7, None] - vertices[None], axis=-1).min(1)
        assert distances.max() < 0.08, "metres from a triangle's corner"


def test_same_point_has_the_same_colour_in_two_images(scenes):
    """Colours come from textures, of which the maps know nothing, and light that falls everywhere leaves them so."""
    light, same, other = Light(ambient=1.0), [], []
    for scene in scenes:
        poses = (scene.reference_pose, scene.poses[0])
        maps = [render_surface(scene.person, pose, scene.camera, SIZE).reshape(-1, 3) for pose in poses]
        images = [
            render_person(scene.person, pose, scene.camera, SIZE, light=light).image.reshape(-1, 3).astype(float)
            for pose in poses
        ]
        reference, frame = (np.flatnonzero(np.isfinite(part).all(-1)) for part in maps)
        distances = np.linalg.norm(maps[1][frame][:, None] - maps[0][reference][None], axis=-1)
        near = distances.min(1) < 0.02
        match = reference[distances.argmin(1)]
        same.append(np.abs(images[1][frame] - images[0][match])[near].mean())
        other.append(np.abs(images[1][frame] - images[0][np.roll(match, len(match) // 3)])[near].mean())
    assert np.mean(same) < 0.4 * np.mean(other)


@settings(max_examples=15, deadline=None)
@given(x=st.integers(-8, 8), y=st.integers(-8, 8))
def test_map_moves_with_the_camera(x, y, scenes):
    scene = scenes[0]
    still = replace(scene.camera, scale=0.5, center=(0.5, 0.5))
    moved = replace(still, center=(0.5 + x / SIZE[0], 0.5 + y / SIZE[1]))
    before, after = (render_surface(scene.person, scene.poses[0], c, SIZE) for c in (still, moved))
    # Perspective is of the person, not of the image, so a shift by whole places changes nothing else.
    rows, columns = slice(10, 86), slice(10, 86)
    shifted = after[10 + y : 86 + y, 10 + x : 86 + x]
    agree = np.isclose(before[rows, columns], shifted, atol=0.02, equal_nan=True).all(-1)
    assert agree.mean() > 0.99


def test_keypoints_of_the_face_are_found_through_the_surface(person):
    """The nose of a standing person in one framing, looked up in another by its point on the surface."""
    data = make_dataset(DataConfig(size=list(SIZE), num_frames=1), 1)
    pose = data.scene(0).reference_pose
    cameras = [Camera(scale=1.4, center=(0.5, 0.75)), Camera(scale=1.1, rotation=0.4, center=(0.45, 0.6))]
    figures = [Posed(person, pose, camera) for camera in cameras]
    here, there = (project_keypoints(f.person.body, f.pose, f.camera, SIZE)[0] for f in figures)
    frame, reference = (render_surface(person, pose, camera, SIZE) for camera in cameras)
    column, row = np.rint(here[NOSE]).astype(int)
    distances = np.linalg.norm(np.nan_to_num(reference, nan=1e3) - frame[row, column], axis=-1)
    found = np.unravel_index(distances.argmin(), distances.shape)[::-1]
    assert np.linalg.norm(np.array(found) - there[NOSE]) < 2


def test_images_that_are_alike_match_place_by_place(scenes):
    maps = [render_surface(s.person, s.poses[0], s.camera, (32, 32)) for s in scenes[:3]]
    points = surface_points(surface_batch(maps, maps), 40, sample_generators(0, range(3)))
    assert points.body == 40
    for number, surface in enumerate(maps):
        shown = np.isfinite(surface).all(-1)
        assert points.valid[number].sum() == min(40, shown.sum())
        valid = points.valid[number]
        assert torch.equal(points.targets[number][valid], points.sources[number][valid])
        # Places of the map are 2 x 2 pixels, and their middles lie between pixel centres.
        columns, rows = ((points.targets[number][valid] - 0.5) / 2).round().long().T
        assert shown[rows.numpy(), columns.numpy()].all()
        assert len({(int(r), int(c)) for r, c in zip(rows, columns, strict=True)}) == valid.sum(), "no point twice"


def test_what_the_reference_does_not_show_is_not_supervised(scenes):
    surface = render_surface(scenes[0].person, scenes[0].poses[0], scenes[0].camera, (32, 32))
    shown = np.argwhere(np.isfinite(surface).all(-1))
    half = surface.copy()
    half[: shown[len(shown) // 2][0]] = np.nan
    points = surface_points(surface_batch([surface], [half]), 10_000, sample_generators(0, range(1)))
    assert points.targets.shape == (1, 32 * 32, 2), "never more than there are places"
    lower = np.isfinite(half).all(-1).sum()
    assert lower <= points.valid.sum() < len(shown)
    rows = ((points.sources[0][points.valid[0]][:, 1] - 0.5) / 2).round().long()
    assert np.isfinite(half).all(-1)[rows.numpy()].any(-1).all(), "sources lie where the reference shows the person"
    nobody = np.full_like(surface, np.nan)
    assert not surface_points(surface_batch([surface], [nobody]), 20, sample_generators(0, range(1))).valid.any()
    assert not surface_points(surface_batch([nobody], [surface]), 20, sample_generators(0, range(1))).valid.any()
    assert SAME_POINT < 0.1


def test_points_of_a_sample_do_not_depend_on_its_batch(scenes):
    maps = [render_surface(s.person, s.poses[0], s.camera, (32, 32)) for s in scenes[:2]]
    both = surface_points(surface_batch(maps, maps), 16, sample_generators(0, range(2)))
    second = surface_points(surface_batch(maps[1:], maps[1:]), 16, sample_generators(0, range(1, 2)))
    assert torch.equal(both.targets[1:], second.targets)


def test_cache_keeps_the_maps_of_its_images(tmp_path):
    config = DataConfig(size=[32, 32], stride=4, workers=0, cache=str(tmp_path / "c"), cache_clips=3, cache_frames=2)
    plain = make_dataset(config, 6)
    assert "surfaces" not in plain[0]
    clips = make_dataset(replace(config, cache_surfaces=True), 6)
    written = (tmp_path / "c" / "surfaces" / "surfaces.npy").stat().st_mtime_ns
    assert make_dataset(replace(config, cache_surfaces=True), 6)[3].keys() == clips[3].keys()
    assert (tmp_path / "c" / "surfaces" / "surfaces.npy").stat().st_mtime_ns == written, "made once"
    for index in range(6):
        item = clips[index]
        assert item["surfaces"].shape == (3, 1, 16, 16) and item["reference_surface"].shape == (3, 16, 16)
        for surface, mask in (
            (item["surfaces"][:, 0], item["masks"][0, 0]),
            (item["reference_surface"], item["reference_mask"][0]),
        ):
            person = torch.nn.functional.avg_pool2d(mask[None], 2)[0]
            shown = surface.isfinite().all(0)
            assert shown[person == 1].float().mean() > 0.9
            assert not shown[torch.nn.functional.max_pool2d(person[None], 3, 1, 1)[0] == 0].any()


def test_options_that_cannot_work_are_refused():
    good = TrainConfig(
        stage="image",
        output="x",
        model=replace(TINY, vae="vae"),
        data=DataConfig(cache="x", cache_surfaces=True),
        attention=AttentionLossConfig(weight=0.5, surface=16),
    )
    check_config(good)
    moved = AugmentationConfig(composition=CompositionConfig(probability=0.5, fill="scene"))
    for bad, message in (
        (replace(good, data=DataConfig(cache="x")), "attention.surface=16 needs data.cache_surfaces"),
        (replace(good, data=DataConfig(cache_surfaces=True)), "give data.cache="),
        (replace(good, data=DataConfig(source="videos", root="v", cache="x", cache_surfaces=True)), "rendered people"),
        (replace(good, attention=AttentionLossConfig(surface=-1)), "attention.surface=-1"),
        (replace(good, augmentation=moved), "references that stay as they are"),
    ):
        with pytest.raises(UserError, match=message):
            check_config(bad)
