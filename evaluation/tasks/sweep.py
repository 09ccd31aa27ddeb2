"""`evaluate.py sweep`: fidelity of the person against the reference's angle and scale (Figures 1b and 9)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.people.scenes import misaligned_reference
from evaluation.clips import EvaluationClip, at_first_frame, rendered_clip, rendered_people
from evaluation.config import PERSON_MEASURES, ProtocolConfig, SweepConfig
from evaluation.measure import clip_means
from evaluation.metric_suite import MetricSuite
from evaluation.misalignment import misalignment
from evaluation.plots import Curve, Panel, draw_panels
from evaluation.report import (
    DIFFERENCES_NOTE,
    Cell,
    Table,
    heading,
    interval_cell,
    markdown,
    over_seeds,
    write_results,
)
from evaluation.statistics import Interval, mean_interval
from evaluation.trials import (
    PERSON_PSNR,
    PERSON_PSNR_LABEL,
    VARIANT_NAMES,
    WITH,
    WITHOUT,
    Trial,
    run_task,
    without_and_with,
)

IOU_BINS = np.linspace(0, 1, 11)
ALIGNED = 1.0  # scale of a reference that fits
# Panel of each curve; `y_label` is that of the person's PSNR where none is given.
PANELS: dict[str, dict[str, Any]] = {
    "angle": {
        "x_label": "angle of the reference (degrees)",
        "marks": {-30.0: "", 30.0: "±π/6"},
        "ticks": [-180, -120, -60, 0, 60, 120, 180],
    },
    "scale": {"x_label": "scale of the reference", "marks": {}, "ticks": [0.3, 0.5, 1, 2, 3], "log_x": True},
    "box IoU": {
        "x_label": "IoU of the persons' boxes",
        "y_label": "change against aligned (dB)",
        "marks": {0.7: "0.7"},
        "ticks": [0, 0.2, 0.4, 0.6, 0.8, 1],
    },
}


@dataclass(frozen=True)
class SweptReference:
    """The reference of a clip, turned or scaled."""

    clip: int  # index of the rendered clip
    swept: str  # "angle" or "scale", which of the two is changed
    angle_deg: float  # turn of the reference in the image, clockwise, degrees
    scale: float  # factor on the person's size

    @property
    def name(self) -> str:
        return f"clip{self.clip:03d}-{self.swept}{self.angle_deg if self.swept == 'angle' else self.scale:g}"

    @property
    def aligned(self) -> bool:
        return self.angle_deg == 0 and self.scale == ALIGNED


class SweptClips:
    """An `evaluation.clips.ClipSet` of rendered clips with every reference of the sweep."""

    def __init__(self, config: SweepConfig):
        angles = [360 * k / config.angles for k in range(config.angles)]
        angles = [angle - 360 if angle > 180 else angle for angle in angles]
        scales = [float(scale) for scale in config.scales]
        if scales and ALIGNED not in scales:
            scales.append(ALIGNED)
        found: list[SweptReference] = []
        for clip in range(config.clips):
            found += [SweptReference(clip, "angle", round(angle, 3), 1.0) for angle in angles]
            found += [SweptReference(clip, "scale", 0.0, scale) for scale in scales]
        self.references = {reference.name: reference for reference in found}
        self.names = list(self.references)
        self._people = rendered_people(config)

    def clip(self, name: str) -> EvaluationClip:
        swept = self.references[name]
        scene = at_first_frame(self._people.scene(swept.clip))
        rotation = float(np.radians(swept.angle_deg))
        return rendered_clip(scene, misaligned_reference(scene, scale=swept.scale, rotation=rotation), name)

    def stamps(self, name: str) -> None:
        return None

    def box_iou(self, name: str) -> float | None:
        """Mean over frames of the IoU of the persons' boxes in reference and frame; None where too little is seen."""
        clip = self.clip(name)
        known = misalignment(clip.reference.poses, clip.driving.poses).box_iou
        known = known[~np.isnan(known)]
        return float(known.mean()) if len(known) else None


