"""Norms over the frames of a clip. In a UNet, frames are folded into the batch: (f, c, h, w)."""

from torch import Tensor, nn


class ClipGroupNorm(nn.GroupNorm):
    """GroupNorm with one set of statistics for all frames of a clip, (f, c, h, w) -> same shape.

    Attributes:
        single_frames: in training mode, each of the frames is a clip of its own. In evaluation they are one clip.
    """

    single_frames = False

    def forward(self, frames: Tensor) -> Tensor:
        if self.single_frames and self.training:
            return super().forward(frames)
        return super().forward(frames.transpose(0, 1)[None])[0].transpose(0, 1)


def clip_norm(norm: nn.GroupNorm) -> ClipGroupNorm:
    """The same norm, over clips. Its parameters are those of `norm`."""
    replacement = ClipGroupNorm(norm.num_groups, norm.num_channels, norm.eps)
    replacement.weight, replacement.bias = norm.weight, norm.bias
    return replacement
