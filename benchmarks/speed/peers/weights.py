"""Inputs of both sides of a comparison: random weights in the published files, images, and batches to train on."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.speed.sizes import PIXELS, POSE_CHANNELS, SpeedSizes, make_image_encoder, make_vae
from core.files import complete_folder, write_json
from models.animators.animate_anyone.checkpoint import pose_guider_manifest
from models.animators.magic_animate.checkpoint import appearance_encoder_manifest
from models.checkpoints.loading import Shapes
from models.checkpoints.networks import (
    MotionSizes,
    animated_unet_manifest,
    control_net_manifest,
    motion_manifest,
    reference_unet_manifest,
    unet_manifest,
)
from models.checkpoints.verify import synthetic_tensors
from training.config import NoiseConfig
from training.objective import draw, sample_generators

SETTINGS, INPUTS = "settings.json", "inputs"
STAGES = ("image", "motion")
# The side of CLIP's images and the length of its texts, which published pipelines rely on.
CLIP_SIDE, CLIP_TOKENS = 224, 77
# Motion modules of AnimateDiff v1, which MagicAnimate has.
MAGIC_MOTION = MotionSizes(max_seq_length=24, mid_block=False)
VOCABULARY = {"<|startoftext|>": 0, "<|endoftext|>": 1}
NOISE = NoiseConfig(noise_offset=0.05, condition_dropout=0.0)


@dataclass(frozen=True)
class PeerSettings:
    """Settings that a driver reads. One window takes all frames, so that window rules do not matter."""

    family: str  # of `models.checkpoints.convert`
    unet: dict[str, Any]  # `models.checkpoints.networks.UNetSizes` as a dictionary
    pose_channels: tuple[int, ...]  # widths of the pose guider, or of the ControlNet's embedding
    latent_size: tuple[int, int]  # (h, w)
    dtype: str
    device: str
    threads: int
    seed: int = 0  # of initial noise and draws in training; must be that of the weights' folder


def peer_settings(family: str, sizes: SpeedSizes, dtype: str, device: str, threads: int) -> PeerSettings:
    side = sizes.side // PIXELS
    return PeerSettings(family, asdict(sizes.unet), POSE_CHANNELS, (side, side), dtype, device, threads)


def write_weights(folder: str | Path, family: str, sizes: SpeedSizes, seed: int = 0) -> None:
    """Write the published files of a family, of any size, and the inputs; the folder appears when it is complete.

    Weights are random and scaled so that activations keep their size, those that start at zero in training too.
    """
    torch.manual_seed(seed)
    with complete_folder(folder) as path:
        WRITERS[family](path, sizes, seed)
        make_vae(sizes).save_pretrained(path / "vae")
        waves = smooth_images(np.random.default_rng(seed), 1 + sizes.frames, sizes.side)
        inputs = {"reference": waves[0], "poses": waves[1:].contiguous()}  # (H, W, 3) and (f, H, W, 3) uint8
        save_file(inputs, path / f"{INPUTS}.safetensors")
        for stage in STAGES:
            save_file(training_batch(sizes, stage, seed), path / f"batch_{stage}.safetensors")
        write_json(path / SETTINGS, weights_facts(family, sizes, seed))


def weights_facts(family: str, sizes: SpeedSizes, seed: int = 0) -> dict[str, Any]:
    """The settings from which the content of a folder follows, as JSON has them."""
    return json.loads(json.dumps({"family": family, "seed": seed, **asdict(sizes)}))


def write_animate_anyone(folder: Path, sizes: SpeedSizes, seed: int) -> None:
    """The four files of AnimateAnyone, and its image encoder."""
    files: dict[str, Shapes] = {
        "denoising_unet": unet_manifest(sizes.unet),
        "motion_module": motion_manifest(sizes.unet, MotionSizes()),
        "reference_unet": reference_unet_manifest(sizes.unet),
        "pose_guider": pose_guider_manifest(sizes.unet.block_out_channels[0], POSE_CHANNELS),
    }
    for number, (name, shapes) in enumerate(files.items()):
        torch.save(synthetic_tensors(shapes, seed + number), folder / f"{name}.pth")
    make_image_encoder(sizes, CLIP_SIDE).save_pretrained(folder / "image_encoder")


def write_magic_animate(folder: Path, sizes: SpeedSizes, seed: int) -> None:
    """The three files of MagicAnimate, and a text encoder whose tokenizer knows the empty prompt alone."""
    (folder / "temporal_attention").mkdir()
    whole = synthetic_tensors(animated_unet_manifest(sizes.unet, MAGIC_MOTION), seed)
    torch.save(whole, folder / "temporal_attention" / "temporal_attention.ckpt")
    networks: dict[str, Shapes] = {
        "appearance_encoder": appearance_encoder_manifest(sizes.unet),
        "densepose_controlnet": control_net_manifest(sizes.unet, POSE_CHANNELS),
    }
    for number, (name, shapes) in enumerate(networks.items(), start=1):
        (folder / name).mkdir()
        tensors = synthetic_tensors(shapes, seed + number)
        save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")
    width = sizes.unet.cross_attention_dim
    text = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    text.save_pretrained(folder / "text_encoder")
    # Published files have these names; what transformers writes depends on its release.
    tensors = CLIPTextModel(text).state_dict()
    named = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()}
    save_file(named, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer").mkdir()
    write_json(folder / "tokenizer" / "vocab.json", VOCABULARY)
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def smooth_images(rng: np.random.Generator, count: int, side: int) -> Tensor:
    """Waves in colour, (count, side, side, 3) uint8. Smooth ones are resized alike by every library."""
    y, x = np.mgrid[0:side, 0:side] / side
    found = np.zeros((count, side, side, 3))
    for _ in range(4):
        u, v, phase = (rng.uniform(low, high, (count, 1, 1, 3)) for low, high in ((-3, 3), (-3, 3), (0, 2 * np.pi)))
        found += np.sin(2 * np.pi * (u * x[..., None] + v * y[..., None]) + phase)
    return torch.from_numpy((127.5 + 30 * found).round().clip(0, 255).astype(np.uint8))


def training_batch(sizes: SpeedSizes, stage: str, seed: int) -> dict[str, Tensor]:
    """A batch to train on, and the "timesteps", "noise" and "posterior" that the objective will draw."""
    clips, frames = (sizes.batch, 1) if stage == "image" else (1, sizes.clip_frames)
    rng = np.random.default_rng([seed, STAGES.index(stage)])
    waves = smooth_images(rng, clips * (1 + 2 * frames), sizes.side).permute(0, 3, 1, 2).float() / 255
    reference, moving, poses = waves.split([clips, clips * frames, clips * frames])
    moving, poses = (part.unflatten(0, (clips, frames)).transpose(1, 2) for part in (moving, poses))
    side = sizes.side // PIXELS
    drawn = draw((sizes.unet.in_channels, frames, side, side), NOISE, sample_generators(seed, range(clips)))
    batch = {"reference": 2 * reference - 1, "frames": 2 * moving - 1, "poses": poses}
    batch |= {"timesteps": drawn.timesteps, "noise": drawn.noise, "posterior": drawn.posterior}
    return {name: value.contiguous() for name, value in batch.items()}


WRITERS: dict[str, Callable[[Path, SpeedSizes, int], None]] = {
    "animate_anyone": write_animate_anyone,
    "magic_animate": write_magic_animate,
}
