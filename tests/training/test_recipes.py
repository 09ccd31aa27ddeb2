"""Shipped recipes: the commands in their headers, whom their crops keep, learning rates from the first step on."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from core.config import check_config, load_config
from core.errors import UserError
from data.poses.poses import Poses
from data.transforms import map_points
from tests.filmed import Film, figure_film, save_prepared_videos
from training.config import SCHEDULES, OptimizerConfig, TrainConfig, VAEConfig
from training.data import clips
from training.distributed import spread_batch
from training.run import learning_rate

CONFIGS = Path(__file__).parents[2] / "configs"
# Of filmed people; those of rendered ones are the shipped models' own.
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if "source: videos" in path.read_text())


def names(path: Path) -> str:
    return path.stem


def load(path: Path) -> TrainConfig | VAEConfig:
    schema = VAEConfig if path.stem.startswith("vae") else TrainConfig
    given = ["output=x"] + ["model.init=x", "data.root=x"] * (schema is TrainConfig)
    return load_config(schema, given, files=[path])


# Crops


@pytest.fixture(scope="module")
def portraits(tmp_path_factory) -> Path:
    """Upright videos of the sizes of UBC Fashion and TikTok with a person from head to feet, arms at the sides."""
    films: dict[str, Film] = {}
    for width, height, part in ((720, 964, 0.72), (720, 964, 0.95), (604, 1080, 0.72), (604, 1080, 0.98)):
        box = (width // 3, round((1 - part) / 2 * height), width // 4, round(part * height))
        films[f"{width}_{part}"] = figure_film(2, (width, height), box)
    return save_prepared_videos(tmp_path_factory.mktemp("portraits"), films)


@pytest.mark.parametrize("recipe", RECIPES, ids=names)
def test_full_bodies_of_upright_videos_are_kept_whole(recipe, portraits):
    data = replace(load(recipe).data, root=str(portraits), num_frames=1, pose_images=None)
    dataset = clips(data, 4)
    assert len(dataset.clips) == 4 and not dataset.left_out
    for usable in dataset.clips:
        points = map_points(Poses.load(usable.clip.poses).keypoints, usable.matrix)
        assert (points >= -0.5).all() and (points <= np.array(data.size) - 0.5).all()


def test_squares_leave_out_people_taller_than_the_video_is_wide(portraits):
    """The crop "person" takes a window as wide as the upright image; a tenth of the person's height is left free."""
    data = replace(load(CONFIGS / "train_stage1.yaml").data, root=str(portraits), crop="person")
    with pytest.raises(UserError, match="4 of 4 clips are left out: 4 does not fit"):
        clips(data, 4)


# Batches


def header(recipe: Path) -> str:
    lines = [line.lstrip("#").strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    return " ".join(lines).replace("\\ ", "")


def processes(recipe: Path) -> int:
    """Number of processes of the command in a recipe's header."""
    command = next(re.finditer(r"accelerate launch (.*?--config \S+)", header(recipe))).group(1)
    assert f"--config configs/{recipe.name}" in command
    if given := re.search(r"--num_processes (\d+)", command):
        return int(given.group(1))
    assert "zero" not in command, "say how many GPUs"
    file = re.search(r"--config_file (\S+)", command)
    return yaml.safe_load((CONFIGS.parent / file.group(1)).read_text())["num_processes"] if file else 1


TRAINED = [path for path in RECIPES if not path.stem.startswith("vae")]


@pytest.mark.parametrize("recipe", TRAINED, ids=names)
def test_headers_say_with_how_many_processes_the_batch_is_reached(recipe, monkeypatch):
    config, count = load(recipe), processes(recipe)
    monkeypatch.setenv("WORLD_SIZE", str(count))
    spread = spread_batch(config)
    reached = spread.batch_size * spread.gradient_accumulation * count
    assert reached == (config.total_batch_size or config.batch_size * config.gradient_accumulation * count)
    if recipe.stem in ("train_stage1", "train_stage2"):
        assert (reached, config.max_steps) == {"train_stage1": (64, 30000), "train_stage2": (4, 10000)}[recipe.stem]


def test_only_images_keep_a_margin_as_published():
    assert {path.stem: load(path).data.sample_margin for path in TRAINED if load(path).data.sample_margin} == {
        "train_stage1": 30,
        "train_stage1_24gb": 30,
    }


# Learning rates


@pytest.mark.parametrize("warmup", [0, 1, 2, 7, 30])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_moves_something(schedule, warmup):
    rate = learning_rate(OptimizerConfig(learning_rate=0.5, schedule=schedule, warmup_steps=warmup), 20)
    rates = [rate(step) for step in range(20)]
    assert min(rates) > 0 and max(rates) <= 0.5
    if schedule == "constant":
        assert set(rates) == {0.5}
        return
    assert rates[:warmup] == pytest.approx([0.5 * (step + 1) / (warmup + 1) for step in range(min(warmup, 20))])
    if warmup < 20:
        assert rates[warmup] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_after_the_warm_up_rates_are_diffusers_own(schedule):
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=3, num_training_steps=12).lr_lambdas[0]
    ours = learning_rate(OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=3), 12)
    assert [ours(step) for step in range(3, 12)] == [theirs(step) for step in range(3, 12)]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"schedule": "piecewise_constant"}, "schedule=piecewise_constant"), ({"warmup_steps": -1}, "warmup_steps=-1")],
)
def test_schedules_that_do_not_exist_are_refused(change, named):
    with pytest.raises(UserError, match=named):
        check_config(OptimizerConfig(**change))


@pytest.mark.parametrize("recipe", TRAINED, ids=names)
def test_recipes_start_at_their_rate_unless_they_warm_up(recipe):
    config = load(recipe)
    first = learning_rate(config.optimizer, config.max_steps)(0)
    assert first == pytest.approx(config.optimizer.learning_rate / (config.optimizer.warmup_steps + 1))
    assert config.optimizer.warmup_steps in (0, 1000)
