"""The animators, and their saved pipelines: a folder with a sub-folder for each component, as diffusers writes it."""

import json
from collections.abc import Collection
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import nn

from core.errors import UserError
from core.files import no_such_path, write_json
from models.animators.base import Animator
from models.checkpoints.files import read_config
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
    argument: str = "model",
    embeddings: Collection[str] = (),
) -> AnimationPipeline:
    """A pipeline from a local folder; nothing is downloaded, and a `UserError` says what is missing or does not fit.

    Components that a run may do without are None where the folder has none, and where `embeddings` of these names
    will stand in for them. Adapters in the folder `lora`, and in the pipeline folder's own, are added to the weights,
    times `lora_scale`. Errors name the folder as `argument`.
    """
    folder = Path(folder)
    index = read_index(folder, argument)
    cls = saved_class(index)
    if cls is None and "transformer" in index:  # nothing that could be converted
        raise UserError(
            f"{argument}={folder} is a {index.get('_class_name')}; the pipelines known here are "
            f"{', '.join(pipeline_names())}"
        )
    if cls is None:
        raise not_a_pipeline(folder, argument, f"a {index.get('_class_name')}")
    what = f"{argument}={folder}"
    left_out = left_out_components(cls, folder, embeddings, what)
    arguments = {}
    for name, parameter in list(signature(cls.__init__).parameters.items())[1:]:
        if name in left_out:
            arguments[name] = None
        elif parameter.default is Parameter.empty:
            arguments[name] = load_component(folder, name, index.get(name), component_classes(cls, name), dtype, what)
        elif name in index:
            arguments[name] = index[name]
    pipeline = cls(**arguments)
    for adapters in (folder / LORA_FOLDER if (folder / LORA_FOLDER).is_dir() else None, lora):
        if adapters is not None:
            pipeline.notes += load_lora(pipeline, adapters, lora_scale, folder)
    return pipeline


def left_out_components(
    cls: type[AnimationPipeline], folder: Path, embeddings: Collection[str], what: str
) -> list[str]:
    """Components that a pipeline of a folder goes without, see `load_pipeline`; UserError where others are missing."""
    components = [name for name, p in signature(cls.__init__).parameters.items() if p.default is Parameter.empty][1:]
    absent = [name for name in components if not list((folder / name).glob("*.json"))]
    unneeded = {name for embedding in embeddings for name in cls.animator_cls.encoders.get(embedding, ())}
    left_out = [name for name in components if name in {*absent, *unneeded} and may_be_absent(cls, name)]
    if lacking := [name for name in absent if name not in left_out]:
        raise UserError(
            f"{what} is incomplete: of the folders that its model_index.json names, "
            f"{', '.join(f'{name}/' for name in lacking)} are missing or have no configuration"
        )
    return left_out


def read_index(folder: Path, argument: str = "model") -> dict[str, Any]:
    """The contents of `model_index.json`, in the words of today."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise not_a_pipeline(folder, argument)
    index = read_config(path, f"{argument}={folder}")
    sampling = index.get("sampling") or {}
    numbers = isinstance(sampling, dict) and {key: np.ravel(value).tolist() for key, value in sampling.items()}
    if numbers is False or any(
        len(found) != (2 if key == "size" else 1) or not all(type(n) in (int, float) and n > 0 for n in found)
        for key, found in numbers.items()
    ):
        raise UserError(
            f"{argument}={folder}: sampling in model_index.json is {sampling}; it must hold numbers above 0: steps, "
            "guidance_scale, start, and two of size"
        )
    for key, values in OLD_VALUES.items():
        if key in index:
            index[key] = values.get(str(index[key]), index[key])
    return index


def not_a_pipeline(path: Path, argument: str, found: str = "") -> UserError:
    """What a path that should be a pipeline folder is, and what to do with it."""
    if not path.exists():
        return no_such_path(path, argument, "; give a pipeline folder (train.py writes output/pipeline)")
    what = f"{argument}={path} is {found or ('a file' if path.is_file() else 'a folder without model_index.json')}"
    if not found:
        for near in (path / "pipeline", path.parent):
            if (near / "model_index.json").is_file():
                return UserError(f"{what}, no pipeline folder; give {argument}={near}")
    if (path / "progress.json").is_file():
        export = f"python -m training.export checkpoint={path} output=FOLDER"
        return UserError(f"{what}, a checkpoint of training and no pipeline folder; make one of it: {export}")
    # It knows the published files, and needs the pipelines of this module.
    weights = import_module("..checkpoints.inspect", __package__).published_weights(path)
    known = f"the pipelines known here are {', '.join(pipeline_names())}"
    if weights is None:
        return UserError(f"{what}, no pipeline folder; {known}" if found else f"{what}, no pipeline folder")
    kind, model = weights
    holds = f"{what}, published weights{'' if kind == 'weights' else f' ({kind})'} and no pipeline folder"
    if model is not None and model.repository:
        return UserError(f"{holds}; {model.repository} is one as it comes: give the folder of all of it")
    folder = path if path.is_dir() else path.parent
    command = f"python -m models.checkpoints convert family={model.name if model else 'NAME'} weights={folder}"
    return UserError(f"{holds}; make one of them: {command} output=FOLDER")


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
    return {cls.__name__: cls for cls in get_args(annotation) or (annotation,) if cls is not NoneType}


def may_be_absent(pipeline: type[AnimationPipeline], name: str) -> bool:
    """True for a component that a run may do without."""
    return NoneType in get_args(get_type_hints(pipeline.__init__)[name])


def load_component(
    folder: Path, name: str, entry: Any, classes: dict[str, type], dtype: torch.dtype, what: str = ""
) -> Any:
    """One component; `entry` is its [library, class] in the index, `what` the folder in errors."""
    what = what or f"model={folder}"
    if not isinstance(entry, list) or len(entry) != 2 or not list((folder / name).glob("*.json")):
        raise UserError(f"{what}: component {name} is missing or incomplete")
    if name == "scheduler":
        cls = getattr(diffusers, str(entry[1]), None)
        if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
            raise UserError(f"{what}: component {name} is a {entry[1]}, which diffusers does not have")
        try:
            return cls.from_pretrained(folder / name)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{what}: component {name} cannot be loaded: {error}") from None
    if not any(issubclass(cls, nn.Module) for cls in classes.values()):  # it prepares a network's inputs
        try:
            return next(iter(classes.values())).from_pretrained(folder / name, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
            raise UserError(f"{what}: component {name} cannot be loaded: {error}") from None
    if entry[1] not in classes:
        raise UserError(f"{what}: component {name} is a {entry[1]}, not one of {', '.join(classes)}")
    return load_folder(classes[entry[1]], folder / name, f"{what}: component {name}", dtype)
