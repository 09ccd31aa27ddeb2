"""Images and words of the attention tab: a result with the chosen point, and what it attends to."""

from dataclasses import dataclass

import cv2
import numpy as np

from core.errors import UserError
from evaluation.attention.figures import TRUE_COORDS, at_height, attended_images, layer_mean, mark, overlay
from evaluation.attention.grids import numbered_layers
from evaluation.attention.recorded_runs import RecordedRun, RecordedSide
from inference.comparison import MARGIN

HEIGHT = 384  # of all images, so that a small model's frames can be clicked
PAPER = 246
NO_RUN = "There is no animation yet; press Run first."


@dataclass(frozen=True)
class Choice:
    """The query and the maps that are shown."""

    frame: int = 0  # 0 first
    step: int | None = None  # denoising step, 0 first; None: the mean over the recorded steps
    layer: str | None = None  # name; None: the mean over layers
    point: tuple[float, float] | None = None  # (x, y) pixels of the model's frame; None: none is chosen yet


def choice_of(
    run: RecordedRun | None,
    point: tuple[float, float] | None,
    frame: int,
    step: int,
    all_steps: bool,
    layer: int,
    all_layers: bool,
) -> Choice:
    """The page's controls as a choice; steps count those that were recorded."""
    if run is None:
        raise UserError(NO_RUN)
    steps, layers = run.plain.recorded.selection.steps, run.plain.recorded.layers
    counts = {"frame": len(run.driving), "step": len(steps), "layer": len(layers)}
    for (name, count), value in zip(counts.items(), (frame, step, layer), strict=True):
        if not 0 <= value < count:
            raise UserError(f"{name}={value} is out of range; there are 0 to {count - 1}")
    return Choice(
        int(frame),
        None if all_steps else steps[int(step)],
        None if all_layers else layers[int(layer)],
        point,
    )


@dataclass(frozen=True)
class SideView:
    """One result, enlarged, (h, w, 3) uint8 RGB each."""

    result: np.ndarray  # the frame with the chosen point
    reference: np.ndarray  # under the attention to it
    calibrated: np.ndarray | None  # calibrated images, side by side, under theirs; None without TPC
    caption: str  # shares of attention


def side_view(run: RecordedRun, side: RecordedSide, choice: Choice) -> SideView:
    """A result and the attention of its chosen point; plain images as long as no point is chosen."""
    if choice.frame not in side.recorded.selection.frames:
        raise UserError(f"frame={choice.frame} was not recorded")
    # With the mean over steps, calibrated images are those of the last recorded one.
    step = side.recorded.selection.steps[-1] if choice.step is None else choice.step
    shown = [enlarged(image) for image in attended_images(run.reference, side.calibration, step, choice.frame)]
    result = enlarged(side.frames[choice.frame])
    if choice.point is None:
        caption = "Click a point of a frame to see what it attends to."
    else:
        layers = None if choice.layer is None else [choice.layer]
        maps = layer_mean(side.recorded, choice.point, choice.step, choice.frame, layers=layers)
        # One colour scale for the reference and the calibrated images of a side.
        shown = [overlay(image, density, maps.max()) for image, density in zip(shown, maps, strict=True)]
        result = mark(result, np.array(choice.point), scale_of(side.frames), TRUE_COORDS, cross=False)
        caption = division(maps)
    calibrated = beside(shown[1:]) if side.calibration is not None else None
    return SideView(result, shown[0], calibrated, caption)


def division(maps: np.ndarray) -> str:
    """Shares of one point's attention in percent, from its maps (k, h, w) over the images."""
    given = maps.sum(axis=(1, 2))
    parts = [f"itself (its own frame) {1 - given.sum():.0%}", f"reference {given[0]:.0%}"]
    several = len(given) > 2
    for person, share in enumerate(given[1:]):
        parts.append(f"calibrated image{f' of person {person}' if several else ''} {share:.0%}")
    return "Attends to " + ", ".join(parts) + "."


def where(run: RecordedRun, choice: Choice) -> str:
    """The chosen step, layer and point in words."""
    recorded = run.calibrated.recorded
    step = "mean over steps"
    if choice.step is not None:
        timestep = recorded.timesteps[recorded.selection.position("steps", choice.step)]
        step = f"step {choice.step} (t = {timestep})"
    layer = "mean over layers"
    if choice.layer is not None:
        rows, columns = recorded.grid(choice.layer)
        layer = f"layer {numbered_layers(recorded.layers)[choice.layer]}, {columns} x {rows} tokens"
    point = "" if choice.point is None else f", point ({choice.point[0]:.0f}, {choice.point[1]:.0f})"
    return f"Frame {choice.frame}{point}: {step}, {layer}."


def first_point(run: RecordedRun) -> tuple[float, float]:
    """A point of the first frame to begin with: its first visible keypoint, else the middle."""
    visible = run.keypoints[0][~np.isnan(run.keypoints[0]).any(axis=-1)]
    height, width = run.reference.shape[:2]
    return (width / 2, height / 2) if not len(visible) else (float(visible[0, 0]), float(visible[0, 1]))


def point_of_click(run: RecordedRun, index: tuple[float, float]) -> tuple[float, float]:
    """The (x, y) in the model's frame of a click at (x, y) in an enlarged image; pixel centres are at integers."""
    scale = scale_of(run.driving)
    height, width = run.reference.shape[:2]
    x, y = ((float(coord) + 0.5) / scale - 0.5 for coord in index)
    return min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)


def enlarged(image: np.ndarray) -> np.ndarray:
    """An image (h, w, 3) uint8 at the height of the page's images."""
    return at_height(image, HEIGHT)


def scale_of(frames: np.ndarray) -> float:
    """The factor by which `enlarged` enlarges frames (f, H, W, 3)."""
    return HEIGHT / frames.shape[1]


def beside(images: list[np.ndarray]) -> np.ndarray:
    """Images of one height side by side, with white between them."""
    apart = [np.pad(image, ((0, 0), (0, MARGIN), (0, 0)), constant_values=255) for image in images]
    return np.concatenate(apart, axis=1)[:, :-MARGIN]


def notice(text: str) -> np.ndarray:
    """A light image (HEIGHT, HEIGHT, 3) with a line of text, where there is nothing to show yet."""
    image = np.full((HEIGHT, HEIGHT, 3), PAPER, np.uint8)
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.6, 1)
    corner = (HEIGHT - width) // 2, (HEIGHT + height) // 2
    cv2.putText(image, text, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.6, (110, 110, 110), 1, cv2.LINE_AA)
    return image
