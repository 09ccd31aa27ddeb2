"""A small DisCo: what its published file would hold, and the model and pipeline of it."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from models.animators.disco.checkpoint import CLIP, POSITIONS, VAE, disco_manifest, load_disco
from models.animators.disco.model import DisCo, DiscoPipeline
from models.animators.disco.networks import DiscoControlNet, DiscoUNet
from models.checkpoints.convert import published_scheduler
from models.checkpoints.loading import old_names, shapes_of
from models.checkpoints.networks import UNetSizes, control_net_arguments, unet_arguments
from models.checkpoints.verify import synthetic_tensors

SIZES = UNetSizes(block_out_channels=(32, 64), attention=(True, False), layers_per_block=1, cross_attention_dim=16)
POSE_CHANNELS = (8, 16, 16)  # factor 4, as the VAE
SIDE, PATCH = 32, 8  # of CLIP's input: 4 x 4 patches
TOKENS = 1 + (SIDE // PATCH) ** 2
FRAMES, WIDTH, HEIGHT = 3, 32, 24
LATENTS = (HEIGHT // 4, WIDTH // 4)


def disco_shapes(temporal: bool = False) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a small published file."""
    with torch.device("meta"):
        unet = DiscoUNet(temporal=temporal, attention_head_dim=8, **unet_arguments(SIZES, "2D"))
        pose = DiscoControlNet(temporal=temporal, **control_net_arguments(SIZES, POSE_CHANNELS))
        clip = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=1,
                num_attention_heads=1,
                image_size=SIDE,
                patch_size=PATCH,
                projection_dim=16,
                hidden_act="quick_gelu",
            )
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            latent_channels=4,
        )
    parts = {"unet.": unet, "controlnet.nets.0.": pose, CLIP: clip}
    known = {
        f"{prefix}{name}": tuple(t.shape) for prefix, part in parts.items() for name, t in part.state_dict().items()
    }
    known |= {f"{VAE}{name}": shape for name, shape in old_names(shapes_of(vae.state_dict())).items()}
    return dict(disco_manifest({**known, "refer_clip_proj.weight": (16, 64)}))


def disco_tensors(temporal: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """What `module` of a small published file holds: half precision, but for CLIP, which has its position numbers."""
    tensors = synthetic_tensors(disco_shapes(temporal), seed)
    tensors = {name: tensor if name.startswith(CLIP) else tensor.half() for name, tensor in tensors.items()}
    return {**tensors, f"{CLIP}{POSITIONS}": torch.arange(TOKENS)[None]}


def attribute_tensors() -> dict[str, Tensor]:
    """What a file of the attribute pre-training holds: one ControlNet."""
    tensors = {name: t for name, t in disco_tensors().items() if not name.startswith("controlnet.nets.0.")}
    return {name.replace("controlnet.nets.1.", "controlnet."): tensor for name, tensor in tensors.items()}


def small_disco_pipeline(temporal: bool = False, null_tokens: str = "empty_image") -> DiscoPipeline:
    """Random weights everywhere, factor 4."""
    weights = load_disco(disco_tensors(temporal), "small")
    pipeline = DiscoPipeline(
        vae=weights.vae,
        unet=weights.unet,
        pose_control_net=weights.pose_control_net,
        background_control_net=weights.background_control_net,
        image_encoder=weights.image_encoder,
        token_projection=weights.token_projection,
        scheduler=published_scheduler("disco"),
        null_tokens=null_tokens,
        window_size=16,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frame_inputs(frames: int = FRAMES) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, pose images and background latents of some frames."""
    poses = torch.rand(frames, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    return randn(frames, 4, *LATENTS), poses, randn(1, 4, *LATENTS, seed=2)


@pytest.fixture(scope="module")
def pipeline() -> DiscoPipeline:
    return small_disco_pipeline()


@pytest.fixture(scope="module")
def temporal_pipeline() -> DiscoPipeline:
    return small_disco_pipeline(temporal=True)


@pytest.fixture(scope="module")
def model(pipeline) -> DisCo:
    return pipeline.animator


FIXTURES = pipeline, temporal_pipeline, model  # test files assign them to these names
