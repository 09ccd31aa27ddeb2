"""This project and a published implementation side by side: the same weights, inputs and noise, in turns.

    python -m benchmarks.speed.peers.compare peer=moore checkout=PATH python=PATH [size=half] [threads=2]
        [dtypes=[float32,bfloat16]] [side=512] [frames=4] [rounds=3] [output=DIR]

Each side runs in a process of its own, both with all threads, one computes at a time. Prints a table; `output` gets it
as table.md, beside results.json.
"""

from benchmarks.config import CompareConfig
from core.config import check_first

check_first(__name__, CompareConfig, __doc__)


import json
import os
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.speed.measuring import machine_facts
from benchmarks.speed.peers.session import PeerSession, chosen_peer
from benchmarks.speed.peers.table import Row, markdown
from benchmarks.speed.peers.weights import SETTINGS, PeerSettings, peer_settings, weights_facts, write_weights
from benchmarks.speed.sizes import SpeedSizes, chosen_sizes
from core.config import config_dict, load_config
from core.errors import UserError, run_command
from core.files import complete_file, output_folder, write_json

INFERENCE = "inference"


def sizes_of(config: CompareConfig) -> SpeedSizes:
    return chosen_sizes(config.size, side=config.side, frames=config.frames)


def commands(config: CompareConfig) -> list[tuple[str, bool, dict[str, Any]]]:
    """Each work, with or without gradient checkpointing, and the drivers' command for it."""
    found = []
    for work in config.works or (INFERENCE, *chosen_peer(config.peer).stages):
        if work == INFERENCE:
            found.append((work, False, {"do": "infer", "steps": config.steps, "guidance": config.guidance}))
        else:
            training = {"do": "train", "stage": work}
            found += [(work, way, {**training, "gradient_checkpointing": way}) for way in config.checkpointing]
    return found


def compare(config: CompareConfig, sizes: SpeedSizes, folder: Path) -> list[Row]:
    """A row for each work and dtype, with the weights of a folder."""
    threads = config.threads or os.cpu_count() or 1
    rows: list[Row] = []
    for dtype in config.dtypes:
        settings = peer_settings(chosen_peer(config.peer).family, sizes, dtype, config.device, threads)
        for work, checkpointed, command in commands(config):
            row = measure(config, settings, folder, Row(work, dtype, checkpointed), command)
            # The peer's failures are part of the result, unless nothing of it runs.
            if row.reason and not any(earlier.theirs for earlier in rows):
                raise UserError(row.reason)
            rows.append(row)
    return rows


def measure(config: CompareConfig, settings: PeerSettings, folder: Path, row: Row, command: dict[str, Any]) -> Row:
    """`row` with the answers of both sides to a command, in turns."""
    ours, theirs, reason, difference = [], [], None, {}
    infers = command["do"] == "infer"
    with (
        PeerSession.of_ours(settings, folder) as our_side,
        PeerSession.of_peer(config.peer, config.python, config.checkout, settings, folder) as their_side,
    ):
        first = our_side.ask(**command, **({"peer_rounding": True} if infers else {}))
        try:
            their_first = their_side.ask(**command)
            if infers:
                difference["peer_rounding"] = latent_difference(our_side, their_side)
            else:
                difference["loss"] = abs(first["loss"] - their_first["loss"])
        except UserError as error:
            reason = str(error)
        for _ in range(config.rounds):
            ours.append(our_side.ask(**command))
            if reason is None:
                theirs.append(their_side.ask(**command))
        if theirs and infers:
            difference |= latent_difference(our_side, their_side)
        elif theirs:
            difference["last_loss"] = abs(ours[-1]["loss"] - theirs[-1]["loss"])
    return replace(row, ours=summary(ours), theirs=summary(theirs), difference=difference, reason=reason)


def latent_difference(ours: PeerSession, theirs: PeerSession) -> dict[str, float]:
    """Largest and mean difference of the last latents, and their standard deviation for scale."""
    with TemporaryDirectory() as scratch:
        found = []
        for name, side in (("ours", ours), ("theirs", theirs)):
            side.ask("result", path=f"{scratch}/{name}.safetensors")
            found.append(load_file(f"{scratch}/{name}.safetensors")["latents"])
    apart = (found[0] - found[1]).abs()
    return {"largest": float(apart.max()), "mean": float(apart.mean()), "deviation": float(found[1].std())}


def summary(answers: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the seconds and the largest peaks; empty for no answers."""
    if not answers:
        return {}
    found = {name: median(answer[name] for answer in answers) for name in answers[0] if name.endswith("seconds")}
    found["least_seconds"] = min(answer["seconds"] for answer in answers)
    peaks = [name for name in answers[0] if name.endswith("peak_bytes")]
    return found | {name: max(answer[name] for answer in answers) for name in peaks}


def main(arguments: list[str]) -> None:
    config = load_config(CompareConfig, arguments, about=__doc__)
    sizes, family = sizes_of(config), chosen_peer(config.peer).family
    with TemporaryDirectory() as scratch:
        weights = Path(config.weights or f"{scratch}/weights")
        kept = weights / SETTINGS
        if not weights.exists():
            write_weights(weights, family, sizes)
        elif not kept.is_file() or json.loads(kept.read_text(encoding="utf-8")) != weights_facts(family, sizes):
            held = f"holds no {SETTINGS} of {family} at size={config.size}"
            raise UserError(f"weights={weights} {held}; give a new folder")
        rows = compare(config, sizes, weights)
    text = markdown(rows, config.peer)
    print(text, end="")
    if config.output:
        output = output_folder(config.output)
        facts = {**machine_facts(torch.device(config.device)), "threads": config.threads or os.cpu_count()}
        results = {"config": config_dict(config), "machine": facts, "rows": [row.numbers(rows) for row in rows]}
        write_json(output / "results.json", results)
        with complete_file(output / "table.md") as path:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
