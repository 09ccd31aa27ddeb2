"""The tab where a click on a frame shows what it attends to, without and with TPC."""

from dataclasses import replace
from typing import Any

import gradio as gr
import numpy as np

from core.errors import UserError
from evaluation.attention.recorded_runs import RecordedRun, affordable_steps, record_both
from models.attention.recording import AttentionConfig
from viewer.controls import (
    ONE_AT_A_TIME,
    Inputs,
    Machine,
    ReportingStopwatch,
    choose_inputs,
    choose_settings,
    chosen,
    one_line_errors,
    read_inputs,
)
from viewer.images import Choice, enlarged, first_point, notice, point_of_click, side_view, where

EXPLANATION = (
    "Run once, then click any point of a frame: the colours show what this point's patch looks at in the reference "
    "and, with TPC, in the calibrated image. Red is the most, grey nothing; heads are averaged."
)
STAGES = ("reading and poses", "sampling without TPC", "calibration", "sampling with TPC")
IN_ORDER = "showing"  # events of one name wait for each other, so the page ends with the last one's images
NO_RUN = "There is no animation yet; press Run first."


class AttentionTab:
    """The tab's components and the answers to its events; nothing of a session is kept here."""

    def __init__(self, machine: Machine):
        self.machine = machine
        gr.Markdown(EXPLANATION)
        self.run, self.point = gr.State(None), gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                self.inputs: Inputs = choose_inputs("attention")
                with gr.Accordion("Settings", open=False):
                    self.settings = choose_settings(frames=6, stride=2, steps=8, most_frames=64)
                start = gr.Button("Run", variant="primary", elem_id="attention-run")
            with gr.Column(scale=4):
                self._draw_choices()
                self._draw_images()
        choices = [self.frame, self.step, self.all_steps, self.layer, self.all_layers]
        start.click(
            self.animate,
            [self.inputs.image, self.inputs.clip, *self.settings.components()],
            [self.run, self.point, *choices, *self.shown],
            concurrency_id=ONE_AT_A_TIME,
            show_progress_on=[self.images["plain"], self.images["calibrated"]],
        )
        quick = {"show_progress": "hidden", "concurrency_id": IN_ORDER}
        state = [self.run, self.point, *choices]
        for choice in choices:
            choice.input(self.show, state, self.shown, trigger_mode="always_last", **quick)
        for name in ("plain", "calibrated", "driving"):
            self.images[name].select(self.click, [self.run, *choices], [self.point, *self.shown], **quick)

    def _draw_choices(self) -> None:
        with gr.Row():
            self.frame = gr.Slider(1, 6, 1, step=1, label="Frame", elem_id="frame")
            with gr.Column(min_width=160):
                self.step = gr.Slider(1, 8, 1, step=1, label="Denoising step", elem_id="step")
                self.all_steps = gr.Checkbox(True, label="Mean over steps", elem_id="all-steps", container=False)
            with gr.Column(min_width=160):
                self.layer = gr.Slider(1, 2, 1, step=1, label="Layer, in the order they run", elem_id="layer")
                self.all_layers = gr.Checkbox(True, label="Mean over layers", elem_id="all-layers", container=False)
        self.where = gr.Markdown(NO_RUN, elem_id="where")

    def _draw_images(self) -> None:
        first = notice("Press Run, then click here.")
        names = {
            "plain": "Result without TPC (click)",
            "plain reference": "It looks at the reference",
            "driving": "Driving clip (click)",
            "calibrated": "Result with TPC (click)",
            "calibrated reference": "It looks at the reference",
            "calibrated image": "and at the calibrated image",
        }
        self.images, self.captions = {}, {}
        for row in (
            ("plain", "plain reference", "driving"),
            ("calibrated", "calibrated reference", "calibrated image"),
        ):
            with gr.Row():
                for name in row:
                    with gr.Column(min_width=160):
                        gr.Markdown(f"**{names[name]}**")
                        empty = first if name in ("plain", "calibrated", "driving") else notice("")
                        # A label of the component's own would lie over the corner of the image.
                        shown = {"show_label": False, "interactive": False, "buttons": [], "format": "png"}
                        self.images[name] = gr.Image(empty, elem_id=name.replace(" ", "-"), **shown)
            self.captions[row[0]] = gr.Markdown("", elem_id=f"{row[0]}-caption")

    @property
    def shown(self) -> list[gr.components.Component]:
        """Components in the order of `_shown_values`."""
        return [self.where, *self.images.values(), *self.captions.values()]

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
    ) -> list[Any]:
        """Run both animations and record them; new values of all components."""
        watch = ReportingStopwatch(progress, STAGES)
        machine = self.machine
        with one_line_errors():
            sampling, tpc = chosen(preset, frames, stride, steps, guidance, seed)
            with watch.stage(STAGES[0]):
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
        driving = enlarged(run.driving[choice.frame])
        images: list[np.ndarray] = [plain.result, plain.reference, driving]
        images += [calibrated.result, calibrated.reference, calibrated.calibrated]
        return [where(run, choice), *images, plain.caption, calibrated.caption]


def slider_of(count: int) -> gr.Slider:
    """A slider from 1 to a count, at 1; a slider of one value cannot be drawn, so it is longer and does not move."""
    return gr.Slider(1, max(2, count), 1, step=1, interactive=count > 1)


def choice_of(
    run: RecordedRun | None,
    point: tuple[float, float] | None,
    frame: int,
    step: int,
    all_steps: bool,
    layer: int,
    all_layers: bool,
) -> Choice:
    """The page's controls, which count from 1, as a choice; steps count those that were recorded."""
    if run is None:
        raise UserError(NO_RUN)
    steps, layers = run.plain.recorded.selection.steps, run.plain.recorded.layers
    counts = {"frame": len(run.driving), "step": len(steps), "layer": len(layers)}
    for (name, count), value in zip(counts.items(), (frame, step, layer), strict=True):
        if not 1 <= value <= count:
            raise UserError(f"{name}={value} is out of range; there are 1 to {count}")
    return Choice(
        int(frame) - 1,
        None if all_steps else steps[int(step) - 1],
        None if all_layers else layers[int(layer) - 1],
        point,
    )
