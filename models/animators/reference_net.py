"""Common parts of animators with a ReferenceNet: two UNets, of which one reads the tokens that the other writes.

Shapes use b = batch, f = frames, i = reference images, c = channels, h, w = latent size.
"""

from typing import Any

import torch
from torch import Tensor

from models.animators.small_networks import block_types, unet_settings
from models.attention.context import fused_layers
from models.attention.layers import LayerShape, unet_layers
from models.attention.processors import reference_layers
from models.config import NetworkSizes, resolution_settings
from models.images import ImageBatch
from models.unets import DenoisingUNet, ReferenceNet


class ReferenceNetMixin:
    """Answers of an `Animator` whose frames attend to the reference's tokens beside their own in self-attention.

    Its conditioning is the context of cross-attention, (1, tokens, channels).
    """

    reference_net: ReferenceNet
    denoising_unet: DenoisingUNet
    fusion_blocks = "full"  # or "midup", the layers in which frames attend to the reference
    frozen_parts: tuple[str, ...] = ()  # children that are trained on demand only; published ones came from elsewhere
    trainable = True

    @property
    def takes_batches(self) -> bool:
        # Norms over clips take the clips of a batch one after another.
        return self.denoising_unet.config.norm_scope == "frame"

    @property
    def longest_window(self) -> int:
        """The length of the motion modules' position tables."""
        return self.denoising_unet.config.motion_max_seq_length

    def write_tokens(self, latents: Tensor, timestep: Tensor | int, context: Tensor) -> dict[str, Tensor]:
        """Latents (i, c, h, w) of images and their contexts (i, tokens, channels) -> layer -> tokens (i, h*w, c)."""
        if isinstance(timestep, int):  # which would be copied to the device, and part of a compiled network's graph
            timestep = torch.full((), timestep, device=latents.device)
        return fused_layers(self.reference_net(latents, timestep, context), self.fusion_blocks)

    def encode_images(self, images: ImageBatch, timestep: int, conditioning: Tensor) -> dict[str, Tensor]:
        latents = images.latents
        return self.write_tokens(latents, timestep, conditioning.expand(len(latents), -1, -1))

    def attention_layers(self, latent_size: tuple[int, int]) -> dict[str, LayerShape]:
        names = fused_layers(dict.fromkeys(reference_layers(self.denoising_unet)), self.fusion_blocks)
        return unet_layers(self.denoising_unet, latent_size, names)

    def prepare_stage(self, stage: str) -> None:
        if stage == "image":
            self.denoising_unet.use_motion_on_single_frames(False)

    def trainable_choices(self, stage: str) -> tuple[str, ...]:
        return ("full",) if stage == "image" else ("motion", "full")

    def trained_parameters(self, choice: str, stage: str, image_encoder: bool) -> set[str]:
        """Names of everything, or of the motion modules, which take no part where clips have one frame."""
        names = {name for name, _ in self.named_parameters()} - self.unused_parameters()
        motion = {name for name in names if "motion_modules" in name}
        if choice == "motion":
            return motion
        frozen = () if image_encoder else tuple(f"{part}." for part in self.frozen_parts)
        return {name for name in names if not name.startswith(frozen)} - (motion if stage == "image" else set())

    def unused_parameters(self) -> set[str]:
        # after the reference net's last written layer
        return {f"reference_net.{name}" for name in self.reference_net.unused_parameters()}

    def initialized_from(self, name: str) -> str:
        return name.replace("reference_net.", "denoising_unet.", 1)


def small_unets(
    sizes: NetworkSizes, latent_channels: int, latent_side: int, **settings: Any
) -> tuple[ReferenceNet, DenoisingUNet]:
    """New networks, with further settings of the denoising UNet; motion modules end in zeros and change nothing."""
    shared = unet_settings(sizes, latent_channels, latent_side)
    reference_net = ReferenceNet(**shared)
    attention, heads = resolution_settings(sizes)
    settings |= {"num_attention_heads": heads, "motion_num_attention_heads": heads, **block_types(attention, "Motion")}
    del shared["attention_head_dim"]
    denoising_unet = DenoisingUNet(motion_max_seq_length=sizes.motion_max_seq_length, **shared | settings)
    # As published, both start as the same image model: what one writes means something to the other's attention.
    own = reference_net.state_dict().keys()
    same = {name: value for name, value in denoising_unet.state_dict().items() if name in own}
    reference_net.load_state_dict(same, strict=False)
    return reference_net, denoising_unet
