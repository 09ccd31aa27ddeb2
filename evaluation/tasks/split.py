"""`evaluate.py split`: which clips of a data set are misaligned, after the paper's definition, and in which way."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from omegaconf import MISSING

from core.config import config_dict, save_config
from core.files import output_folder, write_json
from core.processes import process_state
from evaluation.clips import ClipsConfig
from evaluation.filmed import open_clips
from evaluation.jobs import claim_output, remove_parts, run_parts
from evaluation.misalignment import KINDS, ClipSplit, ThresholdConfig, classify, misalignment
from evaluation.plots import Histogram, draw_histograms
from evaluation.report import common_facts, write_results

CLIP_FILE = "clip.json"
GROUPS = ("original", "misaligned")


@dataclass
class SplitConfig(ClipsConfig):
    """Which clips are split; `ClipsConfig` says where they come from. A folder needs pose files only.

    output: folder for the results; thresholds: see `ThresholdConfig`.
    """

    dataset: str = MISSING
    output: str = "outputs/split"
    clips: int = 0
    frames: int = 0
    stride: int = 1
    thresholds: ThresholdConfig = field(default_factory=ThresholdConfig)

    def check(self) -> None:
        super().check()
        self.thresholds.check()


def run(config: SplitConfig) -> None:
    """Write results.json, original.txt, misaligned.txt, table.md and the histograms."""
    clips = open_clips(config)
    state = process_state("cpu")
    output = output_folder(config.output)
    settings = {key: value for key, value in config_dict(config).items() if key != "output"}
    claim_output(output, {"task": "split"} | settings, state)

    def measure(name: str, folder: Path) -> None:
        reference, driving = clips.poses(name)
        measured = misalignment(reference, driving, config.thresholds.score)
        write_json(folder / CLIP_FILE, classify(name, measured, config.thresholds).plain())

    folders = run_parts(list(clips.names), measure, output, state, "comparing poses")
    if state.is_main_process:
        splits = [read_split(folder) for folder in folders]
        _write(config, splits, output)
        remove_parts(output)
    state.wait_for_everyone()


def read_split(folder: Path) -> ClipSplit:
    """What a part says about its clip."""
    content = json.loads((folder / CLIP_FILE).read_text(encoding="utf-8"))
    return ClipSplit(**{**content, "kinds": tuple(content["kinds"])})


def _write(config: SplitConfig, splits: list[ClipSplit], output: Path) -> None:
    groups = {name: [s for s in splits if s.misaligned == (name == "misaligned")] for name in GROUPS}
    kinds = Counter(kind for split in splits for kind in split.kinds)
    angles = {name: [s.angle_deg for s in group if s.angle_deg is not None] for name, group in groups.items()}
    overlaps = {name: [s.box_iou for s in group if s.box_iou is not None] for name, group in groups.items()}
    angle, box_iou = float(np.degrees(config.thresholds.angle)), config.thresholds.box_iou
    draw_histograms(
        output / "histogram.png",
        [
            Histogram(
                "median relative angle (degrees)",
                angles,
                np.linspace(0, 180, 19),
                range(0, 181, 30),
                angle,
                f"{angle:.3g}°",
            ),
            Histogram(
                "median box IoU", overlaps, np.linspace(0, 1, 21), np.linspace(0, 1, 6), box_iou, f"{box_iou:g}"
            ),
        ],
    )
    results = common_facts(config) | {
        "counts": {name: len(group) for name, group in groups.items()} | {kind: kinds[kind] for kind in KINDS},
        "clips": {split.name: split.plain() for split in splits},
    }
    lines = ["| clips | number |", "|---|---|"]
    lines += [f"| {name} | {number} |" for name, number in results["counts"].items()]
    table = "\n".join(lines) + "\n"
    save_config(config, output / "config.yaml")
    lists = {f"{name}.txt": "".join(f"{split.name}\n" for split in group) for name, group in groups.items()}
    write_results(output, results, {"table.md": table, **lists})
    print(table, end="")
