"""Ways of sampling with less work and a somewhat other result, all of them off by default; see `docs/speed.md`.

frames = pipeline(image, poses, calibration, acceleration=AccelerationConfig(broadcast=2, solver="dpm++")).frames
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffusers import SchedulerMixin
from torch import Tensor

from core.errors import UserError
from models.animators.base import Animator
from models.attention.layers import LayerShape
from models.broadcast import CROSS, KINDS, SPATIAL, STABLE_STEPS, AttentionCache, BroadcastSchedule
from models.merging import FACTORS, TokenMerging
from models.pipeline_settings import RunSettings
from models.schedules import SOLVERS, noise_level, with_solver

EVERYWHERE = [0.0, 1.0]


@dataclass
class AccelerationConfig:
    """What a run leaves out. As it stands, nothing: the result is the same, bit for bit.

    guidance_interval: noise levels [low, high]: guidance is applied above low and up to high; elsewhere its
        conditional half runs alone (Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and
        Distribution Quality in Diffusion Models", 2024). Levels are deviations of the noise within the noisy latents,
        0 (none) to 1 (nothing else): the paper's s as s / sqrt(1 + s^2).
    broadcast: n: attention is computed at every n-th step and its outputs are re-used in between; 1: at all steps
        (Zhao et al., "Real-Time Video Generation with Pyramid Attention Broadcast", 2024).
    broadcast_kinds: of attention: spatial (self-attention, with the reference or without), cross, temporal.
    broadcast_interval: shares of the steps at which re-use begins and ends.
    merge_reference: side of the blocks of tokens of reference and calibrated images that are averaged to one, 2 or 4;
        1: none (after Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", 2023).
    merge_levels: how many of the finest token grids are merged.
    solver: ddim, dpm++ (DPM-Solver++, second order) or unipc (UniPC, second order); null: the model's own.
    """

    guidance_interval: list[float] = field(default_factory=lambda: list(EVERYWHERE))
    broadcast: int = 1
    broadcast_kinds: list[str] = field(default_factory=lambda: [SPATIAL, CROSS])
    broadcast_interval: list[float] = field(default_factory=lambda: list(STABLE_STEPS))
    merge_reference: int = 1
    merge_levels: int = 1
    solver: str | None = None

    def check(self) -> None:
        """Refuse values that mean nothing, naming them.

        Raises:
            UserError: such a value.
        """
        for name in ("guidance_interval", "broadcast_interval"):
            interval = getattr(self, name)
            if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
                raise UserError(f"acceleration.{name}={interval} must be two numbers, 0 <= first < second <= 1")
        for name in ("broadcast", "merge_levels"):
            if getattr(self, name) < 1:
                raise UserError(f"acceleration.{name}={getattr(self, name)} must be at least 1")
        if not self.broadcast_kinds or not set(self.broadcast_kinds) <= set(KINDS):
            raise UserError(f"acceleration.broadcast_kinds={self.broadcast_kinds} must be some of {', '.join(KINDS)}")
        if self.merge_reference not in (1, *FACTORS):
            raise UserError(f"acceleration.merge_reference={self.merge_reference} must be 1 (none), 2 or 4")
        if self.solver is not None and self.solver not in SOLVERS:
            raise UserError(f"acceleration.solver={self.solver} must be one of {', '.join(SOLVERS)}")

    def check_for(self, animator: Animator, run: RunSettings, latent_size: tuple[int, int]) -> None:
        """Refuse what cannot be done with an animator, or with how its clip is divided.

        Args:
            run: filled.
            latent_size: (h, w).

        Raises:
            UserError: such a setting, naming it.
        """
        self.check()
        name = type(animator).__name__
        if self.broadcast > 1:
            missing = [kind for kind in self.broadcast_kinds if kind not in animator.broadcast_kinds]
            if missing:
                known = ", ".join(animator.broadcast_kinds)
                raise UserError(
                    f"acceleration.broadcast_kinds={self.broadcast_kinds}: {missing[0]} attention of {name} cannot be "
                    f"re-used; {known} can"
                )
            if run.shift_windows and run.num_frames > run.window_size:
                raise UserError(
                    f"acceleration.broadcast={self.broadcast} re-uses the attention of a window, which shift_windows "
                    "moves at every step; give shift_windows=false"
                )
        layers = animator.attention_layers(latent_size)
        if self.merge_reference > 1 and any(shape.keys is not None for shape in layers.values()):
            raise UserError(
                f"acceleration.merge_reference={self.merge_reference}: {name} sees images as a few tokens of an image "
                "encoder, the same in all layers; only tokens of reference attention can be merged"
            )

    def merging(self) -> TokenMerging | None:
        """Of reference tokens; None: they stay as they are."""
        return TokenMerging(self.merge_reference, self.merge_levels) if self.merge_reference > 1 else None

    def layers(self, layers: dict[str, LayerShape]) -> dict[str, LayerShape]:
        """`Animator.attention_layers` with the keys that are left of them."""
        merging = self.merging()
        return layers if merging is None else merging.layers(layers)

    def attention_cache(self, steps: int) -> AttentionCache:
        """An empty cache for one run."""
        schedule = BroadcastSchedule(steps, self.broadcast, tuple(self.broadcast_interval))
        return AttentionCache(schedule, self.broadcast_kinds)

    def reused_steps(self, layers: Mapping[str, LayerShape], steps: int) -> tuple[int, ...]:
        """Steps at which nobody looks at an image, as the attention of earlier steps is used."""
        cache, kind = self.attention_cache(steps), next(iter(layers.values())).kind
        return tuple(step for step in range(steps) if cache.source(step, kind) < step)

    def scheduler(self, own: SchedulerMixin) -> SchedulerMixin:
        """The model's own scheduler, or another solver of the same diffusion."""
        return own if self.solver is None else with_solver(own, self.solver)

    def scales_at(self, scales: tuple[float, ...], scheduler: SchedulerMixin, timestep: Tensor) -> tuple[float, ...]:
        """Scales of guidance at one step: as they are, or all 1 outside the interval."""
        low, high = self.guidance_interval
        if [low, high] == EVERYWHERE or low < noise_level(scheduler, timestep) <= high:
            return scales
        return (1.0,) * len(scales)
