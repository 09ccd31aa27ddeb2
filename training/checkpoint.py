"""Complete training states: saved by all ranks, renamed when whole, old ones pruned only afterwards.

    output/checkpoint-<step>/
        progress.json           step, position in the data, strategy, processes, what is trained, on which weights
        average.safetensors     EMA, whole, if there is one
        model.safetensors, optimizer.bin      weights and optimiser (one process, DDP), or
        pytorch_model/                        the parts of every process (DeepSpeed), or
        pytorch_model_fsdp_0/, optimizer_0/   (FSDP)
        random_states_<rank>.pkl              random state of every process

Weights are those that are trained, and frozen ones only where `model.init` does not have them: its folder must stay as
it is. The learning rate is a function of the step. Names that start with a point are being written or removed.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import nn

from core.errors import UserError
from core.files import give_usual_mode, sync_entries, sync_folder
from models.lora import without_adapter
from training.distributed import on_main, strategy
from training.ema import WeightAverage

PROGRESS = "progress.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


@dataclass
class Progress:
    """Position of a run."""

    step: int = 0  # optimiser steps taken
    clips: int = 0  # trained on by all processes; where the data go on
    skipped: int = 0  # steps that were left out because loss or gradient was not finite


@dataclass(frozen=True)
class Layout:
    """Traits that a checkpoint and the run that loads it must share."""

    strategy: str  # see `training.distributed.strategy`
    processes: int  # that wrote it
    trained: str  # digest of names and shapes of the trainable parameters
    # Digest of the weights that frozen ones come from; None: the checkpoint has them, as those of new networks and of
    # earlier releases do.
    base: str | None = None


def layout(accelerator: Accelerator, named: list[tuple[str, nn.Parameter]], base: str | None = None) -> Layout:
    """Layout of this run's checkpoints, from the names and parameters that are trained, and the digest of the base."""
    shapes = [(name, list(getattr(parameter, "ds_shape", parameter.shape))) for name, parameter in named]
    digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
    return Layout(strategy(accelerator), accelerator.num_processes, digest, base)


