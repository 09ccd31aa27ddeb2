"""Reference and calibrated images of one run, encoded when some frame needs them and not more often than that.

Shapes use f = frames, i = reference images, c = channels, h, w = latent size, H, W = image size.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from models.animators.base import Animator
from models.attention.context import ReferenceContext
from models.attention.layers import token_levels
from models.attention.tokens import TokenLevel
from models.vae import VAE, vae_encode, vae_scale_factor
from tpc.attach import Visibility, frame_visibility, gate_flags
from tpc.calibration import Calibration

# Images that go through VAE and encoder at a time.
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
        projected: layer -> keys and values, filled by the layers at first use; see `ReferenceContext`.
    """

    tokens: dict[str, Tensor]
    slots: dict[int, int]
    projected: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def drop_projected(self) -> None:
        """Forget the tokens of layers that have their keys and values: nothing reads them any more."""
        for layer in self.projected.keys() & self.tokens.keys():
            del self.tokens[layer]


class SomeImages:
    """Images of a run by their numbers, as `models.animators.base.Images`."""

    def __init__(self, run: "ReferenceImages", numbers: list[int]):
        self.run, self.numbers = run, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def pixels(self) -> Tensor:
        return torch.cat([self.run.image(number) for number in self.numbers])

    @property
    def masks(self) -> Tensor | None:
        if self.run.mask is None:
            return None
        return torch.cat([self.run.person_mask(number) for number in self.numbers])

    @property
    def latents(self) -> Tensor:
        return self.run.latents_of(self.numbers)

    def encode(self, images: Tensor) -> Tensor:
        return vae_encode(self.run.vae, images)


