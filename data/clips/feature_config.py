"""Settings of `prepare.py latents` and `prepare.py embeddings`."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from core.errors import UserError
from data.crops import CROPS

DTYPES = ("float32", "float16")


@dataclass
class FeatureConfig:
    """`prepare.py latents` and `prepare.py embeddings`.

    dataset: prepared folder.
    output: folder of the features; `latents` or `embeddings` in the data set's folder without it.
    model: pipeline folder whose VAE or image encoder is used, the one that training starts from (model.init).
    vae: a VAE folder in its place, for latents of new networks (model.vae).
    size, crop: the model's frame as in training (data.size, data.crop).
    batch_size: frames that pass the network together.
    dtype: float32, or float16: half the size, losses then agree to three digits.
    device: "auto" takes CUDA when there is one.
    shard, num_shards: as in preparation.
    """

    dataset: str = MISSING
    output: str | None = None
    model: str | None = None
    vae: str | None = None
    size: list[int] = field(default_factory=lambda: [512, 512])
    crop: str = "person"
    batch_size: int = 8
    dtype: str = "float32"
    device: str = "auto"
    shard: int = 0
    num_shards: int = 1

    def check(self) -> None:
        """Refuse values that cannot work, naming them."""
        if len(self.size) != 2 or min(self.size) < 8:
            raise UserError(f"size={self.size} must be a width and a height of at least 8 pixels")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype} is not one of {', '.join(DTYPES)}")
        if self.crop not in CROPS:
            raise UserError(f"crop={self.crop} is not one of {', '.join(CROPS)}")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")
