"""Training on a second device: the CPU's losses, gradients and weights, and steps that wait for it where stated.

Where nothing has to be computed in float64 the device has none, as mps.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm import tqdm

from core.errors import UserError
from models.animators.registry import animator_class
from models.animators.wan_animate.small import FACE_SIDE
from models.vae import VAE
from tests.networks import TINY
from tests.published import small_vae
from tests.second_device import SECOND, second_device
from tests.training.test_wan_animate_training import SIZES
from tests.training_runs import VIDEO_VAE
from tpc.augmentation import calibrate_item
from tpc.config import CalibratedTrainingConfig, CompositionConfig
from training.autoencoder import build_vae
from training.build import save_memory, set_trainable
from training.config import (
    AttentionLossConfig,
    AugmentationConfig,
    DataConfig,
    LoraConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from training.data import make_dataset
from training.distributed import StopRequest, make_accelerator
from training.loop import train
from training.run import Run, accumulate_gradients, batches, move_parameters, prepare

SIDE = 32
COMPOSED = CompositionConfig(probability=1.0)
CALIBRATED = CalibratedTrainingConfig(probability=1.0, noise=0.0, images=2)
BENT = replace(CALIBRATED, transform="articulated")
# What a step waits for, kind and place -> number; the same for any batch, frames and images.
NORM = {("read", "training/run.py move_parameters"): 1}  # the gradients' norm, which says if the step may be taken
# If any person can be calibrated, and if weights of keypoints are sound.
ESTIMATED = {("read", "tpc/procrustes.py _Correspondence.of"): 1, ("read", "tpc/procrustes.py _result"): 1}

# The bytes that CLIP's own preprocessing takes, and which images frames attend to.
PREPROCESSED = {("to CPU", "models/animators/wan_animate/text.py image_pixels"): 1}
READ_INDEX = {("to CPU", "models/animators/wan_animate/model.py WanAnimate.training_prediction"): 1}


@dataclass(frozen=True)
class Case:
    """One step of training."""

    animator: str
    stage: str = "image"
    batch_size: int = 2
    num_frames: int = 3  # of a clip
    settings: dict[str, Any] = field(default_factory=dict)  # of `TrainConfig`
    waits: dict[tuple[str, str], int] = field(default_factory=lambda: NORM)
    tolerance: float = 1e-4  # of gradients, as parts of the largest


def augmented(composition: CompositionConfig | None = None, calibrated: CalibratedTrainingConfig | None = None):
    return {
        "augmentation": AugmentationConfig(
            composition=composition or CompositionConfig(), calibrated=calibrated or CalibratedTrainingConfig()
        )
    }


CASES = {
    "composed references, supervised by keypoints": Case(
        "animate_anyone",
        settings={"attention": AttentionLossConfig(weight=0.5, background=3), **augmented(COMPOSED)},
    ),
    "bent references, supervised by surfaces": Case(
        "animate_anyone",
        batch_size=3,
        settings={"attention": AttentionLossConfig(weight=0.5, surface=8), **augmented(calibrated=BENT)},
    ),
    "from noised calibrated images": Case(
        "animate_anyone",
        "motion",
        settings={"trainable": "full", **augmented(COMPOSED, replace(CALIBRATED, start=0.5))},
        waits=NORM | ESTIMATED,
    ),
    "adapters, recomputed in bfloat16": Case(
        "animate_anyone",
        "motion",
        batch_size=1,
        num_frames=2,
        settings={
            "trainable": "lora",
            "gradient_checkpointing": True,
            "mixed_precision": "bf16",
        },
        tolerance=0.05,
    ),
    "MagicAnimate's images": Case("magic_animate"),
    "MagicAnimate's clips": Case(
        "magic_animate", "motion", settings=augmented(calibrated=CALIBRATED), waits=NORM | ESTIMATED
    ),
    "DisCo's images": Case(
        "disco", settings=augmented(COMPOSED, replace(CALIBRATED, images=1)), waits=NORM | ESTIMATED
    ),
    "DisCo's clips": Case(
        "disco", "motion", num_frames=2, settings={"trainable": "full", **augmented(calibrated=BENT)}
    ),
    "DreamPose's images": Case("dream_pose", batch_size=3, settings=augmented(COMPOSED)),
    "DreamPose's clips": Case(
        "dream_pose", "motion", batch_size=1, settings=augmented(calibrated=CALIBRATED), waits=NORM | ESTIMATED
    ),
    "Wan-Animate's clips": Case("wan_animate", "motion", num_frames=5, waits=NORM | PREPROCESSED),
    "Wan-Animate's calibrated images": Case(
        "wan_animate",
        "motion",
        num_frames=5,
        settings=augmented(calibrated=CALIBRATED),
        waits=NORM | ESTIMATED | PREPROCESSED | READ_INDEX,
    ),
}


@cache
def clips() -> list[dict[str, Tensor]]:
    """Three rendered clips of five frames, the first three of which all but one animator train on."""
    data = make_dataset(DataConfig(size=[SIDE, SIDE], num_frames=5, stride=4, workers=0), 3)
    return [data[index] for index in range(3)]


def items(case: Case) -> list[dict[str, Tensor]]:
    """A batch's clips, of one frame in the stage of images, with what their case needs beside."""
    frames, draw, made = 1 if case.stage == "image" else case.num_frames, torch.Generator().manual_seed(0), []
    for clip in clips()[: case.batch_size]:
        item = {name: value[:, :frames] for name, value in clip.items() if name in ("frames", "poses", "masks")}
        item = clip | item | {"keypoints": clip["keypoints"][:frames]}
        calibrated = case.settings.get("augmentation", AugmentationConfig()).calibrated
        if calibrated.transform == "articulated":
            item |= calibrate_item(item, calibrated, draw)
        surface = torch.rand((3, 16, 16), generator=draw)  # every place shows another point
        if case.animator == "wan_animate":
            item["faces"] = torch.rand((3, frames, FACE_SIDE, FACE_SIDE), generator=draw)
        made.append(item | {"surfaces": surface[:, None].repeat(1, frames, 1, 1), "reference_surface": surface})
    return made


