"""`evaluate.py split`: original and misaligned clips of a data set, after the paper's definition."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np

from core.config import config_dict
from core.files import output_folder, write_json
from core.processes import process_state
from evaluation.clips import open_clips
from evaluation.config import SplitConfig
from evaluation.misalignment import KINDS, SUBSETS, UNSEEN, ClipSplit, classify, misalignment
from evaluation.plots import Histogram, draw_histograms
from evaluation.report import claim_output, close_output, run_parts, write_results

CLIP_FILE = "clip.json"


def run(config: SplitConfig) -> None:
    """Write results.json, original.txt, misaligned.txt, unseen.txt, table.md and the histograms."""
    clips = open_clips(config)
    state = process_state("cpu")
    output = output_folder(config.output)
    settings = {key: value for key, value in config_dict(config).items() if key != "output"}
    claim_output(output, {"task": "split"} | settings, state)

    def measure(name: str, folder: Path) -> None:
        measured = misalignment(*clips.poses(name), config.thresholds.score)
        write_json(folder / CLIP_FILE, asdict(classify(name, measured, config.thresholds)))

    folders = run_parts(list(clips.names), measure, output, state, "comparing poses")
    if state.is_main_process:
        contents = [json.loads((folder / CLIP_FILE).read_text(encoding="utf-8")) for folder in folders]
        _write(config, [ClipSplit(**content | {"kinds": tuple(content["kinds"])}) for content in contents], output)
        close_output(output, keep_parts=False)
    state.wait_for_everyone()


def _write(config: SplitConfig, splits: list[ClipSplit], output: Path) -> None:
    subsets = {subset: [split for split in splits if split.subset == subset] for subset in (*SUBSETS, UNSEEN)}
    kinds = Counter(kind for split in splits for kind in split.kinds)
    angles = {name: [split.angle_deg for split in subsets[name]] for name in SUBSETS}
    overlaps = {name: [split.box_iou for split in subsets[name]] for name in SUBSETS}
    angle, box_iou = float(np.degrees(config.thresholds.angle)), config.thresholds.box_iou
    edges, ticks = np.linspace(0, 180, 19), range(0, 181, 30)
    histograms = [
        Histogram("median relative angle (degrees)", angles, edges, ticks, angle, f"{angle:.3g}°"),
        Histogram("median box IoU", overlaps, np.linspace(0, 1, 21), np.linspace(0, 1, 6), box_iou, f"{box_iou:g}"),
    ]
    draw_histograms(output / "histogram.png", histograms)
    results = {
        "counts": {name: len(subset) for name, subset in subsets.items()} | {kind: kinds[kind] for kind in KINDS},
        "frames": {
            "all": sum(split.frames for split in splits),
            "unseen": sum(split.unseen_frames for split in splits),
            "angle by points": sum(split.angles_by_points for split in splits),
        },
        "clips": {split.name: asdict(split) for split in splits},
    }
    lines = ["| clips | number |", "|---|---|", *(f"| {name} | {n} |" for name, n in results["counts"].items())]
    lines += ["", "| frames | number |", "|---|---|", *(f"| {name} | {n} |" for name, n in results["frames"].items())]
    lists = {f"{name}.txt": "".join(f"{split.name}\n" for split in subset) for name, subset in subsets.items()}
    write_results(config, None, results, {"table.md": "\n".join(lines) + "\n", **lists}, output)
