"""Composition augmentation and calibrated training."""

import numpy as np
import pytest
import torch

from core.errors import UserError
from models.attention.masking import dense_mask
from tests.tpc_bodies import body, place, silhouette
from tpc.augmentation import (
    calibrate_batch,
    compose_references,
    composition_matrices,
    misalignment,
    training_visibility,
)
from tpc.config import CalibratedTrainingConfig, CompositionConfig
from tpc.procrustes import SimilarityTransform, apply_matrix

SIDE = 64


def tensors(points: np.ndarray) -> dict[str, torch.Tensor]:
    """Image whose colours are coordinates, mask and keypoints of one body."""
    mask = torch.from_numpy(silhouette(points, (SIDE, SIDE)))[None].float()
    x, y = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="xy")
    image = torch.stack([x, y, 0 * x]).float() / SIDE * 2 - 1
    keypoints = torch.from_numpy(np.concatenate([points, np.ones((17, 1))], 1)).float()
    return {"image": torch.where(mask > 0, image, torch.zeros_like(image)), "mask": mask, "keypoints": keypoints}


@pytest.fixture(scope="module")
def batch():
    rows = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        points = body(rng)
        ours = tensors(place(points, 34, rng.uniform(-3, 3), (30, 32)))
        theirs = [tensors(place(points, 44, 0.02 * f, (32, 32))) for f in range(4)]
        rows.append((ours, theirs))
    return {
        "reference": torch.stack([ours["image"] for ours, _ in rows]),
        "reference_mask": torch.stack([ours["mask"] for ours, _ in rows]),
        "reference_keypoints": torch.stack([ours["keypoints"] for ours, _ in rows]),
        "frames": torch.stack([torch.stack([t["image"] for t in theirs], 1) for _, theirs in rows]),
        "masks": torch.stack([torch.stack([t["mask"] for t in theirs], 1) for _, theirs in rows]),
        "keypoints": torch.stack([torch.stack([t["keypoints"] for t in theirs]) for _, theirs in rows]),
    }


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fill", ["scene", "edge", "black"])
def test_image_mask_and_keypoints_move_together(batch, fill):
    config = CompositionConfig(probability=1.0, min_scale=0.8, max_scale=1.3, max_translation=0.1, fill=fill)
    moved = compose_references(batch, config, generator=generator())
    matrices = composition_matrices(batch["reference_mask"], config, generator=generator())
    for i in range(6):
        before, after = batch["reference_keypoints"][i], moved["reference_keypoints"][i]
        expected = apply_matrix(matrices[i], before[:, :2].double())
        np.testing.assert_allclose(after[:, :2], expected, atol=1e-4)
        inside = ((expected >= 0) & (expected <= SIDE - 1)).all(-1)
        assert (after[inside, 2] == 1).all()
        torso = expected[[5, 6, 11, 12]].mean(0).round().int()
        assert moved["reference_mask"][i, 0, torso[1], torso[0]] == 1
        # The colour at the torso says where it was in the image before.
        colour = (moved["reference"][i, :2, torso[1], torso[0]] + 1) / 2 * SIDE
        origin = apply_matrix(torch.linalg.inv(matrices[i]), torso.double())
        assert (colour - origin).abs().max() < 1.5
    assert moved["frames"] is batch["frames"] and set(moved) == set(batch)


def test_ranges_probability_and_ramp(batch):
    mask = batch["reference_mask"][:1].expand(4000, -1, -1, -1)
    config = CompositionConfig(probability=0.7, min_scale=0.5, max_scale=2.0, max_rotation=90.0, ramp_steps=100)
    matrices = composition_matrices(mask, config, step=100, generator=generator())
    changed = (matrices != torch.eye(3)).any(-1).any(-1)
    assert abs(changed.double().mean() - 0.7) < 0.03
    drawn = SimilarityTransform.from_matrix(matrices[changed])
    assert 0.5 <= drawn.scale.min() < 0.52 and 1.9 < drawn.scale.max() <= 2.0
    assert abs(drawn.scale.log().mean()) < 0.05
    assert 85 < drawn.rotation.rad2deg().max() <= 90 and -90 <= drawn.rotation.rad2deg().min() < -85
    middle = apply_matrix(matrices, torch.tensor([[30.0, 32.0]]).double())[:, 0]
    assert middle.min() > 0.15 * SIDE and middle.max() < 0.85 * SIDE
    half = SimilarityTransform.from_matrix(composition_matrices(mask, config, step=50, generator=generator()))
    assert half.scale.max() <= 2**0.5 + 1e-9 and half.rotation.rad2deg().abs().max() <= 45
    start = composition_matrices(mask, config, step=0, generator=generator())
    assert (start - torch.eye(3)).abs().max() < 1e-9


def test_off_changes_nothing_and_one_seed_gives_one_result(batch):
    assert compose_references(batch, CompositionConfig()) is batch
    config = CompositionConfig(probability=0.5)
    first, again = (compose_references(batch, config, generator=generator(3)) for _ in range(2))
    assert torch.equal(first["reference"], again["reference"])
    untouched = (
        (composition_matrices(batch["reference_mask"], config, generator=generator(3)) == torch.eye(3))
        .flatten(1)
        .all(1)
    )
    assert 0 < untouched.sum() < 6
    assert torch.equal(first["reference"][untouched], batch["reference"][untouched])


