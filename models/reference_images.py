"""Reference and calibrated images of one run as frames attend to them, each encoded once.

Shapes use f = frames, i = reference images, c = channels, h, w = latent size.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.processes import to_device
from models.animators.base import Animator
from models.attention.context import ReferenceContext
from models.attention.layers import token_levels
from models.attention.processors import project_images
from models.images import ENCODE_CHUNK, REFERENCE, ImageBatch, image_pixels
from models.segments import Segment
from models.vae import vae_scale_factor

# Images whose keys and values are kept: at 784x512 pixels each takes some 80 MB in half precision.
MAX_IMAGES = 128


class ReferenceImages:
    """Contexts for the windows of a run.

    Of more than `max_images` images only those of a step or of some windows stay encoded. With `null_image` the last
    of the tokens are `Animator.null_image_tokens`. `conditioning`: that of the reference; None: it is encoded here.
    """

    def __init__(
        self,
        animator: Animator,
        images: ImageBatch,
        steps: int,
        max_images: int = MAX_IMAGES,
        null_image: bool = False,
        conditioning: Any = None,
    ):
        self.animator, self.images, self.calibration = animator, images, images.calibration
        self.max_images, self.null_image = max_images, null_image
        factor = vae_scale_factor(images.vae)
        height, width = images.reference.shape[-2:]
        self.latent_size = height // factor, width // factor
        self.levels = token_levels(animator.attention_layers(self.latent_size))
        self.used = [] if self.calibration is None else [int(image) for image in self.calibration.used(steps)]
        self.conditioning = conditioning
        if conditioning is None:
            self.conditioning = animator.encode_reference(images.select([REFERENCE]))
        # By layer, see `ReferenceContext`.
        self.tokens: dict[str, Tensor] = {}
        self.projected: dict[str, tuple[Tensor, Tensor]] = {}
        self.rows: dict[int, int] = {}  # index of an encoded image -> its row in the tokens
        self._encoded_at: int | None = None
        self._index: tuple[int, np.ndarray] | None = None
        self._segment: tuple[Segment, ReferenceContext] | None = None  # the last one

    def start_latents(self) -> Tensor:
        """Latents (1, c, f, h, w) of what replaces each frame's reference, or (1, c, 1, h, w) of the reference."""
        indices = [REFERENCE]
        if self.calibration is not None and self.calibration.replaces_reference:
            indices = self.index(0).max(axis=1, initial=REFERENCE).tolist()
        return self.images.select(indices).latents.transpose(0, 1)[None]

    def index(self, step: int) -> np.ndarray:
        """`Calibration.index` of the step, (frames, persons), which every window of the step asks for."""
        if self._index is None or self._index[0] != step:
            self._index = step, self.calibration.index(step)
        return self._index[1]

    def context(self, step: int, timestep: int, frames: range) -> ReferenceContext:
        """The images that consecutive frames of the clip may attend to at a denoising step, 0 first."""
        return self.contexts(step, timestep, [frames])[0]

    def contexts(self, step: int, timestep: int, windows: Sequence[range]) -> list[ReferenceContext]:
        """`context` of windows that are denoised together."""
        follows = self.animator.reference_follows_timestep
        self.encode([REFERENCE, *self.wanted(step, windows, whole_run=not follows)], timestep if follows else 0)
        contexts = [self.attended(step, frames) for frames in windows]
        if self.animator.compiled:  # whose graph would be another one once it finds them
            for network in self.animator.children():
                if hasattr(network, "attn_processors"):
                    project_images(network, contexts[0])
        # Layers that have their keys and values do not need the tokens any more.
        for layer in self.projected.keys() & self.tokens.keys():
            del self.tokens[layer]
        return contexts

    def segment_context(self, segment: Segment) -> ReferenceContext:
        """What the frames of a segment attend to together: the reference, or what replaces it, and further images."""
        if self._segment is None or self._segment[0] != segment:
            self._segment = segment, self._of_segment(segment)
        return self._segment[1]

    def _of_segment(self, segment: Segment) -> ReferenceContext:
        calibration, images, frames = self.calibration, self.images, segment.inside
        replaces = calibration is not None and calibration.replaces_reference
        if replaces and (shown := calibration.segment_image(frames)) is not None:
            images = replace(images, reference=image_pixels(shown, images.reference), calibration=None, encoded={})
        elif calibration is not None and not replaces:
            images = replace(images, calibration=calibration.held(frames, self.animator.images_of_segment))
            own = ReferenceImages(self.animator, images, steps=1, conditioning=self.conditioning)
            context = own.contexts(0, 0, [frames])[0]
            # Frames beyond the end of the shot, which nobody will see, are as the last.
            last = torch.arange(len(segment.frames), device=context.index.device).clamp(max=len(frames) - 1)
            flags = context.visibility and context.visibility.rows(last)
            context = replace(context, index=context.index[last], visibility=flags)
            return self.animator.segment_context(context, self.latent_size)
        tokens = self.animator.encode_images(images.select([REFERENCE]), 0, self.conditioning)
        return ReferenceContext(tokens, torch.zeros(1, 1, dtype=torch.long, device=images.reference.device))

    def attended(self, step: int, frames: range) -> ReferenceContext:
        """The images of the frames, which are encoded."""
        device = self.images.reference.device
        if self.calibration is None:
            reference = torch.zeros(len(frames), 1, dtype=torch.long, device=device)
            return ReferenceContext(self.tokens, reference, projected=self.projected)
        index = self.index(step)[frames.start : frames.stop]  # (f, persons), -1 where uncalibrated
        rows = [[self.rows[int(image)] for image in row] for row in index]
        calibrated = to_device(torch.tensor(rows, dtype=torch.long).reshape(len(frames), -1), device)
        flags = self.calibration.flags(frames, step, self.levels)
        return ReferenceContext(
            self.tokens,
            attended_images(calibrated, self.calibration.replaces_reference),
            None if flags is None else flags.map(partial(to_device, device=device)),
            self.projected,
        )

    def wanted(self, step: int, windows: Sequence[range], whole_run: bool) -> list[int]:
        """Calibrated images of the run, of the step, or of windows: the widest of these that is not too many."""
        if self.calibration is None or (whole_run and len(self.used) < self.max_images):
            return self.used
        index = self.index(step)
        of_step = np.unique(index[index >= 0]).tolist()
        if len(of_step) < self.max_images:
            return of_step
        index = np.concatenate([index[frames.start : frames.stop] for frames in windows])
        return np.unique(index[index >= 0]).tolist()

    def encode(self, indices: list[int], timestep: int) -> None:
        """Make `tokens` those of these images at this timestep, a few images at a time."""
        if list(self.rows) == indices and self._encoded_at == timestep:
            return
        self.tokens, self.projected = {}, {}  # the old ones make room first
        written: dict[str, list[Tensor]] = {}
        for start in range(0, len(indices), ENCODE_CHUNK):
            chunk = indices[start : start + ENCODE_CHUNK]
            # A compiled network gets the last ones filled up: it would be compiled once more for their number.
            filling = [chunk[-1]] * (ENCODE_CHUNK - len(chunk)) if self.animator.compiled and start else []
            part = self.images.select(chunk + filling)
            for layer, tokens in self.animator.encode_images(part, timestep, self.conditioning).items():
                written.setdefault(layer, []).append(tokens[: len(chunk)])
        if self.null_image:
            for layer, tokens in self.animator.null_image_tokens(self.conditioning).items():
                written[layer].append(tokens)
        self.tokens = {layer: torch.cat(parts) for layer, parts in written.items()}
        self.rows = {image: row for row, image in enumerate(indices)}
        self._encoded_at = timestep


def attended_images(calibrated: Tensor, replaces_reference: bool) -> Tensor:
    """Rows (f, k) of the attended images: the reference and `calibrated` (f, persons), or the latter alone."""
    if replaces_reference and calibrated.shape[1]:
        return calibrated
    return torch.cat([calibrated.new_zeros(len(calibrated), 1), calibrated], dim=1)
