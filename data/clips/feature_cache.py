"""Features of the frames of clips by frozen networks, kept on disk: VAE latents and image embeddings.

One safetensors file a clip, `name.safetensors`, with a row for every frame of the clip:

    latents      mean (frames, c, h, w) and, where the VAE has a posterior, deviation (frames, c, h, w); scaled
    embeddings   embedding (frames, channels)

Its metadata say what it was computed from; a file counts only while all of that is unchanged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from core.errors import UserError
from core.files import complete_file
from data.preparation.manifest import Clip

KINDS = ("latents", "embeddings")


@dataclass(frozen=True)
class FeatureInputs:
    """Inputs of the features of a clip, as text; messages name the field that has changed."""

    network: str  # digest of the network's weights and settings
    video: str  # digest of the video's content
    size: str  # width x height of the model's frame
    crop: str  # how the video is cut to it

    @classmethod
    def of(cls, network: str, clip: Clip, size: tuple[int, int], matrix: np.ndarray, crop: str) -> "FeatureInputs":
        """Inputs of a prepared clip's features; `matrix` (3, 3) maps the clip's pixels to the model's frame."""
        numbers = " ".join(f"{value:.6f}" for value in (matrix[0, 0], *matrix[:2, 2]))
        # The mode of cropping decides what lies beyond the image's edge.
        border = "black" if crop == "pad" else "none"
        return cls(network, clip.fingerprint.sha256, f"{size[0]}x{size[1]}", f"{numbers} border {border}")


class FeatureCache:
    """A folder of features of one kind, "latents" or "embeddings"; it need not exist."""

    def __init__(self, folder: str | Path, kind: str):
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        self.folder, self.kind = Path(folder), kind

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def problem(self, name: str, inputs: FeatureInputs, frames: int) -> str | None:
        """Reason why the features of a clip cannot be used, such as "other size"; None when they can."""
        try:
            with safe_open(self.path(name), "pt") as file:
                stored = file.metadata() or {}
        except FileNotFoundError:
            return "missing"
        except (SafetensorError, OSError):
            return "damaged"
        if stored.get("kind") != self.kind:
            return f"no {self.kind}"
        changed = [key for key, value in asdict(inputs).items() if stored.get(key) != value]
        if not changed and stored.get("frames") != str(frames):
            changed = ["number of frames"]
        return f"other {changed[0]}" if changed else None

    def write(self, name: str, features: dict[str, Tensor], inputs: FeatureInputs) -> None:
        """Write the features of a clip, tensors with a row for each frame; the file appears when it is complete."""
        frames = {len(value) for value in features.values()}
        if len(frames) != 1:
            raise ValueError(f"features must have a row for each frame, got {sorted(frames)} rows")
        metadata = {"kind": self.kind, "frames": str(frames.pop()), **asdict(inputs)}
        with complete_file(self.path(name)) as temporary:
            # Written by ourselves: the library's own writing leaves a file that others may not read.
            temporary.write_bytes(save({key: value.contiguous().cpu() for key, value in features.items()}, metadata))

    def read(self, name: str, frames: Sequence[int]) -> dict[str, Tensor]:
        """Features of some frames of a clip, in this order; `UserError` when the file is missing or damaged."""
        try:
            with safe_open(self.path(name), "pt") as file:
                found = {}
                for key in file.keys():  # noqa: SIM118 - the file is no dictionary
                    rows = file.get_slice(key)  # the others are not read
                    found[key] = torch.cat([rows[frame : frame + 1] for frame in frames])
                return found
        except (FileNotFoundError, SafetensorError, OSError) as error:
            raise UserError(f"{self.path(name)} cannot be read as {self.kind}: {error}") from None

    def require(self, clips: Iterator[tuple[str, FeatureInputs, int]], argument: str) -> None:
        """Refuse a cache that some of the clips (name, inputs and number of frames of each) cannot use.

        The message counts the reasons and says how to make the features again.
        """
        reasons: dict[str, list[str]] = {}
        clips = list(clips)
        for name, inputs, frames in clips:
            problem = self.problem(name, inputs, frames)
            if problem is not None:
                reasons.setdefault(problem, []).append(name)
        if reasons:
            told = "; ".join(f"{reason}: {len(names)} ({names[0]})" for reason, names in reasons.items())
            raise UserError(
                f"{argument}={self.folder} does not serve {sum(map(len, reasons.values()))} of {len(clips)} clips "
                f"as they are now: {told}; run `python prepare.py {self.kind}` again with this model, "
                f"dataset, size and crop"
            )
