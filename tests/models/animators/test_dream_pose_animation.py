"""DreamPose in the animation pipeline, and TPC by whole images."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from data.poses.poses import Poses
from models.animators.registry import load_pipeline
from models.attention.layers import token_levels
from models.attention.recording import AttentionConfig, AttentionRecording
from models.images import as_images
from tests.dream_pose_parts import FRAMES, LATENTS, SIZE, TOKENS, noise, run, small_pipeline
from tpc import CalibrationConfig, calibrate


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline()


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    """Reference (20, 16, 3) and pose images (6, 20, 16, 3)."""
    draw = np.random.default_rng(0).integers(0, 256, (1 + FRAMES, *SIZE, 3), dtype=np.uint8)
    return draw[0], draw[1:]


def test_still_poses_give_still_frames(pipeline, images):
    """The same noise in every frame: what differs between frames are their poses, nothing else."""
    reference, poses = images
    still = run(pipeline, reference, np.repeat(poses[:1], FRAMES, axis=0))
    assert torch.allclose(still, still[:, :, :1].expand_as(still), atol=1e-5)
    moving = run(pipeline, reference, poses)
    assert not torch.allclose(moving[:, :, 0], moving[:, :, 3], atol=1e-2)


def test_a_pose_reaches_two_frames_around_it(pipeline, images):
    reference, poses = images
    changed = poses.copy()
    changed[0] = 255 - changed[0]
    difference = (run(pipeline, reference, poses) - run(pipeline, reference, changed)).abs().amax(dim=(0, 1, 3, 4))
    assert (difference[:3] > 1e-3).all() and (difference[3:] < 1e-5).all()


def test_windows_change_nothing(pipeline, images):
    whole = run(pipeline, *images, window_size=FRAMES)
    assert torch.allclose(whole, run(pipeline, *images, window_size=2), atol=1e-5)


def test_reference_and_guidance_matter(pipeline, images):
    reference, poses = images
    base = run(pipeline, reference, poses)
    assert base.shape == (1, 4, FRAMES, *LATENTS) and base.isfinite().all()
    assert not torch.allclose(base, run(pipeline, 255 - reference, poses), atol=1e-2)
    assert not torch.allclose(base, run(pipeline, reference, poses, guidance_scale=(3.5, 0)), atol=1e-2)
    assert torch.equal(base, run(pipeline, reference, poses))
    unposed = [run(pipeline, reference, p, guidance_scale=(2, 0)) for p in (poses, 255 - poses)]
    assert torch.equal(*unposed)


def test_denoising_starts_from_the_reference_under_noise(pipeline, images):
    animator, scheduler = pipeline.animator, deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(4)
    start, drawn = torch.randn(1, 4, 1, *LATENTS).expand(-1, -1, FRAMES, -1, -1), noise()
    kept = scheduler.alphas_cumprod[scheduler.timesteps[0]]
    expected = kept.sqrt() * start + (1 - kept).sqrt() * drawn
    assert torch.allclose(animator.initial_latents(drawn, scheduler, lambda: start), expected, atol=1e-6)


def test_half_precision_runs(images):
    pipeline = small_pipeline().to(torch.bfloat16)
    assert run(pipeline, *images).isfinite().all()


@pytest.mark.parametrize(("mode", "blocks"), [("leaf_level", None), ("block_level", 1)])
def test_offloading_changes_nothing(pipeline, images, mode, blocks):
    saver = small_pipeline()
    saver.enable_group_offload(torch.device("cpu"), offload_type=mode, num_blocks_per_group=blocks)
    assert torch.equal(run(saver, *images), run(pipeline, *images))


def test_save_and_load_give_the_same_frames(pipeline, images, tmp_path):
    pipeline.save_pretrained(tmp_path / "p")
    loaded = load_pipeline(tmp_path / "p")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipeline) and loaded.pose_kind == "DensePose"
    assert loaded.denoising_unet.config.pose_range in ((-1.0, 1.0), [-1.0, 1.0])
    assert loaded.adapter.null_latents.any()
    assert torch.equal(run(pipeline, *images), run(loaded, *images))


# TPC


def calibration(config: CalibrationConfig, persons: int = 1, seen: slice = slice(None)):
    """A calibration of rendered noise; only the frames `seen` have keypoints."""
    keypoints = np.random.default_rng(1).uniform(12, 52, (FRAMES, persons, 17, 2)).astype(np.float32)
    scores = np.zeros((FRAMES, persons, 17), np.float32)
    scores[seen] = 1
    driving = Poses(keypoints, scores, (64, 80), 25.0)
    reference = Poses(keypoints[:1] * 0.7 + 5, np.ones((1, persons, 17), np.float32), (64, 80), 25.0)
    image = np.random.default_rng(2).integers(0, 256, (80, 64, 3), dtype=np.uint8)
    return calibrate(image, reference, driving, (SIZE[1], SIZE[0]), config)


def test_nobody_calibrated_is_no_calibration(pipeline, images):
    nobody = calibration(CalibrationConfig(min_iou=1.0))
    assert not len(nobody.used(2))
    plain = run(pipeline, *images)
    for attach in ("add", "replace"):
        none = calibration(CalibrationConfig(min_iou=1.0, attach=attach))
        assert torch.allclose(run(pipeline, *images, calibration=none), plain, atol=1e-5)


@pytest.mark.parametrize("attach", ["add", "replace"])
def test_calibration_reaches_its_frames_alone(pipeline, images, attach):
    """50 tokens for each person and frame, or none: there is nothing between."""
    some = calibration(CalibrationConfig(groups=1, max_gap=0, attach=attach), seen=slice(0, 3))
    present = (some.index(0) >= 0)[:, 0]
    assert present.any() and not present.all()
    difference = (run(pipeline, *images, calibration=some) - run(pipeline, *images)).abs().amax(dim=(0, 1, 3, 4))
    assert ((difference > 1e-3).numpy() == present).all() and (difference[torch.from_numpy(~present)] < 1e-5).all()


def test_each_person_adds_an_image(pipeline, images):
    two = calibration(CalibrationConfig(groups=2), persons=2)
    levels = token_levels(pipeline.animator.attention_layers(LATENTS))
    assert all(level.keys.tokens == TOKENS and level.keys.grid is None for level in levels)
    assert run(pipeline, *images, calibration=two).isfinite().all()


def test_recording_tells_how_much_each_image_gets(pipeline, images):
    """Mixed tokens have no place: of each image there is one number, and those of a frame sum to one."""
    config = CalibrationConfig(groups=1, max_gap=0)
    some = calibration(config, seen=slice(0, 3))
    plain = run(pipeline, *images, calibration=some)
    with AttentionRecording(AttentionConfig(steps=[1])) as recording:
        recorded = run(pipeline, *images, calibration=some, attention=recording)
    assert torch.equal(plain, recorded)
    layer = next(iter(pipeline.animator.attention_layers(LATENTS)))
    maps = np.asarray(recording.result.maps[layer], np.float64)  # (steps, frames, heads, queries, images, 1)
    assert maps.shape[:2] == (1, FRAMES) and maps.shape[-2:] == (2, 1)
    assert np.allclose(maps.sum(axis=(-2, -1)), 1, atol=1e-2)
    calibrated = maps[0, :, :, :, 1].max(axis=(1, 2, 3)) > 1e-6
    assert (calibrated == (some.index(1) >= 0)[:, 0]).all()


def test_replacing_is_animating_the_calibrated_image(pipeline, images):
    """With one calibrated image for all frames, it is as if that image were the reference."""
    held = calibration(CalibrationConfig(groups=1, propagation="hold", attach="replace"))
    (image,) = held.used(2)
    assert (held.index(0) == image).all()
    replaced = run(pipeline, *images, calibration=held)
    assert torch.allclose(replaced, run(pipeline, held.images[image], images[1]), atol=1e-4)


def test_image_range_of_the_reference(pipeline, images):
    """Bytes and numbers in [0, 1] are the same image to CLIP, VAE and start."""
    reference, poses = images
    as_floats = as_images(reference, "reference")[0].permute(1, 2, 0).numpy()
    assert torch.equal(run(pipeline, reference, poses), run(pipeline, as_floats, poses))
