"""Sizes of the smallest networks that have every part."""

from models.animators.registry import animator_class
from models.config import ANIMATORS
from training.config import ModelConfig

# Names of the animators of single images that train.py makes and trains; that of segments is in `tests.wan_parts`.
TRAINABLE = [
    name for name in ANIMATORS if animator_class(name).trainable and animator_class(name).segment_frames is None
]

TINY = ModelConfig(
    block_out_channels=[16, 32],
    attention_heads=[2],
    norm_num_groups=8,
    motion_max_seq_length=8,
    pose_channels=[8, 8, 8],
    context_dim=8,
    image_encoder_size=16,
    image_encoder_width=16,
    image_encoder_layers=1,
    train_image_encoder=True,
)
