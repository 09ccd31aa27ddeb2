"""MagicAnimate's published files.

appearance_encoder/     a Stable Diffusion UNet without output layers and what follows the last written tokens
densepose_controlnet/   a ControlNet
temporal_attention/     an image UNet with motion modules of AnimateDiff v1
"""

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel

from core.errors import UserError
from models.animators.magic_animate.model import MagicAnimatePipeline, PromptEmbedding, control_residuals
from models.attention.context import fused_layers, same_reference
from models.checkpoints.convert import Family, Recognised, Sources
from models.checkpoints.inspect import image_unet
from models.checkpoints.loading import MOTION, Shapes, compare, module_names, on_meta, table_length
from models.checkpoints.networks import (
    UNetSizes,
    animated_unet_manifest,
    check_not_swapped,
    check_reference_net,
    load_control_net,
    load_denoising_unet,
    load_reference_net,
    make_reference_net,
    motion_sizes,
    reference_unet_manifest,
    unet_sizes,
)
from models.checkpoints.verify import Fixture
from models.config import MagicAnimateFiles


def make_magic_animate(sources: Sources) -> MagicAnimatePipeline:
    sources.require("appearance_encoder", "densepose_controlnet", "temporal_attention", "text_encoder", "vae")
    vae = sources.load_folder("vae", AutoencoderKL)
    prompt = empty_prompt(sources.load_folder("text_encoder", CLIPTextModel, torch.float32)).to(sources.dtype)
    check_not_swapped(*sources.tensors("appearance_encoder"), sources.tensors("temporal_attention")[0])
    reference_net = sources.load("appearance_encoder", load_reference_net)
    denoising_unet = sources.load("temporal_attention", load_denoising_unet, norm_scope="clip")
    check_reference_net(reference_net, denoising_unet, vae)
    if (width := prompt.embedding.shape[-1]) != (context := denoising_unet.config.cross_attention_dim):
        raise UserError(f"text_encoder= gives {width} channels, the UNets' cross-attention takes {context}")
    return MagicAnimatePipeline(
        vae=vae,
        reference_net=reference_net,
        denoising_unet=denoising_unet,
        control_net=sources.load("densepose_controlnet", load_control_net),
        prompt=prompt,
        scheduler=sources.family.scheduler(),
        window_size=sources.family.window,
        sampling=dict(sources.family.sampling) or None,
    )


@torch.no_grad()
def empty_prompt(text_encoder: CLIPTextModel) -> PromptEmbedding:
    """The tokens of a prompt without words: its start, then ends up to the encoder's full length."""
    config = text_encoder.config
    # The last two entries of CLIP's vocabulary are start and end; the numbers in published configurations are wrong.
    tokens = torch.full((1, config.max_position_embeddings), config.vocab_size - 1)
    tokens[:, 0] = config.vocab_size - 2
    prompt = PromptEmbedding(config.max_position_embeddings, config.hidden_size)
    prompt.embedding.data = text_encoder(tokens).last_hidden_state
    return prompt.eval()


def appearance_encoder_manifest(sizes: UNetSizes) -> Shapes:
    unused = set(on_meta(make_reference_net, sizes).unused_parameters())
    return {name: shape for name, shape in reference_unet_manifest(sizes).items() if name not in unused}


def recognise_animated_unet(shapes: Shapes) -> Recognised | None:
    if not any(MOTION in name for name in shapes):
        return None
    sizes, motion = unet_sizes(shapes), motion_sizes(module_names(shapes), table_length(shapes))
    kind = "denoising UNet with motion modules (MagicAnimate temporal_attention)"
    return Recognised(kind, f"{sizes}, {motion}", compare(animated_unet_manifest(sizes, motion), shapes))


def outputs(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    sizes = fixture.unet_sizes()
    encoder = load_reference_net(fixture.checkpoint("appearance_encoder"), "appearance_encoder", sizes)
    control_net = load_control_net(fixture.checkpoint("densepose_controlnet"), "densepose_controlnet", sizes)
    tensors = fixture.checkpoint("temporal_attention")
    unet = load_denoising_unet(tensors, "temporal_attention", fixture.norm_scope(), sizes, fixture.motion_sizes())

    inputs = fixture.inputs
    latents, timestep = inputs["noisy_latents"], inputs["timestep"]
    clips, _, num_frames = latents.shape[:3]
    context = repeated(inputs["text_embeds"], clips)
    poses = repeated(inputs["pose_images"], clips * num_frames)
    residuals = control_residuals(control_net, latents, timestep, context, poses)
    for index, residual in enumerate(residuals):
        yield f"control_residual_{index:02d}", residual
    yield "prediction_plain", unet(latents, timestep, context)
    yield "prediction_pose", unet(latents, timestep, context, residuals=residuals)

    own = fixture.config["reference_timestep"]
    # One reference may serve several clips, each of which has its own timestep.
    references = repeated(inputs["ref_latents"], max(len(inputs["ref_latents"]), timestep.numel()))
    tokens = encoder(references, own if isinstance(own, int) else timestep, context[: len(references)])
    yield from fixture.reference_tokens(tokens)
    tokens = {layer: repeated(value, clips) for layer, value in tokens.items()}
    predictions = {}
    for blocks in ("midup", "full"):
        seen = same_reference(fused_layers(tokens, blocks), num_frames)
        predictions[blocks] = unet(latents, timestep, context, reference=seen, residuals=residuals)
        yield f"prediction_reference_{blocks}", predictions[blocks]
    yield "guidance_uncond", unet(latents, timestep, context, residuals=residuals)
    yield "guidance_cond", predictions[fixture.config["fusion_blocks"]]


def repeated(shared: Tensor, count: int) -> Tensor:
    """Rows that all clips share, repeated for each."""
    return shared.repeat(count // len(shared), *[1] * (shared.ndim - 1))


FAMILIES = (
    Family(
        name="magic_animate",
        config=MagicAnimateFiles,
        make=make_magic_animate,
        schedule={
            "beta_schedule": "linear",
            "prediction_type": "epsilon",
            "rescale_betas_zero_snr": False,
            "timestep_spacing": "leading",
        },
        window=16,
        sampling={"steps": 25, "guidance_scale": 7.5, "size": [512, 512]},
        recognisers=(
            recognise_animated_unet,
            image_unet("MagicAnimate appearance_encoder", appearance_encoder_manifest),
        ),
        fixture=frozenset({"appearance_encoder", "densepose_controlnet", "temporal_attention"}),
        outputs=outputs,
    ),
)
