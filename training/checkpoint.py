"""Complete training states: saved by all ranks, renamed when whole, old ones pruned only afterwards."""

import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator

_NAME = re.compile(r"checkpoint-(\d+)$")


def checkpoints(output: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints in a folder, oldest first."""
    found = [(int(match[1]), path) for path in Path(output).iterdir() if (match := _NAME.match(path.name))]
    return sorted(found)


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, keep: int) -> Path:
    """Save weights, optimiser, schedule, registered objects and every rank's random state as `checkpoint-<step>`.

    Every process must call it. The folder has a temporary name until all ranks have written; a crash in between
    leaves earlier checkpoints untouched.
    """
    final = output / f"checkpoint-{step}"
    temporary = output / f".checkpoint-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for _, old in checkpoints(output)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def resume(accelerator: Accelerator, output: Path) -> int:
    """Load the newest complete checkpoint, if there is one; returns the step to go on from, 0 for a new start."""
    found = checkpoints(output)
    if not found:
        return 0
    step, folder = found[-1]
    accelerator.load_state(str(folder))
    return step