def run(config: SweepConfig) -> None:
    """Write results.json, table.md, sweep.png and sweep.pdf."""
    variants, clips = without_and_with(config), SweptClips(config)
    references = clips.references
    measures = ["psnr", "ssim", *(PERSON_MEASURES if config.persons else ())]
    protocol = ProtocolConfig(protocol="native", features="none", measures=measures)

    def write(folders: dict[Trial, Path], metric_suite: MetricSuite, output: Path) -> None:
        psnr = {trial: clip_means(folder)[PERSON_PSNR] for trial, folder in folders.items()}
        box_iou = {name: clips.box_iou(name) for name in clips.names}
        groups = _groups(references, box_iou)
        curves = _curves(config, references, groups, psnr)
        gains = {quantity: _gains(at_x, references, psnr) for quantity, at_x in groups.items()}
        panels = [
            Panel(list(lines.values()), **{"y_label": PERSON_PSNR_LABEL} | PANELS[quantity])
            for quantity, lines in curves.items()
        ]
        draw_panels(output / "sweep.png", panels)
        counts = {"clips": config.clips, "frames": config.frames, "seeds": len(config.seeds)}
        results = {
            "counts": counts | {"trials": len(psnr)},
            "curves": {
                quantity: {
                    label: {
                        name: None if (values := getattr(curve, name)) is None else values.tolist()
                        for name in ("x", "mean", "deviation")
                    }
                    for label, curve in lines.items()
                }
                for quantity, lines in curves.items()
            },
            "gains": {
                quantity: [{"x": x} | gain.plain() for x, gain in at_x.items()] for quantity, at_x in gains.items()
            },
            "trials": [
                {
                    "clip": references[trial.clip].clip,
                    "angle_deg": references[trial.clip].angle_deg,
                    "scale": references[trial.clip].scale,
                    "box_iou": None if (iou := box_iou[trial.clip]) is None else round(iou, 4),
                    "tpc": trial.variant.tpc is not None,
                    "seed": trial.seed,
                    "person_psnr_db": value,
                }
                for trial, value in psnr.items()
            ],
        }
        caption = f"{config.clips} clips of {config.frames} frames, mean and deviation over {len(config.seeds)} seeds"
        tables = "\n".join(markdown(_table(quantity, lines, gains[quantity])) for quantity, lines in curves.items())
        text = heading(metric_suite, caption, DIFFERENCES_NOTE) + tables
        write_results(config, metric_suite, results, {"table.md": text}, output)

    run_task("sweep", config, protocol, ("foreground", "background"), variants, clips, write)


def _groups(
    references: dict[str, SweptReference], box_iou: dict[str, float | None]
) -> dict[str, dict[float, list[str]]]:
    """What is swept ("angle", "scale", "box IoU": the middle of a bin) -> its value -> references."""
    known = {name: iou for name, iou in box_iou.items() if iou is not None}
    bins = {name: int(np.clip(np.digitize(iou, IOU_BINS) - 1, 0, len(IOU_BINS) - 2)) for name, iou in known.items()}
    turned, scaled = ([name for name, r in references.items() if r.swept == swept] for swept in ("angle", "scale"))
    coords = {
        "angle": {name: references[name].angle_deg for name in turned},
        "scale": {name: references[name].scale for name in scaled},
        "box IoU": {name: float(IOU_BINS[bins[name] : bins[name] + 2].mean()) for name in scaled if name in bins},
    }
    groups: dict[str, dict[float, list[str]]] = {}
    for quantity, of_names in coords.items():
        for name, x in of_names.items():
            groups.setdefault(quantity, {}).setdefault(round(x, 6), []).append(name)
    return groups


