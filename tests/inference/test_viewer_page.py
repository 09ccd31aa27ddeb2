"""The viewer's page: its events called as the server calls them, and all of it in a browser where there is one."""

import shutil
import socket
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

gr = pytest.importorskip("gradio")

from core.errors import UserError  # noqa: E402
from data.config import PoseConfig  # noqa: E402
from data.poses.weights import fetch_models  # noqa: E402
from data.video.files import read_video, video_metadata  # noqa: E402
from evaluation.attention.grids import numbered_layers  # noqa: E402
from viewer.controls import (  # noqa: E402
    PRESETS_OWN,
    SAMPLE_CLIP,
    SAMPLE_IMAGES,
    Machine,
    accept_clip,
    accept_image,
    chosen,
    one_line_errors,
    required,
    without_folders,
)
from viewer.images import HEIGHT, choice_of  # noqa: E402
from viewer.page import AnimateTab, AttentionTab, build_page, serve  # noqa: E402

IMAGE = SAMPLE_IMAGES["Rendered person"]
SETTINGS = ("best", PRESETS_OWN, 3, 4, 2, 1.0, 0)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def machine(tiny_pipeline, tmp_path_factory):
    try:
        fetch_models()
    except UserError as error:
        pytest.skip(str(error))
    return Machine(tiny_pipeline, PoseConfig(threads=1), 2**28, tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def tab(machine):
    with gr.Blocks(analytics_enabled=False):
        return AttentionTab(machine)


@pytest.fixture(scope="module")
def ran(tab):
    """What a press of Run sets: run, point, sliders and their means, then everything that is shown."""
    return tab.animate(str(IMAGE), str(SAMPLE_CLIP), *SETTINGS)


class TestInputs:
    def test_bad_files_are_one_line_without_folders(self, tmp_path):
        image, clip = tmp_path / "photo.png", tmp_path / "clip.mp4"
        image.write_text("this is no image")
        clip.write_bytes(b"\0" * 4096)
        for accept, path in ((accept_image, image), (accept_clip, clip)):
            with pytest.raises(gr.Error) as caught:
                accept(str(path))
            assert path.name in caught.value.message and str(tmp_path) not in caught.value.message
            assert "\n" not in caught.value.message and not caught.value.print_exception
            assert caught.value.__suppress_context__, "no traceback of ours"

    def test_good_files_pass(self):
        path, pixels = accept_image(str(IMAGE))
        assert path == str(IMAGE) and pixels.ndim == 3
        assert accept_clip(str(SAMPLE_CLIP)) == (str(SAMPLE_CLIP), str(SAMPLE_CLIP))

    def test_nothing_given(self):
        with pytest.raises(UserError, match="reference: no image was given"):
            required(None, "reference")
        with pytest.raises(UserError, match="driving: no clip was given"):
            required("", "driving")

    def test_programming_errors_are_not_hidden(self):
        with pytest.raises(ZeroDivisionError), one_line_errors():
            1 / 0  # noqa: B018

    @pytest.mark.parametrize(
        ("message", "shown"),
        [
            ("reference=/tmp/a/b.png is bad", "reference=b.png is bad"),
            ("size=[3,4] of x/y", "size=[3,4] of x/y"),
        ],
    )
    def test_only_files_names_are_shown(self, message, shown):
        assert without_folders(message) == shown

    def test_settings(self):
        assert chosen("best", "articulated", 5, 2, 7, 1.5, 0)[1].transform == "articulated"
        sampling, tpc = chosen("paper", PRESETS_OWN, 5.0, 2.0, 7.0, 1.5, 3)
        assert (sampling.num_frames, sampling.stride, sampling.steps, sampling.seed) == (5, 2, 7, 3)
        assert sampling.guidance_scale == 1.5 and (tpc.preset, tpc.transform) == ("paper", None)
        for seed in (None, -1, 0.5):
            with pytest.raises(UserError, match="seed must be a whole number"):
                chosen("best", PRESETS_OWN, 5, 2, 7, 1.5, seed)


class TestAttention:
    def test_run_shows_both_results_and_where_a_keypoint_looks(self, tab, ran):
        run, point, frame, step, all_steps, layer, all_layers, *shown = ran
        assert len(shown) == len(tab.shown)
        assert all_steps and all_layers, "as it is shown"
        assert (frame.maximum, step.maximum) == (2, 1) and layer.maximum == len(run.plain.recorded.layers) - 1
        assert any(np.allclose(point, place) for place in run.keypoints[0])
        where, *images, plain, calibrated = shown
        assert where.startswith("Frame 0, point") and len(images) == 6
        assert all(image.dtype == np.uint8 and image.shape[0] == HEIGHT for image in images)
        assert "calibrated" in calibrated and "calibrated" not in plain

    def test_click_and_choices_need_no_new_run(self, tab, ran):
        run = ran[0]
        choices = (1, 0, False, 0, False)
        event = gr.SelectData(None, {"index": [HEIGHT // 2, HEIGHT // 3], "value": None})
        point, *shown = tab.click(event, run, *choices)
        height = run.reference.shape[0]
        assert point == pytest.approx(((HEIGHT // 2 + 0.5) * height / HEIGHT - 0.5, height / 3), abs=0.7)
        again = tab.show(run, point, *choices)
        assert all(np.array_equal(a, b) for a, b in zip(shown, again, strict=True))
        other = tab.show(run, point, 1, 0, True, 0, False)
        assert other[0] != again[0] and any(
            not np.array_equal(a, b) for a, b in zip(other[1:7], again[1:7], strict=True)
        )

    def test_before_a_run(self, tab):
        event = gr.SelectData(None, {"index": [5, 5], "value": None})
        for call in (
            lambda: tab.show(None, None, 0, 0, True, 0, True),
            lambda: tab.click(event, None, 0, 0, True, 0, True),
        ):
            with pytest.raises(gr.Error, match="press Run first"):
                call()

    def test_numbers_beyond_the_run(self, ran):
        run = ran[0]
        with pytest.raises(UserError, match="frame=3 is out of range; there are 0 to 2"):
            choice_of(run, None, 3, 0, True, 0, True)
        with pytest.raises(UserError, match="step=-1 is out of range; there are 0 to 1"):
            choice_of(run, None, 0, -1, True, 0, True)
        assert choice_of(run, None, 2, 1, False, 0, True).step == 1

    def test_nothing_is_kept_outside_the_session(self, tab, ran):
        kept = [value for value in vars(tab).values() if value is ran[0]]
        assert not kept and tab.run.value is None and tab.point.value is None

    def test_bad_image_of_a_run(self, tab, tmp_path):
        (tmp_path / "photo.png").write_text("no image")
        with pytest.raises(gr.Error, match="photo.png"):
            tab.animate(str(tmp_path / "photo.png"), str(SAMPLE_CLIP), *SETTINGS)


def test_animate_writes_what_infer_writes(machine):
    with gr.Blocks(analytics_enabled=False):
        tab = AnimateTab(machine)
    plain, calibrated, report, strip, comparison = tab.animate(str(IMAGE), str(SAMPLE_CLIP), *SETTINGS)
    for path in (plain, calibrated, comparison):
        assert len(read_video(path).frames) == 3
        metadata = video_metadata(path)
        assert metadata["generated"] is True and metadata["configuration"]["steps"] == 2
        assert Path(path).is_relative_to(machine.folder)
    assert (read_video(plain).frames != read_video(calibrated).frames).any()
    assert Path(strip).suffix == ".png" and report.startswith("3 frames: ")


def test_a_busy_port_is_one_line(tmp_path):
    with gr.Blocks(analytics_enabled=False) as page, socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port} cannot be listened at; choose another port"):
            serve(page, "127.0.0.1", port, tmp_path, wait=False)


@contextmanager
def browser_page(address: str):
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as player:
        # Containers have no name spaces for Chromium's own sandbox; the only page opened is ours.
        browser = player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1400, "height": 1200})
            page.set_default_timeout(120_000)
            page.goto(address)
            yield page
        finally:
            browser.close()


def pixels(page, name: str) -> str:
    """Address of the image a component shows; it changes with its pixels."""
    return page.locator(f"#{name} img").get_attribute("src")


@pytest.mark.slow
def test_in_a_browser(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(machine.folder))
    (tmp_path / "broken.png").write_text("this is no image")
    server = build_page(machine)
    address = serve(server, "127.0.0.1", 0, machine.folder, wait=False)
    try:
        with browser_page(address) as page:
            outside = []
            page.on("request", lambda request: outside.append(request.url))
            page.reload()
            page.locator("#plain img").click()
            page.get_by_text("press Run first").first.wait_for()

            with page.expect_file_chooser() as chooser:
                page.locator("#attention-image").click()
            chooser.value.set_files(tmp_path / "broken.png")
            page.get_by_text("broken.png").first.wait_for()
            assert "Traceback" not in page.content()
            assert page.locator("#attention-reference img").is_visible(), "the sample stays chosen"

            page.get_by_text("Settings", exact=True).first.click()
            for label, value in (("Frames", 3), ("Stride", 4), ("Steps", 2)):
                page.get_by_label(f"number input for {label}").first.fill(str(value))
            page.locator("#attention-run").click()
            page.locator("#where").get_by_text("point").wait_for()
            first = pixels(page, "plain-reference"), pixels(page, "calibrated-image")

            page.locator("#calibrated img").click(position={"x": 30, "y": 40})
            page.wait_for_function(
                "before => document.querySelector('#plain-reference img').src != before", arg=first[0]
            )
            assert pixels(page, "calibrated-image") != first[1], "the click shows on both sides"
            chosen_point = page.locator("#where").inner_text()

            page.locator("#frame input[type=range]").fill("2")
            page.locator("#where").get_by_text("Frame 2").wait_for()
            page.locator("#all-steps input").click()
            page.locator("#step input[type=range]").fill("1")
            page.locator("#where").get_by_text("step 1").wait_for()
            page.locator("#all-layers input").click()
            page.locator("#layer input[type=range]").fill("2")
            third = list(numbered_layers(list(machine.pipeline.attention_run(1, (32, 32), 1).layers)).values())[2]
            page.locator("#where").get_by_text(f"layer {third}, ").wait_for()
            assert page.locator("#where").inner_text().split(":")[0].split(",", 1)[1] in chosen_point
            assert not [url for url in outside if not url.startswith((address, "data:", "blob:"))]
    finally:
        server.close()
