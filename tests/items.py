"""Checks of every item of a data set, see `data.clips.rendered`."""

import torch

KEYS = {"reference", "frames", "poses", "reference_mask", "masks", "reference_keypoints", "keypoints"}


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
