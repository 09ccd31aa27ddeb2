"""Floating-point operations of inference at full size, in 10^12, counted on the meta device: no weights, no GPU.

    python -m benchmarks.inference_cost [groups=30] [propagation=iterative|hold|off] [output=cost.json]

"published" is what the published implementations compute, "ours" what this project computes for the same result.
"""

from benchmarks.config import CostConfig
from core.config import check_first

check_first(__name__, CostConfig, __doc__)


from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from benchmarks.speed.measuring import counting
from benchmarks.speed.sizes import POSE_CHANNELS, SIZES, make_vae
from core.config import load_config
from core.errors import run_command
from core.files import write_json
from models.animators.magic_animate.model import control_residuals
from models.attention.context import ReferenceContext, fused_layers
from models.attention.layers import token_levels, unet_layers
from models.attention.masking import Visibility
from models.attention.processors import set_reference_processors
from models.checkpoints.networks import MotionSizes, make_control_net, make_denoising_unet, make_reference_net
from models.sampling import context_windows
from models.unets import DenoisingUNet
from tpc.attach import visibility_flags
from tpc.trajectory import Schedule

UNET = SIZES["sd15"].unet


@dataclass(frozen=True)
class Setting:
    """One animator at one size."""

    name: str
    frames: int
    latent_size: tuple[int, int]  # (h, w)
    window: int  # frames
    overlap: int  # frames
    steps: int
    blocks: str  # layers that attend to the reference, "full" or "midup"
    follows_timestep: bool  # the reference is encoded at every step, and a ControlNet runs
    context_tokens: int


SETTINGS = (
    Setting("AnimateAnyone 512x784, 24 frames", 24, (98, 64), 24, 4, 30, "full", False, 1),
    Setting("AnimateAnyone 512x784, 96 frames", 96, (98, 64), 24, 4, 30, "full", False, 1),
    Setting("MagicAnimate 512x512, 96 frames", 96, (64, 64), 16, 4, 25, "midup", True, 77),
)


@dataclass(frozen=True)
class Operations:
    """Operations, in 10^12, of one window of frames at one step, of one image, of one pose image."""

    guided: float
    guided_tpc: float
    published: float
    encode_image: float  # by the reference net
    encode_latents: float  # by the VAE
    control: float


@dataclass(frozen=True)
class Cost:
    """Operations, in 10^12."""

    published: float  # one guided step of the whole clip, without TPC
    ours: float  # the same
    with_tpc: float  # the same with one calibrated person, and encoding where it happens at every step
    calibrated_images: int  # different ones that the steps of a run draw
    vae: float  # encoding of these images, once a run
    reference_net: float  # the same; 0 where it runs at every step, as part of `with_tpc`
    run: float  # all steps of a run with TPC, and the encoding

    @property
    def encoding(self) -> float:
        return self.vae + self.reference_net


