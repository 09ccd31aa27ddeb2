"""Training by its own commands: VAE, image stage, motion stage; the loss falls; the same command resumes exactly."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train as train_py
from core.config import load_config
from core.errors import UserError
from models.animators.registry import load_pipeline, read_index
from models.checkpoints.convert import published_scheduler
from models.config import SCHEDULE
from models.noise import DiffusionNoise
from tests.training_runs import Fork, train, weights
from training.build import check_precision, make_scheduler, schedule_differences, trained_window, with_schedule
from training.checkpoint import checkpoints
from training.config import DataConfig, ModelConfig, NoiseConfig, TrainConfig, VAEConfig
from training.data import make_dataset, make_loader

ROOT = Path(__file__).parents[2]
DATA = ["data.size=[32,32]", "data.workers=0", "data.cache_clips=24"]
NETWORKS = [
    "model.block_out_channels=[16,32]",
    "model.attention_heads=[2]",
    "model.norm_num_groups=8",
    "model.motion_max_seq_length=8",
    "model.pose_channels=[8,8,16]",
    "model.context_dim=8",
    "model.image_encoder_size=16",
    "model.image_encoder_width=16",
    "model.image_encoder_layers=1",
    "model.train_image_encoder=true",
]
FAST = ["optimizer.learning_rate=3e-3", "log_steps=5", "seed=3", "mixed_precision=no"]


def logged(folder: Path, name: str) -> list[float]:
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def vae(folder) -> Path:
    arguments = [
        f"output={folder / 'vae'}",
        "width=16",
        "blocks=[0,1,1]",
        "latent_channels=4",
        "max_steps=60",
        "log_steps=20",
        f"data.cache={folder / 'cache'}",
        *DATA,
        *FAST[:1],
    ]
    Fork(folder / "vae.log", "training/vae.py", arguments).finish()
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
    train(folder / "stage1.log", *command)
    return command


@pytest.fixture(scope="module")
def motion_stage(folder, image_stage) -> Path:
    train(
        folder / "stage2.log",
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
    train(folder / "resumed.log", *image_stage)
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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["stage=video"], "stage=video"),
        (["stage=image", "max_steps=0"], "max_steps=0"),
        (["stage=image", "trainable=motion"], "trainable=motion"),
        (["stage=image", "trainable=lora", "model.vae=x"], "trainable=lora"),
        (["stage=image", "frozen_dtype=bfloat16", "model.init=x", "mixed_precision=no"], "frozen_dtype"),
        (["stage=image", "noise.condition_dropout=1.5"], "condition_dropout"),
        (["stage=image", "optimizer.name=sgd"], "optimizer.name=sgd"),
        (["stage=image", "data.num_frames=4"], "data.num_frames"),
        (["stage=image"], "model.init="),
        (["stage=image", "model.init=nowhere"], "nowhere"),
        (["stage=image", "model.vae=nowhere"], "nowhere"),
        (["stage=image", "optimiser.learning_rate=1"], "optimizer.learning_rate"),
        (["stage=image", "data.source=videos", "model.vae=x"], "data.root="),
        (["stage=image", "data.split=development"], "data.split=development must be one of train, heldout"),
    ],
)
def test_wrong_configurations_end_in_one_line(folder, arguments, named):
    with pytest.raises(UserError, match=named) as caught:
        train_py.main([*arguments, f"output={folder / 'wrong'}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_valid_and_say_only_what_differs(file):
    schema, arguments = TrainConfig, ["output=x", "model.init=x", "data.root=x"]
    if file.stem.startswith("vae"):
        schema, arguments = VAEConfig, ["output=x"]
    load_config(schema, arguments, files=[file])
    lines = file.read_text().splitlines()
    assert 20 <= len(lines) <= 60 and all(len(line) < 120 for line in lines)
    defaults, recipe = OmegaConf.structured(schema), flat(yaml.safe_load("\n".join(lines)))
    assert not [key for key, value in recipe.items() if OmegaConf.select(defaults, key) == value]


def flat(values: dict, prefix: str = "") -> dict:
    """Dotted keys of nested dictionaries, with their values."""
    keys = {}
    for key, value in values.items():
        keys |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return keys


def test_precision_that_crashes_on_cpus_is_refused():
    """Clips in bf16 with channels-last memory end in a segmentation fault in torch 2.13 there."""
    config = TrainConfig(stage="motion", output="x", channels_last=True, data=DataConfig(num_frames=2))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="channels_last"):
            check_precision(config)
    check_precision(replace(config, mixed_precision="no"))


def test_window_and_schedule_of_the_starting_folder_are_known():
    config = TrainConfig(stage="image", output="x")
    assert trained_window(config) is None and schedule_differences(config) == []
    config.model.init = str(ROOT / "assets" / "tiny_model")
    assert trained_window(config) == read_index(ROOT / "assets" / "tiny_model")["window_size"]
    assert trained_window(replace(config, stage="motion", data=DataConfig(num_frames=5))) == 5
    assert schedule_differences(config) == []
    other = replace(config, noise=NoiseConfig(beta_schedule="linear"))
    assert schedule_differences(other) == ["beta_schedule=linear, was scaled_linear"]


@pytest.mark.parametrize("family", ["animate_anyone", "stable_diffusion", "disco"])
def test_the_noise_schedule_is_the_models(tmp_path, family):
    """Everything of it, whatever its sampler; what is given takes its place and is said."""
    shutil.copy(ROOT / "assets" / "tiny_model" / "model_index.json", tmp_path)
    published = published_scheduler(family)
    published.save_pretrained(tmp_path / "scheduler")
    config = TrainConfig(stage="image", output="x", model=ModelConfig(init=str(tmp_path)))
    whole = with_schedule(config)
    assert vars(whole.noise) | {name: published.config[name] for name in SCHEDULE} == vars(whole.noise)
    for noise in (config.noise, whole.noise):
        scheduler = make_scheduler(noise, config.model.init)
        settings = [{n: v for n, v in s.config.items() if not n.startswith("_")} for s in (scheduler, published)]
        assert settings[0] == settings[1] and torch.equal(scheduler.betas, published.betas)
    assert schedule_differences(config) == schedule_differences(whole) == []
    given = replace(config, noise=NoiseConfig(beta_end=0.02))
    assert schedule_differences(given) == ["beta_end=0.02, was 0.012"]
    changed = make_scheduler(given.noise, config.model.init).config
    assert changed["beta_end"] == 0.02 and changed["beta_schedule"] == published.config.beta_schedule


def test_given_parts_of_the_schedule_must_fit_the_rest():
    """Also where the rest is the model's."""
    config = TrainConfig(stage="image", output="x", noise=NoiseConfig(prediction_type="epsilon"))
    config.model.init = str(ROOT / "assets" / "tiny_model")
    with pytest.raises(UserError, match="noise.prediction_type=epsilon"):
        with_schedule(config)


def test_data_go_on_where_they_stopped():
    config = DataConfig(size=[32, 32], workers=0)
    whole = [batch["frames"] for batch in make_loader(make_dataset(config, 6), 2, 0)]
    rest = [batch["frames"] for batch in make_loader(make_dataset(config, 6), 2, 0, start=4)]
    assert len(whole) == 3 and len(rest) == 1 and torch.equal(whole[2], rest[0])


def test_velocity_target_is_minus_the_image_at_the_end():
    """With zero terminal SNR the last step's velocity is -x: the model must paint the image from noise alone."""
    scheduler = make_scheduler(NoiseConfig())
    latents, noise = torch.randn(1, 4, 1, 2, 2), torch.randn(1, 4, 1, 2, 2)
    assert torch.allclose(DiffusionNoise(scheduler).target(latents, noise, torch.tensor([999])), -latents, atol=1e-5)


def test_training_and_sampling_share_one_table(tmp_path):
    scheduler = make_scheduler(NoiseConfig())
    scheduler.save_pretrained(tmp_path)
    assert torch.equal(DDIMScheduler.from_pretrained(tmp_path).alphas_cumprod, scheduler.alphas_cumprod)
