"""`evaluate.py metrics`: generated clips on disk against the true ones."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import tee
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.config import config_dict
from core.errors import UserError
from core.files import output_folder
from core.processes import choose_device, process_state
from data.poses.files import load_poses
from data.poses.poses import PoseEstimator, Poses, open_estimator
from data.preparation.layouts import left_out_line
from evaluation.config import MetricsConfig
from evaluation.folders import (
    ClipFiles,
    ClipPair,
    MaskFiles,
    file_stamps,
    find_poses,
    other_entries,
    pair_clips,
    read_features,
)
from evaluation.measure import (
    SIDES,
    FramePair,
    Number,
    frame_means,
    measure_clip,
    person_tracks,
    person_values,
    summarise,
    with_persons,
)
from evaluation.metric_suite import REGIONS, MetricSuite, open_metric_suite
from evaluation.report import (
    INTERVALS_NOTE,
    RESULTS_FILE,
    Cell,
    claim_output,
    close_output,
    format_number,
    heading,
    interval_cell,
    measure_label,
    run_parts,
    warning_lines,
    write_results,
)
from evaluation.statistics import Interval, ratio_interval
from metrics.face import FaceNetwork
from metrics.protocols import MEASURES, Protocol, brought_to_form, generated_to_form
from metrics.weights import digest

MMD_NOTE = "MMD: ± is the standard error, by the jackknife over clips; unbiased, so it may be negative"
# Keys that do not decide the numbers, or by files that are compared themselves.
ABOUT_FILES = ("generated", "truth", "masks", "output", "keep_parts", "device", "weights", "face")
ABOUT_FILES += tuple(f"{side}_{content}" for side in SIDES for content in ("poses", "features"))


def run(config: MetricsConfig) -> None:
    """Measure all clips and write results.json and table.md."""
    pairs = {pair.name: pair for pair in pair_clips(config.generated, config.truth, config.masks)}
    sides = {"generated": config.generated, "truth": config.truth}
    others = {f"{key}={path}": entries for key, path in sides.items() if (entries := other_entries(path, key))}
    state = process_state(config.device)
    if state.is_main_process:
        for given, entries in others.items():
            print(left_out_line(given, entries))
    device, _ = choose_device(config.device, "float32", state.local_process_index)
    regions = REGIONS if config.masks is not None else REGIONS[:1]
    metric_suite = open_metric_suite(config, regions, config.persons, device, _given_features(config, list(pairs)))
    persons = _person_sources(config, pairs, metric_suite.protocol)
    output = output_folder(config.output)
    inputs = {name: pair.stamps() | _pose_stamps(persons, name) for name, pair in pairs.items()}
    settings = {key: value for key, value in config_dict(config).items() if key not in ABOUT_FILES}
    settings |= {"task": "metrics", "masks": config.masks is not None}
    settings |= {"protocol version": metric_suite.protocol.version, "networks": metric_suite.networks()}
    given = (config.generated_features, config.truth_features) if metric_suite.given else ()
    settings["features given"] = [digest(Path(file)) for file in given]
    claim_output(output, settings, state, inputs)
    if (output / RESULTS_FILE).is_file():
        if state.is_main_process:
            print((output / "table.md").read_text(encoding="utf-8"), end="")
        return

    def measure(name: str, folder: Path) -> None:
        sources = [_of_clip(source, pairs[name], side) for source, side in zip(persons, SIDES, strict=False)]
        frames = frame_pairs(pairs[name], metric_suite.protocol, sources or None, metric_suite.face)
        bar = tqdm(frames, desc=name, total=pairs[name].frames, unit="frame", leave=False, disable=None)
        measure_clip(bar, metric_suite, folder)

    if state.is_main_process:
        frames, protocol = sum(pair.frames for pair in pairs.values()), metric_suite.protocol
        print(f"{len(pairs)} clips of {frames} frames in all, protocol {protocol.name} {protocol.version}")
    folders = run_parts(list(pairs), measure, output, state, "measuring", inputs)
    if state.is_main_process:
        numbers = summarise(folders, metric_suite)
        counts = {"clips": len(pairs), "frames": sum(pair.frames for pair in pairs.values())}
        by_clip = [frame_means([folder]) for folder in folders]
        intervals = {name: over_clips([clip[name] for clip in by_clip]) for name in metric_suite.names_by_clip()}
        if others:  # what is no clip
            counts["left_out"] = sum(len(entries) for entries in others.values())
        results = {
            "counts": counts,
            "results": {name: asdict(number) for name, number in numbers.items()},
            "intervals": {name: interval.plain() for name, interval in intervals.items()},
            "clips": {
                name: {"frames": pairs[name].frames} | {measure: number.value for measure, number in clip.items()}
                for name, clip in zip(pairs, by_clip, strict=True)
            },
        }
        text = _table(numbers, intervals, metric_suite, counts)
        write_results(config, metric_suite, results, {"table.md": text}, output)
        close_output(output, config.keep_parts)
    state.wait_for_everyone()


def _given_features(config: MetricsConfig, names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Side -> clip -> vectors of the features that the user brings; {} without."""
    if config.generated_features is None:
        return {}
    given = {side: read_features(getattr(config, f"{side}_features"), names, f"{side}_features") for side in SIDES}
    dimensions = [clips[names[0]].shape[1] for clips in given.values()]
    if dimensions[0] != dimensions[1]:
        raise UserError(f"generated_features are of dimension {dimensions[0]}, truth_features of {dimensions[1]}")
    return given


