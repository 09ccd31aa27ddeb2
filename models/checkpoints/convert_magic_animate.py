"""MagicAnimate as a pipeline."""

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel

from models.animators.magic_animate.model import MagicAnimatePipeline
from models.animators.magic_animate.networks import PromptEmbedding
from models.checkpoints.convert_animate_anyone import check_fit
from models.checkpoints.networks import load_control_net, load_denoising_unet, load_reference_net
from models.checkpoints.sources import WINDOWS, Sources
from models.schedules import published_scheduler


def magic_animate(sources: Sources) -> MagicAnimatePipeline:
    """MagicAnimate as published."""
    reference_net = sources.load("appearance_encoder", load_reference_net)
    denoising_unet = sources.load("temporal_attention", load_denoising_unet, norm_scope="clip")
    vae = sources.folder("vae", AutoencoderKL)
    check_fit(reference_net, denoising_unet, vae)
    return MagicAnimatePipeline(
        vae=vae,
        reference_net=reference_net,
        denoising_unet=denoising_unet,
        control_net=sources.load("densepose_controlnet", load_control_net),
        prompt=empty_prompt(sources.folder("text_encoder", CLIPTextModel, torch.float32)).to(sources.dtype),
        scheduler=published_scheduler("magic_animate"),
        window_size=WINDOWS["magic_animate"],
    )


@torch.no_grad()
def empty_prompt(text_encoder: CLIPTextModel) -> PromptEmbedding:
    """The tokens of a prompt without words: its start, then ends up to the encoder's full length.

    The last two entries of CLIP's vocabulary are start and end; the numbers in published configurations are wrong.
    """
    config = text_encoder.config
    tokens = torch.full((1, config.max_position_embeddings), config.vocab_size - 1)
    tokens[:, 0] = config.vocab_size - 2
    prompt = PromptEmbedding(config.max_position_embeddings, config.hidden_size)
    prompt.embedding.data = text_encoder(tokens).last_hidden_state
    return prompt.eval()
