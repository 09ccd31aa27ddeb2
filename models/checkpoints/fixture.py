"""What a fixture of known answers holds; `verify` reads and judges it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from core.errors import UserError
from models.checkpoints.sizes import MotionSizes, UNetSizes
from models.checkpoints.synthetic import synthetic_tensors


@dataclass(frozen=True)
class Fixture:
    """Networks, inputs and known outputs.

    Attributes:
        config: the numbers that define the networks.
        shapes: checkpoint file -> tensor name -> shape.
        seeds: checkpoint file -> seed of its weights.
        meanings: output -> what it is, in words.
        tolerances: output -> largest difference allowed in float32.
        inputs, expected: name -> tensor.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, Mapping[str, list[int]]]
    seeds: Mapping[str, int]
    meanings: Mapping[str, str]
    tolerances: Mapping[str, float]
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]

    def checkpoint(self, file: str) -> dict[str, Tensor]:
        """What this checkpoint file would hold."""
        return synthetic_tensors(self.shapes[file], self.seeds[file])

    def unet_sizes(self) -> UNetSizes:
        """Sizes of the UNets and of a ControlNet."""
        config = self.config
        if not config.get("flip_sin_to_cos", True) or config.get("freq_shift", 0):
            raise UserError("flip_sin_to_cos must be true and freq_shift 0, as in Stable Diffusion 1")
        widths = tuple(config["block_out_channels"])
        return UNetSizes(
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            block_out_channels=widths,
            attention=(True,) * (len(widths) - 1) + (False,),
            layers_per_block=config["layers_per_block"],
            cross_attention_dim=config["cross_attention_dim"],
            num_attention_heads=config["num_attention_heads"],
            norm_num_groups=config["norm_num_groups"],
            use_linear_projection=config.get("use_linear_projection", False),
        )

    def motion_sizes(self) -> MotionSizes:
        """Sizes of the motion modules."""
        config = self.config
        return MotionSizes(
            max_seq_length=config["motion_max_seq_length"],
            mid_block=config["motion_module_mid_block"],
            layers=config.get("motion_transformer_layers", 1),
            num_attention_heads=config["motion_num_attention_heads"],
        )

    def norm_scope(self) -> str:
        """What the GroupNorms of ResNets and output take their statistics over."""
        words = {self.config["resnet_group_norm"], self.config.get("conv_norm_out", self.config["resnet_group_norm"])}
        if words - {"per frame", "per clip"} or len(words) != 1:
            raise UserError(f"resnet_group_norm and conv_norm_out must both be per frame or per clip, got {words}")
        other = self.config.get("motion_group_norm", "per frame"), self.config.get("spatial_transformer_group_norm")
        if other[0] != "per frame" or other[1] not in (None, "per frame"):
            raise UserError(f"group norm of motion modules and spatial transformers must be per frame, got {other}")
        return words.pop().removeprefix("per ")

    def reference_layers(self) -> dict[str, str]:
        """Output -> reference layer, for the outputs that are said to be the input of a layer."""
        found = {name: re.search(r"input of (\S+\.attn1)\b", text) for name, text in self.meanings.items()}
        return {name: match.group(1) for name, match in found.items() if match}
