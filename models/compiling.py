"""Networks for inference on GPUs: compiled by torch, which takes minutes at the first run, or with channels last."""

import os
import shutil
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.unets import unet_motion_model

from core.errors import UserError
from models.animators.base import Animator
from models.vae import VAE

COMPILERS = ("cc", "gcc", "clang", "g++", "c++")
GRAPHS = 64  # of a network, for lists of clips of many sizes; with more torch gives up


def use_channels_last(animator: Animator, vae: VAE) -> None:
    """Keep images and weights of convolutions with channels as the last axis in memory, which GPUs convolve faster.

    Networks stay so in other dtypes and on other devices.
    """
    for network in (animator, vae):
        network.to(memory_format=torch.channels_last)


def compile_unets(animator: Animator, **options: Any) -> None:
    """Compile the UNets, each as one graph, when they are called next; options are of `torch.compile`.

    Another size, number of frames in a window or of persons compiles once more; the steps and windows of a run do not.
    Attention cannot be recorded afterwards.
    """
    # torch writes C or C++ around its kernels.
    if "backend" not in options and not (os.environ.get("CC") or any(map(shutil.which, COMPILERS))):
        raise UserError(f"compile=true needs a compiler of C; none of {', '.join(COMPILERS)} was found")
    # It tells the log about sizes that are no multiples, which no graph can.
    torch._dynamo.config.ignore_logging_functions.add(unet_motion_model.logger.info)
    for network in animator.children():
        if isinstance(network, UNet2DConditionModel | UNetMotionModel):
            network.compile(fullgraph=True, recompile_limit=GRAPHS, **options)
    animator.compiled = True
