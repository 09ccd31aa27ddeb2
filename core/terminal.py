"""What libraries and worker processes would write on a terminal that a user can do nothing about."""

import logging
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Logger -> beginnings of lines that say nothing about what the user gave.
FOREIGN_LINES = {
    # Every folder of an AutoencoderTiny, for diffusers itself saves what it then does not expect.
    "diffusers.configuration_utils": ("The config attributes {'block_out_channels'",),
    # Some text encoders have two names for one tensor.
    "accelerate.utils.other": ("Removed shared tensor", "[RANK 0] Removed shared tensor"),
    # DeepSpeed looks for a GPU when accelerate imports it, whether or not it is used.
    "DeepSpeed": ("Setting accelerator to CPU", "Setting ds_accelerator"),
}


def _is_wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(FOREIGN_LINES[record.name])


def quiet_libraries() -> None:
    """Leave out lines of `FOREIGN_LINES`, and bars of loading weights if it is called before the libraries are
    imported. Warnings and errors stay."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Of torch's norms with float32 weights on half-precision inputs, which are as they should be.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    for name in FOREIGN_LINES:
        logging.getLogger(name).addFilter(_is_wanted)


def ignore_interrupts(worker: int = 0) -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def without_native_lines(*foreign: str) -> Iterator[None]:
    """Leave out lines that hold one of the texts `foreign` from what compiled code writes to standard error.

    Within the block the process's descriptor is a file, whose other lines appear after it.
    """
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file:
                if not any(text.encode() in line for text in foreign):
                    os.write(2, line)
