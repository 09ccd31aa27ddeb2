"""Low-rank adapters (Hu et al., ICLR 2022) of an animator's networks, through PEFT.

A folder of adapters has a sub-folder for each network, such as denoising_unet/pytorch_lora_weights.safetensors.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from core.errors import UserError
from models.animators.base import Animator
from models.checkpoints.loading import check_finite, first_few
from models.checkpoints.streaming import StoredTensors, Written, write_tensors
from models.config import SCHEDULE

FOLDER = "lora"  # of adapters inside a pipeline folder
FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"  # PEFT's name of a network's only adapter
# In a file of adapters: the noise schedule and the digest of the network's weights that they were trained with.
SCHEDULE_KEY, BASE_KEY = "noise_schedule", "base_weights"
FACTORS = (".lora_A.weight", ".lora_B.weight")  # of a layer's change, B A
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "to_out", "add_k_proj", "add_v_proj")


def adaptable_layers(network: ModelMixin, unused: Collection[str], excluded: Collection[str] = ()) -> list[str]:
    """Names of attention projections, without `unused` parameters and names that contain one of `excluded`."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and name.endswith(tuple(f".{projection}" for projection in PROJECTIONS))
        and f"{name}.weight" not in unused
        and not any(part in name for part in excluded)
    ]


def add_lora(model: Animator, rank: int, alpha: float, motion: bool) -> None:
    """Give a model's attention projections adapters, which start as no change, and make nothing else trainable.

    `motion`: also the projections of layers over several frames.
    """
    model.requires_grad_(False)
    unused = model.unused_parameters()
    for name in model.adapted_networks:
        own = {parameter.removeprefix(f"{name}.") for parameter in unused if parameter.startswith(f"{name}.")}
        network = getattr(model, name)
        layers = adaptable_layers(network, own, () if motion else model.motion_parts)
        network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, lora_dropout=0.0, bias="none"))


def has_lora(network: nn.Module) -> bool:
    """Tell if `add_lora` was called."""
    return bool(getattr(network, "peft_config", None))


def save_lora(pipeline: DiffusionPipeline, folder: Path, bases: Mapping[str, str] | None = None) -> None:
    """Write the adapters of a pipeline's networks, with its noise schedule.

    `bases` are digests of the weights that the networks' adapters were trained on (`StoredTensors.digest`).
    """
    schedule = {name: pipeline.scheduler.config[name] for name in SCHEDULE if name in pipeline.scheduler.config}
    for name in pipeline.animator_cls.adapted_networks:
        if has_lora(network := getattr(pipeline, name)):
            (folder / name).mkdir(parents=True)
            # Sorted lists instead of sets: equal adapters give equal files.
            settings = {
                key: sorted(value) if isinstance(value, set) else value
                for key, value in network.peft_config[ADAPTER].to_dict().items()
            }
            metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(settings, sort_keys=True)}
            metadata |= {SCHEDULE_KEY: json.dumps(schedule)}
            if bases and name in bases:
                metadata[BASE_KEY] = bases[name]
            tensors = get_peft_model_state_dict(network, adapter_name=ADAPTER)
            written = {key: Written(tuple(value.shape), value.dtype, value.detach) for key, value in tensors.items()}
            write_tensors(folder / name / FILE, written, metadata)


def merge(network: ModelMixin, scale: float = 1.0) -> None:
    """Add the network's adapters to its weights, and remove them: its layers are then as before `add_lora`."""
    network.fuse_lora(lora_scale=scale)
    network.unload_lora()


def is_adapter(name: str) -> bool:
    """Tell by the name of a parameter in a network with adapters if it is one of theirs."""
    return ".lora_A." in name or ".lora_B." in name


def without_adapter(name: str) -> str:
    """The name in the network as it was before `add_lora`."""
    return name.replace(".base_layer.", ".")


