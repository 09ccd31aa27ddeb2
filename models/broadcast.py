"""Attention broadcast (Zhao et al., "Real-Time Video Generation with Pyramid Attention Broadcast", 2024): what an
attention layer gave at one denoising step is used again at the next ones.

Nothing is kept on a layer. The outputs are in a cache that belongs to one run and travels to the layers inside
`models.attention.processors.ReferenceContext`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

# Attention within a frame, whether or not it sees the reference, to context or image tokens, and between frames.
SPATIAL, CROSS, TEMPORAL = KINDS = ("spatial", "cross", "temporal")
# Shares of the steps that make up the middle 70 %, where attention changes least (Zhao et al., Sec. 3.1).
STABLE_STEPS = (0.15, 0.85)


@dataclass(frozen=True)
class BroadcastSchedule:
    """At which steps of a run attention is computed.

    Attributes:
        steps: of the run.
        every: n: within the interval attention is computed at every n-th step; 1: at all steps.
        interval: shares of the steps at which it begins and ends.
    """

    steps: int
    every: int
    interval: tuple[float, float] = STABLE_STEPS

    def source(self, step: int) -> int:
        """The step whose attention is used at `step`: itself, or one before."""
        # Shares such as 0.15 of 20 steps are whole numbers but for rounding.
        first, stop = (math.ceil(share * self.steps - 1e-9) for share in self.interval)
        return step - (step - first) % self.every if first <= step < stop else step

    def is_used_again(self, step: int) -> bool:
        """Whether later steps use the attention of the same step as this one does."""
        return step + 1 < self.steps and self.source(step + 1) == self.source(step)


class AttentionCache:
    """Attention outputs of one run, one for each layer, window and branch of guidance.

    Args:
        kinds: of `KINDS`, whose outputs are used again.

    Attributes:
        bytes: held now; peak_bytes: held at most so far.
    """

    def __init__(self, schedule: BroadcastSchedule, kinds: Sequence[str]):
        self.schedule = schedule
        self.kinds = frozenset(kinds)
        self.bytes = self.peak_bytes = 0
        self._outputs: dict[tuple[int, str, nn.Module], tuple[int, Tensor]] = {}

    def source(self, step: int, kind: str) -> int:
        """The step whose attention of a kind is used at `step`."""
        return self.schedule.source(step) if kind in self.kinds else step

    def window(self, step: int, number: int) -> "WindowCache | None":
        """What the layers get for one window at one step; None where nothing is used again."""
        source = self.schedule.source(step)
        if source == step and not self.schedule.is_used_again(step):
            self._outputs.clear()
            self.bytes = 0
            return None
        return WindowCache(self, source, number)

    def output(self, source: int, place: tuple[int, str, nn.Module], compute: Callable[[], Tensor]) -> Tensor:
        """What is kept at a place for the steps that use the attention of `source`, otherwise what is computed now.

        A branch of guidance that was not run at `source` computes its own at the first of these steps that runs it.
        """
        if place in self._outputs and self._outputs[place][0] != source:
            self.bytes -= self._outputs.pop(place)[1].nbytes  # an old one makes room first
        if place not in self._outputs:
            output = compute()
            self._outputs[place] = source, output
            self.bytes += output.nbytes
            self.peak_bytes = max(self.peak_bytes, self.bytes)
        return self._outputs[place][1]


@dataclass(frozen=True)
class WindowCache:
    """The part of a cache that one pass over one window uses.

    Attributes:
        source: the step whose attention is used.
        window: its number; branch: of guidance.
    """

    cache: AttentionCache
    source: int
    window: int
    branch: str = "conditional"

    def apart(self, branch: str) -> "WindowCache":
        """For another branch of guidance."""
        return replace(self, branch=branch)

    def output(self, kind: str, layer: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
        """Attention of one layer: kept, or computed and kept; just computed where its kind is not used again."""
        if kind not in self.cache.kinds:
            return compute()
        return self.cache.output(self.source, (self.window, self.branch, layer), compute)
