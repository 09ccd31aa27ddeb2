"""Configuration of `training/vae.py`."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from training.config import DataConfig, OptimizerConfig


@dataclass
class VAEConfig:
    """`training/vae.py`: a small convolutional autoencoder (diffusers' AutoencoderTiny) for rendered people, or the
    decoder of a published one (AutoencoderKL), fine-tuned to the images of a person as DreamPose does.

    init: VAE folder to go on from, for example the `vae` of a pipeline folder; null starts anew.
    freeze_encoder: train the decoder alone, so that models trained on the latents stay valid; AutoencoderKL needs it.
    loss: "edges", absolute and squared error, the person weighted, and edges; "squares", the mean squared error.
    crop: random crops take away up to this part of an image's sides.
    blocks: residual blocks at each resolution, finest first; each entry after the first halves the image.
    latent_noise: standard deviation of noise added to latents in training, so that the decoder bears small errors.
    latent_weight: weight of the latents' mean square, which keeps them near zero.
    person_weight: how much more a person's pixels count than the background's.
    """

    output: str = MISSING
    init: str | None = None
    freeze_encoder: bool = False
    seed: int = 0
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_steps: int = 1000
    log_steps: int = 50
    mixed_precision: str | None = None
    channels_last: bool = False
    latent_channels: int = 16
    width: int = 48
    blocks: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    loss: str = "edges"
    crop: float = 0.0
    latent_noise: float = 0.05
    latent_weight: float = 1e-3
    person_weight: float = 3.0
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
