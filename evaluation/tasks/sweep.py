"""`evaluate.py sweep`: fidelity of the person against the reference's angle and scale (Figures 1b and 9)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.config import save_config
from core.errors import UserError
from core.processes import process_state
from data.people.scenes import Scene, misaligned_reference
from evaluation.clips import ClipsConfig, EvaluationClip, at_first_frame, rendered_clip, rendered_people
from evaluation.metric_suite import PERSON_MEASURES, MetricSuite, ProtocolConfig, open_instruments
from evaluation.misalignment import misalignment
from evaluation.plots import Curve, Panel, draw_panels
from evaluation.report import Cell, Table, common_facts, heading, markdown, over_seeds, write_results
from evaluation.summary import clip_means
from evaluation.trials import PERSON_PSNR, PERSON_PSNR_LABEL, WITH, WITHOUT, Condition, Trial, TrialsConfig, run_task
from inference.animate import SamplingConfig
from models.animators.registry import SHIPPED_MODEL
from tpc import CalibrationConfig

IOU_BINS = np.linspace(0, 1, 11)
ALIGNED = 1.0  # scale of a reference that fits


@dataclass
class SweepConfig(ClipsConfig, TrialsConfig):
    """Rendered clips whose reference is turned and scaled; `ClipsConfig` and `TrialsConfig` say which and how.

    output: folder for the results; model: pipeline folder.
    angles: number of angles of the reference over a full turn; 0 leaves angles out.
    scales: factors on the person's size in the reference, and 1 beside them; [] leaves them out.
    """

    output: str = "outputs/sweep"
    model: str = str(SHIPPED_MODEL)
    clips: int = 8
    frames: int = 4
    stride: int = 6
    angles: int = 12
    scales: list[float] = field(default_factory=lambda: [0.3, 0.42, 0.6, 0.77, 1.0, 1.3, 1.7, 2.2, 3.0])
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=15, guidance_scale=1.0))
    tpc: CalibrationConfig = field(default_factory=CalibrationConfig)


@dataclass(frozen=True)
class Variation:
    """A clip with its reference framed otherwise.

    Attributes:
        kind: "angle" or "scale", which of the two is swept.
        angle_deg: turn of the reference in the image, clockwise, degrees.
        scale: factor on the person's size.
    """

    number: int
    kind: str
    angle_deg: float
    scale: float

    @property
    def name(self) -> str:
        return f"clip{self.number:03d}-{self.kind}{getattr(self, 'angle_deg' if self.kind == 'angle' else 'scale'):g}"

    @property
    def aligned(self) -> bool:
        return self.angle_deg == 0 and self.scale == ALIGNED

    def clip(self, scene: Scene) -> EvaluationClip:
        """The clip of the scene."""
        reference = misaligned_reference(scene, scale=self.scale, rotation=float(np.radians(self.angle_deg)))
        return rendered_clip(scene, reference, self.name)


def run(config: SweepConfig) -> None:
    """Write results.json, table.md, sweep.png and sweep.pdf."""
    config.check()
    config.sampling.check()
    variations = {variation.name: variation for variation in _variations(config)}
    people = rendered_people(config)
    conditions = [Condition("without", config.model, None), Condition("with", config.model, config.tpc)]
    state = process_state(config.device)
    metric_suite = _instruments(config)

    def clip_of(name: str) -> EvaluationClip:
        return variations[name].clip(at_first_frame(people.scene(variations[name].number)))

    def write(folders: dict[Trial, Path], output: Path) -> None:
        psnr = {trial: clip_means(folder)[PERSON_PSNR] for trial, folder in folders.items()}
        box_iou = {name: _box_iou(clip_of(name)) for name in variations}
        curves = _curves(config, variations, box_iou, psnr)
        _write(config, metric_suite, curves, variations, box_iou, psnr, output)

    run_task("sweep", config, conditions, list(variations), clip_of, metric_suite, state, write)


def _instruments(config: SweepConfig) -> MetricSuite:
    measures = ["psnr", "ssim", *(PERSON_MEASURES if config.persons else ())]
    measured = ProtocolConfig(protocol="native", features="none", measures=measures)
    return open_instruments(measured, ("foreground", "background"), config.persons)


def _variations(config: SweepConfig) -> list[Variation]:
    if config.angles < 0 or any(not scale > 0 for scale in config.scales):
        raise UserError(f"angles={config.angles} must not be negative and scales={config.scales} must be positive")
    angles = [360 * k / config.angles for k in range(config.angles)]
    angles = [angle - 360 if angle > 180 else angle for angle in angles]
    scales = [float(scale) for scale in config.scales]
    if scales and ALIGNED not in scales:
        scales.append(ALIGNED)
    found = []
    for number in range(config.clips):
        found += [Variation(number, "angle", round(angle, 3), 1.0) for angle in angles]
        found += [Variation(number, "scale", 0.0, scale) for scale in scales]
    if len({variation.name for variation in found}) < len(found):
        raise UserError(f"scales={config.scales} must differ")
    return found


def _box_iou(clip: EvaluationClip) -> float:
    return float(np.nanmean(misalignment(clip.reference.poses, clip.driving.poses).box_iou))


def _curves(
    config: SweepConfig,
    variations: dict[str, Variation],
    box_iou: dict[str, float],
    psnr: dict[Trial, float | None],
) -> dict[str, dict[str, Curve]]:
    """Curves by what is swept ("angle", "scale", "box IoU") and condition.

    Different clips reach different IoUs, so that curve is of the change against the same clip aligned, without TPC.
    """
    of_kind = {kind: [name for name, v in variations.items() if v.kind == kind] for kind in ("angle", "scale")}
    bins = {name: int(np.clip(np.digitize(box_iou[name], IOU_BINS) - 1, 0, len(IOU_BINS) - 2)) for name in variations}
    middle = {name: float(IOU_BINS[first : first + 2].mean()) for name, first in bins.items()}
    swept: dict[str, tuple[list[str], Callable[[str], float], dict[Trial, float | None]]] = {
        "angle": (of_kind["angle"], lambda name: variations[name].angle_deg, psnr),
        "scale": (of_kind["scale"], lambda name: variations[name].scale, psnr),
        "box IoU": (of_kind["scale"], middle.__getitem__, _change_from_aligned(variations, psnr)),
    }
    curves: dict[str, dict[str, Curve]] = {}
    for kind, (names, place, measured) in swept.items():
        if not names:
            continue
        groups: dict[float, list[str]] = {}
        for name in names:
            groups.setdefault(round(place(name), 6), []).append(name)
        curves[kind] = {
            label: _curve(label, condition, groups, config.seeds, measured, closed=kind == "angle")
            for label, condition in ((WITHOUT, "without"), (WITH, "with"))
        }
    return curves


def _change_from_aligned(
    variations: dict[str, Variation], psnr: dict[Trial, float | None]
) -> dict[Trial, float | None]:
    """PSNR of a trial minus that of its clip at scale 1, not turned, without TPC, with the same seed."""
    aligned = {
        (variations[trial.clip].number, trial.seed): value
        for trial, value in psnr.items()
        if variations[trial.clip].aligned and trial.condition.tpc is None
    }
    pairs = {trial: (value, aligned[variations[trial.clip].number, trial.seed]) for trial, value in psnr.items()}
    return {trial: None if None in pair else pair[0] - pair[1] for trial, pair in pairs.items()}


def _curve(
    label: str,
    condition: str,
    groups: dict[float, list[str]],
    seeds: Sequence[int],
    measured: dict[Trial, float | None],
    closed: bool,
) -> Curve:
    """Mean and deviation over seeds of the mean over clips, at every place. A closed curve repeats 180 at -180."""
    values = {(t.condition.name, t.clip, t.seed): value for t, value in measured.items() if value is not None}
    cells = {}
    for place, names in groups.items():
        by_seed = [[values[key] for n in names if (key := (condition, n, seed)) in values] for seed in seeds]
        cells[place] = over_seeds([float(np.mean(known)) if known else None for known in by_seed])
    cells = {place: cell for place, cell in cells.items() if cell.mean is not None}
    if closed and 180.0 in cells:
        cells[-180.0] = cells[180.0]
    places = sorted(cells)
    deviation = None if len(seeds) < 2 else np.array([cells[place].deviation for place in places])
    return Curve(label, np.array(places), np.array([cells[place].mean for place in places]), deviation)


def _write(
    config: SweepConfig,
    metric_suite: MetricSuite,
    curves: dict[str, dict[str, Curve]],
    variations: dict[str, Variation],
    box_iou: dict[str, float],
    psnr: dict[Trial, float | None],
    output: Path,
) -> None:
    about: dict[str, dict[str, Any]] = {
        "angle": {
            "x_label": "angle of the reference (degrees)",
            "y_label": PERSON_PSNR_LABEL,
            "marks": {-30.0: "", 30.0: "±π/6"},
            "ticks": [-180, -120, -60, 0, 60, 120, 180],
        },
        "scale": {
            "x_label": "scale of the reference",
            "y_label": PERSON_PSNR_LABEL,
            "marks": {},
            "ticks": [0.3, 0.5, 1, 2, 3],
            "log_x": True,
        },
        "box IoU": {
            "x_label": "IoU of the persons' boxes",
            "y_label": "change against aligned (dB)",
            "marks": {0.7: "0.7"},
            "ticks": [0, 0.2, 0.4, 0.6, 0.8, 1],
        },
    }
    panels = [Panel(list(lines.values()), **about[kind]) for kind, lines in curves.items()]
    draw_panels(output / "sweep.png", panels)
    results = common_facts(config, metric_suite) | {
        "counts": {"clips": config.clips, "frames": config.frames, "seeds": len(config.seeds), "trials": len(psnr)},
        "curves": {
            kind: {
                label: {
                    "x": curve.x.tolist(),
                    "mean": curve.mean.tolist(),
                    "deviation": None if curve.deviation is None else curve.deviation.tolist(),
                }
                for label, curve in lines.items()
            }
            for kind, lines in curves.items()
        },
        "trials": [
            {
                "clip": variations[trial.clip].number,
                "angle_deg": variations[trial.clip].angle_deg,
                "scale": variations[trial.clip].scale,
                "box_iou": round(box_iou[trial.clip], 4),
                "tpc": trial.condition.tpc is not None,
                "seed": trial.seed,
                "person_psnr_db": value,
            }
            for trial, value in psnr.items()
        ],
    }
    tables = [_table(kind, lines) for kind, lines in curves.items()]
    caption = f"{config.clips} clips of {config.frames} frames, mean and deviation over {len(config.seeds)} seeds"
    text = heading(metric_suite, caption) + "\n".join(markdown(table) for table in tables)
    save_config(config, output / "config.yaml")
    write_results(output, results, {"table.md": text})
    print(text, end="")


def _table(kind: str, lines: dict[str, Curve]) -> Table:
    rows = []
    for place in lines[WITHOUT].x:
        cells = []
        for curve in lines.values():
            at = np.flatnonzero(curve.x == place)
            cells.append(Cell(None) if not len(at) else _cell(curve, int(at[0])))
        rows.append((f"{place:g}", tuple(cells)))
    what = "change of person PSNR" if kind == "box IoU" else "person PSNR"
    header = tuple(f"{what} {label} (dB)" for label in lines)
    return Table(kind, header, tuple(rows), f"Fidelity of the person against {kind}")


def _cell(curve: Curve, place: int) -> Cell:
    deviation = None if curve.deviation is None else float(curve.deviation[place])
    return Cell(float(curve.mean[place]), deviation)
