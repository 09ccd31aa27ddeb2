"""Prepare filmed people for training, and report what is wrong with them.

    python prepare.py source=videos/ output=dataset/ [layout=auto] [key=value ...]    poses, masks and a manifest
    python prepare.py check dataset=dataset/ [size=[512,512]] [num_frames=24]         what is wrong, and what to do
    python prepare.py latents dataset=dataset/ model=pipeline/ size=[512,512]         cached VAE latents
    python prepare.py embeddings dataset=dataset/ model=pipeline/ size=[512,512]      cached image embeddings

All of them go on where a killed run stopped, and share their clips among the processes of `accelerate launch` and
among machines (`num_shards=4 shard=0`); `check` runs once. Known layouts of data sets are shown in `docs/data.md`.
"""

import sys
from functools import partial
from pathlib import Path

from core.config import known_task, load_config
from core.errors import UserError, run_command
from core.files import output_folder
from data.config import CheckConfig, FeatureConfig, PrepareConfig, process_shard


def prepare(arguments: list[str]) -> None:
    """Estimate poses and masks of a data set's clips, and write their manifest."""
    config = load_config(PrepareConfig, arguments, about=__doc__)
    # What works takes seconds to import, which wrong arguments need not wait for: so in every task below.
    from data.poses.poses import open_estimator
    from data.preparation.layouts import find_clips, left_out_line, other_files
    from data.preparation.manifest import write_manifest
    from data.preparation.prepare import hold_out, prepare_clips

    shard = process_shard(config.shard, config.num_shards)
    source = Path(config.source).absolute()
    clips = hold_out(find_clips(source, config.layout), config.heldout)
    others = other_files(source, clips)
    output = output_folder(config.output).absolute()
    mine = shard.part(clips)
    print(f"{len(mine)} clips of layout {clips[0].layout}{shard}; poses, masks and records in {output}", flush=True)
    done = prepare_clips(mine, output, config, partial(open_estimator, config.pose), shard.row)
    manifest = write_manifest(output, [clip.name for clip in clips], clips[0].layout, str(config.source))
    counted = f"{done.prepared} clips prepared, {done.done_before} were done before{shard}"
    print(f"layout {clips[0].layout}: {counted}; {done.frames} frames read")
    for name, reason in done.left_out.items():
        print(f"left out: {name}: {reason}")
    if others:
        print(left_out_line(f"source={config.source}", others))
    rest = f", {manifest.missing} to be prepared by others" if manifest.missing else ""
    print(f"{output}: {len(manifest.clips)} clips for training, {len(manifest.left_out)} left out{rest}")
    if not manifest.clips and not manifest.missing:
        raise UserError(f"source={config.source}: none of {len(clips)} clips can be used; the reasons are above")


def check(arguments: list[str]) -> None:
    """Report what is wrong with a data set; ends with code 1 when a clip has an error."""
    config = load_config(CheckConfig, arguments, about=__doc__)
    from data.preparation.checks import check_dataset
    from data.preparation.layouts import find_clips, left_out_line, other_files
    from data.preparation.manifest import has_manifest
    from data.preparation.report import report_table, write_report

    report = check_dataset(config)
    print(report_table(report))
    if not has_manifest(config.dataset):
        others = other_files(Path(config.dataset), find_clips(config.dataset, config.layout, "dataset"))
        if others:
            print(left_out_line(f"dataset={config.dataset}", others))
    # What is not ours is not written to unless that is asked for.
    folder = config.output or (config.dataset if has_manifest(config.dataset) else None)
    if folder is not None:
        print("report: {} and {}".format(*write_report(report, Path(folder))))
    if report.errors:
        sys.exit(1)


def features(kind: str, arguments: list[str]) -> None:
    """Cache the latents or the embeddings of a data set's clips."""
    config = load_config(FeatureConfig, arguments, about=__doc__)
    from inference.features import make_features

    shard = process_shard(config.shard, config.num_shards)
    made = make_features(kind, config, shard)
    for name, reason in made.left_out.items():
        print(f"left out: {name}: {reason}")
    again = "".join(f", {count} of them again ({reason})" for reason, count in made.again.items())
    print(f"{made.folder}: {kind} of {made.made} clips made{again}, {made.current} were there{shard}")


TASKS = {
    "check": check,
    "latents": lambda arguments: features("latents", arguments),
    "embeddings": lambda arguments: features("embeddings", arguments),
}


def main(arguments: list[str]) -> None:
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        task, *rest = arguments
        TASKS[known_task(task, TASKS)](rest)
        return
    prepare(arguments)


if __name__ == "__main__":
    run_command(main)
