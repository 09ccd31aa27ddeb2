"""Measures and charts of the notebooks, against the functions they summarise."""

import numpy as np
import pytest
import torch

from core.errors import UserError
from data.config import COCO_KEYPOINTS
from evaluation.attention.grids import (
    PART_INDICES,
    PARTS,
    accuracy_by_part,
    denoising_rows,
    grouped_bars,
    head_accuracy,
    head_maps,
    layer_accuracy,
    lines_by_radius,
    lines_by_step,
    numbered_layers,
    over_layers,
    pointings,
    share_means,
    truths,
    visible_in_both,
)
from evaluation.attention.maps import Pointing, pointing
from models.attention.recording import AttentionConfig
from tests.viewed import recorded_run, rendered_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return rendered_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(tiny_pipeline, inputs):
    """Heads apart."""
    return recorded_run(tiny_pipeline, inputs, AttentionConfig(), keypoints_only=True)


@pytest.fixture(scope="module")
def reference(inputs):
    return inputs[0].poses


def test_every_keypoint_is_of_one_part():
    assert sorted(name for names in PARTS.values() for name in names) == sorted(COCO_KEYPOINTS)
    assert sorted(number for numbers in PART_INDICES.values() for number in numbers) == list(range(17))


def test_keypoints_seen_in_both(run, reference):
    seen = visible_in_both(run, reference, frame=1)
    assert seen
    for number, name in enumerate(COCO_KEYPOINTS):
        shown = not np.isnan(run.plain.recorded.points[1, number]).any() and reference.scores[0, 0, number] >= 0.3
        assert (name in seen) == shown


def test_rows_through_denoising(run, reference):
    keypoint = visible_in_both(run, reference, frame=1)[0]
    image = denoising_rows(run, reference, keypoint, 1, [0, 2], height=64)
    other = denoising_rows(run, reference, keypoint, 1, [0, 1], height=64)
    assert image.dtype == np.uint8 and image.shape[0] > 2 * 64 and image.shape[1] >= 3 * 64
    half = image.shape[0] // 2
    assert (image[:half] != image[half : 2 * half]).any(), "the sides differ"
    assert image.shape == other.shape and (image != other).any(), "steps differ"
    with pytest.raises(UserError, match="elbow_3"):
        denoising_rows(run, reference, "elbow_3", 1, [0])


def test_accuracy_of_heads_is_that_of_pointing(run, reference):
    found = head_accuracy(run, reference, "with TPC", radius=0.4)
    layer = run.calibrated.recorded.layers[-1]
    accuracy = pointing(run.calibrated.recorded, truths(run, reference)["with TPC"], layer, mean_heads=False).accuracy(
        0.4
    )
    numbers = [COCO_KEYPOINTS.index(name) for name in PARTS["trunk"]]
    heads = run.calibrated.recorded.selection.heads[layer]
    assert found["trunk"].shape == (len(run.calibrated.recorded.layers), len(heads))
    for head in range(len(heads)):
        assert found["trunk"][-1, head] == pytest.approx(float(accuracy[:, :, head, numbers].nanmean()))


def test_heads_apart_are_needed(tiny_pipeline, inputs, run, reference):
    with pytest.raises(UserError, match="side=TPC is not one of without TPC, with TPC"):
        head_accuracy(run, reference, "TPC")
    mean = recorded_run(tiny_pipeline, inputs, AttentionConfig(steps=[2], mean=["heads"]), keypoints_only=True)
    with pytest.raises(UserError, match="record heads without a mean"):
        head_accuracy(mean, reference, "with TPC")


def test_layers_and_parts_agree_with_the_whole(run, reference):
    layers = pointings(run, reference)["without TPC"]
    accuracy = over_layers(layers, "accuracy")
    assert accuracy.shape == (len(layers), 3, 3, 17)
    by_layer = layer_accuracy(run, reference, "without TPC")
    assert np.allclose(by_layer, accuracy.nanmean((2, 3)))
    parts = accuracy_by_part(layers)
    known = {part: int((~accuracy[..., numbers].isnan()).sum()) for part, numbers in PART_INDICES.items()}
    assert set(parts) == {part for part, count in known.items() if count}
    whole = sum(parts[part] * known[part] for part in parts) / sum(known.values())
    assert whole == pytest.approx(float(accuracy.nanmean()))


def test_parts_of_made_up_distances():
    distance = torch.full((2, 1, 1, 17), torch.nan)
    distance[..., COCO_KEYPOINTS.index("left_knee")] = torch.tensor([0.1, 0.9])[:, None, None]
    distance[..., COCO_KEYPOINTS.index("nose")] = 0.05
    made_up = Pointing(distance, torch.zeros(*distance.shape, 2), distance, distance)
    assert accuracy_by_part({"layer": made_up}) == {"head": 1.0, "legs": 0.5}


def test_shares_sum_to_one(run):
    mask = run.calibrated.calibration.reference_masks.any(axis=0)
    for name, side in run.sides.items():
        divided = share_means(side, mask)
        assert sum(divided.values()) == pytest.approx(1, abs=1e-5)
        assert ("calibrated 0" in divided) == (name == "with TPC")


def test_short_names():
    layers = [
        "mid_block.attentions.0.transformer_blocks.0.attn1",
        "up_blocks.0.attentions.1.transformer_blocks.0.attn1",
    ]
    assert list(numbered_layers(layers).values()) == ["0: mid 0", "1: up 0.1"]
    assert list(numbered_layers(["blocks.0.attn1", "blocks.12.attn1"]).values()) == ["0: blocks 0", "1: blocks 12"]


def test_charts_show_the_values():
    lines = lines_by_step({"a": np.array([0.1, 0.4]), "b": np.array([0.2, 0.3])}, [0, 5], "what").axes[0]
    assert [line.get_ydata().tolist() for line in lines.lines] == [[0.1, 0.4], [0.2, 0.3]]
    assert lines.lines[0].get_xdata().tolist() == [0, 5] and lines.get_ylabel() == "what"
    bars = grouped_bars({"a": {"x": 0.5, "y": 0.2}, "b": {"y": 0.7}}, "share").axes[0]
    assert sorted(round(bar.get_height(), 3) for bar in bars.patches) == [0.2, 0.5, 0.7]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["x", "y"]
    curve = lines_by_radius({"a": torch.tensor([0.1, 0.3, torch.nan])}, 0.4, count=5).axes[0].lines[0]
    assert curve.get_ydata().tolist() == [0, 0.5, 0.5, 1, 1]
    panels = head_maps({"x": np.array([[0.25, np.nan]]), "y": np.array([[1.0, 0.5]])}, ["up 0"], "accuracy").axes
    assert [text.get_text() for text in panels[0].texts] == ["0.2"] and len(panels[1].texts) == 2
