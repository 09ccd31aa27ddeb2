"""Time, peak memory and operations of inference, training and data on this machine.

    python -m benchmarks.speed [size=tiny|half|sd15] [model=FOLDER] [parts=[inference,training,...]] [threads=2]
        [dtypes=[float32,bfloat16]] [repeats=3] [output=outputs/speed] [key=value ...]

Every part runs in a process of its own, things to be compared in turns. Writes results.json and table.md; a part that
was measured already is not measured again. `python -m benchmarks.speed.peers.compare` measures beside a peer.
"""

from benchmarks.config import SpeedConfig
from core.config import check_first

check_first(__name__, SpeedConfig, __doc__)


import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

import torch

from benchmarks.speed.measuring import machine_facts
from benchmarks.speed.parts import SpeedConfig, run_part, works
from benchmarks.speed.report import speed_tables
from core.config import load_config
from core.errors import UserError, run_command
from core.files import complete_file, output_folder, write_json
from core.processes import choose_device


def main(arguments: list[str]) -> None:
    config = load_config(SpeedConfig, arguments, about=__doc__)
    output = output_folder(config.output)
    if config.threads:
        torch.set_num_threads(config.threads)
    settings = {name: value for name, value in asdict(config).items() if name not in ("parts", "output")}
    path, parts = output / "results.json", {}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["settings"] != settings:
            raise UserError(f"{path} was measured with other settings; give another output=, or remove it")
        parts = before["parts"]
    machine = machine_facts(torch.device(choose_device(config.device, "float32")[0]))
    for name, (function, *rest) in works(config).items():
        if name in parts:
            continue
        print(f"measuring {name}", flush=True)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            parts[name] = process.submit(run_part, config.threads, function, *rest).result()
        write_json(path, {"machine": machine, "settings": settings, "parts": parts})
    text = speed_tables(json.loads(path.read_text(encoding="utf-8")))
    with complete_file(output / "table.md") as part:
        part.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_command(main)
