"""Show in a browser what a clicked point of a frame attends to, without and with TPC; animate an image with a clip.

    pip install -r requirements-viewer.txt
    python -m viewer [model=path/to/pipeline] [port=7860] [server_name=127.0.0.1] [key=value ...]

See docs/viewer.md.
"""

import importlib.util
import os
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from core.config import DTYPES, choice, device, load_config, number
from core.errors import UserError, run_command
from data.config import PoseConfig
from models.config import SHIPPED_MODEL


@dataclass
class ViewerConfig:
    """The served model and its address."""

    model: str | None = None  # saved pipeline folder; null: the shipped small model
    lora: str | None = None  # folder of low-rank adapters
    lora_scale: float = number(1.0, -10, 10)  # weight of the adapters; 1 as trained
    port: int = number(7860, 1, 65535)  # of the server
    server_name: str = "127.0.0.1"  # address to listen at; 0.0.0.0: other machines can use the page too
    # MiB of recorded attention of each of the last few open pages; longer runs keep fewer steps
    memory_mib: int = number(1024, 1, 10**7)
    device: str = device()  # auto: CUDA where there is one
    dtype: str = choice("auto", DTYPES)  # of the networks; auto: bfloat16 on CUDA, float32 elsewhere
    pose: PoseConfig = field(default_factory=PoseConfig)


def main(arguments: list[str]) -> None:
    config = load_config(ViewerConfig, arguments, about=__doc__)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the viewer needs gradio; install it with `pip install -r requirements-viewer.txt`")
    # Networks take seconds to import, which wrong arguments need not wait for.
    from core.processes import choose_device
    from data.poses.drawing import FIGURES
    from models.animators.registry import load_pipeline

    device, dtype = choose_device(config.device, config.dtype)
    pipeline = load_pipeline(config.model or SHIPPED_MODEL, dtype, config.lora, config.lora_scale).to(device)
    if pipeline.pose_kind not in FIGURES:
        raise UserError(f"model={config.model} reads {pipeline.pose_kind} images, the viewer draws figures")
    for note in pipeline.notes:
        print(f"note: {note}")
    pipeline.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory(prefix="tpc-animate-viewer-") as folder:
        # gradio reads these when it is imported: nothing is reported, and uploads go when the server does.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = folder
        from viewer.controls import Machine
        from viewer.page import build_page, serve

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as with Ctrl-C, without leaving the folder
        machine = Machine(pipeline, config.pose, config.memory_mib * 2**20, Path(folder))
        serve(build_page(machine), config.server_name, config.port, Path(folder))


if __name__ == "__main__":
    run_command(main)
