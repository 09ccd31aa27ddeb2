"""The animators, and their saved pipelines: a folder with a sub-folder for each component, as diffusers writes it."""

import json
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_args, get_type_hints

import diffusers
import torch
from diffusers import SchedulerMixin

from core.errors import UserError
from core.files import write_json
from models.animators.base import Animator
from models.checkpoints.loading import load_folder
from models.config import ANIMATORS
from models.lora import FOLDER as LORA_FOLDER
from models.lora import load_lora
from models.pipeline import AnimationPipeline

TRAINING_FILE = "training.json"  # in a pipeline folder, facts of its training that its weights do not tell
# Values in folders of earlier releases that have another name today: key of model_index.json -> old -> new.
OLD_VALUES = {"null_tokens": {"empty_picture": "empty_image"}}


def pipeline_class(name: str) -> type[AnimationPipeline]:
    """The pipeline class of a line of `ANIMATORS`."""
    module, _, cls = ANIMATORS[name].partition(":")
    return getattr(import_module(module), cls)


def animator_class(name: str) -> type[Animator]:
    return pipeline_class(name).animator_cls


def pipeline_of(animator: type[Animator]) -> type[AnimationPipeline]:
    """The pipeline class of an animator's class."""
    return next(cls for cls in map(pipeline_class, ANIMATORS) if cls.animator_cls is animator)


def pipeline_names() -> dict[str, str]:
    """Names of the pipelines' classes, which their folders hold -> names of the animators."""
    return {line.partition(":")[2]: name for name, line in ANIMATORS.items()}


def saved_class(index: dict[str, Any]) -> type[AnimationPipeline] | None:
    """The pipeline class of a folder's index; None: it is of another project."""
    name = pipeline_names().get(index.get("_class_name"))
    return None if name is None else pipeline_class(name)


def load_pipeline(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
) -> AnimationPipeline:
    """A pipeline from a local folder; nothing is downloaded, and a `UserError` says what is missing or does not fit.

    Adapters in the folder `lora`, and in the pipeline folder's own, are added to the weights, times `lora_scale`.
    """
    folder = Path(folder)
    index = read_index(folder)
    cls = saved_class(index)
    if cls is None:
        known = ", ".join(pipeline_names())
        raise UserError(f"model={folder} is a {index.get('_class_name')}; the pipelines known here are {known}")
    arguments = {}
    for name, parameter in list(signature(cls.__init__).parameters.items())[1:]:
        if parameter.default is Parameter.empty:
            arguments[name] = load_component(folder, name, index.get(name), component_classes(cls, name), dtype)
        elif name in index:
            arguments[name] = index[name]
    pipeline = cls(**arguments)
    for adapters in (folder / LORA_FOLDER if (folder / LORA_FOLDER).is_dir() else None, lora):
        if adapters is not None:
            load_lora(pipeline, adapters, lora_scale)
    return pipeline


def read_index(folder: Path) -> dict[str, Any]:
    """The contents of `model_index.json`, in the words of today."""
    if not folder.is_dir():
        raise UserError(f"model={folder} does not exist; give a pipeline folder (train.py writes output/pipeline)")
    path = folder / "model_index.json"
    if not path.is_file():
        raise UserError(f"model={folder} is not a pipeline folder: it has no model_index.json")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"model={folder}: model_index.json is not valid JSON") from None
    if not isinstance(index, dict):
        raise UserError(f"model={folder}: model_index.json is not a pipeline's index")
    for key, values in OLD_VALUES.items():
        if key in index:
            index[key] = values.get(str(index[key]), index[key])
    return index


def write_training_facts(folder: Path, attention_supervised: bool | None) -> None:
    """Record in a pipeline folder how it was trained; None: unknown, as of the weights that training began with."""
    write_json(folder / TRAINING_FILE, {"attention_supervised": attention_supervised})


def supervised_attention(folder: str | Path) -> bool | None:
    """True where training showed a pipeline's attention where to look; None when its folder does not say."""
    path = Path(folder) / TRAINING_FILE
    return json.loads(path.read_text(encoding="utf-8")).get("attention_supervised") if path.is_file() else None


def supervision_words(supervised: bool | None) -> str:
    return {True: "yes", False: "no", None: "not recorded"}[supervised]


def network_folders(folder: str | Path) -> dict[str, Path]:
    """Component -> folder of the networks of a pipeline folder, by name."""
    folders = {name: Path(folder) / name for name in sorted(read_index(Path(folder)))}
    return {name: path for name, path in folders.items() if (path / "config.json").is_file()}


def component_classes(pipeline: type[AnimationPipeline], name: str) -> dict[str, type]:
    """Classes that a component may have, by name."""
    annotation = get_type_hints(pipeline.__init__)[name]
    return {cls.__name__: cls for cls in get_args(annotation) or (annotation,)}


def load_component(folder: Path, name: str, entry: Any, classes: dict[str, type], dtype: torch.dtype) -> Any:
    """One network or the scheduler; `entry` is its [library, class] in the index."""
    if not isinstance(entry, list) or len(entry) != 2 or not list((folder / name).glob("*.json")):
        raise UserError(f"model={folder}: component {name} is missing or incomplete")
    if name == "scheduler":
        cls = getattr(diffusers, str(entry[1]), None)
        if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
            raise UserError(f"model={folder}: component {name} is a {entry[1]}, which diffusers does not have")
        try:
            return cls.from_pretrained(folder / name)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"model={folder}: component {name} cannot be loaded: {error}") from None
    if entry[1] not in classes:
        raise UserError(f"model={folder}: component {name} is a {entry[1]}, not one of {', '.join(classes)}")
    return load_folder(classes[entry[1]], folder / name, f"model={folder}: component {name}", dtype)
