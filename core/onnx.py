"""ONNX networks that users bring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import UserError
from core.files import existing_file

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


def open_onnx(path: str | Path, argument: str, threads: int = 0) -> InferenceSession:
    """The network of a file, on CUDA where onnxruntime has it; `UserError` that names the argument for other files.

    `threads` 0: as many as onnxruntime takes.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{argument} needs the package onnxruntime; install it with pip") from None
    path = existing_file(path, argument)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    available = onnxruntime.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime has no common base class for what a bad file raises
        reason = str(error).splitlines()[0]
        raise UserError(f"{argument}={path} is not an ONNX network that can be read: {reason}") from None
