"""Small real objects that several test files use."""

import os

# Before any import of a hub client: tests never reach for a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Small tensors gain nothing from a second thread, and two that wait for each other stall on a busy machine. Commands
# that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

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
    # Which come last by their names, and would leave the other workers without work.
    "test_training.py",
    "test_vae_training.py",
    "test_validation.py",
)


def pytest_collection_modifyitems(items):
    """Start the longest files first, so that parallel workers end together."""
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def usual_scheduling():
    """SVT-AV1, as root, makes the process that encodes real-time; other workers and what they start would starve."""
    yield
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture(scope="session")
def tiny_pipeline():
    """An AnimationPipeline of the smallest networks, every parameter random, so that no path is a no-op."""
    from models.animators.animate_anyone.model import AnimateAnyone
    from tests.networks import TINY
    from tests.published import small_vae
    from training.build import make_pipeline
    from training.config import NoiseConfig

    vae = small_vae()  # seeds what follows
    model: AnimateAnyone = AnimateAnyone.small(TINY, 4, 8)
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    pipeline = make_pipeline(vae, model.eval(), NoiseConfig())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A rendered reference and clip with exact poses and masks: no estimator is needed."""
    from tests.clips import save_rendered_pair

    folder = tmp_path_factory.mktemp("inputs")
    save_rendered_pair(folder)
    return folder