def config_of(case: Case) -> TrainConfig:
    data = DataConfig(size=[SIDE, SIDE], num_frames=1 if case.stage == "image" else case.num_frames, workers=0)
    settings = {"mixed_precision": "no", "noise": NoiseConfig(condition_dropout=0.4, person_weight=2.0)}
    settings |= {"ema_decay": 0.9, "max_steps": 1, "optimizer": OptimizerConfig(epsilon=1e-4)}
    model = SIZES if case.animator == "wan_animate" else TINY
    settings |= {"lora": LoraConfig(rank=2), "batch_size": case.batch_size, "model": model, "data": data}
    return TrainConfig(**{"stage": case.stage, "output": "x", **settings, **case.settings})


def networks(case: Case, config: TrainConfig) -> tuple[VAE, nn.Module]:
    """Without a zero anywhere, so that no path is a no-op."""
    vae = small_vae()  # seeds what follows
    vae = (build_vae(VIDEO_VAE) if case.animator == "wan_animate" else vae).requires_grad_(False)
    model = animator_class(case.animator).small(config.model, 4, SIDE // 4)
    set_trainable(model, config)
    for parameter in model.parameters():
        if parameter.numel() and parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.05)
    save_memory(vae, model, config)
    return vae, model.train()


@pytest.fixture
def accelerated(monkeypatch) -> Iterator[Any]:
    """Chooses the device of accelerate's next run."""

    def choose(device: torch.device) -> None:
        AcceleratorState._reset_state(True)
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(device))

    yield choose
    AcceleratorState._reset_state(True)


