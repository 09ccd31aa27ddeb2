"""The tab that animates an image with a clip, without and with TPC, as `infer.py` does."""

import tempfile
from pathlib import Path

import gradio as gr

from core.config import config_dict
from data.video.files import write_video
from inference.animate import Animation, Stopwatch, animate, generated_by, write_animation
from viewer.controls import (
    ONE_AT_A_TIME,
    Machine,
    ReportingStopwatch,
    choose_inputs,
    choose_settings,
    chosen,
    one_line_errors,
    read_inputs,
)

STAGES = ("reading and poses", "calibration", "sampling without TPC", "sampling with TPC", "writing")
HEIGHT = 300


class AnimateTab:
    """The tab's components and the answers to its events; nothing of a session is kept here."""

    def __init__(self, machine: Machine):
        self.machine = machine
        gr.Markdown("An image and a clip in, animations out. Do not animate people without their consent.")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                inputs = choose_inputs("animate")
                settings = choose_settings(frames=16, stride=1, steps=8, most_frames=256)
                start = gr.Button("Animate", variant="primary", elem_id="animate-run")
            with gr.Column(scale=4):
                with gr.Row():
                    videos = [
                        video_player(name, label, HEIGHT)
                        for name, label in (("video-plain", "Without TPC"), ("video-calibrated", "With TPC"))
                    ]
                report = gr.Markdown("", elem_id="report")
                strip = gr.Image(
                    show_label=False, interactive=False, buttons=["download"], format="png", elem_id="strip"
                )
                comparison = video_player("video-comparison", None, None)
        start.click(
            self.animate,
            [inputs.image, inputs.clip, *settings.components()],
            [*videos, report, strip, comparison],
            concurrency_id=ONE_AT_A_TIME,
        )

    def animate(
        self,
        image: str | None,
        clip: str | None,
        preset: str,
        frames: int,
        stride: int,
        steps: int,
        guidance: float,
        seed: float | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008, gradio tells by the default what to fill in
    ) -> tuple[str, str, str, str, str]:
        """Paths of the videos without and with TPC, a report, the strip's path, and that of the comparison."""
        watch = ReportingStopwatch(progress, STAGES)
        with one_line_errors():
            sampling, tpc = chosen(preset, frames, stride, steps, guidance, seed)
            with watch.stage(STAGES[0]):
                reference, driving = read_inputs(self.machine, image, clip, sampling)
            animation = animate(self.machine.pipeline, reference, driving, sampling, tpc, watch, show_progress=False)
            folder = Path(tempfile.mkdtemp(dir=self.machine.folder))
            configuration = config_dict(sampling) | {"tpc": config_dict(tpc)}
            write_animation(animation, folder, configuration, watch)
            plain = folder / "without_tpc.mp4"
            write_video(plain, animation.plain, animation.fps, generated_by(configuration))
        files = [plain, folder / "animation.mp4", folder / "comparison.png", folder / "comparison.mp4"]
        plain, calibrated, strip, comparison = map(str, files)
        return plain, calibrated, report_of(animation, watch), strip, comparison


def video_player(name: str, label: str | None, height: int | None) -> gr.Video:
    """A player that repeats a video of a run; without a label nothing lies over the image."""
    return gr.Video(
        label=label,
        show_label=label is not None,
        height=height,
        autoplay=True,
        loop=True,
        interactive=False,
        buttons=["download"],
        elem_id=name,
    )


def report_of(animation: Animation, watch: Stopwatch) -> str:
    """A paragraph with the frames by status and the seconds."""
    done = animation.calibration.summary()
    counts = ", ".join(f"{done[name]} {name}" for name in ("calibrated", "interpolated", "uncalibrated"))
    took = f"{len(animation.result)} frames: {counts}. {sum(watch.seconds.values()):.0f} seconds."
    return " ".join([took, *done["notes"]])
