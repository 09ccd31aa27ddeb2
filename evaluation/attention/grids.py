"""Images and charts of the notebooks: rows through denoising, measures by step, by layer and by head."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import pad

from core.errors import UserError
from data.config import COCO_KEYPOINTS
from data.poses.poses import Poses
from evaluation.attention.figures import point_maps, point_maps_row, stacked
from evaluation.attention.maps import BodyTruth, Pointing, body_truth, mean_over, pck, pointing, shares
from evaluation.attention.recorded_runs import RecordedRun, RecordedSide

PARTS = {
    "head": ("nose", "left_eye", "right_eye", "left_ear", "right_ear"),
    "trunk": ("left_shoulder", "right_shoulder", "left_hip", "right_hip"),
    "arms": ("left_elbow", "right_elbow", "left_wrist", "right_wrist"),
    "legs": ("left_knee", "right_knee", "left_ankle", "right_ankle"),
}
PART_INDICES = {part: [COCO_KEYPOINTS.index(name) for name in names] for part, names in PARTS.items()}


def truths(run: RecordedRun, reference: Poses, reference_map: np.ndarray | None = None) -> dict[str, BodyTruth]:
    """True coordinates of a run's recorded keypoints by side."""
    sides = run.sides.items()
    return {name: body_truth(side.recorded, reference, side.calibration, reference_map) for name, side in sides}


def visible_in_both(run: RecordedRun, reference: Poses, frame: int) -> list[str]:
    """Names of recorded keypoints that a frame and the reference show."""
    recorded = run.plain.recorded
    coords = truths(run, reference)["without TPC"].coords[0, recorded.selection.position("frames", frame), :, 0]
    visible = ~np.isnan(recorded.points[frame]).any(axis=-1) & ~coords.isnan().any(-1).numpy()
    return [name for name, shown in zip(recorded.names, visible, strict=True) if shown]


def denoising_rows(
    run: RecordedRun, reference: Poses, keypoint: str, frame: int, steps: Sequence[int], height: int = 192
) -> np.ndarray:
    """A keypoint of one frame through denoising, a row for each side, as in Figure 2; (h, w, 3) uint8."""
    rows, found = [], truths(run, reference)
    for name, side in run.sides.items():
        query = side.recorded.query_index(side.recorded.layers[0], keypoint)
        maps = point_maps(side.recorded, found[name], run.reference, side.calibration, keypoint, frame, steps)
        point = side.recorded.points[frame, query]
        rows.append(point_maps_row(maps, side.frames[frame], point, name, steps, height))
    return stacked(rows)


def pointings(run: RecordedRun, reference: Poses, radius: float = 0.15) -> dict[str, dict[str, Pointing]]:
    """`Pointing` with heads averaged: side -> layer -> it."""
    found = truths(run, reference)
    return {
        name: {layer: pointing(side.recorded, found[name], layer, radius) for layer in side.recorded.layers}
        for name, side in run.sides.items()
    }


def over_layers(by_layer: Mapping[str, Pointing], measure: str, radius: float = 0.15) -> Tensor:
    """(layers, s, f, p) of "accuracy", "entropy", "near", "strongest" or "centroid"; NaN where there is none."""
    layers = by_layer.values()
    values = [found.accuracy(radius) if measure == "accuracy" else getattr(found, measure) for found in layers]
    return torch.stack([value[:, :, 0] for value in values])


def accuracy_by_part(by_layer: Mapping[str, Pointing], radius: float = 0.15) -> dict[str, float]:
    """Pointing accuracy by visible part of the body of the first person, mean over layers, steps and frames."""
    accuracy = over_layers(by_layer, "accuracy", radius)
    means = {part: accuracy[..., indices].nanmean().item() for part, indices in PART_INDICES.items()}
    return {part: mean for part, mean in means.items() if not np.isnan(mean)}


def layer_accuracy(run: RecordedRun, reference: Poses, side: str, radius: float = 0.15) -> np.ndarray:
    """(layers, s) pointing accuracy of a side's layers, heads averaged, over frames and keypoints."""
    by_layer = pointings(run, reference, radius)[known_side(run, side)]
    return over_layers(by_layer, "accuracy", radius).nanmean((2, 3)).numpy()


def share_means(side: RecordedSide, mask: np.ndarray) -> dict[str, float]:
    """Mean `shares` of the recorded points over layers, with the persons' mask (H, W) in the model's reference."""
    layers = [shares(side.recorded, layer, mask) for layer in side.recorded.layers]
    return {part: float(np.mean([mean_over(found[part]) for found in layers])) for part in layers[0]}


