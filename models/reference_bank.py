"""Reference and calibrated images of one run, encoded when some frame needs them and not more often than that.

Shapes use f = frames, i = reference images, c = channels, h, w = latent size, H, W = picture size.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from models.animator import Animator
from models.latents import VAE, encode_pictures
from models.reference_attention import ReferenceContext
from tpc.attention import frame_visibility
from tpc.calibration import Calibration

# Images that go through VAE and ReferenceNet at a time.
ENCODE_CHUNK = 8
# Images whose keys and values are kept: at 784x512 pixels each takes some 80 MB in half precision.
MAX_IMAGES = 128
REFERENCE = -1  # number of the reference itself, beside the numbers of calibrated images


@dataclass(frozen=True)
class ReferenceBank:
    """Some images as the denoising UNet may attend to them.

    Attributes:
        tokens: layer -> (i, r, c). Image 0 is the reference, the others are calibrated images.
        slots: calibrated image of the `Calibration` -> its place.
        device: of the tokens.
        projected: layer -> keys and values, filled by the layers at first use; see `ReferenceContext`.
    """

    tokens: dict[str, Tensor]
    slots: dict[int, int]
    device: torch.device
    projected: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def drop_projected(self) -> None:
        """Forget the tokens of layers that have their keys and values: nothing reads them any more."""
        for layer in self.projected.keys() & self.tokens.keys():
            del self.tokens[layer]


class ReferenceImages:
    """The images of one run.

    Args:
        reference: (1, 3, H, W) in [-1, 1].
        context: of cross-attention, (1, tokens, channels).
        calibration: its images that some of the `steps` denoising steps draw may be seen too; None: the reference.
        max_images: how many images are kept encoded. A run with more keeps those of one step, or of one window.
    """

    def __init__(
        self,
        animator: Animator,
        vae: VAE,
        reference: Tensor,
        context: Tensor,
        calibration: Calibration | None,
        steps: int,
        max_images: int = MAX_IMAGES,
    ):
        self.animator, self.vae = animator, vae
        self.context = context
        self.calibration = calibration
        self.max_images = max_images
        self.latents = {REFERENCE: encode_pictures(vae, reference)}
        self.drawn = [] if calibration is None else [int(image) for image in calibration.used(steps)]
        self._current: tuple[tuple[list[int], int], ReferenceBank] | None = None
        self._members: tuple[int, np.ndarray] | None = None

    def members(self, step: int) -> np.ndarray:
        """`Calibration.index` of the step, (frames, persons), which every window of the step asks for."""
        if self._members is None or self._members[0] != step:
            self._members = step, self.calibration.index(step)
        return self._members[1]

    def bank(self, step: int, timestep: int, frames: range) -> ReferenceBank:
        """The encoded images that these frames see at a denoising step; further ones as long as there is room.

        The same bank is returned until frames need another one. Windows of a step come one after the other.
        """
        at = timestep if self.animator.reference_follows_timestep else 0
        images = self._images(step, frames, whole_run=not self.animator.reference_follows_timestep)
        if self._current is None or self._current[0] != (images, at):
            self._current = None  # the old one makes room first
            self._current = (images, at), self.encode(images, at)
        return self._current[1]

    def _images(self, step: int, frames: range, whole_run: bool) -> list[int]:
        """Calibrated images of the run, of the step, or of the window: the widest of these that is not too many."""
        if self.calibration is None or (whole_run and len(self.drawn) < self.max_images):
            return self.drawn
        index = self.members(step)
        of_step = distinct_images(index.ravel())
        return (
            of_step if len(of_step) < self.max_images else distinct_images(index[frames.start : frames.stop].ravel())
        )

    def encode(self, images: list[int], timestep: int) -> ReferenceBank:
        """The reference and these calibrated images, each once through VAE (in the whole run) and ReferenceNet."""
        written: dict[str, list[Tensor]] = {}
        everything = [REFERENCE, *images]
        for start in range(0, len(everything), ENCODE_CHUNK):
            latents = self._latents(everything[start : start + ENCODE_CHUNK])
            context = self.context.expand(len(latents), -1, -1)
            for layer, tokens in self.animator.encode_reference(latents, timestep, context).items():
                written.setdefault(layer, []).append(tokens)
        tokens = {layer: torch.cat(parts) for layer, parts in written.items()}
        slots = {image: place for place, image in enumerate(images, start=1)}
        return ReferenceBank(tokens, slots, self.context.device)

    def _latents(self, images: list[int]) -> Tensor:
        reference = self.latents[REFERENCE]
        missing = [image for image in images if image not in self.latents]
        if missing:
            pictures = torch.from_numpy(self.calibration.images[missing]).permute(0, 3, 1, 2)
            encoded = encode_pictures(self.vae, pictures.to(reference) / 127.5 - 1)
            self.latents |= {image: latent[None] for image, latent in zip(missing, encoded, strict=True)}
        return torch.cat([self.latents[image] for image in images])

    def seen_by(
        self,
        bank: ReferenceBank,
        frames: range,
        step: int,
        latent_size: tuple[int, int],
        grids: list[tuple[int, int]],
    ) -> ReferenceContext:
        """What the frames of one window may attend to at one denoising step.

        Args:
            frames: consecutive frames of the clip.
            step: number of the denoising step, 0 first.
            latent_size: (h, w).
            grids: (h, w) of every self-attention level of the denoising UNet.
        """
        bank.drop_projected()
        index = torch.zeros(len(frames), 1, dtype=torch.long, device=bank.device)
        if self.calibration is None:
            return ReferenceContext(bank.tokens, index, projected=bank.projected)
        members = self.members(step)[frames.start : frames.stop]  # (f, persons), -1 where uncalibrated
        slots = [[bank.slots.get(int(member), 0) for member in row] for row in members]
        index = torch.cat([index, torch.tensor(slots, device=bank.device).reshape(len(frames), -1)], dim=1)
        flags = frame_visibility(self.calibration, frames, members, latent_size, grids)
        return ReferenceContext(
            tokens=bank.tokens,
            index=index,
            query_flags={n: value.to(bank.device) for n, value in flags.query.items()},
            key_flags={n: value.to(bank.device) for n, value in flags.key.items()},
            projected=bank.projected,
        )


def distinct_images(members: Iterable[int]) -> list[int]:
    """Numbers of the calibrated images that occur, ascending."""
    return sorted({int(member) for member in members if member >= 0})
