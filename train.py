"""Train an animator: image stage and motion stage in one loop.

    python train.py --config configs/train_stage1.yaml [key=value ...]
    python train.py --config configs/train_stage1.yaml --dry-run

The same command again resumes from the newest checkpoint; SIGTERM and Ctrl-C save one first. Writes to `output`:
    checkpoint-<step>/   complete states        samples/    validation sheets
    pipeline/ or lora/   what infer.py loads    logs/       TensorBoard
    config.yaml          resolved configuration
"""

from core.config import load_config
from core.errors import run_command
from core.files import check_paths
from training.config import TrainConfig


def main(arguments: list[str]) -> None:
    config = load_config(TrainConfig, arguments, about=__doc__, file_option="--config", flags=("dry_run",))
    check_paths(config.folders())
    # Networks take seconds to import, which wrong arguments need not wait for.
    from training.loop import run_training

    run_training(config)


if __name__ == "__main__":
    run_command(main)
