"""Small real objects that several test files use."""

import os

import pytest
import torch

# Before any import of a hub client: tests never reach for a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Small tensors gain nothing from a second thread, and two that wait for each other stall on a busy machine.
torch.set_num_threads(1)

# Files whose tests start processes take longest; the others fill up what is left of the time.
LONGEST_FIRST = (
    "test_training_processes.py",
    "test_notebooks.py",
    "test_training_checkpoints.py",
    "test_shortcuts.py",
    "test_memory.py",
    "test_guard.py",
    "test_evaluate_experiments.py",
)


def pytest_collection_modifyitems(items):
    """Start the longest files first, so that parallel workers end together."""
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def tiny_pipeline():
    """An AnimationPipeline of the smallest networks, every parameter random, so that no path is a no-op."""
    from diffusers import AutoencoderKL

    from models.animators.animate_anyone.model import AnimateAnyone
    from tests.networks import TINY
    from training.build import make_pipeline
    from training.config import NoiseConfig

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    model: AnimateAnyone = AnimateAnyone.small(TINY, 4, 32)
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    pipeline = make_pipeline(vae.eval(), model.eval(), NoiseConfig())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