def step(case: Case, output: Path, waits: list) -> tuple[Run, dict[str, Tensor], list]:
    """A run after one step, the gradients that moved it, and what it waited for."""
    config = config_of(case)
    run = prepare(config, output, make_accelerator(config, output), *networks(case, config))
    # It moves at the first step of a run, which is not counted.
    run.objective.scheduler.alphas_cumprod = run.objective.scheduler.alphas_cumprod.to(run.accelerator.device)
    del waits[:]
    [(batch, generators)] = batches(run, items(case))
    accumulate_gradients(run, batch, generators)
    before = list(waits)
    found = {name: parameter.grad.clone() for name, parameter in run.trainable}
    del waits[:]
    move_parameters(run)
    return run, found, before + waits


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_every_animator(name, accelerated, tmp_path):
    case = CASES[name]
    accelerated(torch.device("cpu"))
    expected, gradients, _ = step(case, tmp_path, [])
    accelerated(SECOND)
    double = config_of(case).augmentation.needs_float64()
    with second_device(double) as waits:
        found, others, waited = step(case, tmp_path, waits)
        assert found.accelerator.device == SECOND and {p.device for _, p in found.trainable} == {SECOND}
        losses = [run.log.losses[0].item() for run in (expected, found)]
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        away = max(float((others[n].cpu() - gradient).abs().max()) for n, gradient in gradients.items())
        moved = [
            (parameter.detach().cpu(), own)
            for (_, own), (_, parameter) in zip(expected.trainable, found.trainable, strict=True)
        ]
        averages = zip(found.average.ema.shadow_params, expected.average.ema.shadow_params, strict=True)
        moved += [(average.cpu(), own) for average, own in averages]
    assert losses[0] == pytest.approx(losses[1], rel=case.tolerance)
    assert away < case.tolerance * largest
    # What Adam makes of a small gradient's rounding error is a larger part of the rate.
    rate = 200 * case.tolerance * expected.config.optimizer.learning_rate
    assert all((value - own).abs().max() < rate for value, own in moved)
    assert Counter((wait.kind, wait.place) for wait in waited) == case.waits


@pytest.mark.parametrize("augmentation", [augmented(COMPOSED), augmented(calibrated=CALIBRATED)])
def test_what_needs_float64_is_refused_without_it(augmentation, accelerated, tmp_path):
    accelerated(torch.device("mps"))
    config = config_of(Case("animate_anyone", settings=augmentation))
    with pytest.raises(UserError, match="float64, which device mps does not have; set ACCELERATE_USE_CPU=true"):
        prepare(config, tmp_path, make_accelerator(config, tmp_path), nn.Module(), nn.Module())


def test_a_run_is_validated_saved_and_resumed(accelerated, tmp_path):
    """Two steps: at once on the CPU; on the device in two starts, the second of which samples clips with TPC too."""
    case = Case("animate_anyone", batch_size=1)
    both = items(replace(case, batch_size=2))

    def trained(device: torch.device, output: Path, steps: int, **settings: Any) -> Run:
        accelerated(device)
        optimizer = OptimizerConfig(learning_rate=1e-3, epsilon=1e-4)
        settings |= {"max_steps": steps, "log_steps": 1, "optimizer": optimizer}
        config = config_of(replace(case, settings=settings))
        (output / "samples").mkdir(parents=True, exist_ok=True)
        run = prepare(config, output, make_accelerator(config, output), *networks(case, config))
        run.accelerator.init_trackers("logs")
        train(run, both[:steps], StopRequest(), tqdm(disable=True))
        return run

    def held(run: Run) -> Tensor:
        parts = [*(parameter for _, parameter in run.trainable), *run.average.ema.shadow_params]
        return torch.cat([part.detach().cpu().flatten() for part in parts])

    expected = held(trained(torch.device("cpu"), tmp_path / "cpu", 2))
    with second_device(double=False) as waits:
        first = held(trained(SECOND, tmp_path / "second", 1))
        del waits[:]
        validation = ValidationConfig(steps=2, clips=1, misaligned=1.0, num_inference_steps=1)
        run = trained(SECOND, tmp_path / "second", 2, validation=validation)
        waited = list(waits)
        assert run.progress.step == 2 and {average.device for average in run.average.ema.shadow_params} == {SECOND}
        found = held(run)
    assert torch.allclose(found, expected, atol=1e-6) and not torch.allclose(first, expected, atol=1e-4)
    assert (tmp_path / "second" / "samples" / "0000002.png").is_file()
    # Of the loop itself nothing waits but its one step; the noise table moves with a run's first one.
    others = ("training/checkpoint.py", "training/ema.py", "training/run.py prepare", "training/run.py StepLog")
    own = [w for w in waited if w.place.startswith("models/noise.py") or not w.place.startswith((*others, "models/"))]
    steps = Counter((wait.kind, wait.place) for wait in own)
    assert steps == NORM | {("to device", "models/noise.py DiffusionNoise.added"): 1}
