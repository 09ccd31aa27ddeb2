"""Denoising: its steps, and guided predictions of windows, several passes in one batch where that is asked for.

A pass is one window with one branch of guidance. Shapes use b = passes of a batch, f = frames, c = channels, h, w =
latent size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from core.processes import to_device
from models.animators.base import Animator, Condition, PoseCondition
from models.attention.context import joined_contexts
from models.attention.probe import WindowProbe
from models.attention.recording import AttentionRecording
from models.reference_images import ReferenceImages
from models.sampling import window_weights
from models.segments import Segment
from models.vae import finite_advice


@dataclass(frozen=True)
class WindowPredictions:
    """Predictions for the windows of a run."""

    animator: Animator
    references: ReferenceImages
    pose_condition: PoseCondition
    attention: AttentionRecording | None = None
    passes_at_a_time: int = 1  # at most
    segment: Segment | None = None  # that the latents are of, of models of segments

    def __call__(
        self,
        sample: Tensor,
        step: int,
        timestep: Tensor,
        at: int,
        windows: Sequence[range],
        scales: tuple[float, ...],
    ) -> Iterator[tuple[int, Tensor]]:
        """Index of each window, and its guided prediction (1, c, f, h, w).

        `sample`: noisy latents of the clip, (1, c, frames, h, w). `timestep` is of its device, `at` the same number.
        """
        for group in grouped(windows, self.passes_at_a_time):
            frames = [windows[i] for i in group]
            if self.animator.segment_frames is None:
                contexts = self.references.contexts(step, at, frames)
            else:
                contexts = [self.references.segment_context(self.segment)]
            if self.attention is not None:
                probes = [self._probe(step, at, windows, i) for i in group]
                contexts = [replace(c, probe=probe) for c, probe in zip(contexts, probes, strict=True)]
            poses = [self.pose_condition(window, sample, timestep) for window in frames]
            conditions = [Condition(self.references.conditioning, *each) for each in zip(poses, contexts, strict=True)]
            parts = [sample[:, :, window.start : window.stop] for window in frames]
            found = guided_predictions(self.animator, parts, timestep, conditions, scales, self.passes_at_a_time)
            yield from zip(group, found, strict=True)

    def _probe(self, step: int, at: int, windows: Sequence[range], i: int) -> WindowProbe | None:
        if self.animator.segment_frames is None:
            return self.attention.probe(step, at, windows, i)
        return self.attention.row_probe(
            step, at, self.segment.new, self.segment.latents(self.animator.frames_per_latent)
        )


@dataclass(frozen=True)
class Denoising:
    """The steps of a run, or of one of its segments."""

    scheduler: Any  # with its timesteps set
    timesteps: Tensor  # the same, on the CPU
    scales: Sequence[tuple[float, ...]]  # of guidance, for each of them
    windows: Callable[[int], list[range]]  # of latents, that a step denoises
    # (step, timestep, latents) after each step -> latents
    after: Callable[[int, int, Tensor], Tensor]

    def __call__(self, latents: Tensor, predictions: WindowPredictions) -> Tensor:
        """Latents (1, c, f, h, w) without noise, of those of the first timestep; UserError where not finite."""
        scheduler, device, dtype = self.scheduler, latents.device, predictions.animator.dtype
        broken = torch.full((), -1, device=device)  # the first step whose result is not finite; read at the end
        for step, (timestep, at) in enumerate(zip(scheduler.timesteps, self.timesteps, strict=True)):
            scaled = hasattr(scheduler, "scale_model_input")
            sample = (scheduler.scale_model_input(latents, at) if scaled else latents).to(dtype)
            windows = self.windows(step)
            prediction = torch.zeros_like(latents)
            weights = window_weights(windows, latents.shape[2])
            for i, predicted in predictions(sample, step, timestep, int(at), windows, self.scales[step]):
                frames, weight = slice(windows[i].start, windows[i].stop), to_device(weights[i], device)
                prediction[:, :, frames] += predicted * weight.to(latents)[:, None, None]
            latents = self.after(step, int(at), scheduler.step(prediction, at, latents).prev_sample)
            broken = torch.where((broken < 0) & ~latents.isfinite().all(), step, broken)
        if (step := int(broken)) >= 0:
            steps = len(self.timesteps)
            raise UserError(f"the latents are not finite from step {step + 1} of {steps} on; {finite_advice(dtype)}")
        return latents


def grouped(windows: Sequence[range], size: int) -> list[list[int]]:
    """Indices of windows, at most `size` of equal length together."""
    lengths: dict[int, list[int]] = {}
    for i, window in enumerate(windows):
        lengths.setdefault(len(window), []).append(i)
    return [same[start : start + size] for same in lengths.values() for start in range(0, len(same), size)]


def guided_predictions(
    animator: Animator,
    samples: Sequence[Tensor],
    timestep: Tensor,
    conditions: Sequence[Condition],
    scales: tuple[float, ...],
    passes_at_a_time: int = 1,
) -> list[Tensor]:
    """Guided predictions of windows of equal length, (1, c, f, h, w) each as their noisy latents `samples`."""
    branches = animator.branches(scales)
    # One branch after the other: a batch with images in some of its passes computes attention to images in all.
    passes = [(branch, window) for branch in branches for window in range(len(samples))]
    found: dict[tuple[int, int], Tensor] = {}
    for start in range(0, len(passes), passes_at_a_time):
        some = passes[start : start + passes_at_a_time]
        sample = torch.cat([samples[window] for _, window in some]) if len(some) > 1 else samples[some[0][1]]
        # Attention is recorded where no condition is missing.
        condition = joined(
            [conditions[window].without_probe() if branch else conditions[window] for branch, window in some]
        )
        predicted = animator.predict(sample, timestep, condition, tuple(branch for branch, _ in some))
        found |= zip(some, predicted.split(1), strict=True)
    windows = range(len(samples))
    return [animator.combined([found[branch, window] for branch in branches], scales) for window in windows]


def joined(conditions: Sequence[Condition]) -> Condition:
    """The conditions of a batch of passes."""
    if len(conditions) == 1:
        return conditions[0]
    poses, context = [c.pose for c in conditions], joined_contexts([c.context for c in conditions])
    if isinstance(poses[0], Tensor):
        return Condition(conditions[0].conditioning, torch.cat(poses), context)
    return Condition(conditions[0].conditioning, [torch.cat(parts) for parts in zip(*poses, strict=True)], context)