class PublishedReadProcessor(AttnProcessor2_0):
    """Reference attention as the published pipelines compute it for [unconditional | conditional] frames."""

    # The unconditional half attends to the reference too, is computed once more without it, and its first result is
    # thrown away. Own tokens stand for the reference's here.
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, reference=None) -> Tensor:
        both = super().__call__(attn, hidden_states, torch.cat([hidden_states, hidden_states], dim=1))
        half = hidden_states[: len(hidden_states) // 2]
        return torch.cat([super().__call__(attn, half), both[len(half) :]])


class PublishedPlainProcessor(AttnProcessor2_0):
    """Stock attention, its context repeated for every frame."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, reference=None) -> Tensor:
        if encoder_hidden_states is not None:
            frames = len(hidden_states) // len(encoder_hidden_states)
            encoder_hidden_states = encoder_hidden_states.repeat_interleave(frames, dim=0)
        return super().__call__(attn, hidden_states, encoder_hidden_states)


def count(compute: Callable[[], object]) -> float:
    with torch.no_grad(), counting() as counted:
        compute()
        return counted() / 1e12


def published_unet(setting: Setting, motion: MotionSizes) -> DenoisingUNet:
    """The denoising UNet with the published attention. Norms cost nothing here, so their scope does not matter."""
    unet = make_denoising_unet(UNET, motion, "frame")

    def attention_of(layer: str) -> AttnProcessor2_0:
        attends = setting.blocks == "full" or not layer.startswith("down_blocks.")
        return PublishedReadProcessor() if attends else PublishedPlainProcessor()

    set_reference_processors(unet, attention_of)
    processors = unet.attn_processors
    plain = [name for name in processors if "attn2" in name and "motion_modules" not in name]
    unet.set_attn_processor(processors | {name: PublishedPlainProcessor() for name in plain})
    return unet


def context_of(setting: Setting, tokens: dict[str, Tensor], unet: DenoisingUNet, calibrated: bool) -> ReferenceContext:
    """One reference, and one calibrated image a frame; keys and values are projected already."""
    persons, frames = int(calibrated), setting.window
    projected = {layer: (value, value) for layer, value in fused_layers(tokens, setting.blocks).items()}
    index = torch.zeros(frames, 1 + persons, dtype=torch.long)
    if not calibrated:
        return ReferenceContext({}, index, projected=projected)
    shares = torch.zeros(1, 1, 1, device="cpu")
    present = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    flags = visibility_flags(shares, shares[0], shares, shares, present, preset="release")[0].shape[-1]
    counts = [level.tokens for level in token_levels(unet_layers(unet, setting.latent_size))]
    query = {n: torch.zeros(frames, n, flags) for n in counts}
    key = {n: torch.zeros(frames, (2 + persons) * n, flags) for n in counts}
    return ReferenceContext({}, index, Visibility(query, key), projected)


def drawn_images(setting: Setting, groups: int, propagation: str) -> tuple[int, int]:
    """Different calibrated images in a run, and at most at one step."""
    schedule = Schedule(np.ones((setting.frames, 1), bool), groups, propagation, 0)
    steps = [np.unique(schedule.source_frame(step)) for step in range(setting.steps)]
    return len(np.unique(np.concatenate(steps))), max(map(len, steps))


@cache
def operations(setting: Setting) -> Operations:
    """Those of a window and of an image; the clip's length and the steps of the setting do not matter."""
    height, width = setting.latent_size
    with torch.device("meta"):
        motion = MotionSizes(24, False) if setting.follows_timestep else MotionSizes()
        ours, published = make_denoising_unet(UNET, motion, "frame"), published_unet(setting, motion)
        reference_net, control_net = make_reference_net(UNET), make_control_net(UNET, POSE_CHANNELS)
        vae = make_vae(SIZES["sd15"])
        latent, image = torch.zeros(1, 4, height, width), torch.zeros(1, 3, 8 * height, 8 * width)
        clip = torch.zeros(1, 4, setting.window, height, width)
        context = torch.zeros(1, setting.context_tokens, UNET.cross_attention_dim)
        with torch.no_grad():
            tokens = reference_net(latent, 0, context)
        plain, calibrated = (context_of(setting, tokens, ours, with_tpc) for with_tpc in (False, True))
        unconditional = count(lambda: ours(clip, 0, context))
        return Operations(
            guided=unconditional + count(lambda: ours(clip, 0, context, reference=plain)),
            guided_tpc=unconditional + count(lambda: ours(clip, 0, context, reference=calibrated)),
            published=count(lambda: published(torch.cat([clip, clip]), 0, torch.cat([context, context]))),
            encode_image=count(lambda: reference_net(latent, 0, context)),
            encode_latents=count(lambda: vae.encode(image)),
            control=count(lambda: control_residuals(control_net, latent[:, :, None], 0, context, image)),
        )


def cost(setting: Setting, groups: int, propagation: str = "iterative") -> Cost:
    one = operations(replace(setting, name="", frames=0, steps=0))
    windows = len(context_windows(setting.frames, setting.window, setting.overlap))
    images, at_once = drawn_images(setting, groups, propagation)
    every_step = one.encode_image if setting.follows_timestep else 0.0
    poses = setting.frames * one.control if setting.follows_timestep else 0.0
    with_tpc = windows * one.guided_tpc + poses + every_step * (1 + at_once)
    vae, once = images * one.encode_latents, images * (one.encode_image - every_step)
    return Cost(
        published=windows * one.published + poses + 2 * every_step,
        ours=windows * one.guided + poses + every_step,
        with_tpc=with_tpc,
        calibrated_images=images,
        vae=vae,
        reference_net=once,
        run=setting.steps * with_tpc + vae + once,
    )


def main(arguments: list[str]) -> None:
    config = load_config(CostConfig, arguments, about=__doc__)
    results = {setting.name: cost(setting, config.groups, config.propagation) for setting in SETTINGS}
    for name, result in results.items():
        saved, added = result.ours / result.published - 1, result.with_tpc / result.ours - 1
        print(name)
        print(f"  step           published {result.published:.1f}, ours {result.ours:.1f} ({saved:+.1%})")
        print(f"  step with TPC  {result.with_tpc:.1f} ({added:+.1%})")
        images = f"{result.calibrated_images} calibrated images, of {result.run:.0f} of a run"
        print(f"  encoding       {result.encoding:.1f} ({result.encoding / result.run:.2%}) for {images}")
        for name, part in (("VAE", result.vae), ("reference net", result.reference_net)):
            print(f"    {name:14}{part:.1f} ({part / result.run:.2%})")
    if config.output:
        write_json(config.output, {name: asdict(result) for name, result in results.items()})


if __name__ == "__main__":
    run_command(main)
