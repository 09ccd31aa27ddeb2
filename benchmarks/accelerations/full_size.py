"""What accelerations leave of a denoising step at full size, counted on the meta device: no weights, no GPU, minutes.

    python -m benchmarks.accelerations.full_size [output=full_size.json]

A step is one window with TPC, one calibrated person, and guidance. Operations are in 10^12; a multiplication and an
addition count as two. Kept attention is in GiB of half precision.
"""

import re
from dataclasses import asdict, dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.inference_cost import SETTINGS, SIZES, Setting, count, seen
from core.config import load_config
from core.errors import run_command
from core.files import write_json
from models.attention.context import ReferenceContext, fused_layers
from models.attention.layers import unet_layers
from models.broadcast import CROSS, SPATIAL, AttentionCache, BroadcastSchedule
from models.checkpoints.sizes import MotionSizes, UNetSizes, make_denoising_unet, make_reference_net
from models.merging import TokenMerging
from models.unets import DenoisingUNet

MOTION_ATTENTION = re.compile(r"motion_modules.*\.attn[12]$")
MERGINGS = (TokenMerging(2), TokenMerging(2, 2), TokenMerging(4))


@dataclass
class FullSizeConfig:
    """output: JSON file, null prints the numbers only."""

    output: str | None = None


@dataclass(frozen=True)
class StepCost:
    """Operations of one step.

    Attributes:
        whole: without acceleration.
        unguided: outside the interval of guidance.
        reused: with the attention of another step.
        merged: "side x levels" -> with merged reference tokens.
        kept_gib: attention that broadcast keeps for one window.
        motion_attention: the part of `whole` in the attention of motion modules, which cannot be re-used.
    """

    whole: float
    unguided: float
    reused: float
    merged: dict[str, float]
    kept_gib: float
    motion_attention: float


def merged_context(
    context: ReferenceContext, unet: DenoisingUNet, setting: Setting, merging: TokenMerging
) -> ReferenceContext:
    """The same images with merged tokens, as shapes."""
    layers = unet_layers(unet, setting.latent_size, fused_layers(dict.fromkeys(context.projected), setting.blocks))
    grids = merging.merged_grids(layers)
    projected = {
        layer: tuple(merging.tokens(part, grids[layer]) if layer in grids else part for part in parts)
        for layer, parts in context.projected.items()
    }
    counts = {rows * columns: merging.log_counts((rows, columns)) for rows, columns in grids.values()}
    images = context.index.shape[1]
    keys = {
        n: flags[:, : n + images * len(counts[n])] if n in counts else flags for n, flags in context.key_flags.items()
    }
    return replace(context, projected=projected, key_flags=keys, merged=counts)


def step_cost(setting: Setting, sizes: UNetSizes = SIZES) -> StepCost:
    """Count one setting of `benchmarks.inference_cost`."""
    with torch.device("meta"), torch.no_grad():
        motion = MotionSizes(24, False) if setting.follows_timestep else MotionSizes()
        unet, reference_net = make_denoising_unet(sizes, motion, "frame"), make_reference_net(sizes)
        height, width = setting.latent_size
        words = torch.zeros(1, setting.context_tokens, sizes.cross_attention_dim)
        clip = torch.zeros(1, 4, setting.window, height, width)
        images = seen(setting, reference_net(torch.zeros(1, 4, height, width), 0, words), unet, calibrated=True)

        def halves(context: ReferenceContext) -> float:
            """Both halves of guidance."""
            parts = context, context.unconditional()
            return sum(count(lambda part=part: unet(clip, 0, words, reference=part)) for part in parts)

        whole, unguided = halves(images), count(lambda: unet(clip, 0, words, reference=images))
        cache = AttentionCache(BroadcastSchedule(2, 2, (0.0, 1.0)), (SPATIAL, CROSS))
        _, reused = (halves(replace(images, reuse=cache.window(step, 0))) for step in range(2))
        merged = {
            f"{merging.factor} x {merging.factor}, {merging.levels} levels": halves(
                merged_context(images, unet, setting, merging)
            )
            for merging in MERGINGS
        }
        with FlopCounterMode(display=False) as counter:
            unet(clip, 0, words)
        motion_attention = sum(
            sum(operations.values())
            for module, operations in counter.get_flop_counts().items()
            if MOTION_ATTENTION.search(module)
        )
    # The meta device counts four bytes a number; both halves pass the same motion modules.
    return StepCost(whole, unguided, reused, merged, cache.peak_bytes / 2 / 2**30, 2 * motion_attention / 1e12)


def main(arguments: list[str]) -> None:
    config = load_config(FullSizeConfig, arguments)
    # Settings that differ in their clip's length have the same window.
    windows = {setting.window: setting for setting in reversed(SETTINGS)}
    costs = {setting.name: step_cost(setting) for setting in windows.values()}
    for name, cost in costs.items():
        print(f"{name}, one window: {cost.whole:.1f}")
        parts = {"without guidance": cost.unguided, "attention re-used": cost.reused}
        parts |= {f"merged {key}": value for key, value in cost.merged.items()}
        for label, part in (parts | {"(attention between frames)": cost.motion_attention}).items():
            print(f"  {label:28}{part:.1f} ({part / cost.whole:.1%})")
        print(f"  kept attention              {cost.kept_gib:.2f} GiB")
    if config.output:
        write_json(config.output, {name: asdict(cost) for name, cost in costs.items()})


if __name__ == "__main__":
    run_command(main)
