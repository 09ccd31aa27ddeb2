"""From published files to a pipeline folder that `infer.py model=` and `train.py model.init=` take.

A published model is said once: in `checkpoint.py` of its animator's folder, as one of `FAMILIES`. Where its files are
to become a pipeline it is a `Family`, which says how; where they come as a pipeline folder it is no more than a
`PublishedModel`, whose files `inspect` and `verify` know.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from core.config import check_config
from core.errors import UserError
from core.files import check_room, complete_folder, no_such_path
from models.animators.registry import animator_class, read_index, saved_class
from models.checkpoints.files import other_kind, read_tensors
from models.checkpoints.loading import Mismatch, Shapes, load_folder
from models.config import ANIMATORS, ConvertConfig
from models.pipeline import AnimationPipeline

# Names in Stability's own single-file format begin with this.
SINGLE_FILE = "model.diffusion_model."
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Schedule of Stable Diffusion 1 itself. The last step goes to the cleanest level that was trained.
IMAGE_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "leading",
    "set_alpha_to_one": False,
}


@dataclass(frozen=True)
class Recognised:
    """Sort of a file, its sizes in words, and its difference from a complete one; None: not compared."""

    kind: str
    detail: str = ""
    mismatch: Mismatch | None = None


@dataclass(frozen=True)
class PublishedModel:
    """A published model: its files, and known answers."""

    name: str
    _: KW_ONLY
    repository: str = ""  # of Hugging Face that is a pipeline folder as it comes
    recognisers: tuple[Callable[[Shapes], Recognised | None], ...] = ()  # of its files, for `inspect`
    fixture: frozenset[str] = frozenset()  # files that a `verify.Fixture` describes
    outputs: Callable[[Any], Iterator[tuple[str, Tensor]]] | None = None  # (name, result) from such a fixture


@dataclass(frozen=True)
class Family(PublishedModel):
    """A published model that `convert` makes a pipeline folder of."""

    config: type[ConvertConfig]  # keys of `convert`, and where the publishers' instructions put the files
    make: Callable[["Sources"], AnimationPipeline]
    schedule: Mapping[str, Any]  # settings of DDIM that its inference uses
    window: int | None = None  # frames that it was trained on at a time; None: as many as it knows
    sampling: Mapping[str, Any] = field(default_factory=dict)  # that its inference has, see `AnimationPipeline`
    folder: str = ""  # in `weights=`, where its files may lie in place of `weights=` itself

    def places(self, key: str) -> tuple[str, ...]:
        """Where in `weights=` the file of a key may lie, as patterns."""
        return next(entry.metadata.get("places", ()) for entry in fields(self.config) if entry.name == key)

    def found(self, weights: Path, key: str) -> Path | None:
        """The file of a key in `weights=`; of several epochs the last."""
        folders = (weights / self.folder, weights) if self.folder else (weights,)
        for found in (list(folder.glob(place)) for folder in folders for place in self.places(key)):
            if found:
                return max(found, key=lambda path: int((re.findall(r"\d+", path.stem) or ["0"])[-1]))
        return None

    def found_in(self, weights: Path) -> int:
        """Count of the files that a folder has, its own folder counting too."""
        own = bool(self.folder) and (weights / self.folder).is_dir()
        return own + sum(self.found(weights, entry.name) is not None for entry in fields(self.config))

    def scheduler(self) -> DDIMScheduler:
        settings = {"beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1, "clip_sample": False}
        return DDIMScheduler(num_train_timesteps=1000, **settings, **self.schedule)


def published_models() -> dict[str, PublishedModel]:
    """Every published model by its name, in the order of the animators."""
    found = {}
    for name in ANIMATORS:
        folder = animator_class(name).__module__.rpartition(".")[0]
        if folder and find_spec(f"{folder}.checkpoint"):
            found |= {model.name: model for model in import_module(f"{folder}.checkpoint").FAMILIES}
    return found


def families() -> dict[str, Family]:
    """Those of the published models that `convert` takes."""
    return {name: model for name, model in published_models().items() if isinstance(model, Family)}


def published_family(name: str) -> Family:
    """The family of this name; a `UserError` when there is none."""
    known = families()
    if name not in known:
        raise UserError(f"family={name} is not one of {', '.join(known)}")
    return known[name]


def published_scheduler(family: str) -> DDIMScheduler:
    """DDIM with the betas, prediction type and spacing of a family."""
    known = families()
    if family not in known:
        raise ValueError(f"family must be one of {', '.join(known)}, got {family!r}")
    return known[family].scheduler()


def convert_config(family: str, output: str, **keys: Any) -> ConvertConfig:
    """The configuration of `convert family=... output=...` with these keys."""
    return published_family(family).config(family, output, **keys)


class Sources:
    """The files that a conversion names."""

    def __init__(self, config: ConvertConfig):
        self.config, self.family = config, published_family(config.family)
        self.dtype = DTYPES[config.dtype]
        self.notes: list[str] = []  # sentences for the user about the result
        weights = config.weights and Path(config.weights)
        if weights and not weights.exists():
            raise no_such_path(weights, "weights")
        if weights and not weights.is_dir():
            raise UserError(f"weights={weights} is a file; give its folder, or the file by its own key")

    def path(self, name: str, required: bool = True) -> Path | None:
        """The file or folder given as `name=`, or found in `weights=`; of several epochs the last."""
        if (given := getattr(self.config, name)) is not None:
            return Path(given)
        if self.config.weights is not None:
            if found := self.family.found(Path(self.config.weights), name):
                return found
        if required:
            self.require(name)
        return None

    def require(self, *names: str) -> None:
        """Refuse files that were not given, are not there or cannot be read, all before the first is converted."""
        lacking = [name for name in names if self.path(name, required=False) is None]
        for name in names:
            if name not in lacking:
                self.tensors(name)
        if lacking:
            where = f" and not in weights={self.config.weights}" if self.config.weights else ""
            also = f"; so are {', '.join(f'{name}=' for name in lacking[1:])}" if lacking[1:] else ""
            places = ", ".join(" or ".join(self.family.places(name)) for name in lacking)
            raise UserError(f"{lacking[0]}= is required for family={self.config.family}{where}{also} ({places})")

    def tensors(self, name: str) -> tuple[dict[str, Tensor], str]:
        """Tensors of a file, and the file's name for errors."""
        path = self.path(name)
        tensors = read_tensors(path, name)
        if any(key.startswith(SINGLE_FILE) for key in tensors):
            raise UserError(f"{name}={path} is single-file Stable Diffusion; convert it to a diffusers folder first")
        if kind := other_kind(tensors):
            raise UserError(f"{name}={path} is {kind}")
        return tensors, f"{name}={path}"

    def load(self, name: str, load: Callable[..., nn.Module], **arguments: Any) -> nn.Module:
        tensors, what = self.tensors(name)
        try:
            return load(tensors, what, dtype=self.dtype, **arguments)
        except ValueError as error:
            raise UserError(f"{what} is of no network: {error}") from None

    def load_folder(self, name: str, cls: type[nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
        path = self.path(name)
        return load_folder(cls, path, f"{name}={path}", dtype or self.dtype)


def check_replaceable(output: Path) -> None:
    """Refuse an output that is something else than an earlier result."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        try:
            ours = saved_class(read_index(output)) is not None
        except UserError:
            ours = False
        if not ours:
            raise UserError(f"output={output} exists and is no pipeline folder of this project; give a new folder")


def convert(config: ConvertConfig) -> list[str]:
    """Load everything strictly, then write the folder, which appears when it is complete; returns `Sources.notes`.

    A `UserError` also stops it where the output folder holds something else than an earlier result.
    """
    family = published_family(config.family)
    check_config(config)
    output = Path(config.output)
    sources = Sources(config)
    try:
        check_replaceable(output)
        with complete_folder(output) as folder:  # first, as where it cannot be made there is nothing to wait for
            pipeline = family.make(sources)
            networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
            check_room(folder, sum(t.nbytes for network in networks for t in network.state_dict().values()))
            pipeline.save_pretrained(folder)
    except OSError as error:
        if error.filename != str(output):
            raise
        raise UserError(f"output={output} could not be written: {error.strerror}") from None
    return sources.notes