def known_side(run: RecordedRun, side: str) -> str:
    """The side's name, checked."""
    if side not in run.sides:
        raise UserError(f"side={side} is not one of {', '.join(run.sides)}")
    return side


def numbered_layers(layers: Sequence[str]) -> dict[str, str]:
    """Short names of the layers with their numbers, in the order in which they run.

    "3: up 0.1" for up_blocks.0.attentions.1...attn1, "3: blocks 3" for blocks.3.attn1.
    """
    names = {}
    for number, layer in enumerate(layers):
        block, *rest = layer.split(".")
        outer = rest[: rest.index("transformer_blocks")] if "transformer_blocks" in rest else rest
        indices = [part for part in outer if part.isdigit()]
        names[layer] = f"{number}: {block.split('_')[0]} {'.'.join(indices)}".rstrip()
    return names


def head_accuracy(run: RecordedRun, reference: Poses, side: str, radius: float = 0.15) -> dict[str, np.ndarray]:
    """Pointing accuracy over steps and frames: part of the body -> (layers, heads); NaN where the part is hidden."""
    recorded = run.sides[known_side(run, side)].recorded
    if "heads" in recorded.selection.mean:
        raise UserError("mean: the mean over heads was recorded; record heads without a mean")
    truth = truths(run, reference)[side]
    layers = [pointing(recorded, truth, layer, radius, mean_heads=False).accuracy(radius) for layer in recorded.layers]
    heads = max(layer.shape[2] for layer in layers)
    # (layers, s, f, heads, p)
    padded = torch.stack([pad(layer, (0, 0, 0, heads - layer.shape[2]), value=np.nan) for layer in layers])
    return {part: padded[..., indices].nanmean((1, 2, 4)).numpy() for part, indices in PART_INDICES.items()}


def empty_chart(width: float) -> tuple[Figure, Axes]:
    # Drawn without pyplot, so nothing needs closing.
    figure = Figure(figsize=(width, 2.8), layout="constrained")
    return figure, figure.subplots()


def lines_by_radius(distances: Mapping[str, Tensor], longest: float, count: int = 31) -> Figure:
    """PCK curves: the share of each name's known distances within every radius up to `longest` body heights."""
    radii = np.linspace(0, longest, count)
    figure, axes = empty_chart(7)
    for name, values in distances.items():
        axes.plot(radii, pck(values, radii), label=name)
    axes.set(xlabel="radius (body heights)", ylabel="share within", ylim=(0, 1.02), xlim=(0, longest))
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def lines_by_step(values: Mapping[str, np.ndarray], steps: Sequence[int], label: str) -> Figure:
    """One line (s,) a name over denoising steps."""
    figure, axes = empty_chart(7)
    for name, line in values.items():
        axes.plot(np.array(steps), line, marker="o", markersize=3, label=name)
    axes.set(xlabel="denoising step", ylabel=label)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def grouped_bars(values: Mapping[str, Mapping[str, float]], label: str) -> Figure:
    """Bars: a group for each inner name, a colour for each outer one; missing ones are left out."""
    groups = list(dict.fromkeys(name for inner in values.values() for name in inner))
    figure, axes = empty_chart(3 + 1.2 * len(groups))
    width = 0.8 / len(values)
    for index, (name, inner) in enumerate(values.items()):
        lefts = [groups.index(group) + (index - (len(values) - 1) / 2) * width for group in inner]
        axes.bar(lefts, list(inner.values()), width, label=name)
    axes.set_xticks(range(len(groups)), [group.replace(" ", "\n") for group in groups])
    axes.set_ylabel(label)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def head_maps(values: Mapping[str, np.ndarray], rows: Sequence[str], label: str) -> Figure:
    """A panel for each name with its (layers, heads) as colours and numbers; `rows` are the layers' names."""
    figure = Figure(figsize=(1.6 + 2.1 * len(values), 1.3 + 0.32 * len(rows)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(values), sharey=True))
    for axes, (name, grid) in zip(panels, values.items(), strict=True):
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                ink = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=ink)
        axes.set(title=name, xlabel="head", xticks=range(grid.shape[1]))
        axes.set_yticks(range(len(rows)), rows)
    figure.colorbar(image, ax=list(panels), label=label)
    return figure
