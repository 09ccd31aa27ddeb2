"""The parts of the check, by the code of `benchmarks.speed`. Each yields the rows of its table as it measures them.

What no row says otherwise of is computed in bfloat16, in training under autocast.
"""

import gc
import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.config import GPUCheckConfig
from benchmarks.gpu_check.attention import attention_cases, attention_row, is_fused
from benchmarks.gpu_check.worker import NotHere, Row, Rows
from benchmarks.speed.inference import RunSize, StepClock, measure_inference, run_once
from benchmarks.speed.measuring import machine_facts, matrix_rate, peak_memory, wait_for
from benchmarks.speed.peers import compare
from benchmarks.speed.scene import FPS, make_scene
from benchmarks.speed.sizes import SIZES, open_pipeline
from benchmarks.speed.training import TrainingStep, measure_training, noise_batch
from core.config import load_config
from core.errors import UserError
from data.poses.poses import Poses
from data.video.files import write_video
from models.compiling import compile_networks, use_channels_last
from models.config import SHIPPED_MODEL, SMALL_ANIMATORS
from models.pipeline import AnimationPipeline
from tpc import CalibrationConfig
from training.config import TrainConfig
from training.data import make_dataset, make_loader
from training.memory import RESERVE, memory_report

ROOT = Path(__file__).parents[2]
SMALL_MODEL = str(SMALL_ANIMATORS[0])
GIB, TERA = 2**30, 1e12
MACHINE, RATE = "machine", "bfloat16 products, TFLOP/s"  # the part that comes first, and its column
# Most that results may differ from the CPU's in float32: mean of pixels in 1/255, shares of loss and of gradients. In
# bfloat16 the CPU itself differs by 0.8, 4e-4 and 0.02, with a smaller model by 2.8; convolutions in TF32 round as
# float16 does.
BOUNDS = {"float32": (0.02, 1e-4, 1e-3), "rounded": (6.0, 5e-3, 0.1)}
TF32 = "float32, convolutions in TF32"
LOSS_SCALE = 2.0**10  # of gradients, which are too small for float16
RECIPES = {"stage 1": "train_stage1", "stage 2": "train_stage2", "LoRA": "train_finetune_lora"}


@dataclass(frozen=True)
class Check:
    """What every part is given."""

    config: GPUCheckConfig
    earlier: Rows  # of the parts before

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device)

    @property
    def tiny(self) -> bool:
        return self.config.size == "tiny"

    def pipeline(self, dtype: torch.dtype) -> AnimationPipeline:
        """Random weights of published size, or a small model."""
        return open_pipeline(SMALL_MODEL if self.tiny else None, SIZES["sd15"], self.device, dtype)

    def run_sizes(self) -> list[RunSize]:
        if self.tiny:
            return [RunSize(frames=2, size=(64, 64), steps=2, guidance_scale=3.5)]
        return [RunSize(24, size, steps=4, guidance_scale=3.5, times=4) for size in ((512, 784), (512, 512))]

    def work(self, operations: float, seconds: float) -> Row:
        """Floating-point operations, and the share of the hardware's rate at which they are done."""
        rate = next((row[RATE] for row in self.earlier.get(MACHINE, ()) if RATE in row), None)
        share = {} if rate is None else {"of matrix rate": operations / seconds / TERA / rate}
        return {"TFLOP": operations / TERA, **share}

    def recipe(self, name: str, *arguments: str) -> TrainConfig:
        """A recipe of `configs/` as it stands, or on small images."""
        given = ["output=unused", "dry_run=true", *arguments]
        if self.tiny:
            given += [f"model.init={SMALL_MODEL}", "data.size=[64,64]", "batch_size=1", "total_batch_size=null"]
            given += [] if name == RECIPES["stage 1"] else ["data.num_frames=2"]
        return load_config(TrainConfig, given, files=[ROOT / "configs" / f"{name}.yaml"])


def described(size: RunSize) -> str:
    return f"{size.size[0]}x{size.size[1]}, {size.frames} frames"


def machine(check: Check) -> Iterator[Row]:
    device, facts = check.device, machine_facts(check.device)
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which(query[0]) else ""
        facts |= {"driver": (driver or "unknown").split()[0], "CUDA": torch.version.cuda}
        facts |= {"cuDNN": torch.backends.cudnn.version(), "GiB": torch.cuda.mem_get_info(device)[1] / GIB}
    rates = {name: matrix_rate(device, getattr(torch, name)) / TERA for name in ("bfloat16", "float32")}
    yield facts | {f"{name} products, TFLOP/s": rate for name, rate in rates.items()}


# Agreement