def checkpoints(output: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints in a folder, oldest first."""
    found = [(int(match[1]), path) for path in Path(output).iterdir() if (match := _NAME.match(path.name))]
    return sorted((step, path) for step, path in found if (path / PROGRESS).is_file())


def leave_out(model: nn.Module, names: Collection[str]) -> None:
    """Leave frozen tensors of these names, of a model without adapters, out of its state, in saving and in loading.

    Hooks of torch do it because every strategy has its own way to save a state.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    out = {name for name in model.state_dict() if name not in trained and without_adapter(name) in names}

    def shorten(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        for name in out:
            state.pop(prefix + name, None)

    def forgive(module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in out]

    model.register_state_dict_post_hook(shorten)
    model.register_load_state_dict_post_hook(forgive)


def exchange_with_bare_model(accelerator: Accelerator) -> None:
    """Save and load weights under the bare model's names, without DDP's prefix."""

    def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
        for index, model in enumerate(models[: len(weights)]):
            weights[index] = accelerator.unwrap_model(model).state_dict()

    def load(models: list[nn.Module], folder: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(
    accelerator: Accelerator,
    output: Path,
    progress: Progress,
    arrangement: Layout,
    average: WeightAverage | None,
    keep: int,
) -> Path:
    """Save the complete state as `checkpoint-<step>` and keep the newest `keep`; every process must call it.

    The folder has a temporary name until all ranks have written and the disk has it. `UserError` if it could not be
    written; earlier checkpoints are then as they were.
    """
    final = output / f"checkpoint-{progress.step}"
    temporary = output / f".{final.name}.partial"
    on_main(accelerator, lambda: prepare_folder(output, temporary))
    failure = write_state(accelerator, temporary, progress, arrangement, average)
    if arrangement.strategy == "replicated":
        failure = next(filter(None, gather_object([failure])), None)
    # Processes that write their parts in step cannot be told; they end when this one does.
    if failure is not None:
        message = not_written(output, final.name, failure)
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(message)
    accelerator.wait_for_everyone()
    on_main(accelerator, lambda: publish(output, temporary, final, keep))
    return final


def prepare_folder(output: Path, temporary: Path) -> None:
    """An empty folder to write to, if there is room for another checkpoint of the last one's size."""
    shutil.rmtree(temporary, ignore_errors=True)
    found = checkpoints(output)
    if found:
        size = sum(path.stat().st_size for path in found[-1][1].rglob("*") if path.is_file())
        free = shutil.disk_usage(output).free
        if free < size:
            raise UserError(not_written(output, temporary.stem[1:], f"it needs about {size / 2**20:.0f} MiB"))
    try:
        temporary.mkdir()
    except OSError as error:
        raise UserError(not_written(output, temporary.stem[1:], error.strerror)) from None


def write_state(
    accelerator: Accelerator, folder: Path, progress: Progress, arrangement: Layout, average: WeightAverage | None
) -> str | None:
    """Reason why this process's part of a checkpoint could not be written, or None."""
    try:
        # DeepSpeed has a list of frozen parameters beside the model's state.
        accelerator.save_state(str(folder), exclude_frozen_parameters=arrangement.base is not None)
        if average is not None:
            average.save(folder, accelerator)
        if accelerator.is_main_process:
            entry = {**asdict(progress), **asdict(arrangement)}
            (folder / PROGRESS).write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
        if accelerator.is_local_main_process:
            sync_folder(folder)
    except OSError as error:
        return error.strerror or str(error)
    # What writers in C++ and Rust raise when the disk is full, and collectives when another process has ended.
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        return "a file was cut short" if "inline_container" in reason else reason
    return None


def publish(output: Path, temporary: Path, final: Path, keep: int) -> None:
    """Give a whole checkpoint its name, then remove old ones."""
    try:
        give_usual_mode(temporary)
        if final.exists():
            retire(final)
        os.replace(temporary, final)
        sync_entries(output)
        for _, old in checkpoints(output)[:-keep]:
            shutil.rmtree(retire(old))
    except OSError as error:
        raise UserError(not_written(output, final.name, error.strerror or str(error))) from None


def retire(checkpoint: Path) -> Path:
    """The checkpoint under a hidden name, renamed at once, so that none is ever found half-removed."""
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(checkpoint, old)
    return old


def not_written(output: Path, name: str, reason: str) -> str:
    free = shutil.disk_usage(output).free / 2**20
    found = checkpoints(output)
    last = f"the last complete one is {found[-1][1]}" if found else "there is none before it"
    return (
        f"{name} could not be written to {output} ({reason}; {free:.0f} MiB free); {last}. Make room and run the same "
        f"command again"
    )


def resume(accelerator: Accelerator, output: Path, arrangement: Layout, average: WeightAverage | None) -> Progress:
    """Progress of the newest complete checkpoint, which is loaded, or of a new start; every process must call it.

    Raises `UserError` for a checkpoint of another training or number of processes, or one that cannot be read.
    """
    newest = [str(path) for _, path in checkpoints(output)[-1:]] if accelerator.is_main_process else []
    chosen = [newest[0] if newest else None]
    broadcast_object_list(chosen)
    if chosen[0] is None:
        return Progress()
    folder = Path(chosen[0])
    try:
        saved = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{folder} cannot be seen by every process; output= must be on a file system they share"
        ) from None
    check_layout(folder, saved_layout(saved), arrangement)
    try:
        accelerator.load_state(str(folder))
        if average is not None:
            average.load(folder, accelerator)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder} cannot be read ({reason}); remove it to go on from the one before") from None
    # Accumulation starts with the step, whatever it was when the checkpoint was written.
    accelerator.step = 0
    return Progress(**{field.name: saved[field.name] for field in fields(Progress)})


def saved_layout(progress: dict[str, Any]) -> Layout:
    """The layout in the contents of `PROGRESS`."""
    return Layout(**{field.name: progress[field.name] for field in fields(Layout) if field.name in progress})


def check_base(folder: Path, saved: str | None, present: str | None) -> None:
    """Refuse to complete a checkpoint with frozen weights that it was not trained on."""
    if saved is not None and saved != present:
        raise UserError(
            f"the weights in model.init= are not those that {folder} was trained on, and it holds only what was "
            "trained; give model.init= as it was, or another output="
        )


def check_layout(folder: Path, saved: Layout, present: Layout) -> None:
    if saved.trained != present.trained:
        raise UserError(
            f"{folder} is of a training of other parameters (another stage, fine-tuning mode or network size); give "
            f"another output="
        )
    check_base(folder, saved.base, present.base)
    # Whole states fit any number of processes, and so do FSDP's, which are stored by name; DeepSpeed's parts fit only
    # as many processes of the same stage.
    fits = saved.strategy == present.strategy and (
        saved.strategy in ("replicated", "fsdp") or saved.processes == present.processes
    )
    if not fits:
        raise UserError(
            f"{folder} was written by {saved.processes} process(es) of {saved.strategy} and cannot go on with "
            f"{present.processes} of {present.strategy}; launch it as before, or start anew from its weights: "
            f"python -m training.export checkpoint={folder} output=NEW, then model.init=NEW with another output="
        )