class ReferenceImages:
    """The images of one run.

    Args:
        reference: (1, 3, H, W) in [-1, 1].
        calibration: its images that some of the `steps` denoising steps draw may be seen too; None: the reference.
        mask: (1, 1, H, W), 1 where the reference's persons are; None: those of the calibration, if there is one.
        max_images: how many images are kept encoded. A run with more keeps those of one step, or of one window.

    Attributes:
        conditioning: what the animator's `encode_reference` made of the reference.
    """

    def __init__(
        self,
        animator: Animator,
        vae: VAE,
        reference: Tensor,
        calibration: Calibration | None,
        steps: int,
        mask: Tensor | None = None,
        max_images: int = MAX_IMAGES,
    ):
        self.animator, self.vae = animator, vae
        self.reference = reference
        self.calibration = calibration
        self.mask = mask
        if mask is None and calibration is not None and calibration.persons:
            self.mask = torch.from_numpy(calibration.reference_masks.any(axis=0))[None, None].to(reference)
        self.max_images = max_images
        self.drawn = [] if calibration is None else [int(image) for image in calibration.used(steps)]
        factor = vae_scale_factor(vae)
        self.levels = token_levels(animator.attention_layers(tuple(side // factor for side in reference.shape[-2:])))
        self._latents: dict[int, Tensor] = {}
        self._current: tuple[tuple[list[int], int], ReferenceBank] | None = None
        self._members: tuple[int, np.ndarray] | None = None
        self.conditioning = animator.encode_reference(SomeImages(self, [REFERENCE]))

    @property
    def replaces(self) -> bool:
        """Whether a calibrated image takes the reference's place in its frames, instead of keeping it company."""
        return self.calibration is not None and self.calibration.config.attach == "replace"

    def image(self, number: int) -> Tensor:
        """(1, 3, H, W) in [-1, 1]."""
        if number == REFERENCE:
            return self.reference
        image = torch.from_numpy(self.calibration.images[number])[None].permute(0, 3, 1, 2)
        return image.to(self.reference) / 127.5 - 1

    def person_mask(self, number: int) -> Tensor:
        """(1, 1, H, W), 1 where the person is."""
        if number == REFERENCE:
            return self.mask
        return torch.from_numpy(self.calibration.masks[number])[None, None].to(self.reference)

    def latents_of(self, numbers: list[int]) -> Tensor:
        """Latents (i, c, h, w), each image once through the VAE in the whole run."""
        # The reference goes by itself, so that its latents do not depend on which images it comes with.
        if REFERENCE in numbers and REFERENCE not in self._latents:
            self._latents[REFERENCE] = vae_encode(self.vae, self.reference)
        missing = [number for number in numbers if number not in self._latents]
        if missing:
            encoded = vae_encode(self.vae, torch.cat([self.image(number) for number in missing]))
            self._latents |= {number: latent[None] for number, latent in zip(missing, encoded, strict=True)}
        return torch.cat([self._latents[number] for number in numbers])

    def start_latents(self) -> Tensor:
        """Latents (1, c, f, h, w) of the image that each frame of a calibrated clip takes as its reference, or
        (1, c, 1, h, w) where all take the reference."""
        numbers = [REFERENCE]
        if self.replaces:
            numbers = [int(row.max(initial=REFERENCE)) for row in self.members(0)]
        distinct = sorted(set(numbers))
        parts = [distinct[start : start + ENCODE_CHUNK] for start in range(0, len(distinct), ENCODE_CHUNK)]
        latents = torch.cat([self.latents_of(part) for part in parts])
        return latents[[distinct.index(number) for number in numbers]].transpose(0, 1)[None]

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
        """The reference and these calibrated images, each once through VAE (in the whole run) and encoder."""
        written: dict[str, list[Tensor]] = {}
        everything = [REFERENCE, *images]
        for start in range(0, len(everything), ENCODE_CHUNK):
            part = SomeImages(self, everything[start : start + ENCODE_CHUNK])
            for layer, tokens in self.animator.encode_images(part, timestep, self.conditioning).items():
                written.setdefault(layer, []).append(tokens)
        tokens = {layer: torch.cat(parts) for layer, parts in written.items()}
        return ReferenceBank(tokens, {image: place for place, image in enumerate(images, start=1)})

    def context_of(self, bank: ReferenceBank, frames: range, step: int) -> ReferenceContext:
        """What the frames of one window may attend to at one denoising step.

        Args:
            frames: consecutive frames of the clip.
            step: number of the denoising step, 0 first.
        """
        bank.drop_projected()
        device = self.reference.device
        index = torch.zeros(len(frames), 1, dtype=torch.long, device=device)
        seen = ReferenceContext(bank.tokens, index, projected=bank.projected)
        if self.calibration is None:
            return seen
        members = self.members(step)[frames.start : frames.stop]  # (f, persons), -1 where uncalibrated
        slots = [[bank.slots.get(int(member), 0) for member in row] for row in members]
        calibrated = torch.tensor(slots, device=device).reshape(len(frames), -1)
        if self.replaces:
            index, flags = replaced(index, calibrated, self.levels)
        else:
            index = torch.cat([index, calibrated], dim=1)
            flags = frame_visibility(self.calibration, frames, members, None, self.levels).to(device)
        if flags is None:
            return replace(seen, index=index)
        return replace(seen, index=index, query_flags=flags.query, key_flags=flags.key)


def replaced(reference: Tensor, calibrated: Tensor, levels: list[TokenLevel]) -> tuple[Tensor, Visibility | None]:
    """What frames see where calibrated images take the reference's place: one image for each person.

    The reference stays in frames where somebody is uncalibrated, once.

    Args:
        reference: (f, 1) long, the reference's place.
        calibrated: (f, persons) long, places of calibrated images, 0 for uncalibrated persons.

    Returns:
        Index (f, k), and flags that hide what would be there twice; None where k is 1.
    """
    if calibrated.shape[1] < 2:
        return (calibrated if calibrated.shape[1] else reference), None
    absent = calibrated == 0
    twice = absent & (absent.cumsum(dim=1) > 1)
    flags = {level.tokens: gate_flags(twice, level) for level in levels}
    return calibrated, Visibility({n: q for n, (q, _) in flags.items()}, {n: k for n, (_, k) in flags.items()})


def distinct_images(members: Iterable[int]) -> list[int]:
    """Numbers of the calibrated images that occur, ascending."""
    return sorted({int(member) for member in members if member >= 0})
