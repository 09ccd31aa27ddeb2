"""`AnimationPipeline` of DisCo."""

from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline
from transformers import CLIPVisionModelWithProjection

from models.animators.disco.model import DisCo
from models.animators.disco.networks import DiscoControlNet, DiscoUNet, TokenProjection
from models.pipeline import AnimationPipeline


class DiscoPipeline(AnimationPipeline):
    """An image, where its person is, and OpenPose figures in; an animation out.

    Args:
        unet, pose_control_net, background_control_net: of the image model, or of the temporal variant.
        image_encoder: CLIP's, of which all tokens are used.
        token_projection: of these tokens to the width of cross-attention.
        null_tokens: "empty_image" or "zeros", what the unconditional half of guidance sees; see
            `models.animators.disco.model.NULL_TOKENS`.
        window_size: frames that are denoised together; the temporal variant was trained on 16.
    """

    animator_kind = DisCo
    model_cpu_offload_seq = "image_encoder->token_projection->pose_control_net->background_control_net->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        unet: DiscoUNet,
        pose_control_net: DiscoControlNet,
        background_control_net: DiscoControlNet,
        image_encoder: CLIPVisionModelWithProjection,
        token_projection: TokenProjection,
        scheduler: DDIMScheduler,
        null_tokens: str = "empty_image",
        window_size: int | None = None,
    ):
        DiffusionPipeline.__init__(self)
        self.set_components(
            window_size,
            vae=vae,
            unet=unet,
            pose_control_net=pose_control_net,
            background_control_net=background_control_net,
            image_encoder=image_encoder,
            token_projection=token_projection,
            scheduler=scheduler,
        )
        self.register_to_config(null_tokens=null_tokens)
