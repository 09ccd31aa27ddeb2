"""Training by its own commands: VAE, image stage, motion stage; the loss falls; the same command resumes exactly."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.errors import UserError
from models.pipeline_folder import load_pipeline
from training.build import make_scheduler
from training.checkpoint import checkpoints
from training.config import DataConfig, NoiseConfig, TrainConfig, check_train_config
from training.data import make_dataset, make_loader
from training.objective import check_schedule, draw_noise, prediction_target, snr_weights

ROOT = Path(__file__).parent.parent
DATA = ["data.size=[32,32]", "data.workers=0", "data.cache_clips=24"]
NETWORKS = [
    "model.block_out_channels=[16,32]",
    "model.attention_heads=2",
    "model.norm_num_groups=8",
    "model.motion_max_seq_length=8",
    "model.pose_channels=[8,8,16]",
    "model.context_dim=8",
    "model.image_encoder_size=16",
    "model.image_encoder_width=16",
    "model.image_encoder_layers=1",
    "model.train_image_encoder=true",
]
FAST = ["optimizer.learning_rate=3e-3", "log_steps=5", "seed=3"]


def run(script: str, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == expect, done.stderr[-3000:]
    return done


def logged(folder: Path, name: str) -> list[float]:
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def vae(folder) -> Path:
    run(
        "train_vae.py",
        f"output={folder / 'vae'}",
        "width=16",
        "blocks=[0,1,1]",
        "latent_channels=4",
        "max_steps=60",
        "log_steps=20",
        f"data.cache={folder / 'cache'}",
        *DATA,
        *FAST[:1],
    )
    return folder / "vae"


@pytest.fixture(scope="module")
def image_stage(folder, vae) -> list[str]:
    """The command of the image stage, run once."""
    command = [
        "stage=image",
        f"output={folder / 'stage1'}",
        f"model.vae={vae / 'vae'}",
        "batch_size=4",
        "max_steps=40",
        "checkpoint_steps=20",
        "ema_decay=0.5",
        "validation.steps=40",
        "validation.clips=1",
        "validation.num_inference_steps=2",
        f"data.cache={folder / 'cache'}",
        *DATA,
        *NETWORKS,
        *FAST,
    ]
    run("train.py", *command)
    return command


@pytest.fixture(scope="module")
def motion_stage(folder, image_stage) -> Path:
    run(
        "train.py",
        "stage=motion",
        f"output={folder / 'stage2'}",
        f"model.init={folder / 'stage1' / 'pipeline'}",
        "batch_size=2",
        "gradient_accumulation=2",
        "gradient_checkpointing=true",
        "max_steps=10",
        "checkpoint_steps=5",
        "keep_checkpoints=1",
        "export_dtype=float16",
        "augmentation.composition.probability=0.8",
        "augmentation.calibrated.probability=0.8",
        "data.num_frames=4",
        *DATA,
        *FAST,
    )
    return folder / "stage2"


def weights(pipeline: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(pipeline.rglob("*.safetensors")):
        for name, tensor in safetensors.torch.load_file(file).items():
            found[f"{file.parent.name}.{name}"] = tensor
    return found


def test_vae_learns(vae):
    psnr = logged(vae, "psnr")
    assert psnr[-1] > psnr[0] + 2
    assert (vae / "reconstructions.png").stat().st_size > 0


def test_image_stage_lowers_the_loss_and_writes_everything(folder, image_stage):
    losses = logged(folder / "stage1", "loss")
    assert len(losses) == 8 and sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert [step for step, _ in checkpoints(folder / "stage1")] == [20, 40]
    assert (folder / "stage1" / "samples" / "0000040.png").is_file()
    assert load_pipeline(folder / "stage1" / "pipeline").scheduler.config.prediction_type == "v_prediction"
    assert logged(folder / "stage1", "samples_per_second")[-1] > 0


def test_resuming_repeats_what_an_unbroken_run_does(folder, image_stage):
    """The state at step 20, EMA and random numbers included, leads to the same weights at step 40."""
    output = folder / "stage1"
    unbroken = weights(output / "pipeline")
    shutil.rmtree(output / "checkpoint-40")
    shutil.rmtree(output / "pipeline")
    run("train.py", *image_stage)
    resumed = weights(output / "pipeline")
    assert resumed.keys() == unbroken.keys()
    for name in resumed:
        assert torch.allclose(resumed[name], unbroken[name], atol=1e-6), name


def test_a_half_written_checkpoint_is_no_checkpoint(folder, image_stage):
    partial = folder / "stage1" / ".checkpoint-60.partial"
    partial.mkdir()
    assert [step for step, _ in checkpoints(folder / "stage1")] == [20, 40]
    partial.rmdir()


def test_motion_stage_trains_motion_modules_alone(folder, motion_stage):
    before, after = weights(folder / "stage1" / "pipeline"), weights(motion_stage / "pipeline")
    assert {tensor.dtype for tensor in after.values()} <= {torch.float16, torch.int64}
    changed = {name for name in after if not torch.equal(before[name].half(), after[name].half())}
    motion = {name for name in after if "motion_modules" in name and "pos_embed" not in name}
    assert changed and changed <= motion
    assert [step for step, _ in checkpoints(motion_stage)] == [10]


def test_misalignment_of_references_is_logged_and_grows_with_composition(folder, image_stage, motion_stage):
    plain, composed = (logged(run, "reference/relative_angle_deg") for run in (folder / "stage1", motion_stage))
    assert max(plain) < min(composed)
    assert all(0 <= value <= 1 for value in logged(motion_stage, "reference/box_iou"))


def test_dry_run_prints_sizes_and_trains_nothing(folder, vae):
    output = folder / "dry"
    done = run(
        "train.py", "--dry-run", "stage=image", f"output={output}", f"model.vae={vae / 'vae'}", *DATA, *NETWORKS
    )
    assert "denoising_unet" in done.stdout and "activations" in done.stdout
    assert not (output / "logs").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["stage=video"], "stage=video"),
        (["stage=image", "max_steps=0"], "max_steps=0"),
        (["stage=image", "data.num_frames=4"], "data.num_frames"),
        (["stage=image"], "model.init="),
        (["stage=image", "model.init=nowhere"], "nowhere"),
        (["stage=image", "model.vae=nowhere"], "nowhere"),
        (["stage=image", "optimiser.learning_rate=1"], "optimizer.learning_rate"),
        (["stage=image", "data.source=videos", "model.vae=x"], "data.root="),
    ],
)
def test_wrong_configurations_end_in_one_line(folder, arguments, named):
    import train

    with pytest.raises(UserError, match=named) as caught:
        train.main([*arguments, f"output={folder / 'wrong'}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["train_stage1", "train_stage2", "train_stage1_tiny", "train_stage2_tiny"])
def test_shipped_configurations_are_valid(name):
    from core.config import load_config

    arguments = ["output=x", "model.vae=x", "data.root=x"]
    check_train_config(load_config(TrainConfig, arguments, files=[ROOT / "configs" / f"{name}.yaml"]))


def test_data_go_on_where_they_stopped():
    config = DataConfig(size=[32, 32], workers=0)
    whole = [batch["frames"] for batch in make_loader(make_dataset(config, 6), 2, 0)]
    rest = [batch["frames"] for batch in make_loader(make_dataset(config, 6), 2, 0, start=4)]
    assert len(whole) == 3 and len(rest) == 1 and torch.equal(whole[2], rest[0])


def test_min_snr_weights_are_those_of_the_formula_and_one_at_the_end():
    scheduler = make_scheduler(NoiseConfig())
    alpha = scheduler.alphas_cumprod
    timesteps = torch.tensor([0, 100, 500, 900, 999])
    snr = alpha[timesteps] / (1 - alpha[timesteps])
    expected = (snr + 1).clamp(max=5) / (snr + 1)
    assert torch.allclose(snr_weights(scheduler, timesteps, 5.0), expected.float(), rtol=1e-4)
    assert alpha[999] == 0 and snr_weights(scheduler, timesteps, 5.0)[-1] == 1
    assert torch.equal(snr_weights(scheduler, timesteps, None), torch.ones(5))


def test_velocity_target_is_minus_the_picture_at_the_end():
    """With zero terminal SNR the last step's velocity is -x: the model must paint the picture from noise alone."""
    scheduler = make_scheduler(NoiseConfig())
    latents, noise = torch.randn(1, 4, 1, 2, 2), torch.randn(1, 4, 1, 2, 2)
    assert torch.allclose(prediction_target(scheduler, latents, noise, torch.tensor([999])), -latents, atol=1e-5)


def test_training_and_sampling_share_one_table(tmp_path):
    scheduler = make_scheduler(NoiseConfig())
    scheduler.save_pretrained(tmp_path)
    assert torch.equal(DDIMScheduler.from_pretrained(tmp_path).alphas_cumprod, scheduler.alphas_cumprod)


def test_noise_offset_is_a_constant_a_channel():
    torch.manual_seed(0)
    plain = draw_noise(torch.zeros(64, 8, 1, 4, 4), 0.0)
    shifted = draw_noise(torch.zeros(64, 8, 1, 4, 4), 1.0)
    assert abs(plain.mean(dim=(2, 3, 4)).std() - 0.25) < 0.05
    assert abs(shifted.mean(dim=(2, 3, 4)).std() - (1 + 1 / 16) ** 0.5) < 0.15


def test_schedule_that_cannot_be_sampled_is_refused():
    with pytest.raises(UserError, match="epsilon"):
        check_schedule(NoiseConfig(prediction_type="epsilon"))
