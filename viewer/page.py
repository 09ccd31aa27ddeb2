"""The viewer's page, its two tabs, and its server.

A tab has its components and the answers to their events; everything of a session is in its `gr.State`.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from core.config import config_dict
from core.errors import UserError
from data.config import SAMPLES
from data.video.files import write_video
from evaluation.attention.recorded_runs import RecordedRun, affordable_steps, record_both
from inference.animate import animate, generated_by, write_animation
from models.attention.recording import AttentionConfig
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
from viewer.images import NO_RUN, Choice, choice_of, enlarged, first_point, notice, point_of_click, side_view, where

EXPLANATION = (
    "Run once, then click any point of a frame: the colours show what this point's patch attends to in the reference "
    "and, with TPC, in the calibrated image. Red is the most, grey nothing; heads are averaged."
)
ATTENTION_STAGES = ("reading and poses", "sampling without TPC", "calibration", "sampling with TPC")
ANIMATION_STAGES = ("reading and poses", "calibration", "sampling without TPC", "sampling with TPC", "writing")
IMAGES = (
    {
        "plain": "Result without TPC (click)",
        "plain reference": "What it attends to in the reference",
        "driving": "Driving clip (click)",
    },
    {
        "calibrated": "Result with TPC (click)",
        "calibrated reference": "What it attends to in the reference",
        "calibrated image": "and in the calibrated image",
    },
)
CLICKED = ("plain", "calibrated", "driving")
IN_ORDER = "showing"  # events of one name wait for each other, so the page ends with the last one's images
VIDEO_HEIGHT = 300
TITLE = "TPC-Animate viewer"
FONTS = ("system-ui", "sans-serif")  # gradio's own would be fetched from a font service
MONOSPACE = ("ui-monospace", "monospace")
SESSIONS = 4  # the last of them keep their recorded attention; older ones have to press Run again


class AttentionTab:
    """Images of a run that attention of the clicked point lies over, without and with TPC."""

    def __init__(self, machine: Machine):
        self.machine = machine
        gr.Markdown(EXPLANATION)
        self.run, self.point = gr.State(None), gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                inputs = choose_inputs("attention")
                with gr.Accordion("Settings", open=False):
                    settings = choose_settings(machine, frames=6, stride=2, steps=8, most_frames=64)
                start = gr.Button("Run", variant="primary", elem_id="attention-run")
            with gr.Column(scale=4):
                self._draw_choices()
                self._draw_images()
        choices = [self.frame, self.step, self.all_steps, self.layer, self.all_layers]
        start.click(
            self.animate,
            [*inputs, *settings],
            [self.run, self.point, *choices, *self.shown],
            concurrency_id=ONE_AT_A_TIME,
            show_progress_on=[self.images["plain"], self.images["calibrated"]],
        )
        quick = {"show_progress": "hidden", "concurrency_id": IN_ORDER}
        state = [self.run, self.point, *choices]
        for choice in choices:
            choice.input(self.show, state, self.shown, trigger_mode="always_last", **quick)
        for name in CLICKED:
            self.images[name].select(self.click, [self.run, *choices], [self.point, *self.shown], **quick)

    def _draw_choices(self) -> None:
        with gr.Row():
            self.frame = gr.Slider(0, 5, 0, step=1, label="Frame, from 0", elem_id="frame")
            with gr.Column(min_width=160):
                self.step = gr.Slider(0, 7, 0, step=1, label="Denoising step, from 0", elem_id="step")
                self.all_steps = gr.Checkbox(True, label="Mean over steps", elem_id="all-steps", container=False)
            with gr.Column(min_width=160):
                self.layer = gr.Slider(0, 1, 0, step=1, label="Layer, from 0 as they run", elem_id="layer")
                self.all_layers = gr.Checkbox(True, label="Mean over layers", elem_id="all-layers", container=False)
        self.where = gr.Markdown(NO_RUN, elem_id="where")

    def _draw_images(self) -> None:
        self.images, self.captions = {}, {}
        for row in IMAGES:
            with gr.Row():
                for name, title in row.items():
                    with gr.Column(min_width=160):
                        gr.Markdown(f"**{title}**")
                        empty = notice("Press Run, then click here." if name in CLICKED else "")
                        # A label of the component's own would lie over the corner of the image.
                        shown = {"show_label": False, "interactive": False, "buttons": [], "format": "png"}
                        self.images[name] = gr.Image(empty, elem_id=name.replace(" ", "-"), **shown)
            side = next(iter(row))
            self.captions[side] = gr.Markdown("", elem_id=f"{side}-caption")

    @property
    def shown(self) -> list[gr.components.Component]:
        """Components in the order of `_shown_values`."""
        return [self.where, *self.images.values(), *self.captions.values()]

    def animate(
        self,
        image: str | None,
        clip: str | None,
        preset: str,
        transform: str,
        frames: int,
        stride: int,
        steps: int,
        guidance: float,
        seed: float | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008, gradio tells by the default what to fill in
    ) -> list[Any]:
        """Record both animations; new values of all components."""
        watch = ReportingStopwatch(progress, ATTENTION_STAGES)
        machine = self.machine
        with one_line_errors():
            sampling, tpc = chosen(preset, transform, frames, stride, steps, guidance, seed)
            with watch.stage(ATTENTION_STAGES[0]):
                reference, driving = read_inputs(machine, image, clip, sampling)
            kept = affordable_steps(machine.pipeline, reference, driving, sampling, machine.limit_bytes)
            config = AttentionConfig(steps=kept, mean=["heads"], limit_bytes=machine.limit_bytes)
            run = record_both(machine.pipeline, reference, driving, sampling, tpc, config, watch=watch)
            if len(kept) < sampling.steps:
                gr.Info(f"{len(kept)} of {sampling.steps} steps are kept, so that they fit into memory.")
            point = first_point(run)
            values = self._shown_values(run, Choice(point=point))
        layers = run.plain.recorded.layers
        sliders = [slider_of(len(run.driving)), slider_of(len(kept)), True, slider_of(len(layers)), True]
        return [run, point, *sliders, *values]

    def show(self, run: RecordedRun | None, point: tuple[float, float] | None, *choices: Any) -> list[Any]:
        """New values of the images for other choices."""
        with one_line_errors():
            return self._shown_values(run, choice_of(run, point, *choices))

    def click(self, event: gr.SelectData, run: RecordedRun | None, *choices: Any) -> list[Any]:
        """The clicked point and new values of the images."""
        with one_line_errors():
            choice = choice_of(run, None, *choices)
            point = point_of_click(run, event.index)
            return [point, *self._shown_values(run, replace(choice, point=point))]

    def _shown_values(self, run: RecordedRun, choice: Choice) -> list[Any]:
        plain, calibrated = (side_view(run, side, choice) for side in run.sides.values())
        images = [plain.result, plain.reference, enlarged(run.driving[choice.frame])]
        images += [calibrated.result, calibrated.reference, calibrated.calibrated]
        return [where(run, choice), *images, plain.caption, calibrated.caption]


def slider_of(count: int) -> gr.Slider:
    """A slider over indices, at 0; a slider of one value cannot be drawn, so it is longer and does not move."""
    return gr.Slider(0, max(1, count - 1), 0, step=1, interactive=count > 1)


class AnimateTab:
    """Videos of an animation without and with TPC, as `infer.py` writes them."""

    def __init__(self, machine: Machine):
        self.machine = machine
        gr.Markdown("An image and a clip in, animations out. Do not animate people without their consent.")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                inputs = choose_inputs("animate")
                settings = choose_settings(
                    machine, frames=16, stride=1, steps=machine.pipeline.sampling.get("steps", 8), most_frames=256
                )
                start = gr.Button("Animate", variant="primary", elem_id="animate-run")
            with gr.Column(scale=4):
                player = {"autoplay": True, "loop": True, "interactive": False, "buttons": ["download"]}
                with gr.Row():
                    plain = gr.Video(label="Without TPC", height=VIDEO_HEIGHT, elem_id="video-plain", **player)
                    calibrated = gr.Video(label="With TPC", height=VIDEO_HEIGHT, elem_id="video-calibrated", **player)
                report = gr.Markdown("", elem_id="report")
                strip = gr.Image(
                    show_label=False, interactive=False, buttons=["download"], format="png", elem_id="strip"
                )
                comparison = gr.Video(show_label=False, elem_id="video-comparison", **player)
        start.click(
            self.animate,
            [*inputs, *settings],
            [plain, calibrated, report, strip, comparison],
            concurrency_id=ONE_AT_A_TIME,
        )

    def animate(
        self,
        image: str | None,
        clip: str | None,
        preset: str,
        transform: str,
        frames: int,
        stride: int,
        steps: int,
        guidance: float,
        seed: float | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008, gradio tells by the default what to fill in
    ) -> tuple[str, str, str, str, str]:
        """Paths of the videos without and with TPC, a report, the strip's path, and that of the comparison."""
        watch = ReportingStopwatch(progress, ANIMATION_STAGES)
        with one_line_errors():
            sampling, tpc = chosen(preset, transform, frames, stride, steps, guidance, seed)
            with watch.stage(ANIMATION_STAGES[0]):
                reference, driving = read_inputs(self.machine, image, clip, sampling)
            animation = animate(self.machine.pipeline, reference, driving, sampling, tpc, watch, show_progress=False)
            folder = Path(tempfile.mkdtemp(dir=self.machine.folder))
            configuration = config_dict(sampling) | {"tpc": config_dict(tpc)}
            write_animation(animation, folder, configuration, watch, driving.sound)
            plain = folder / "without_tpc.mp4"
            write_video(plain, animation.plain, animation.fps, generated_by(configuration))
        done = animation.calibration.summary()
        counts = ", ".join(f"{done[name]} {name}" for name in ("calibrated", "interpolated", "uncalibrated"))
        took = f"{len(animation.result)} frames: {counts}. {sum(watch.seconds.values()):.0f} seconds."
        report = " ".join([took, *done["notes"]])
        calibrated, strip, comparison = (
            str(folder / name) for name in ("animation.mp4", "comparison.png", "comparison.mp4")
        )
        return str(plain), calibrated, report, strip, comparison


def build_page(machine: Machine) -> gr.Blocks:
    """The page with both tabs."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"## {TITLE}")
        with gr.Tab("Attention"):
            AttentionTab(machine)
        with gr.Tab("Animate"):
            AnimateTab(machine)
    return page


def serve(page: gr.Blocks, server_name: str, port: int, folder: Path, wait: bool = True) -> str:
    """Serve the page, with `wait` until it is interrupted; its address. Videos are in `folder`."""
    options: dict[str, Any] = {} if port == 0 else {"server_port": port}  # without: a free one
    try:
        _, address, _ = page.queue().launch(
            server_name=server_name,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            allowed_paths=[str(SAMPLES), str(folder)],
            state_session_capacity=SESSIONS,
            theme=gr.themes.Default(font=FONTS, font_mono=MONOSPACE),
            **options,
        )
    except OSError:
        raise UserError(
            f"server_name={server_name} port={port} cannot be listened at; choose another port, such as {port + 1}"
        ) from None
    if wait:
        print(f"viewer: {address} (Ctrl-C ends it)")
        page.block_thread()
    return address