def agreement(check: Check) -> Iterator[Row]:
    """The shipped model with TPC, and a training step of it, against the CPU in float32."""
    size = RunSize(2, (64, 64), 2, 3.5) if check.tiny else RunSize(4, (128, 128), 4, 3.5)
    on_gpu = check.device.type == "cuda"
    scene = make_scene(1, size.frames, size.size)
    calibration = scene.calibration(CalibrationConfig())

    def opened(device: torch.device, dtype: torch.dtype) -> AnimationPipeline:
        return open_pipeline(SMALL_MODEL if check.tiny else str(SHIPPED_MODEL), SIZES["tiny"], device, dtype)

    def results(device: torch.device, dtype: torch.dtype) -> tuple[np.ndarray, float, Tensor]:
        """Frames, and loss and gradients under autocast."""
        frames = run_once(opened(device, dtype), scene, calibration, size, None, "np")
        batch = noise_batch(1, 2, size.size, device)
        config = TrainConfig("motion", trainable="full", output="")
        step = TrainingStep(opened(device, torch.float32), config, batch)
        loss = step.loss(torch.autocast(device.type, dtype, enabled=dtype != torch.float32))
        (LOSS_SCALE * loss).backward()
        gradients = torch.cat([p.grad.flatten().cpu() for p in step.parameters]) / LOSS_SCALE
        return frames, loss.item(), gradients

    frames, loss, gradients = results(torch.device("cpu"), torch.float32)
    apart = []
    # CPUs have no TF32, and take minutes in float16.
    for name in ("float32", "bfloat16", *(("float16", TF32) if on_gpu else ())):
        torch.backends.cudnn.allow_tf32 = name != "float32"  # of convolutions, as torch allows by itself
        other_frames, other_loss, other_gradients = results(check.device, getattr(torch, name.split(",")[0]))
        differences = 255 * np.abs(other_frames - frames)
        row = {
            "dtype": name,
            "mean of pixels, 1/255": float(differences.mean()),
            "largest": float(differences.max()),
            "loss, share": abs(other_loss / loss - 1),
            "gradients, share": float((other_gradients - gradients).norm() / gradients.norm()),
        }
        yield row
        found = row["mean of pixels, 1/255"], row["loss, share"], row["gradients, share"]
        bounds = BOUNDS["float32" if name == "float32" else "rounded"]
        apart += [name] if not all(value <= bound for value, bound in zip(found, bounds, strict=True)) else []
    if apart:
        raise UserError(f"results differ from the CPU's by more than rounding in {', '.join(apart)}")


def attention(check: Check) -> Iterator[Row]:
    """Kernels of every head size, each with the flags of calibrated images and without."""
    slow = []
    for case in attention_cases(check.tiny):
        row = attention_row(case, check.device)
        yield row | check.work(case.operations, row["ms"] / 1e3)
        slow += [case.name] if case.must_be_fused and not is_fused(row) else []
    if slow:
        raise UserError(f"no fused kernel was chosen for {', '.join(slow)}")


# Steps


def inference(check: Check) -> Iterator[Row]:
    pipeline, persons = check.pipeline(torch.bfloat16), [1] if check.tiny else [1, 2]
    for size in check.run_sizes():
        found = measure_inference(pipeline, size, persons, CalibrationConfig(), repeats=1)
        plain = found["without TPC"].parts["step"][0]
        for name, measured in found.items():
            (step,) = measured.parts["step"]
            yield {
                "size": described(size),
                "run": name,
                "step, s": step,
                "more time": step / plain - 1,
                "peak of steps, GiB": measured.facts["step_peak_mib"] / 1024,
                "whole run, s": measured.typical,
                "its peak, GiB": measured.peak_bytes / GIB,
                **{f"{part}, s": seconds[0] for part, seconds in measured.parts.items() if part != "step"},
                **check.work(1e9 * measured.facts["step_gflop"], step),
            }


def training(check: Check) -> Iterator[Row]:
    for name, recipe in RECIPES.items():
        yield training_row(check, name, check.recipe(recipe))


def adam8bit(check: Check) -> Iterator[Row]:
    if find_spec("bitsandbytes") is None:
        raise NotHere("bitsandbytes is not installed")
    yield training_row(check, "stage 2, adamw8bit", check.recipe(RECIPES["stage 2"], "optimizer.name=adamw8bit"))


def training_row(check: Check, name: str, config: TrainConfig) -> Row:
    gc.collect()  # networks of the row before
    data, frozen = config.data, getattr(torch, config.frozen_dtype)
    estimated = memory_report(config)[1] - RESERVE
    batch = noise_batch(config.batch_size, data.num_frames, tuple(data.size), check.device)
    step = TrainingStep(check.pipeline(torch.float32), config, batch, frozen)
    measured = measure_training(step, torch.bfloat16, repeats=2)
    clips = f"{config.batch_size} x {data.num_frames}, {data.size[0]}x{data.size[1]}"
    return {
        "step": name,
        "clips": clips,
        "s": measured.typical,
        **{f"{part}, s": seconds[-1] for part, seconds in measured.parts.items()},
        "peak, GiB": measured.peak_bytes / GIB,
        "--dry-run, GiB": estimated / GIB,
        **check.work(measured.operations, measured.typical),
    }


