"""DisCo as a pipeline."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from core.errors import UserError
from models.animators.disco.checkpoint import LATENT_SIDE, DiscoWeights, load_disco
from models.animators.disco.model import NULL_TOKENS, DiscoPipeline
from models.animators.disco.networks import EMBEDDING_WIDTHS, DiscoUNet, TokenProjection, new_control_net
from models.checkpoints.loading import load_strictly, shapes_of
from models.checkpoints.sizes import unet_arguments, unet_sizes
from models.checkpoints.sources import WINDOWS, Sources
from models.schedules import published_scheduler
from models.vae import vae_scale_factor


def disco(sources: Sources) -> DiscoPipeline:
    """The image model, its temporal variant, what attribute pre-training left, or base weights to train one from."""
    null_tokens = sources.config.null_tokens
    if null_tokens not in NULL_TOKENS:
        raise UserError(f"null_tokens={null_tokens} is not one of {', '.join(NULL_TOKENS)}")
    if sources.path("checkpoint", required=sources.config.unet is None) is None:
        weights = base_weights(sources)
    else:
        tensors, what = sources.tensors("checkpoint")
        weights = load_disco(tensors, what, dtype=sources.dtype)
    pose_control_net = weights.pose_control_net
    if pose_control_net is None:
        sources.notes.append("the pose ControlNet is new: until it is trained, poses have no effect")
        # Each width after the first halves the pose images, which must end as small as the latents.
        widths = EMBEDDING_WIDTHS[: vae_scale_factor(weights.vae).bit_length()]
        pose_control_net = new_control_net(weights.unet, False, widths).eval()
    return DiscoPipeline(
        vae=weights.vae,
        unet=weights.unet,
        pose_control_net=pose_control_net,
        background_control_net=weights.background_control_net,
        image_encoder=weights.image_encoder,
        token_projection=weights.token_projection,
        scheduler=published_scheduler("disco"),
        null_tokens=null_tokens,
        window_size=WINDOWS["disco"],
    )


def base_weights(sources: Sources) -> DiscoWeights:
    """What the published training starts from: the UNet of sd-image-variations, both ControlNets made of it, and
    CLIP's own projection for all of its tokens."""
    tensors, what = sources.tensors("unet")
    image_encoder = sources.folder("image_encoder", CLIPVisionModelWithProjection)
    projection = image_encoder.visual_projection.weight
    unet = base_unet(tensors, what, sources.dtype)
    if unet.config.cross_attention_dim != len(projection):
        context = unet.config.cross_attention_dim
        raise UserError(f"image_encoder= gives {len(projection)} channels, unet='s cross-attention takes {context}")
    with torch.device("meta"):
        token_projection = TokenProjection(*projection.shape[::-1])
    sources.notes.append("the background ControlNet is new: until it is trained, the background has no effect")
    return DiscoWeights(
        unet=unet,
        pose_control_net=None,
        background_control_net=new_control_net(unet, True).eval(),
        image_encoder=image_encoder,
        token_projection=load_strictly(
            token_projection, {"linear.weight": projection.detach().clone()}, "image_encoder=", sources.dtype
        ),
        vae=sources.folder("vae", AutoencoderKL),
    )


def base_unet(tensors: dict[str, Tensor], what: str, dtype: torch.dtype) -> DiscoUNet:
    """DisCo's UNet from one of Stable Diffusion."""
    sizes = unet_sizes(shapes_of(tensors))
    arguments = unet_arguments(sizes, "2D") | {"sample_size": LATENT_SIDE}
    with torch.device("meta"):
        unet = DiscoUNet(attention_head_dim=sizes.num_attention_heads, **arguments)
    return load_strictly(unet, tensors, what, dtype)
