"""Known answers: does this project compute what the published code computes, from the published tensor names?

A fixture is a pair of files: `NAME.json` describes networks, inputs and outputs, and `NAME.safetensors` holds the
numbers. Weights are drawn from tensor names and seeds (`synthetic`), and loaded as a published checkpoint is.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from core.errors import UserError
from models.checkpoints import verify_animate_anyone, verify_disco, verify_dream_pose, verify_magic_animate
from models.checkpoints.fixture import Fixture

# Names of the checkpoint files -> what computes the outputs.
COMPUTE: dict[frozenset[str], Callable[[Fixture], Iterator[tuple[str, Tensor]]]] = {
    verify_animate_anyone.FILES: verify_animate_anyone.outputs,
    verify_magic_animate.FILES: verify_magic_animate.outputs,
    verify_disco.FILES: verify_disco.outputs,
    verify_dream_pose.FILES: verify_dream_pose.outputs,
}


@dataclass(frozen=True)
class Result:
    """Largest absolute difference of one output; NaN when it was not computed or holds NaN."""

    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance


def read_fixture(path: str | Path) -> Fixture:
    """`PATH`, `PATH.json` or `PATH.safetensors` name the same fixture."""
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    description, numbers = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.safetensors")
    for file in (description, numbers):
        if not file.is_file():
            raise UserError(f"fixture={path}: {file} does not exist")
    try:
        entries: dict[str, Any] = json.loads(description.read_text(encoding="utf-8"))
        tensors = load_file(numbers)
        return Fixture(
            config=entries["config"],
            shapes=entries["manifests"],
            seeds=entries["seeds"],
            meanings={name: entry.get("meaning", "") for name, entry in entries["outputs"].items()},
            tolerances={
                name: float(entries.get("tolerances", {}).get(name, entries["tolerance"]))
                for name in entries["outputs"]
            },
            inputs={name: tensors[name] for name in entries["inputs"]},
            expected={name: tensors[name] for name in entries["outputs"]},
        )
    except SafetensorError as error:
        raise UserError(f"fixture={path}: {numbers} is damaged: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"fixture={path}: {description} is not a fixture description: {error!r}") from None


@torch.inference_mode()
def verify(fixture: Fixture) -> list[Result]:
    """One result for each output of the fixture, in its order."""
    compute = COMPUTE.get(frozenset(fixture.shapes))
    if compute is None:
        known = "; ".join(", ".join(sorted(files)) for files in COMPUTE)
        raise UserError(f"fixture of {', '.join(sorted(fixture.shapes))}; known are {known}")
    try:
        computed = dict(compute(fixture))
    except KeyError as error:
        raise UserError(f"the fixture's configuration or inputs lack {error}") from error
    return [
        Result(name, difference(computed.get(name), expected), fixture.tolerances[name])
        for name, expected in fixture.expected.items()
    ]


def difference(computed: Tensor | None, expected: Tensor) -> float:
    """Largest absolute difference; NaN for what was not computed, infinity for another shape."""
    if computed is None:
        return math.nan
    if computed.shape != expected.shape:
        return math.inf
    return (computed.double() - expected.double()).abs().max().item()
