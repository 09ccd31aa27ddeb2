"""Networks for inference on GPUs: compiled by torch, which takes minutes at the first run, or with channels last."""

import os
import shutil
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel, WanAnimateTransformer3DModel
from diffusers.models.unets import unet_motion_model
from torch import nn

from core.errors import UserError
from models.animators.base import Animator

COMPILERS = ("cc", "gcc", "clang", "g++", "c++")
COMPILED = (UNet2DConditionModel, UNetMotionModel, WanAnimateTransformer3DModel)
GRAPHS = 64  # of a network, for lists of clips of many sizes; with more torch gives up


def use_channels_last(*networks: nn.Module) -> None:
    """Keep images, clips and weights of convolutions with channels as the last axis in memory.

    GPUs convolve such images faster. Networks stay so in other dtypes and on other devices.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in (parameter for network in networks for parameter in network.parameters()):
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])


def compile_networks(animator: Animator, **options: Any) -> None:
    """Compile UNets and transformers, each as one graph, when they are called next; options are of `torch.compile`.

    Another size, number of frames in a window, of persons, or of images that a segment holds compiles once more; the
    steps, windows and segments of a run do not.
    Attention cannot be recorded afterwards.
    """
    # torch writes C or C++ around its kernels.
    if "backend" not in options and not (os.environ.get("CC") or any(map(shutil.which, COMPILERS))):
        raise UserError(f"compile=true needs a compiler of C; none of {', '.join(COMPILERS)} was found")
    # It tells the log about sizes that are no multiples, which no graph can.
    torch._dynamo.config.ignore_logging_functions.add(unet_motion_model.logger.info)
    for network in animator.children():
        if isinstance(network, COMPILED):
            network.compile(fullgraph=True, recompile_limit=GRAPHS, **options)
    animator.compiled = True
