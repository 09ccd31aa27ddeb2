"""Training on references bent by body part: what the loader adds to an item, and from what it follows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, default_collate

from core.config import check_config
from core.errors import UserError
from data.config import PeopleConfig
from models.attention.layers import self_attention_level
from models.noise import DiffusionNoise
from tests.tpc_bodies import body, place, silhouette
from tpc.augmentation import calibrate_batch, calibrate_item
from tpc.config import CalibratedTrainingConfig, CompositionConfig
from training.build import make_scheduler
from training.config import AugmentationConfig, DataConfig, NoiseConfig, TrainConfig
from training.data import ArticulatedClips, make_dataset, make_loader
from training.objective import (
    calibrated_reference,
    calibrated_samples,
    sample_generators,
    started_noise,
)

SIDE, FRAMES = 96, 4
ON = CalibratedTrainingConfig(probability=1.0, transform="articulated", keypoints="all", noise=0.0, images=2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Bodies(Dataset):
    """Clips of one body a clip, in frames of other poses, sizes and turns than its reference's."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng(index)
        reference = place(body(rng), 60, rng.uniform(-2, 2), (48, 50))
        frames = [place(body(rng, 0.9), 70, 0.1, (46, 48)) for _ in range(FRAMES)]
        keypoints = torch.from_numpy(np.stack([reference, *frames])).float()
        keypoints = torch.cat([keypoints, torch.ones(*keypoints.shape[:2], 1)], -1)
        masks = torch.from_numpy(np.stack([silhouette(p, (SIDE, SIDE)) for p in (reference, *frames)])).float()
        return {
            "reference": torch.where(masks[:1] > 0, torch.rand((3, 1, 1), generator=generator(index)) * 2 - 1, -1.0),
            "reference_mask": masks[:1],
            "reference_keypoints": keypoints[0],
            "frames": torch.zeros(3, FRAMES, SIDE, SIDE),
            "masks": masks[None, 1:],
            "keypoints": keypoints[1:],
        }


@pytest.fixture(scope="module")
def item():
    return Bodies()[1]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def iou(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours > 0.5, theirs > 0.5
    return float((ours & theirs).sum() / (ours | theirs).sum())


def test_bent_references_lie_on_the_frames_where_a_similarity_does_not(item):
    found = calibrate_item(item, ON, generator())
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "calibrated_images": (2, 3, SIDE, SIDE),
        "calibrated_masks": (2, 1, SIDE, SIDE),
        "calibrated_index": (FRAMES,),
        "calibrated_present": (FRAMES,),
    }
    assert found["calibrated_index"].tolist() == [0, 0, 1, 1] and found["calibrated_present"].all()
    # The same draws: each image is made for the same frame.
    whole = calibrate_batch(default_collate([item]), ON, generator())
    for k, group in enumerate(((0, 1), (2, 3))):
        frame = max(group, key=lambda f: iou(found["calibrated_masks"][k, 0], item["masks"][0, f]))
        bent, moved = (
            iou(m, item["masks"][0, frame]) for m in (found["calibrated_masks"][k, 0], whole.masks[0, k, 0])
        )
        assert bent > 0.75 and bent > moved + 0.05
        shown = found["calibrated_images"][k][:, found["calibrated_masks"][k, 0] > 0]
        colour = item["reference"][:, item["reference_mask"][0] > 0].mean(1)
        assert (shown.median(1).values - colour).abs().max() < 0.02, "the person's colour, in the same range"


def test_keypoints_have_errors_and_the_draws_follow_from_the_generator(item):
    exact = calibrate_item(item, ON, generator())
    noisy = replace(ON, noise=0.02)
    found = calibrate_item(item, noisy, generator())
    assert same(found, calibrate_item(item, noisy, generator()))
    assert not torch.equal(found["calibrated_images"], exact["calibrated_images"])
    assert iou(found["calibrated_masks"], exact["calibrated_masks"]) > 0.7
    chosen = {
        calibrate_item(item, replace(ON, images=1), generator(seed))["calibrated_masks"].sum().item()
        for seed in range(8)
    }
    assert len(chosen) > 1, "one of the frames, at random"


@pytest.mark.parametrize("why", ["not drawn", "reference unseen", "frames unseen", "one point"])
def test_items_that_are_not_calibrated_keep_their_shapes(item, why):
    config, changed = ON, {name: value.clone() for name, value in item.items()}
    if why == "not drawn":
        config = replace(ON, probability=0.0)
    if why == "reference unseen":
        changed["reference_keypoints"][:, 2] = 0
    if why == "frames unseen":
        changed["keypoints"][..., 2] = 0
    if why == "one point":
        changed["keypoints"][..., :2] = 7.0
    found = calibrate_item(changed, config, generator())
    assert not found["calibrated_present"].any() and not found["calibrated_masks"].any()
    assert torch.equal(found["calibrated_images"], item["reference"].expand(2, -1, -1, -1))