def merged_weight(network: nn.Module, name: str, make: Callable[[], Tensor]) -> Tensor:
    """The tensor of this name that `merge` would leave in a network without weights but its adapters'.

    `make` gives the weight itself.
    """
    layer, _, rest = name.rpartition(".base_layer.")
    if rest != "weight":
        return make()
    return make().float() + network.get_submodule(layer).get_delta_weight(ADAPTER)


def load_lora(
    pipeline: DiffusionPipeline, folder: str | Path, scale: float = 1.0, base: str | Path | None = None
) -> list[str]:
    """Add the adapters of a folder, times `scale`, to a pipeline's weights; UserError where they do not fit.

    The pipeline then samples with the noise schedule that they were trained with. Returns sentences for the user where
    that, or the weights in the pipeline's folder `base`, are not what they were trained with.
    """
    folder, names = Path(folder), pipeline.animator_cls.adapted_networks
    if not any((folder / name / FILE).is_file() for name in names):
        places = " or ".join(f"{name}/{FILE}" for name in names) or f"{type(pipeline).__name__} takes none"
        raise UserError(f"lora={folder} holds no adapters: {places}")
    notes = []
    for name in names:
        if (file := folder / name / FILE).is_file():
            network = getattr(pipeline, name)
            check_fit(network, file)
            try:
                network.load_lora_adapter(folder / name, prefix=None, weight_name=FILE, local_files_only=True)
            except (ValueError, RuntimeError, KeyError, TypeError) as error:  # PEFT's, of the settings in the file
                raise UserError(f"lora={file} has settings that do not fit it: {error}") from None
            merge(network, scale)
            with safe_open(file, "pt") as opened:
                facts = opened.metadata() or {}
            notes += take_schedule(pipeline, facts.get(SCHEDULE_KEY), folder)
            if base is not None and BASE_KEY in facts:
                if StoredTensors(Path(base) / name, f"model={base}: component {name}").digest() != facts[BASE_KEY]:
                    notes.append(
                        f"lora={file} was trained on other weights than model={base} has in {name}, or on these in "
                        "another dtype"
                    )
    return notes


def take_schedule(pipeline: DiffusionPipeline, stored: str | None, folder: Path) -> list[str]:
    """Give a pipeline the noise schedule in a file of adapters, if it has another; a note says so."""
    try:
        wanted = json.loads(stored or "{}")
        present = {name: pipeline.scheduler.config.get(name) for name in wanted}
        changed = {name: value for name, value in wanted.items() if present[name] != value}
        if not changed:
            return []
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changed)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"lora={folder} has a noise schedule that cannot be read: {error}") from None
    words = ", ".join(f"{name}={value} instead of {present[name]}" for name, value in changed.items())
    return [f"sampling with the noise schedule that lora={folder} was trained with: {words}"]


def check_fit(network: ModelMixin, file: Path) -> None:
    """UserError for what are no pairs of finite factors, one for each adapted layer of the network and of its size."""
    what = f"lora={file}"
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{what} cannot be read: {error}") from None
    foreign = [key for key in tensors if not key.endswith(FACTORS)]
    if foreign or not tensors:
        raise UserError(
            f"{what} holds {first_few(foreign) if foreign else 'nothing'}; adapters here are pairs of "
            f"LAYER{FACTORS[0]} and LAYER{FACTORS[1]}, as train.py lora.export=separate writes them, and no others"
        )
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    for layer in dict.fromkeys(key.removesuffix(FACTORS[0]).removesuffix(FACTORS[1]) for key in tensors):
        known = layers.get(layer)
        if known is None:
            raise UserError(f"{what} adapts {layer}, which the model's {type(network).__name__} does not have")
        a, b = (tuple(tensors[layer + factor].shape) if layer + factor in tensors else None for factor in FACTORS)
        if a is None or b is None:
            raise UserError(f"{what} holds half a pair: {layer} has no {FACTORS[a is not None][1:]}; it is incomplete")
        if (a, b) != ((a[0] if a else 0, known.in_features), (known.out_features, a[0] if a else 0)):
            raise UserError(f"{what} adapts {layer} in another size, {a} and {b}; it belongs to another model")
    check_finite(tensors, what)
