"""Small networks of Wan-Animate, for training from nothing."""

from typing import Any

from transformers import CLIPImageProcessorPil as CLIPImageProcessor
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

from core.errors import UserError
from models.animators.wan_animate.networks import WanAnimateTransformer3DModel
from models.config import IMAGE_ENCODER_HEADS, NetworkSizes

FACE_SIDE, FACE_CHANNELS = 32, {"4": 32, "8": 32, "16": 24, "32": 16}  # pixels, and channels at each of them
# Words are letters to it: rendered people come without any, so that every prompt would mean the same.
PIECES = ("<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz")


def small_networks(sizes: NetworkSizes, latent_channels: int, latent_side: int) -> dict[str, Any]:
    """Arguments of `WanAnimate`, its transformer of one width, for latents of this side.

    Text and image encoder are random, as training finds what to do with what they say.
    """
    if len(sizes.block_out_channels) != 1 or len(sizes.attention_heads) != 1:
        raise UserError(
            f"model.block_out_channels={list(sizes.block_out_channels)} and model.attention_heads="
            f"{list(sizes.attention_heads)} need one number each: the transformer has one width"
        )
    (width,), (heads,) = sizes.block_out_channels, sizes.attention_heads
    if (width // heads) % 2:
        raise UserError(
            f"model.block_out_channels={[width]} must be an even number of channels for each of "
            f"model.attention_heads={[heads]}"
        )
    every = next(n for n in (3, 2, 1) if sizes.layers_per_block % n == 0)
    transformer = WanAnimateTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=2 * latent_channels + 4,
        latent_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=sizes.context_dim,
        freq_dim=64,
        ffn_dim=4 * width,
        num_layers=sizes.layers_per_block,
        image_dim=sizes.image_encoder_width,
        added_kv_proj_dim=width,
        motion_encoder_channel_sizes=FACE_CHANNELS,
        motion_encoder_size=FACE_SIDE,
        motion_style_dim=64,
        motion_dim=8,
        motion_encoder_dim=64,
        face_encoder_hidden_dim=64,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=every,
    )
    side = sizes.image_encoder_size
    clip = CLIPVisionConfig(
        hidden_size=sizes.image_encoder_width,
        intermediate_size=2 * sizes.image_encoder_width,
        num_hidden_layers=sizes.image_encoder_layers,
        num_attention_heads=IMAGE_ENCODER_HEADS,
        image_size=side,
        patch_size=sizes.image_encoder_patch,
    )
    text = UMT5Config(vocab_size=len(PIECES), d_model=sizes.context_dim, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return {
        "transformer": transformer,
        "image_encoder": CLIPVisionModel(clip),
        "image_processor": CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        "text_encoder": UMT5EncoderModel(text),
        "tokenizer": T5Tokenizer(vocab=[(piece, float(-n)) for n, piece in enumerate(PIECES)], extra_ids=0),
        "trained_side": latent_side,
    }
