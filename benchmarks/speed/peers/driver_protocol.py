"""Parts that all drivers share: JSON lines in and out, seconds and peak memory, inputs.

    PYTHON -u DRIVER.py CHECKOUT SETTINGS.json WEIGHTS_FOLDER

Drivers run in a peer's environment, which has torch and safetensors, and nothing of the project.
"""

import gc
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Job:
    """Arguments of a driver."""

    checkout: Path  # the peer's code
    settings: dict[str, Any]  # `weights.PeerSettings`
    folder: Path  # weights and inputs

    @property
    def device(self) -> torch.device:
        return torch.device(self.settings["device"])

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.settings["dtype"]]

    def unet_settings(self) -> dict[str, Any]:
        """Arguments of the UNets in the peers' code, which are Stable Diffusion's but for these."""
        sizes = self.settings["unet"]
        return {
            "block_out_channels": tuple(sizes["block_out_channels"]),
            "layers_per_block": sizes["layers_per_block"],
            "cross_attention_dim": sizes["cross_attention_dim"],
            "attention_head_dim": sizes["num_attention_heads"],  # diffusers' misnomer
            "norm_num_groups": sizes["norm_num_groups"],
        }

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def generator(self) -> torch.Generator:
        """The initial noise's, on the CPU, so that every device draws the same."""
        return torch.Generator().manual_seed(self.settings["seed"])

    def autocast(self) -> AbstractContextManager:
        """Computation in the job's dtype where weights or inputs have another one."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def read_job(arguments: list[str]) -> Job:
    """The job of a command line, with absolute paths; sets torch's threads."""
    checkout, settings, folder = (Path(argument).absolute() for argument in arguments)
    job = Job(checkout, json.loads(settings.read_text(encoding="utf-8")), folder)
    torch.set_num_threads(job.settings["threads"])
    return job


@dataclass
class StepTimes:
    """When the steps of a run ended, what the last one gave, and the most bytes held until then."""

    device: torch.device
    seconds: list[float]  # since any one moment
    latents: torch.Tensor | None = None
    peak_bytes: int = 0

    def note(self, latents: torch.Tensor) -> None:
        wait_for(self.device)
        self.seconds.append(time.perf_counter())
        self.latents, self.peak_bytes = latents, peak(self.device)

    def answer(self) -> dict[str, float]:
        """Mean seconds of a step, the first left out as what runs once is part of it; the peak without decoding."""
        if len(self.seconds) < 2:
            return {}
        step = (self.seconds[-1] - self.seconds[0]) / (len(self.seconds) - 1)
        return {"step_seconds": step, "loop_peak_bytes": self.peak_bytes}

    def save(self, path: str) -> dict[str, str]:
        """Write the last latents, (1, c, f, h, w) float32, under the name "latents"."""
        if self.latents is None:
            raise RuntimeError("nothing has been computed yet")
        save_file({"latents": self.latents.float().cpu().contiguous()}, path)
        return {"path": path}


def load_complete(kind: Any, folder: Path) -> torch.nn.Module:
    """`kind.from_pretrained`, without missing tensors: diffusers and transformers draw those at random and go on."""
    network, info = kind.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:
        raise RuntimeError(f"{folder.name} lacks {len(info['missing_keys'])} tensors of {kind.__name__}")
    return network


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Let `peak` count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # proc(5): the high-water mark becomes the present size


def measured(device: torch.device, work: Callable[[], object]) -> dict[str, float]:
    """Wall-clock seconds of some work, and the most bytes that the process held meanwhile, see `peak`; on CPUs also
    those of them that are private to the process (Linux; elsewhere 0)."""
    gc.collect()
    reset_peak(device)
    wait_for(device)
    on_gpu = device.type == "cuda"
    with nullcontext() if on_gpu else PrivatePeak() as private:
        started = time.perf_counter()
        work()
        wait_for(device)
        seconds = time.perf_counter() - started
    found = {"seconds": seconds, "peak_bytes": peak(device)}
    return found if on_gpu else {**found, "private_peak_bytes": private.most}


class PrivatePeak:
    """`most`: the largest private memory in bytes that this process holds while the context is open.

    Private is what is no copy of a file, which the system could drop and read again. Linux alone tells them apart.
    """

    def __init__(self, every_seconds: float = 0.02):
        self.every_seconds, self.most = every_seconds, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PrivatePeak":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self.most = max(self.most, status_bytes("RssAnon"))  # what came after the thread's last look

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, status_bytes("RssAnon"))
            if self._ended.wait(self.every_seconds):
                return


def peak(device: torch.device) -> int:
    """The most bytes held since `reset_peak`: on a GPU those that torch allocated, else resident memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()


def resident_peak() -> int:
    """The high-water mark of this process's resident memory in bytes."""
    return status_bytes("VmHWM")


def status_bytes(name: str) -> int:
    """An entry of proc(5)'s status of this process in bytes; 0 where there is none."""
    if not STATUS.exists():
        return 0
    found = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(found[0].split()[1]) * 1024 if found else 0


class Driver:
    """Answers to commands. Networks are built at first use, and one kind of work at a time is kept."""

    def __init__(self, job: Job, inference: Callable[[Job], Any], training: Callable[..., Any] | None = None):
        self.job, self.make_inference, self.make_training = job, inference, training
        self.inference: Any = None  # has `run(steps, guidance, ...)` and afterwards `times`
        self.training: Any = None  # has `step()`, which returns the loss
        self.trained: tuple[str, bool] | None = None  # stage, checkpointing

    def commands(self) -> dict[str, Callable[..., dict]]:
        found = {"infer": self.infer, "result": self.result}
        return found if self.make_training is None else {**found, "train": self.train}

    def infer(self, steps: int, guidance: float, **further: Any) -> dict:
        if self.inference is None:
            self.training = None  # it makes room first
            self.inference = self.make_inference(self.job)
        found = measured(self.job.device, lambda: self.inference.run(steps, guidance, **further))
        return {**found, **self.inference.times.answer()}

    def train(self, stage: str, gradient_checkpointing: bool) -> dict:
        if self.training is None or self.trained != (stage, gradient_checkpointing):
            self.inference = self.training = None  # the old one makes room first
            self.training = self.make_training(self.job, stage, gradient_checkpointing)
            self.trained = stage, gradient_checkpointing
        losses = []
        found = measured(self.job.device, lambda: losses.append(self.training.step()))
        return {**found, "loss": losses[0]}

    def result(self, path: str) -> dict:
        if self.inference is None:
            raise RuntimeError("nothing has been computed yet")
        return self.inference.times.save(path)


def serve(commands: dict[str, Callable[..., dict]]) -> None:
    """Answer commands {"do": name, argument: value, ...}, one JSON object a line, until "quit" or the input's end.

    A command that fails is answered with {"error": ...}; the next one may do better.
    """
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        if name == "quit":
            return
        try:
            answer = commands[name](**command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