def test_a_resumed_run_reads_what_an_unbroken_one_reads():
    """Items are a function of seed and index: not of what was read before, of workers, or of where reading starts."""
    config = CalibratedTrainingConfig(probability=0.5, transform="articulated", noise=0.01)
    clips = ArticulatedClips(Bodies(), config, seed=3)
    whole = list(make_loader(clips, 2, 0))
    resumed = list(make_loader(ArticulatedClips(Bodies(), config, seed=3), 2, 1, start=2))
    assert len(whole) == 3 and len(resumed) == 2
    assert all(same(one, other) for one, other in zip(whole[1:], resumed, strict=True))
    present = [bool(clips[i]["calibrated_present"].all()) for i in range(6)]
    assert any(present) and not all(present)
    other = ArticulatedClips(Bodies(), config, seed=4)
    assert not all(torch.equal(clips[i]["calibrated_images"], other[i]["calibrated_images"]) for i in range(6))


def test_the_objective_takes_the_loaders_images():
    clips = ArticulatedClips(Bodies(), ON, seed=0)
    batch = default_collate([clips[0], clips[1]])
    placed = calibrated_samples(batch, ON, sample_generators(0, range(2)))
    images, context = calibrated_reference(batch, placed, [self_attention_level((8, 8))], ON)
    assert torch.equal(images.pixels, batch["calibrated_images"].flatten(0, 1))
    # Rows of [2 references | 2 images each], frame by frame.
    assert context.index.tolist() == [[0, 2], [0, 2], [0, 3], [0, 3], [1, 4], [1, 4], [1, 5], [1, 5]]


@pytest.mark.parametrize("predicted", ["v_prediction", "epsilon", "sample"])
def test_started_frames_are_noised_calibrated_images_on_the_way_to_the_truth(predicted):
    scheduler = make_scheduler(NoiseConfig(prediction_type=predicted, rescale_betas_zero_snr=False))
    noise, latents = (torch.randn((2, 4, 3, 2, 2), generator=generator(k)) for k in range(2))
    images = torch.randn((2 * 2, 4, 2, 2), generator=generator(2))  # two a clip
    index = torch.tensor([[0, 1, 1], [1, 0, 0]])
    timesteps = torch.tensor([300, 0])  # the second clip has hardly any noise, so it stays as it is
    signal = scheduler.alphas_cumprod[timesteps]
    started = torch.tensor([[True, True, False], [True, True, True]])
    added = started_noise(noise, latents, images, index, started, signal)
    noisy = scheduler.add_noise(latents, added, timesteps)
    shown = scheduler.add_noise(images[index[0]].transpose(0, 1)[None], noise[:1], timesteps[:1])
    assert torch.allclose(noisy[0, :, :2], shown[0, :, :2], atol=1e-5)
    assert torch.equal(added[0, :, 2], noise[0, :, 2]) and torch.equal(added[1], noise[1])
    # Whoever predicts the target exactly arrives at the truth.
    target = DiffusionNoise(scheduler).target(latents, added, timesteps)
    scheduler.set_timesteps(1000)
    found = scheduler.step(target[:1], 300, noisy[:1]).pred_original_sample
    assert torch.allclose(found, latents[:1], atol=1e-5)


def test_what_does_not_go_together_is_refused():
    calibrated = CalibratedTrainingConfig(probability=1.0, transform="articulated")
    composed = AugmentationConfig(composition=CompositionConfig(probability=0.5), calibrated=calibrated)
    with pytest.raises(UserError, match="articulated needs references that stay.*composition.probability=0"):
        check_config(TrainConfig(stage="image", output="x", dry_run=True, augmentation=composed), "")
    started = AugmentationConfig(calibrated=replace(calibrated, start=0.5, images=2))
    with pytest.raises(UserError, match="start=0.5 needs an image of its own for every frame.*images=8"):
        data = DataConfig(num_frames=8)
        check_config(TrainConfig(stage="motion", output="x", dry_run=True, augmentation=started, data=data), "")
    with pytest.raises(UserError, match="transform=affine must be one of procrustes, articulated"):
        calibrate_item(Bodies()[0], CalibratedTrainingConfig(transform="affine"))
    with pytest.raises(UserError, match="reframed=1.5 must be a number, 0 to 1"):
        make_dataset(DataConfig(size=[32, 32], people=PeopleConfig(reframed=1.5)), 1)
