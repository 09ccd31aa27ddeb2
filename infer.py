"""Animate an image with a driving video, with and without test-time Procrustes calibration.

    python infer.py                                                          the shipped samples, see `make demo`
    python infer.py reference=photo.png driving=dance.mp4 output=outputs/run1 [key=value ...]
    python infer.py reference=... driving=... steps=10 solver=dpm++            fewer steps: docs/speed.md
    accelerate launch infer.py pairs=list.jsonl output=outputs/many          a line {"reference": ..., "driving": ...,
                                                                             "output": ...} each; finished ones skipped
Writes to `output`:
    animation.mp4    the result                 comparison.mp4, comparison.png    reference | pose | calibrated
    calibration/     calibration.json, images   reference | result without TPC | result with TPC
    config.yaml      resolved configuration     result.json    configuration, versions, seed, seconds, summary of TPC
"""

import json
from dataclasses import replace
from pathlib import Path

from core.config import load_config
from core.errors import UserError, run_command
from core.files import check_paths, existing_file, output_folder, read_text
from data.config import SAMPLES
from inference.config import PAIR_KEYS, InferConfig, check_model_sizes
from models.config import SHIPPED_MODEL, ModelSizes


def jobs_of(config: InferConfig) -> list[InferConfig]:
    """One configuration for each pair: those of the list, the given one, or the shipped samples."""
    if config.pairs is not None:
        return listed_jobs(config)
    if any((config.reference, config.driving, config.driving_poses, config.pose_images)):
        return [config]
    # A rendered person, turned and small, and a photograph.
    samples, driving = (SAMPLES / "rendered.png", SAMPLES / "photo.jpg"), str(SAMPLES / "dance.mp4")
    outputs = [str(Path(config.output) / file.stem) for file in samples]
    return [
        replace(config, reference=str(file), driving=driving, output=output)
        for file, output in zip(samples, outputs, strict=True)
    ]


def listed_jobs(config: InferConfig) -> list[InferConfig]:
    jobs = []
    path = existing_file(config.pairs, "pairs")
    try:
        lines = read_text(path).splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"pairs={path} is not text in UTF-8: {error}") from None
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
        except ValueError:
            raise UserError(f"pairs={path}, line {row}: not valid JSON") from None
        unknown = set(pair) - set(PAIR_KEYS) if isinstance(pair, dict) else {"the line"}
        if unknown:
            raise UserError(f"pairs={path}, line {row}: {sorted(unknown)[0]} is none of {', '.join(PAIR_KEYS)}")
        for key, value in pair.items():
            if not isinstance(value, str | None):
                raise UserError(f"pairs={path}, line {row}: {key}={value!r} is not text; give a path in quotes")
        pair["output"] = pair.get("output") or str(Path(config.output) / f"{row:04d}")
        jobs.append(replace(config, pairs=None, **pair))
    if not jobs:
        raise UserError(f"pairs={path} holds no line")
    if len({job.output for job in jobs}) < len(jobs):
        raise UserError(f"pairs={path}: two lines have the same output")
    return jobs


def check_inputs(job: InferConfig) -> None:
    """Refuse missing inputs, as far as they are known before the model is loaded."""
    if job.reference is None:
        raise UserError("reference= is required beside driving=")
    existing_file(job.reference, "reference")
    check_paths({key: getattr(job, key) for key in (*PAIR_KEYS, "model", "lora") if key != "output"})
    if job.driving is None and job.driving_poses is None:
        if job.pose_images is None:
            raise UserError("driving= is required beside reference=")
        if job.tpc.enabled:
            raise UserError("TPC needs driving= or driving_poses= beside pose_images=; tpc.enabled=false does not")


def main(arguments: list[str]) -> None:
    config = load_config(InferConfig, arguments, about=__doc__)
    jobs = jobs_of(config)
    check_model_sizes(config, ModelSizes.of_folder(config.model or SHIPPED_MODEL))
    for job in jobs:
        check_inputs(job)
    # Networks take seconds to import, which wrong arguments need not wait for.
    from core.processes import choose_device, process_state
    from data.poses.drawing import FIGURES
    from inference.pairs import animate_pairs, with_defaults
    from inference.words import words_of
    from models.animators.registry import load_pipeline
    from models.compiling import compile_networks, use_channels_last

    state = process_state(config.device)
    for job in jobs:
        output_folder(job.output)
    device, dtype = choose_device(config.device, config.dtype, state.local_process_index)
    words = words_of(config)
    if words is not None and "image" in words.embeddings and len({Path(job.reference).resolve() for job in jobs}) > 1:
        raise UserError(
            f"embeddings={config.embeddings} has the image of one reference, and there are several; take image out of "
            "it, or animate them one by one"
        )
    pipeline = load_pipeline(
        config.model or SHIPPED_MODEL,
        dtype,
        config.lora,
        config.lora_scale,
        embeddings=() if words is None else words.embeddings,
    ).to(device)
    if config.channels_last:
        use_channels_last(pipeline.animator, pipeline.vae)
    if config.compile:
        compile_networks(pipeline.animator)
    pipeline.set_progress_bar_config(disable=True)
    check_model_sizes(config, pipeline.sizes)
    kinds = pipeline.animator.guidance_names
    if config.guidance_scales is not None and len(config.guidance_scales) != len(kinds):
        raise UserError(f"guidance_scales={config.guidance_scales} must be one number for each of {', '.join(kinds)}")
    full, tpc = with_defaults(config, pipeline), config.tpc
    wanted = (tpc.attach, tpc.start) if tpc.enabled else ()
    pipeline.check_wanted(full.guidance_scales or full.guidance_scale, config.solver, words, *wanted)
    # Finished by an earlier run.
    there = [job for job in jobs if config.pairs is not None and (Path(job.output) / "result.json").is_file()]
    if state.is_main_process:
        parameters = sum(p.numel() for network in (pipeline.animator, pipeline.vae) for p in network.parameters())
        print(f"model {config.model or 'assets/tiny_model'}: {parameters / 1e6:.1f} million parameters, on {device}")
        for note in pipeline.notes:
            print(f"note: {note}")
        if config.pairs is not None:
            print(f"{len(jobs)} pairs, of which {len(there)} are done already", flush=True)
    for job in jobs:
        if job.has_words and not pipeline.animator.takes_words:
            raise UserError(f"prompt=, negative_prompt= and embeddings= are of no use to model={job.model}")
        if job.pose_images is None and pipeline.pose_kind not in FIGURES:
            kind = f"model={job.model} reads {pipeline.pose_kind} images"
            raise UserError(f"pose_images= is required, a video or a folder of images: {kind}")
    with state.split_between_processes(jobs) as mine:
        animate_pairs([job for job in mine if job not in there], pipeline, config.prefetch)


if __name__ == "__main__":
    run_command(main)