def _curves(
    config: SweepConfig,
    references: dict[str, SweptReference],
    groups: dict[str, dict[float, list[str]]],
    psnr: dict[Trial, float | None],
) -> dict[str, dict[str, Curve]]:
    """Curves by what is swept and label of the variant.

    Different clips reach different IoUs, so that curve is of the change against the same clip aligned, without TPC.
    """
    measured = {quantity: psnr for quantity in groups} | {"box IoU": _change_from_aligned(references, psnr)}
    return {
        quantity: {
            label: _curve(label, at_x, config.seeds, measured[quantity], closed=quantity == "angle")
            for label in VARIANT_NAMES
        }
        for quantity, at_x in groups.items()
    }


def _gains(
    groups: dict[float, list[str]], references: dict[str, SweptReference], psnr: dict[Trial, float | None]
) -> dict[float, Interval]:
    """What TPC adds at every x, over clips; the seeds, and references that one clip has at one x, are averaged."""
    without = {(trial.clip, trial.seed): value for trial, value in psnr.items() if trial.variant.tpc is None}
    gains = {}
    for x, names in groups.items():
        by_clip: dict[int, list[float]] = {}
        for trial, value in psnr.items():
            if trial.variant.tpc is not None and trial.clip in names:
                pair = value, without[trial.clip, trial.seed]
                if None not in pair:
                    by_clip.setdefault(references[trial.clip].clip, []).append(pair[0] - pair[1])
        gains[x] = mean_interval([np.mean(of_clip) for of_clip in by_clip.values()])
    return gains


def _change_from_aligned(
    references: dict[str, SweptReference], psnr: dict[Trial, float | None]
) -> dict[Trial, float | None]:
    """PSNR of a trial minus that of its clip at scale 1, not turned, without TPC, with the same seed."""
    aligned = {
        (references[trial.clip].clip, trial.seed): value
        for trial, value in psnr.items()
        if references[trial.clip].aligned and trial.variant.tpc is None
    }
    pairs = {trial: (value, aligned[references[trial.clip].clip, trial.seed]) for trial, value in psnr.items()}
    return {trial: None if None in pair else pair[0] - pair[1] for trial, pair in pairs.items()}


def _curve(
    label: str,
    groups: dict[float, list[str]],
    seeds: Sequence[int],
    measured: dict[Trial, float | None],
    closed: bool,
) -> Curve:
    """Mean and deviation over seeds of the mean over clips, at every x. A closed curve repeats 180 at -180."""
    values = {(t.variant.name, t.clip, t.seed): value for t, value in measured.items() if value is not None}
    cells = {}
    for x, names in groups.items():
        by_seed = [[values[key] for n in names if (key := (VARIANT_NAMES[label], n, s)) in values] for s in seeds]
        cells[x] = over_seeds([float(np.mean(known)) if known else None for known in by_seed])
    cells = {x: cell for x, cell in cells.items() if cell.mean is not None}
    if closed and 180.0 in cells:
        cells[-180.0] = cells[180.0]
    coords = sorted(cells)
    deviation = None if len(seeds) < 2 else np.array([cells[x].deviation for x in coords])
    return Curve(label, np.array(coords), np.array([cells[x].mean for x in coords]), deviation)


def _table(quantity: str, lines: dict[str, Curve], gains: dict[float, Interval]) -> Table:
    by_x = [
        {
            float(x): Cell(float(mean), None if curve.deviation is None else float(curve.deviation[index]))
            for index, (x, mean) in enumerate(zip(curve.x, curve.mean, strict=True))
        }
        for curve in lines.values()
    ]
    rows = []
    for x in map(float, lines[WITHOUT].x):
        gain = gains[180.0 if quantity == "angle" and x == -180 else round(x, 6)]
        rows.append((f"{x:g}", (*(cells.get(x, Cell(None)) for cells in by_x), interval_cell(gain))))
    measured = "change of person PSNR" if quantity == "box IoU" else "person PSNR"
    header = (*(f"{measured} {label} (dB)" for label in lines), f"{WITH} minus {WITHOUT} (dB)")
    return Table(quantity, header, tuple(rows), f"Fidelity of the person against {quantity}")
