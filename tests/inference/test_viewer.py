"""What the viewer shows, without its page: both results recorded, memory kept within bounds, clicks and images."""

import subprocess
import sys
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import viewer.__main__
from core.errors import UserError
from evaluation.attention.figures import attended_images, layer_mean, overlay
from evaluation.attention.recorded_runs import affordable_steps, load_inputs, record_both, spread_steps
from inference.animate import animate
from models.attention.recording import AttentionConfig
from tests.published import small_magic_pipeline
from tests.viewed import SAMPLING, recorded_run, rendered_inputs
from tests.wan_parts import wan_pipeline
from tpc import CalibrationConfig
from viewer.images import (
    HEIGHT,
    Choice,
    beside,
    division,
    enlarged,
    first_point,
    notice,
    point_of_click,
    scale_of,
    side_view,
    where,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return rendered_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(tiny_pipeline, inputs):
    return recorded_run(tiny_pipeline, inputs)


class TestRecordedRuns:
    def test_both_results_are_those_of_animate(self, tiny_pipeline, inputs, run):
        animation = animate(tiny_pipeline, *inputs, SAMPLING, CalibrationConfig(), show_progress=False)
        assert (run.plain.frames == animation.plain).all()
        assert (run.calibrated.frames == animation.calibrated).all()
        assert (run.plain.frames != run.calibrated.frames).any()
        assert run.plain.calibration is None and run.calibrated.calibration.frames == 3
        assert run.plain.recorded.images == ("reference",)
        assert run.calibrated.recorded.images == ("reference", "calibrated 0")
        assert run.driving.shape == run.poses.shape == run.plain.frames.shape == (3, 32, 32, 3)

    def test_every_query_token_or_the_keypoints(self, tiny_pipeline, inputs, run):
        recorded = run.plain.recorded
        assert recorded.points is None and recorded.selection.steps == (0, 1, 2)
        keypoints = recorded_run(tiny_pipeline, inputs, keypoints_only=True).plain.recorded
        assert keypoints.names[0] == "nose" and keypoints.points.shape == (3, 17, 2)
        seen = int(np.flatnonzero(~np.isnan(keypoints.points[0]).any(-1))[0])
        layer = recorded.layers[0]
        by_name = keypoints.query_map(layer, keypoints.names[seen], step=1, frame=0)
        by_place = recorded.query_map(layer, tuple(keypoints.points[0, seen]), step=1, frame=0)
        assert np.allclose(by_name.maps, by_place.maps, atol=1e-6)

    def test_frames_of_a_segment_are_shown_what_it_holds(self, inputs):
        """Calibrated images stand beside the reference, though the model's own choice is to replace it."""
        run = recorded_run(wan_pipeline(), inputs, AttentionConfig(layers=["blocks.0.attn1"], mean=["heads"]))
        assert run.calibrated.recorded.images == ("reference", "calibrated 0")
        for frame in range(3):
            shown = side_view(run, run.calibrated, Choice(frame=frame, point=(16.0, 16.0)))
            assert shown.calibrated is not None and "calibrated image" in shown.caption
        assert len(np.unique(run.calibrated.calibration.attended)) == 2, "two latents, an image each"

    def test_both_sides_begin_from_noise(self, tiny_pipeline, inputs):
        pipeline = copy(tiny_pipeline)
        pipeline.register_to_config(sampling={"start": 200})
        run = recorded_run(pipeline, inputs, keypoints_only=True)
        timesteps = {side.recorded.timesteps for side in run.sides.values()}
        assert len(timesteps) == 1 and timesteps.pop()[0] > 600

    def test_steps_fit_into_memory(self, tiny_pipeline, inputs):
        def taken(steps):
            run = record_both(
                tiny_pipeline, *inputs, SAMPLING, CalibrationConfig(), AttentionConfig(steps=steps, mean=["heads"])
            )
            return sum(side.recorded.nbytes for side in run.sides.values())

        assert affordable_steps(tiny_pipeline, *inputs, SAMPLING, 2**40) == [0, 1, 2]
        with pytest.raises(UserError, match="recording one step of 3 frames would take .* use fewer frames"):
            affordable_steps(tiny_pipeline, *inputs, SAMPLING, 1000)
        for limit in range(2**16, 2**26, 2**20):
            try:
                steps = affordable_steps(tiny_pipeline, *inputs, SAMPLING, limit)
            except UserError:
                continue
            assert taken(steps) <= limit
            break
        assert len(steps) < 3, "the limit binds"

    def test_spread_steps(self):
        assert spread_steps(8, 8) == list(range(8))
        assert spread_steps(8, 1) == [7] and spread_steps(8, 2) == [0, 7] and spread_steps(9, 3) == [0, 4, 8]

    def test_bad_inputs_are_named(self, tmp_path):
        (tmp_path / "text.png").write_text("no image")
        with pytest.raises(UserError, match="reference=.*text.png"):
            load_inputs(tmp_path / "text.png", tmp_path / "none.mp4", SAMPLING)


class TestImages:
    def test_a_click_is_the_pixel_under_it(self, run):
        scale = scale_of(run.driving)
        assert scale == HEIGHT / 32
        for pixel in (0, 7, 31):
            for inside in (0, scale / 2, scale - 1):
                x, y = point_of_click(run, (pixel * scale + inside, 5 * scale))
                assert round(x) == pixel and round(y) == 5
        assert point_of_click(run, (1e6, -5)) == (31.0, 0.0)

    def test_overlays_are_strongest_where_attention_is(self, run):
        choice = Choice(frame=1, step=2, layer=run.plain.recorded.layers[-1], point=(12.0, 20.0))
        view = side_view(run, run.plain, choice)
        maps = layer_mean(run.plain.recorded, choice.point, 2, 1, layers=[choice.layer])
        row, column = np.unravel_index(maps[0].argmax(), maps[0].shape)
        scale = HEIGHT / 32
        pixel = view.reference[int((row + 0.5) * scale), int((column + 0.5) * scale)].astype(int)
        assert pixel[0] > pixel[2] + 60, "red, not blue, at the maximum"
        assert view.calibrated is None and view.reference.shape == (HEIGHT, HEIGHT, 3)
        assert (view.result != enlarged(run.plain.frames[1])).any(), "the point is marked"

    def test_one_colour_scale_for_reference_and_calibrated(self, run):
        choice = Choice(frame=0, point=first_point(run))
        maps = layer_mean(run.calibrated.recorded, choice.point, None, 0)
        view = side_view(run, run.calibrated, choice)
        weaker = int(maps.max(axis=(1, 2)).argmin())
        last = run.calibrated.recorded.selection.steps[-1]
        seen = attended_images(run.reference, run.calibrated.calibration, last, 0)[weaker]
        shown = (view.reference, view.calibrated)[weaker]
        assert (shown == overlay(enlarged(seen), maps[weaker], maps.max())).all()
        assert (shown != overlay(enlarged(seen), maps[weaker])).any(), "not stretched to the strongest colour"

    def test_steps_and_layers_change_what_is_seen(self, run):
        point = first_point(run)
        views = [
            side_view(run, run.plain, Choice(0, step, layer, point)).reference
            for step in (None, 0, 2)
            for layer in (None, *run.plain.recorded.layers[:2])
        ]
        assert len({view.tobytes() for view in views}) == len(views)

    def test_without_a_point_images_are_plain(self, run):
        view = side_view(run, run.calibrated, Choice())
        assert (view.reference == enlarged(run.reference)).all()
        assert (view.result == enlarged(run.calibrated.frames[0])).all()
        assert "Click" in view.caption

    def test_shares_in_words_sum_to_one(self):
        maps = np.zeros((3, 4, 4))
        maps[0, 0, 0], maps[1, 1, 1], maps[2, 3, 3] = 0.2, 0.1, 0.3
        words = division(maps)
        assert words == (
            "Attends to itself (its own frame) 40%, reference 20%, calibrated image of person 0 10%, "
            "calibrated image of person 1 30%."
        )

    def test_where_names_what_is_shown(self, run):
        layer = run.plain.recorded.layers[0]
        words = where(run, Choice(2, 1, layer, (3.0, 4.0)))
        assert words.startswith("Frame 2, point (3, 4): step 1 (t = ") and "tokens" in words
        assert where(run, Choice()) == "Frame 0: mean over steps, mean over layers."

    def test_frames_that_are_not_there(self, run):
        with pytest.raises(UserError, match="frame=8"):
            side_view(run, run.plain, Choice(frame=8, point=(1.0, 1.0)))

    def test_first_point_is_a_visible_keypoint(self, run):
        assert any(np.allclose(first_point(run), place, equal_nan=False) for place in run.keypoints[0])
        hidden = replace(run, keypoints=np.full_like(run.keypoints, np.nan))
        assert first_point(hidden) == (16, 16)

    def test_images_beside_each_other(self):
        one, two = np.zeros((HEIGHT, 10, 3), np.uint8), np.full((HEIGHT, 20, 3), 255, np.uint8)
        joined = beside([one, two])
        assert joined.shape[0] == HEIGHT and joined.shape[1] > 30
        assert (joined[:, :10] == 0).all() and (joined[:, 10:] == 255).all()
        assert (beside([one]) == one).all()
        assert notice("text").shape == (HEIGHT, HEIGHT, 3) and (notice("text") != notice("")).any()


class TestCommand:
    @pytest.mark.parametrize(
        ("argument", "named"),
        [("port=0", "port=0 must be"), ("memory_mib=0", "memory_mib=0"), ("prot=1", "nearest known one is 'port'")],
    )
    def test_bad_arguments(self, argument, named):
        with pytest.raises(UserError, match=named):
            viewer.__main__.main([argument])

    def test_missing_gradio_is_one_line(self, tmp_path):
        block = "import importlib.util as u, sys; find = u.find_spec\n"
        block += "u.find_spec = lambda name, *a: None if name == 'gradio' else find(name, *a)\n"
        block += f"sys.path.insert(0, {str(ROOT)!r})\nimport viewer.__main__\nfrom core.errors import run_command\n"
        block += "run_command(viewer.__main__.main)"
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2
        assert (
            done.stderr == "error: the viewer needs gradio; install it with `pip install -r requirements-viewer.txt`\n"
        )

    def test_a_model_that_needs_other_pose_images(self, tmp_path):
        pytest.importorskip("gradio")
        small_magic_pipeline().save_pretrained(tmp_path / "magic")
        with pytest.raises(UserError, match="reads DensePose images"):
            viewer.__main__.main([f"model={tmp_path / 'magic'}"])
