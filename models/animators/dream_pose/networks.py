"""DreamPose's networks: a UNet with poses among its input channels, and the adapter that makes its context.

Shapes use b = batch, f = frames, i = images, n = CLIP tokens, c = channels, p = pose channels of one frame,
h, w = latent size, H, W = image size.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from models.attention.context import ReferenceContext
from models.attention.processors import set_image_processors
from models.unets import with_parameters


class DreamPoseUNet(UNet2DConditionModel):
    """Stable Diffusion's image UNet, whose input is the noisy latents followed by the poses around each frame.

    Frames know of each other by these poses alone. Reference and calibrated images are tokens in its cross-attention.
    """

    @with_parameters(
        UNet2DConditionModel.__init__,
        poses=5,
        pose_channels=(1, 2),
        pose_range=(-1.0, 1.0),
        pose_kind="DensePose",
    )
    def __init__(
        self,
        *args,
        poses: int = 5,  # consecutive ones that a frame is given, its own in the middle; odd
        pose_channels: tuple[int, ...] = (1, 2),  # that are used of a pose image, U and V of DensePose (part, U, V)
        pose_range: tuple[float, float] = (-1.0, 1.0),  # of 0 and 1; 0 of the input says "no pose"
        pose_kind: str = "DensePose",
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.register_to_config(
            poses=poses, pose_channels=tuple(pose_channels), pose_range=tuple(pose_range), pose_kind=pose_kind
        )
        wanted = self.config.out_channels + poses * len(pose_channels)
        if self.config.in_channels != wanted or poses % 2 != 1:
            raise ValueError(
                f"in_channels must be out_channels + poses * pose channels = {wanted} with an odd number of poses, "
                f"got {self.config.in_channels} with {poses} poses"
            )
        set_image_processors(self)

    def forward(
        self,
        sample: Tensor,  # noisy latents, (b, c, f, h, w)
        timestep: Tensor | int,  # scalar or (b,)
        poses: Tensor,  # of `consecutive_poses`, (b, f, poses*p, h, w); zeros where there is none
        context: Tensor,  # the adapter's tokens, (b or b*f, n, c'), of every frame where `reference` is None
        reference: ReferenceContext | None = None,
    ) -> Tensor:
        """Noise or velocity of clips, (b, c, f, h, w)."""
        batch, _, num_frames = sample.shape[:3]
        frames = torch.cat([sample.transpose(1, 2), poses], dim=2).flatten(0, 1)  # (b*f, c + poses*p, h, w)
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(batch).repeat_interleave(num_frames)
        prediction = super().forward(
            frames, timesteps, context, cross_attention_kwargs={"reference": reference}, return_dict=False
        )[0]
        return prediction.unflatten(0, (batch, num_frames)).transpose(1, 2)

    def pose_input(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Pose images (i, 3, H, W) in [0, 1] -> the channels used, (i, p, h, w) in `pose_range`; size: (h, w).

        The nearest pixel is taken: between two parts of a body, or body and background, U and V have no mean.
        """
        low, high = self.config.pose_range
        used = torch.stack([images[:, channel] for channel in self.config.pose_channels], dim=1)
        return F.interpolate(used, size, mode="nearest") * (high - low) + low


def consecutive_poses(poses: Tensor, count: int, frames: range | None = None) -> Tensor:
    """The `count` poses around each of k frames, (b, f, p, h, w) of whole clips -> (b, k, count*p, h, w).

    Earliest first; beyond the clip's ends its end poses stay. Without `frames` k = f.
    """
    length = poses.shape[1]
    frames = range(length) if frames is None else frames
    wanted = torch.arange(frames.start, frames.stop, device=poses.device)
    offsets = torch.arange(count, device=poses.device) - count // 2
    index = (wanted[:, None] + offsets).clamp(0, length - 1)
    return poses[:, index].flatten(2, 3)


class ImageAdapter(ModelMixin, ConfigMixin):
    """Mixes n CLIP tokens and l tokens made of the latents' channels into n tokens (Karras et al., ICCV 2023).

    It starts as CLIP's tokens alone: the mixing is the identity on them and zero on the latents' tokens.
    """

    @register_to_config
    def __init__(
        self,
        clip_tokens: int = 50,  # n, of a ViT-B/32 at 224 pixels
        channels: int = 768,
        latent_channels: int = 4,  # l
        latent_grid: tuple[int, int] = (40, 32),  # that latents are max-pooled to; half those of 640 x 512 images
    ):
        super().__init__()
        rows, columns = latent_grid
        # Names of the published file.
        self.vae2clip = nn.Linear(rows * columns, channels)
        self.linear1 = nn.Linear(clip_tokens + latent_channels, clip_tokens)
        with torch.no_grad():
            self.linear1.weight.copy_(torch.eye(clip_tokens, clip_tokens + latent_channels))
            self.linear1.bias.zero_()
        # Max-pooled latents of the empty image, for the unconditional branch of guidance; no published file has them.
        self.register_buffer("null_latents", torch.zeros(latent_channels, rows, columns))

    def forward(self, clip_tokens: Tensor, latents: Tensor) -> Tensor:
        """Context of images (i, n, channels), of CLIP's last hidden states (i, n, channels) and latents (i, l, h, w).

        Latents are of images in [-1, 1], scaled as the denoising UNet has them.
        """
        pooled = self.pooled(latents).flatten(2)  # (i, l, rows*columns)
        tokens = torch.cat([clip_tokens, self.vae2clip(pooled)], dim=1)  # (i, n + l, channels)
        return self.linear1(tokens.transpose(1, 2)).transpose(1, 2)

    def pooled(self, latents: Tensor) -> Tensor:
        """(i, l, h, w) -> (i, l, rows, columns); a 2 x 2 maximum where that gives the grid, as published."""
        grid = tuple(self.config.latent_grid)
        if tuple(side // 2 for side in latents.shape[-2:]) == grid:
            return F.max_pool2d(latents, 2)
        return F.adaptive_max_pool2d(latents, grid)


def portrait_grid(cells: int) -> tuple[int, int]:
    """(rows, columns) with this many cells, all a file tells, and the ratio nearest to 5 : 4, the published one."""
    pairs = [(rows, cells // rows) for rows in range(1, cells + 1) if cells % rows == 0]
    return min(pairs, key=lambda pair: max(pair[0] / pair[1] / 1.25, 1.25 * pair[1] / pair[0]))


def branch_weights(image: float, pose: float) -> tuple[float, float, float]:
    """Weights of the predictions with nothing, with the image, and with image and pose, which sum to 1.

    They are the published null + image (e_image - null) + pose (e_image_pose - e_image), sorted by prediction.
    """
    return 1 - image, image - pose, pose