def _person_sources(
    config: MetricsConfig, pairs: dict[str, ClipPair], protocol: Protocol
) -> list[PoseEstimator | dict[str, Path]]:
    """For each side an estimator or the pose files by clip; [] where persons are not measured."""
    if not config.persons:
        return []
    sources: list[PoseEstimator | dict[str, Path]] = []
    for side in SIDES:
        path, argument = getattr(config, f"{side}_poses"), f"{side}_poses"
        if path is not None and (protocol.crop != "none" or protocol.size is not None):
            raise UserError(f"{argument} is for protocols at the images' own size, not protocol={protocol.name}")
        sources.append(open_estimator(config.pose) if path is None else find_poses(path, pairs.values(), argument))
    return sources


def _pose_stamps(sources: list[PoseEstimator | dict[str, Path]], name: str) -> dict[str, list]:
    files = [source[name] for source in sources if isinstance(source, dict)]
    return {"poses": file_stamps(files)} if files else {}


def _of_clip(source: PoseEstimator | dict[str, Path], pair: ClipPair, side: str) -> PoseEstimator | Poses:
    if not isinstance(source, dict):
        return source
    height, width = next(getattr(pair, side).frames()).shape[:2]
    poses = load_poses(source[pair.name], size=(width, height), argument=f"{side}_poses")
    if len(poses) != pair.frames:
        raise UserError(f"{side}_poses={source[pair.name]} has {len(poses)} frames, clip {pair.name!r} {pair.frames}")
    return poses


def over_clips(numbers: list[Number]) -> Interval:
    """The mean over all frames, with its interval over clips, from each clip's mean over its frames."""
    known = [number for number in numbers if number.samples]
    return ratio_interval(
        [[number.value * number.samples for number in known]], [[number.samples for number in known]]
    )


def frame_pairs(
    pair: ClipPair,
    protocol: Protocol,
    estimators: list[PoseEstimator | Poses] | None = None,
    face: FaceNetwork | None = None,
) -> Iterator[FramePair]:
    """The frames of two clips in the protocol's form, one at a time; with estimators, the person's measures too.

    `estimators`: of the generated and of the true clip, or their poses.
    """
    formed = _formed_frames(pair, protocol)
    if estimators is None:
        yield from formed
        return
    # The estimators follow each person through the clip, so both streams advance side by side.
    frames, ours, theirs = tee(formed, 3)
    generated = with_persons((frame.generated for frame in ours), estimators[0])
    truth = with_persons((frame.truth for frame in theirs), estimators[1])
    for frame, (_, found), (_, target) in zip(frames, generated, truth, strict=True):
        values = person_values(frame.generated, found, frame.truth, target, face)
        yield replace(frame, person=values, tracks=person_tracks(found, target, frame.truth.shape[1::-1]))


def _formed_frames(pair: ClipPair, protocol: Protocol) -> Iterator[FramePair]:
    masks = pair.masks.frames() if pair.masks is not None else iter(lambda: None, 0)
    first: np.ndarray | None = None
    frames = zip(pair.generated.frames(), pair.truth.frames(), masks, strict=False)  # the masks may have no end
    for index, (generated, truth, mask) in enumerate(frames):
        first = truth if first is None else first
        _check_size(pair.truth, index, truth, first)
        if mask is not None:
            _check_size(pair.masks, index, mask, truth)
            mask = brought_to_form(mask, protocol, nearest=True)
        try:
            ours = generated_to_form(generated, (truth.shape[1], truth.shape[0]), protocol)
        except ValueError as error:
            raise UserError(f"clip {pair.name!r}, frame {index}: {pair.generated.path} {error}") from None
        yield FramePair(ours, brought_to_form(truth, protocol), mask)


def _check_size(clip: ClipFiles | MaskFiles, index: int, image: np.ndarray, expected: np.ndarray) -> None:
    if image.shape[:2] != expected.shape[:2]:
        raise UserError(
            f"clip {clip.name!r}, frame {index}: {clip.argument} is {image.shape[1]}x{image.shape[0]} "
            f"({clip.path}), the true frames are {expected.shape[1]}x{expected.shape[0]}"
        )


def _table(
    numbers: dict[str, Number], intervals: dict[str, Interval], metric_suite: MetricSuite, counts: dict[str, int]
) -> str:
    """The numbers with the protocol above and the warnings below."""
    lines = ["| measure | value | samples |", "|---|---|---|"]
    for name, number in numbers.items():
        cell = interval_cell(intervals[name]) if name in intervals else Cell(number.value, number.error)
        lines.append(f"| {measure_label(name)} | {format_number(cell, plus_minus=' ± ')} | {number.samples} |")
    warnings = warning_lines((name, number.warning) for name, number in numbers.items())
    left_out = f", {counts['left_out']} files left out" if "left_out" in counts else ""
    counted = f"{counts['clips']} clips, {counts['frames']} frames{left_out}"
    notes = [MMD_NOTE] if any(MEASURES[name].mmd for name in metric_suite.measures) else []
    return heading(metric_suite, counted, INTERVALS_NOTE, *notes) + "\n".join(lines) + "\n" + warnings
