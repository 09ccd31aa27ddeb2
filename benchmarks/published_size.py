"""Files of published format and size with random weights: converted, a frame animated, one step of adapters trained.

    python -m benchmarks.published_size output=outputs/published_size                    14 GB of memory, 20 of disk
    python -m benchmarks.published_size output=outputs/tiny size=tiny side=64            in a minute

Each command runs by itself, and its largest resident set is compared with what `train.py --dry-run` says. Writes
`results.json` and `table.md` to `output`; weights lie in a temporary folder beside them and are removed.
"""

from benchmarks.config import PublishedConfig
from core.config import check_first

check_first(__name__, PublishedConfig, __doc__)


import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from benchmarks.speed.peers.weights import write_weights
from benchmarks.speed.sizes import chosen_sizes
from core.config import config_dict, load_config
from core.errors import UserError, run_command
from core.files import output_folder, write_json
from data.config import SAMPLES
from training.memory import RESERVE

ROOT = Path(__file__).parent.parent
FAMILY = "animate_anyone"  # AnimateAnyone as Moore Threads released it


@dataclass(frozen=True)
class Used:
    """What a command took."""

    seconds: float
    peak_gib: float  # largest resident set, pages of mapped files included
    text: str  # what it printed


def run(arguments: list[str]) -> Used:
    """Run a Python command in the repository; `UserError` if it fails."""
    started = time.perf_counter()
    with TemporaryFile("w+") as printed:
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT)
        # `Popen.wait` would leave the usage of this child mixed with that of others.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        text = printed.read()
    if process.returncode:
        raise UserError(f"python {' '.join(arguments)} ended with {process.returncode}: {text[-1000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Used(time.perf_counter() - started, usage.ru_maxrss * unit / 2**30, text)


def commands(config: PublishedConfig, weights: Path, folder: Path) -> dict[str, list[str]]:
    """The commands in their order, by name."""
    size = f"[{config.side},{config.side}]"
    training = ["train.py", "stage=image", "trainable=lora", f"model.init={folder / 'pipeline'}", f"data.size={size}"]
    training += [
        "frozen_dtype=bfloat16",
        "gradient_checkpointing=true",
        "vae_chunk=1",
        "data.workers=0",
        "max_steps=1",
    ]
    training += ["lora.export=separate", f"output={folder / 'run'}"]
    pair = [f"reference={SAMPLES / 'photo.jpg'}", f"driving={SAMPLES / 'dance.mp4'}"]
    sampling = [
        f"model={folder / 'pipeline'}",
        f"size={size}",
        "num_frames=1",
        "steps=1",
        "dtype=bfloat16",
        f"output={folder / 'animation'}",
    ]
    convert = ["convert", f"family={FAMILY}", f"weights={weights}", f"output={folder / 'pipeline'}"]
    return {
        "convert": ["-m", "models.checkpoints", *convert, f"dtype={config.dtype}"],
        "animate a frame": ["infer.py", *pair, *sampling],
        "train.py --dry-run": [*training, "dry_run=true"],
        "a step of adapters": training,
    }


def estimated_gib(text: str) -> float:
    """What `train.py --dry-run` says of one process by itself, without what it adds for a GPU's own needs."""
    line = re.search(r"^one GPU .*$", text, re.MULTILINE)
    return float(line.group().split()[-2]) - RESERVE / 2**30


def table(results: dict[str, Used], estimate: float) -> str:
    lines = ["| command | s | GiB at most | estimated |", "|---|---|---|---|"]
    for name, used in results.items():
        cell = f"{estimate:.1f}" if name == "a step of adapters" else ""
        lines.append(f"| {name} | {used.seconds:.0f} | {used.peak_gib:.1f} | {cell} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    config = load_config(PublishedConfig, arguments, about=__doc__)
    output, results = output_folder(config.output), {}
    with TemporaryDirectory(dir=output) as folder:
        weights = Path(folder) / "weights"
        write_weights(weights, FAMILY, chosen_sizes(config.size, side=config.side))
        for name, command in commands(config, weights, Path(folder)).items():
            results[name] = run(command)
            print(f"{name}: {results[name].seconds:.0f} s, {results[name].peak_gib:.1f} GiB", flush=True)
    estimate = estimated_gib(results["train.py --dry-run"].text)
    used = {name: {"seconds": value.seconds, "peak_gib": value.peak_gib} for name, value in results.items()}
    write_json(output / "results.json", {"config": config_dict(config), "estimated_gib": estimate, "used": used})
    (output / "table.md").write_text(table(results, estimate) + "\n", encoding="utf-8")
    print(table(results, estimate))


if __name__ == "__main__":
    run_command(main)
