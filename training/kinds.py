"""Models of which `train.py` can make new small networks, by the names that `model.animator=` takes."""

from collections.abc import Callable

from core.errors import UserError
from models.animators.animate_anyone.model import AnimateAnyone
from models.animators.base import Animator
from models.animators.disco.model import DisCo
from models.animators.dream_pose.model import DreamPose
from models.animators.magic_animate.model import MagicAnimate
from models.animators.small_networks import NetworkSizes
from training.config import ModelConfig

# Sizes, channels of the latents, and side of the images in pixels -> networks.
Maker = Callable[[NetworkSizes, int, int], Animator]
PUBLISHED = "animate_anyone"  # whose published sizes a dry run knows without any folder
KINDS: dict[str, Maker] = {
    "animate_anyone": AnimateAnyone.small,
    "disco": DisCo.small,
    "dream_pose": DreamPose.small,
    "magic_animate": MagicAnimate.small,
}


def new_animator(config: ModelConfig, latent_channels: int, image_size: int) -> Animator:
    """Randomly initialised networks of `model.animator`.

    Raises:
        UserError: another kind, or sizes that do not go together.
    """
    if config.animator not in KINDS:
        raise UserError(f"model.animator={config.animator} is not one of {', '.join(KINDS)}")
    return KINDS[config.animator](config, latent_channels, image_size)
