"""Runs of `train.py` for tests: as a user launches them, or forked from a process that has imported everything."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import safetensors.torch
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.config import DataConfig, VAEConfig

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TIMEOUT = 300  # seconds after which a process hangs; the first one with DeepSpeed compiles an extension
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# The smallest networks.
TINY_NETWORKS = [
    "model.block_out_channels=[8,16]",
    "model.attention_heads=[2]",
    "model.norm_num_groups=4",
    "model.motion_max_seq_length=8",
    "model.pose_channels=[8,8,8]",
    "model.context_dim=8",
    "model.image_encoder_size=16",
    "model.image_encoder_width=16",
    "model.image_encoder_layers=1",
]
# These and the smallest clips, noise with every kind of randomness switched on.
ARGUMENTS = [
    "batch_size=2",
    "checkpoint_steps=100",
    "log_steps=1",
    "ema_decay=0.9",
    "mixed_precision=no",
    "seed=3",
    "data.size=[32,32]",
    "data.workers=0",
    "data.cache_clips=12",
    *TINY_NETWORKS,
    "model.train_image_encoder=true",
    "optimizer.learning_rate=3e-3",
    # AdamW divides tiny gradients by themselves; without this it turns rounding errors into steps.
    "optimizer.epsilon=1e-4",
    "optimizer.schedule=cosine",
    "optimizer.warmup_steps=2",
    "noise.noise_offset=0.1",
    "noise.condition_dropout=0.4",
    "augmentation.composition.probability=0.5",
    "augmentation.calibrated.probability=0.5",
]

_forks = multiprocessing.get_context("forkserver")
# What `train.py` and `training/vae.py` import once their arguments are right; no fork then imports it anew.
_forks.set_forkserver_preload(["training.loop", "training.autoencoder", "training.export", "deepspeed"])


# The smallest VAE of videos, and clips for it.
VIDEO_CLIPS = DataConfig(size=[32, 32], num_frames=5, stride=3, workers=0)
VIDEO_VAE = VAEConfig(output="x", width=4, multiples=[1, 2, 2], latent_channels=4, data=VIDEO_CLIPS)


def make_video_vae(folder: Path) -> Path:
    """A random one of `VIDEO_VAE`."""
    from training.autoencoder import build_vae

    torch.manual_seed(0)
    build_vae(VIDEO_VAE).save_pretrained(folder)
    return folder


def make_vae(folder: Path) -> Path:
    """A random VAE of the smallest size."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(0, 0, 0),
        num_decoder_blocks=(0, 0, 0),
        latent_channels=4,
    ).save_pretrained(folder)
    return folder


def launch(command: list[str], expect: int = 0) -> subprocess.CompletedProcess:
    """Run a command of the environment's `bin` in the repository, as a user does."""
    command = [str(BIN / command[0]), *command[1:]]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == expect, done.stderr[-4000:]
    return done


class Fork:
    """One process that runs a script of the repository with the given arguments and environment.

    Its output goes to a file; `kill`, `terminate` and `join` are those of `multiprocessing.Process`.
    """

    def __init__(self, log: Path, script: str, arguments: list[str], environment: dict[str, str] | None = None):
        self.log = log
        self.process = _forks.Process(target=_run, args=(str(log), script, arguments, environment or {}))
        self.process.start()

    def finish(self, expect: int = 0) -> str:
        """Wait for the end; returns what was printed."""
        self.process.join(TIMEOUT)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        text = self.log.read_text() if self.log.is_file() else ""
        assert self.process.exitcode == expect, text[-4000:]
        return text


def _run(log: str, script: str, arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update({"HF_HUB_OFFLINE": "1", **environment})
    torch.set_num_threads(1)
    # A fork inherits the way it was started; loaders start as in a process of their own.
    multiprocessing.set_start_method(None, force=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = [script, *arguments]
    os.chdir(ROOT)
    runpy.run_path(str(ROOT / script), run_name="__main__")


def train(log: Path, *arguments: str, expect: int = 0, **environment: str) -> str:
    """One process of `train.py`, forked; returns what it printed."""
    return Fork(log, "train.py", list(arguments), environment).finish(expect)


def start_two(log: Path, *arguments: str, script: str = "train.py", **environment: str) -> list[Fork]:
    """Two processes of one run of a script, forked, with the variables that a launcher sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Fork(
            log.with_suffix(f".{rank}"),
            script,
            list(arguments),
            {**shared, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def logged(output: Path, name: str = "loss") -> dict[int, float]:
    """Step -> value of a scalar in a run's log; of a step logged twice, the later one."""
    events = EventAccumulator(str(output / "logs"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def weights(pipeline: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a pipeline folder."""
    return {
        f"{file.parent.name}.{name}": tensor
        for file in sorted(pipeline.rglob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def difference(first: Path, second: Path) -> float:
    """Largest difference between the weights of two pipeline folders."""
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)
