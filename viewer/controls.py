"""Parts that both tabs of the page share: inputs, settings, and errors as one line."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import numpy as np

from core.config import check_config
from core.errors import UserError
from data.config import SAMPLES, PoseConfig
from data.inputs import Driving, Reference
from data.video.files import VideoReader
from data.video.images import read_image
from evaluation.attention.recorded_runs import load_inputs
from inference.animate import Stopwatch
from inference.config import SamplingConfig
from models.pipeline import AnimationPipeline
from tpc import CalibrationConfig
from tpc.config import PRESETS, TRANSFORMS

SAMPLE_IMAGES = {"Rendered person": SAMPLES / "rendered.png", "Photograph": SAMPLES / "photo.jpg"}
PRESETS_OWN = "the preset's"
SAMPLE_CLIP = SAMPLES / "dance.mp4"
ONE_AT_A_TIME = "sampling"  # the pipeline's scheduler belongs to one run at a time


@dataclass(frozen=True)
class Machine:
    """The model and the limits that every session of the page uses and none changes."""

    pipeline: AnimationPipeline  # used by one run at a time
    pose: PoseConfig
    limit_bytes: int  # of one session's recorded attention
    folder: Path  # of videos; removed with the server


class ReportingStopwatch(Stopwatch):
    """A stopwatch that shows in the page which stage begins."""

    def __init__(self, progress: gr.Progress, stages: Sequence[str]):
        super().__init__()
        self.progress, self.stages = progress, stages

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.progress((self.stages.index(name), len(self.stages)), desc=name, unit="stages")
        with super().stage(name):
            yield


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Show user errors as one line in the page, with files by their names only."""
    try:
        yield
    except UserError as error:
        raise gr.Error(without_folders(" ".join(str(error).split())), print_exception=False) from None


def without_folders(message: str) -> str:
    """A message whose `argument=path` names the file alone; the page's user does not know the server's folders."""
    return re.sub(r"=\S*[/\\](?=[^/\\\s])", "=", message)


def chosen(
    preset: str, transform: str, frames: int, stride: int, steps: int, guidance: float, seed: float | None
) -> tuple[SamplingConfig, CalibrationConfig]:
    """Values of `choose_settings` as configurations."""
    if seed is None or seed != int(seed) or not 0 <= seed < 2**63:
        raise UserError("seed must be a whole number from 0")
    sampling = SamplingConfig(
        num_frames=int(frames), stride=int(stride), steps=int(steps), guidance_scale=float(guidance), seed=int(seed)
    )
    check_config(sampling)
    return sampling, CalibrationConfig(preset=preset, transform=None if transform == PRESETS_OWN else transform)


def read_inputs(
    machine: Machine, image: str | None, clip: str | None, sampling: SamplingConfig
) -> tuple[Reference, Driving]:
    """The chosen image and clip with their poses."""
    return load_inputs(required(image, "reference"), required(clip, "driving"), sampling, machine.pose)


def choose_inputs(tab: str) -> tuple[gr.State, gr.State]:
    """Paths of the chosen image and clip; bad files are refused as they come in."""
    image = SAMPLE_IMAGES["Rendered person"]
    image_path, clip_path = gr.State(str(image)), gr.State(str(SAMPLE_CLIP))
    still = {"height": 200, "interactive": False, "buttons": []}
    shown = gr.Image(read_image(image), label="Reference image", format="png", elem_id=f"{tab}-reference", **still)
    upload = gr.UploadButton("Upload an image", file_types=["image"], size="sm", elem_id=f"{tab}-image")
    with gr.Row():
        for name, path in SAMPLE_IMAGES.items():
            sample = gr.Button(name, size="sm", min_width=80)
            sample.click(lambda path=path: (str(path), read_image(path)), None, [image_path, shown], queue=False)
    clip = gr.Video(str(SAMPLE_CLIP), label="Driving clip", **still)
    with gr.Row():
        film = gr.UploadButton("Upload a clip", file_types=["video", ".gif"], size="sm", elem_id=f"{tab}-clip")
        again = gr.Button("Sample clip", size="sm", min_width=80)
    # Hidden progress: an error would lie over the image that is still the chosen one.
    upload.upload(accept_image, upload, [image_path, shown], show_progress="hidden")
    film.upload(accept_clip, film, [clip_path, clip], show_progress="hidden")
    again.click(lambda: (str(SAMPLE_CLIP), str(SAMPLE_CLIP)), None, [clip_path, clip], queue=False)
    return image_path, clip_path


def accept_image(path: str | None) -> tuple[str, np.ndarray]:
    """An uploaded image's path and pixels, or one line about what is wrong with it."""
    with one_line_errors():
        return required(path, "reference"), read_image(path, "reference")


def accept_clip(path: str | None) -> tuple[str, str]:
    """An uploaded clip's path, twice, or one line about what is wrong with it."""
    with one_line_errors():
        with VideoReader(required(path, "driving"), argument="driving") as reader:
            reader.get([0])
        return path, path


def required(path: str | None, argument: str) -> str:
    """The path, or a UserError when none was given."""
    if not path:
        what = "image" if argument == "reference" else "clip"
        raise UserError(f"{argument}: no {what} was given; upload one or take a sample")
    return path


def choose_settings(
    machine: Machine, frames: int, stride: int, steps: int, most_frames: int
) -> list[gr.components.Component]:
    """Choices of a run in the order of `chosen`, with their defaults; the guidance is the model's own."""
    guidance = machine.pipeline.sampling.get("guidance_scale", SamplingConfig.guidance_scale)
    with gr.Row():
        preset = gr.Dropdown(list(PRESETS), value=PRESETS[0], label="TPC preset", min_width=80)
        transforms = [PRESETS_OWN, *TRANSFORMS]
        transform = gr.Dropdown(transforms, value=PRESETS_OWN, label="Transform", min_width=80)
    with gr.Row():
        count = gr.Slider(1, most_frames, frames, step=1, label="Frames")
        every = gr.Slider(1, 8, stride, step=1, label="Stride")
    with gr.Row():
        denoising = gr.Slider(1, 50, steps, step=1, label="Steps")
        scale = gr.Slider(1, max(6, guidance), guidance, step=0.1, label="Guidance")
    return [preset, transform, count, every, denoising, scale, gr.Number(0, label="Seed", precision=0)]
