"""The accelerations that are measured, one change at a time against a run without any."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from core.errors import UserError
from models.acceleration import AccelerationConfig
from models.schedules import SOLVERS

FAMILIES = ("guidance", "broadcast", "merging", *SOLVERS)
# The interval (0.28, 2.90] that Kynkäänniemi et al. found for EDM2-S, as shares of noise, and each of its ends alone.
INTERVALS = ((0.27, 0.95), (0.0, 0.95), (0.27, 1.0))
EVERY = {2: "2nd", 3: "3rd", 4: "4th"}
BLOCKS = ((2, 1), (2, 2), (4, 1))  # side of the blocks, levels
NONE = "none"


@dataclass(frozen=True)
class Setting:
    """One way of sampling.

    Attributes:
        label: in tables.
        name: fit for a file name, different for all settings.
        family: one of `FAMILIES`; "none" for the run that the others are compared with.
        steps: of denoising.
    """

    label: str
    name: str
    family: str
    steps: int
    acceleration: AccelerationConfig = field(default_factory=AccelerationConfig, compare=False)


def settings_of(steps: int, few_steps: Sequence[int], families: Sequence[str]) -> list[Setting]:
    """The run without acceleration, then those of the chosen families.

    Args:
        steps: of all but the runs with few steps; few_steps: of those, with each solver.

    Raises:
        UserError: a family that is not known, or no fewer steps.
    """
    unknown = [family for family in families if family not in FAMILIES]
    if unknown:
        raise UserError(f"families={list(families)} must be some of {', '.join(FAMILIES)}")
    if any(not 1 <= few < steps for few in few_steps) or len(set(few_steps)) < len(few_steps):
        raise UserError(f"few_steps={list(few_steps)} must be different numbers from 1 to {steps - 1}")
    found = [Setting(f"as it is, {steps} steps", f"plain-steps{steps}", NONE, steps)]

    def add(label: str, name: str, family: str, steps: int, **settings: object) -> None:
        found.append(Setting(label, f"{name}-steps{steps}", family, steps, AccelerationConfig(**settings)))

    for low, high in INTERVALS:
        label = f"guidance where noise is {low:g} to {high:g}"
        add(label, f"guidance-{low:g}-{high:g}", "guidance", steps, guidance_interval=[low, high])
    for every, ordinal in EVERY.items():
        add(f"attention at every {ordinal} step", f"broadcast-{every}", "broadcast", steps, broadcast=every)
    for side, levels in BLOCKS:
        label = f"reference tokens merged {side} x {side}, {levels} level{'s' if levels > 1 else ''}"
        merging = {"merge_reference": side, "merge_levels": levels}
        add(label, f"merge-{side}-levels{levels}", "merging", steps, **merging)
    for count in (steps, *sorted(few_steps, reverse=True)):
        for solver in SOLVERS:
            if (solver, count) != ("ddim", steps):  # the models' own
                add(f"{solver}, {count} steps", f"solver-{solver.replace('+', 'p')}", solver, count, solver=solver)
    return [setting for setting in found if setting.family in (NONE, *families)]