def loading(check: Check) -> Iterator[Row]:
    """Clips a second out of a video of 1080 x 1920 pixels, and the workers that keep a training step busy."""
    taken = {row["step"]: row["s"] for row in check.earlier.get("training", ())}
    with TemporaryDirectory() as folder:
        write_footage(Path(folder), (64, 96) if check.tiny else (270, 480), 1 if check.tiny else 4)
        for name, recipe in list(RECIPES.items())[:2]:
            workers = f"data.workers={1 if check.tiny else 4}"
            config = check.recipe(recipe, "data.source=videos", f"data.root={folder}", workers)
            workers, batch = config.data.workers, config.batch_size
            loader = make_loader(make_dataset(config.data, 4 * workers * batch), batch, workers)
            arrived = [time.perf_counter() for _ in loader]
            # The first ones, one of each worker, wait for its start.
            rate = (len(arrived) - workers) * batch / (arrived[-1] - arrived[workers - 1])
            row = {"step": name, "workers": workers, "clips a second": rate, "of one worker": rate / workers}
            if name in taken:
                need = batch / taken[name]
                row |= {"a step needs": need, "workers for it": math.ceil(need / rate * workers)}
            yield row


def write_footage(folder: Path, size: tuple[int, int], times: int) -> None:
    """A video of 100 frames, `times` as large, in which everything moves, and poses for it."""
    scene = make_scene(1, 10, size)
    poses, order = scene.poses, np.concatenate([np.arange(10), np.arange(10)[::-1]] * 5)
    picture = scene.reference // 2 + np.random.default_rng(0).integers(0, 64, scene.reference.shape, np.uint8)
    moved = (cv2.resize(np.roll(picture, shift, axis=1), None, fx=times, fy=times) for shift in range(len(order)))
    write_video(folder / "clip.mp4", moved, FPS)
    large = (size[0] * times, size[1] * times)
    Poses(poses.keypoints[order] * times, poses.scores[order], large, FPS).save(folder / "clip.npz")


def options(check: Check) -> Iterator[Row]:
    """What `infer.py` can be told that only pays on a GPU, on a clip of two windows."""
    pipeline, size = check.pipeline(torch.bfloat16), check.run_sizes()[-1]
    size = replace(size, window=size.frames * 2 // 3)
    scene = make_scene(1, size.frames, size.size, size.times)
    calibration = scene.calibration(CalibrationConfig())
    expected = None

    def measured(name: str, size: RunSize) -> Row:
        nonlocal expected
        seconds = []
        for _ in range(1 if check.tiny else 2):
            started = time.perf_counter()
            with peak_memory(check.device) as peak:
                clock = StepClock(lambda: (wait_for(check.device), time.perf_counter())[1])
                images = run_once(pipeline, scene, calibration, size, clock, "pt").float()
                seconds.append(time.perf_counter() - started)
                step, held = clock.parts()["step"][0], peak()
        expected = images if expected is None else expected
        row = {"option": name, "size": described(size), "first run, s": seconds[0], "next, s": seconds[-1]}
        difference = 255 * (images - expected).abs().mean().item()
        return row | {"step, s": step, "peak, GiB": held / GIB, "mean of pixels, 1/255": difference}

    for passes in (1, 2, 4):  # one by one, both windows, and these with both halves of guidance
        yield measured(f"passes_at_a_time={passes}", replace(size, passes=passes))
    use_channels_last(pipeline.animator, pipeline.vae)
    yield measured("channels_last=true", size)
    if check.device.type == "cuda":  # on a CPU compiling takes longer than it saves
        for network in (pipeline.animator, pipeline.vae):
            network.to(memory_format=torch.contiguous_format)
        compile_networks(pipeline.animator)
        yield measured("compile=true", size)


def peer(check: Check) -> Iterator[Row]:
    config = check.config
    if config.peer is None:
        raise NotHere("no checkout of Moore-AnimateAnyone was given: peer=DIR peer_python=PYTHON")
    with TemporaryDirectory() as folder:
        given = ["peer=moore", f"checkout={config.peer}", f"python={config.peer_python}", f"size={config.size}"]
        given += [f"device={config.device}", "works=[inference]", "rounds=1", f"output={folder}"]
        given += ["dtypes=[float32]"] if config.device == "cpu" else ["dtypes=[float16]", "steps=6"]
        compare.main(given)
        rows = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        sides = {"ours": row["ours"], "Moore": row["theirs"], "difference": row["difference"]}
        numbers = {f"{side}: {name}": value for side, values in sides.items() for name, value in values.items()}
        yield {"run": row["work"], "dtype": row["dtype"], **numbers}


# Seconds that a part takes on a data-centre GPU: assumed, as none of them has run on one.
PARTS: dict[str, tuple[Callable[[Check], Iterator[Row]], int]] = {
    MACHINE: (machine, 20),
    "agreement": (agreement, 40),
    "attention": (attention, 20),
    "inference": (inference, 110),
    "training": (training, 110),
    "peer": (peer, 120),
    "options": (options, 120),
    "loading": (loading, 30),
    "adam8bit": (adam8bit, 30),
}
SECONDS = {name: seconds for name, (_, seconds) in PARTS.items()}


def rows_of(config: GPUCheckConfig, name: str, earlier: Rows) -> Iterator[Row]:
    """The rows of a part; afterwards its memory is free again."""
    yield from PARTS[name][0](Check(config, earlier))
    gc.collect()
    torch.cuda.empty_cache()
