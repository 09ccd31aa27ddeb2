"""The memory that one training step takes beside parameters and states, found by running it on tensors without data.

Forward and backward pass go through PyTorch's fake tensors, which know shapes, types and life spans; every storage
that is alive is counted. Nothing is computed, so a full-size step takes seconds and little memory.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.animators.base import Animator, CalibratedImages
from models.attention.context import ReferenceContext
from models.attention.layers import token_levels
from models.attention.masking import Visibility
from models.vae import VAE, vae_scale_factor
from training.config import TrainConfig
from training.objective import encode_frames, encode_reference

FLAGS = 3  # channels of visibility in calibrated training


@dataclass(frozen=True)
class StepMemory:
    """Peaks in bytes.

    Attributes:
        encoding: while the VAE encodes the batch.
        training: in forward and backward pass, without gradients of parameters.
    """

    encoding: int
    training: int

    @property
    def peak(self) -> int:
        return max(self.encoding, self.training)


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that are made while it is active and are still alive.

    Args:
        networks: their own storages do not count, of which views are made.
    """

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        own = (tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
        self.known = {tensor.untyped_storage()._cdata for tensor in own}

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.notice(leaf.untyped_storage())
        return result

    def notice(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def widen_norms(network: nn.Module) -> None:
    """Normalise in float32, as autocast does on GPUs; on the CPU, where the step is imitated, it does not."""

    def widen(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor.float() for tensor in inputs)

    for module in network.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.register_forward_pre_hook(widen)


@contextmanager
def counted(config: TrainConfig, *networks: nn.Module) -> Iterator[LiveStorages]:
    """Within the block storages are counted, and convolutions and products are in the run's number format."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)
    live = LiveStorages(*networks)
    with live, torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
        yield live


def step_memory(vae: VAE, model: Animator, config: TrainConfig) -> StepMemory:
    """Memory of one batch's step on one process.

    Args:
        vae, model: on the meta device, with what is trained chosen; they are changed.
    """
    width, height = config.data.size
    batch, frames, factor = config.batch_size, config.data.num_frames, vae_scale_factor(vae)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in (vae, model):
            network.to_empty(device="cpu")
            widen_norms(network)
        clip = torch.empty(batch, 3, frames, height, width)
        with counted(config, vae) as live:
            encode_frames(vae, clip, config.vae_chunk)
            encode_reference(vae, clip[:, :, 0], config.vae_chunk)
        encoding = live.peak
        inputs = step_inputs(model, config, (height // factor, width // factor))
        free_gradients(model)
        model.train()
        with counted(config, model) as live:
            model(**inputs).float().square().mean().backward()
    return StepMemory(encoding, live.peak)


def step_inputs(model: Animator, config: TrainConfig, latent: tuple[int, int]) -> dict[str, object]:
    """Arguments of the model for one batch, calibrated images included where they are trained with."""
    width, height = config.data.size
    batch, frames = config.batch_size, config.data.num_frames
    channels = model.latent_channels
    calibrated = config.augmentation.calibrated
    images = min(calibrated.images, frames) if calibrated.probability > 0 else 0
    seen = found = None
    if images:
        levels = token_levels(model.attention_layers(latent))
        keys = {level.tokens: level.tokens * level.keys.own + 2 * level.keys.tokens for level in levels}
        seen = ReferenceContext(
            tokens={},
            index=torch.zeros(batch * frames, 2, dtype=torch.long),
            visibility=Visibility(
                {n: torch.empty(batch * frames, n, FLAGS) for n in keys},
                {n: torch.empty(batch * frames, count, FLAGS) for n, count in keys.items()},
            ),
        )
        shown = batch * images
        found = CalibratedImages(torch.empty(shown, 3, height, width), torch.empty(shown, 1, height, width))
    encoded = images if model.calibrated_latents else 0
    return {
        "noisy_latents": torch.empty(batch, channels, frames, *latent),
        "timestep": torch.zeros(batch, dtype=torch.long),
        "reference_latents": torch.empty(batch * (1 + encoded), channels, *latent),
        "reference_image": torch.empty(batch, 3, height, width),
        "poses": torch.empty(batch, 3, frames, height, width),
        "dropped": torch.zeros(batch, dtype=torch.long),
        "reference": seen,
        "reference_mask": torch.empty(batch, 1, height, width) if model.needs_mask else None,
        "calibrated": found,
    }


def free_gradients(model: nn.Module) -> None:
    """Let every parameter's gradient go as soon as it is there: gradients are counted by themselves."""

    def forget(parameter: nn.Parameter) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(forget)
