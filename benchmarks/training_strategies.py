"""Speed and memory of training by strategy: a few steps of one configuration under each accelerate configuration.

    python -m benchmarks.training_strategies config=configs/train_stage1_tiny.yaml overrides="model.vae=runs/vae/vae"

Prints a table; memory is the main process's, on its GPU, or resident without one.
"""

from benchmarks.config import StrategiesConfig
from core.config import check_first

check_first(__name__, StrategiesConfig, __doc__)


import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.config import load_config
from core.errors import UserError, run_command

ROOT = Path(__file__).parent.parent


def measure(name: str, config: StrategiesConfig) -> str:
    """Row of the table for a few steps of one strategy."""
    shown = ["accelerate", "launch", "--config_file", f"configs/accelerate/{name}.yaml", "train.py"]
    with tempfile.TemporaryDirectory() as output:
        command = [str(Path(sys.executable).parent / shown[0]), *shown[1:], "--config", config.config]
        command += [*shlex.split(config.overrides or ""), f"output={output}", f"max_steps={config.steps}"]
        # DeepSpeed does not take channels_last, so no strategy gets it.
        command += ["log_steps=1", "checkpoint_steps=1000000", "validation.steps=0", "channels_last=false"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{shlex.join(command)} failed: {done.stderr[-1000:]}")
        events = EventAccumulator(f"{output}/logs")
        events.Reload()
        speed = median(event.value for event in events.Scalars("samples_per_second")[1:])
        memory = max(event.value for event in events.Scalars("peak_memory_gib"))
        progress = json.loads((Path(output) / f"checkpoint-{config.steps}" / "progress.json").read_text())
    batch = progress["clips"] // config.steps
    cells = [f"`{' '.join(shown[:4])} ...`", progress["processes"], batch, f"{batch / speed:.2f}", f"{speed:.2f}"]
    return "| " + " | ".join(map(str, [*cells, f"{memory:.2f}"])) + " |"


def main(arguments: list[str]) -> None:
    config = load_config(StrategiesConfig, arguments, about=__doc__)
    print("| command | processes | batch size | s a step | clips a second | GiB, main process |")
    print("|---|---|---|---|---|---|")
    for name in config.strategies:
        print(measure(name, config), flush=True)


if __name__ == "__main__":
    run_command(main)
