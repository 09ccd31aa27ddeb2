"""Train a small VAE for the tiny model, or fine-tune the decoder of a published one to the images of a person.

    python -m training.vae --config configs/vae_tiny.yaml output=runs/vae [key=value ...]
    python -m training.vae --config configs/vae_dreampose.yaml output=runs/vae init=weights/vae data.root=videos

Writes `output/vae/` (diffusers; a new one scales latents to unit variance), `output/logs/` (TensorBoard) and
`output/reconstructions.png` (held-out people: image above, reconstruction below).
"""

from core.config import load_config
from core.errors import run_command
from core.files import check_paths
from training.config import VAEConfig


def main(arguments: list[str]) -> None:
    config = load_config(VAEConfig, arguments, about=__doc__, file_option="--config")
    check_paths({"init": config.init, "data.root": config.data.root})
    # Networks take seconds to import, which wrong arguments need not wait for.
    from training.autoencoder import train_vae

    train_vae(config)


if __name__ == "__main__":
    run_command(main)