def test_a_reference_without_a_person_moves_about_its_middle(batch):
    matrices = composition_matrices(
        torch.zeros(3, 1, SIDE, SIDE), CompositionConfig(probability=1.0, max_translation=0.0)
    )
    middle = torch.tensor([[(SIDE - 1) / 2] * 2], dtype=torch.float64)
    torch.testing.assert_close(apply_matrix(matrices, middle), middle.expand(3, 1, 2))


def test_calibrated_references_lie_on_the_frames(batch):
    config = CalibratedTrainingConfig(probability=1.0, keypoints="all", noise=0.0, images=2)
    found = calibrate_batch(batch, config, generator())
    assert found.images.shape == (6, 2, 3, SIDE, SIDE) and found.index.tolist() == [[0, 0, 1, 1]] * 6
    assert found.present.all()
    for i in range(6):
        for frame in range(4):
            ours, theirs = found.masks[i, found.index[i, frame], 0] > 0, batch["masks"][i, 0, frame] > 0
            assert (ours & theirs).sum() / (ours | theirs).sum() > 0.8
    before = misalignment(batch)
    assert before["relative_angle_deg"].shape == (6, 4) and before["box_iou"].min() >= 0


def test_images_belong_to_their_groups(batch):
    config = CalibratedTrainingConfig(probability=1.0, keypoints="all", noise=0.0, images=4)
    found = calibrate_batch(batch, config, generator())
    assert found.index.tolist() == [[0, 1, 2, 3]] * 6
    many = calibrate_batch(batch, CalibratedTrainingConfig(probability=1.0, images=99), generator())
    assert many.images.shape[1] == 4
    drawn = {
        calibrate_batch(batch, CalibratedTrainingConfig(probability=1.0, noise=0.0, keypoints="all"), generator(s))
        .masks[0]
        .sum()
        .item()
        for s in range(12)
    }
    assert len(drawn) > 1  # one of the four frames, at random


def test_samples_that_cannot_be_calibrated_run_without(batch):
    blind = {**batch, "reference_keypoints": batch["reference_keypoints"].clone()}
    blind["reference_keypoints"][2, :, 2] = 0
    blind["reference_keypoints"][4, :, :2] = 7.0
    config = CalibratedTrainingConfig(probability=1.0, noise=0.0)
    found = calibrate_batch(blind, config, generator())
    assert found.present.all(1).tolist() == [True, True, False, True, False, True]
    assert torch.isfinite(found.images).all()
    nobody = {**batch, "keypoints": torch.zeros_like(batch["keypoints"])}
    assert not calibrate_batch(nobody, config, generator()).present.any()
    some = calibrate_batch(batch, CalibratedTrainingConfig(probability=0.5), generator(1)).present
    assert some.any() and not some.all() and (some == some[:, :1]).all()


@pytest.mark.parametrize("preset", ["paper", "release", "exclusive", "scene"])
def test_training_visibility_is_that_of_inference(batch, preset):
    config = CalibratedTrainingConfig(probability=0.5, noise=0.0, visibility=preset)
    found = calibrate_batch(batch, config, generator(1))
    visibility = training_visibility(batch, found, [(8, 8), (4, 4)], config)
    assert visibility.query[64].shape[:2] == (24, 64) and visibility.key[16].shape[:2] == (24, 48)
    mask = dense_mask(visibility, 64)
    for row, present in enumerate(found.present.flatten()):
        person = batch["masks"][row // 4, 0, row % 4].reshape(8, 8, 8, 8).bool()
        inside = person.all(3).all(1).flatten()
        calibrated = (
            found.masks[row // 4, found.index[row // 4, row % 4], 0].reshape(8, 8, 8, 8).bool().any(3).any(1).flatten()
        )
        if not present:
            assert mask[row, :, :128].all() and not mask[row, :, 128:].any()
        else:
            assert (mask[row, inside][:, 128:] == calibrated).all()
            assert mask[row, inside][:, 64:128].all() == (preset == "paper")


def test_misalignment_measures_angle_and_boxes():
    points = place(body(np.random.default_rng(0)), 30, 0.0, (32, 32))
    turned = place(body(np.random.default_rng(0)), 30, 2.0, (32, 32))
    keypoints = [torch.from_numpy(np.c_[p, np.ones(17)]).float() for p in (points, turned)]
    batch = {
        "reference_keypoints": keypoints[0][None],
        "keypoints": torch.stack([keypoints[0], keypoints[1], keypoints[1]])[None],
    }
    batch["keypoints"][0, 2, :, 2] = 0
    found = misalignment(batch)
    np.testing.assert_allclose(found["relative_angle_deg"][0, :2], [0, np.degrees(2.0)], atol=1e-3)
    assert found["box_iou"][0, 0] == 1 and 0 < found["box_iou"][0, 1] < 0.7
    assert found["relative_angle_deg"][0, 2].isnan() and found["box_iou"][0, 2].isnan()


def test_values_out_of_range_are_named(batch):
    for config, text in (
        (CompositionConfig(probability=1.5), "composition.probability"),
        (CompositionConfig(probability=1.0, min_scale=2.0), "composition.min_scale"),
        (CompositionConfig(probability=1.0, fill="mirror"), "composition.fill"),
    ):
        with pytest.raises(UserError, match=text):
            compose_references(batch, config)
    for config, text in (
        (CalibratedTrainingConfig(keypoints="feet"), "calibrated_training.keypoints"),
        (CalibratedTrainingConfig(visibility="all"), "calibrated_training.visibility"),
        (CalibratedTrainingConfig(images=0), "calibrated_training.images"),
    ):
        with pytest.raises(UserError, match=text):
            calibrate_batch(batch, config)
