"""`infer.py` as a user runs it: results, the demo, lists of pairs, and every kind of bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import infer
import tpc.__main__
from core.errors import UserError
from data.clips.rendered import RenderedPeople
from data.poses.poses import Poses
from data.video.files import read_video, video_metadata, write_video
from inference.animate import sampling_plan, upscaled
from inference.config import SamplingConfig
from tests.clips import given
from tests.published import small_magic_pipeline
from tests.sound import loud, write_clip_with_a_beep

ROOT = Path(__file__).parents[2]
QUICK = ["steps=2", "num_frames=3", "size=[32,32]"]


@pytest.fixture(scope="module")
def model(tiny_pipeline, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline.save_pretrained(folder)
    return f"model={folder}"


@pytest.fixture(scope="module")
def result(model, inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("results") / "run"
    infer.main([*given(inputs), model, f"output={output}", *QUICK])
    return output


def test_all_files_are_there_and_nothing_else(result):
    names = {path.name for path in result.iterdir()}
    assert names == {"animation.mp4", "comparison.mp4", "comparison.png", "result.json", "config.yaml", "calibration"}
    assert read_video(result / "animation.mp4").frames.shape == (3, 32, 32, 3)


def test_result_says_what_was_done(result):
    written = json.loads((result / "result.json").read_text())
    assert written["generated"] is True and written["seed"] == 0 and written["frames"] == 3
    assert written["configuration"]["steps"] == 2
    assert written["calibration"]["calibrated"] == 3
    assert {"calibration", "sampling with TPC", "sampling without TPC"} <= written["seconds"].keys()


def test_videos_say_that_they_are_generated(result):
    for name in ("animation.mp4", "comparison.mp4"):
        metadata = video_metadata(result / name)
        assert metadata["generated"] is True and metadata["generator"].startswith("TPC-Animate")
        assert metadata["configuration"]["steps"] == 2


def test_comparison_has_five_columns(result):
    width = Image.open(result / "comparison.png").width
    assert width == 5 * (256 + 4)


def test_calibration_is_that_of_the_calibration_command(result, inputs, tmp_path):
    """Both commands find the same transforms: original reference pixels to original driving pixels."""
    arguments = [*given(inputs), f"output={tmp_path / 'c'}"]
    tpc.__main__.main(arguments)
    reports = [
        json.loads((folder / "calibration.json").read_text()) for folder in (result / "calibration", tmp_path / "c")
    ]
    for frame in range(2):
        matrices = [report["frames"][frame]["persons"][0]["matrix"] for report in reports]
        # The clip is three frames long here and longer there: smoothing sees more neighbours.
        assert np.allclose(matrices[0], matrices[1], atol=2.0)


def test_same_seed_same_images_and_without_tpc_no_calibration(result, model, inputs, tmp_path):
    output = tmp_path / "plain"
    infer.main([*given(inputs), model, f"output={output}", "tpc.enabled=false", *QUICK])
    assert not (output / "calibration").exists()
    assert Image.open(output / "comparison.png").width == 3 * (256 + 4)
    sheet, plain = (np.asarray(Image.open(folder / "comparison.png")) for folder in (result, output))
    column = slice(2 * 260, 3 * 260)
    assert np.array_equal(plain[:, column], sheet[:, 3 * 260 : 4 * 260])


def test_poses_are_retargeted_without_tpc_too(result, model, inputs, tmp_path):
    asked = ["tpc.enabled=false", "pose.retarget=bones", "pose.height_ratio=0.5"]
    infer.main([*given(inputs), model, f"output={tmp_path / 'o'}", *asked, *QUICK])
    drawn, usual = (np.asarray(Image.open(folder / "comparison.png")) for folder in (tmp_path / "o", result))
    column = slice(260, 520)  # of the poses, which TPC alone does not move
    assert drawn.shape[0] == usual.shape[0] and not np.array_equal(drawn[:, column], usual[:, column])
    assert json.loads((tmp_path / "o" / "result.json").read_text())["configuration"]["pose"]["retarget"] == "bones"


def test_driving_poses_alone_are_enough(model, inputs, tmp_path, capsys):
    arguments = [a for a in given(inputs) if not a.startswith(("driving=", "driving_masks="))]
    infer.main([*arguments, model, f"output={tmp_path / 'o'}", "tpc.preset=paper", "tpc.groups=30", *QUICK])
    printed = capsys.readouterr().out
    assert "note: tpc.groups=30 gives each of the 3 frames a group of its own" in printed
    assert "calibration: 3 calibrated, 0 interpolated, 0 uncalibrated" in printed
    assert f"= 8 passes; results in {tmp_path / 'o'}" in printed  # two steps, guidance, without and with TPC
    written = json.loads((tmp_path / "o" / "result.json").read_text())
    assert written["frames"] == 3 and written["calibration"]["calibrated"] == 3
    assert written["configuration"]["driving"] is None
    assert read_video(tmp_path / "o" / "animation.mp4").frames.shape == (3, 32, 32, 3)
    assert len(json.loads((tmp_path / "o" / "calibration" / "calibration.json").read_text())["frames"]) == 3


@pytest.mark.parametrize(
    ("settings", "calibrated", "told"),
    [
        ({}, True, "3 steps x 2 (guidance 2) x 2 (without and with TPC) = 12 passes"),
        ({"guidance_scale": 1.0}, False, "3 steps = 3 passes"),
        ({"window_size": 4, "window_overlap": 1, "compare": False}, True, "3 steps x 2 (guidance 2) x 3 windows of 4"),
    ],
)
def test_passes_are_counted_beforehand(settings, calibrated, told, tiny_pipeline):
    told = f"8 frames of 64 x 32 pixels; {told}"
    assert sampling_plan(tiny_pipeline, 8, (64, 32), SamplingConfig(steps=3, **settings), calibrated).startswith(told)


@pytest.fixture(scope="module")
def magic_model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("magic")
    small_magic_pipeline().save_pretrained(folder)
    return f"model={folder}"


@pytest.fixture(scope="module")
def densepose(inputs, tmp_path_factory) -> Path:
    """Images of parts in flat colours, as DensePose draws them: a folder of 6 and a video."""
    folder = tmp_path_factory.mktemp("densepose")
    (folder / "images").mkdir()
    frames = read_video(inputs / "driving.mp4").frames // 64 * 64
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / "images" / f"{number:04d}.png")
    write_video(folder / "video.mp4", frames, 8.0)
    return folder


def test_densepose_images_drive_magic_animate(magic_model, inputs, densepose, tmp_path):
    """A video alone without TPC; a folder, with the driving clip's poses, with TPC."""
    reference = f"reference={inputs / 'reference.png'}"
    plain = [
        reference,
        f"pose_images={densepose / 'video.mp4'}",
        "tpc.enabled=false",
        f"output={tmp_path / 'plain'}",
    ]
    infer.main([*plain, magic_model, *QUICK])
    assert read_video(tmp_path / "plain" / "animation.mp4").frames.shape == (3, 32, 32, 3)
    shown = np.asarray(Image.open(tmp_path / "plain" / "comparison.png"))[26:276, 264:516]
    first = Image.fromarray(read_video(densepose / "video.mp4").frames[0]).resize((256, 256))
    assert np.abs(shown.mean((0, 1)) - np.asarray(first).mean((0, 1))).max() < 12

    images = f"pose_images={densepose / 'images'}"
    infer.main([*given(inputs), images, magic_model, f"output={tmp_path / 'tpc'}", "compare=false", *QUICK])
    written = json.loads((tmp_path / "tpc" / "result.json").read_text())
    assert written["calibration"]["calibrated"] == 3 and written["frames"] == 3


def test_pose_images_take_the_place_of_drawn_figures(model, inputs, densepose, tmp_path):
    common = [*given(inputs), model, "tpc.enabled=false", "steps=1", "num_frames=2", "size=[32,32]"]
    infer.main([*common, f"output={tmp_path / 'drawn'}"])
    infer.main([*common, f"pose_images={densepose / 'images'}", f"output={tmp_path / 'given'}"])
    drawn, given_ = (read_video(tmp_path / name / "animation.mp4").frames for name in ("drawn", "given"))
    assert drawn.shape == given_.shape and not np.array_equal(drawn, given_)


def test_odd_shapes_and_default_size(model, inputs, tmp_path):
    """A wide driving clip gives a wide result of about the model's area."""
    video = read_video(inputs / "driving.mp4")
    wide = np.pad(video.frames, ((0, 0), (0, 0), (37, 36), (0, 0)), mode="edge")
    write_video(tmp_path / "wide.mp4", wide, video.fps)
    poses = Poses.load(inputs / "driving.npz")
    Poses(poses.keypoints + np.float32([37, 0]), poses.scores, wide.shape[2:0:-1], poses.fps).save(tmp_path / "w.npz")
    arguments = [f"driving={tmp_path / 'wide.mp4'}", f"driving_poses={tmp_path / 'w.npz'}"]
    arguments += [f"reference={inputs / 'reference.png'}", f"reference_poses={inputs / 'reference.npz'}"]
    infer.main([*arguments, model, f"output={tmp_path / 'o'}", "steps=1", "num_frames=2"])
    width, height = json.loads((tmp_path / "o" / "result.json").read_text())["size"]
    assert width > height and 0.7 < width * height / 32**2 < 1.4


def test_results_at_the_size_of_the_driving_video_with_its_sound(model, inputs, tmp_path):
    """A second and a half of a wide video; the reference fills the frame, which changes the result."""
    frames = np.tile(read_video(inputs / "driving.mp4").frames, (2, 1, 1, 1))[:12]
    wide = np.pad(frames, ((0, 0), (0, 0), (37, 37), (0, 0)), mode="edge")
    write_clip_with_a_beep(tmp_path / "wide.mov", wide, 8, "libx264", "aac")
    points = np.tile(Poses.load(inputs / "driving.npz").keypoints, (2, 1, 1, 1))[:12] + np.float32([37, 0])
    Poses(points, np.ones(points.shape[:3]), (170, 96), 8.0).save(tmp_path / "wide.npz")
    given = [f"driving={tmp_path / 'wide.mov'}", f"driving_poses={tmp_path / 'wide.npz'}"]
    given += [f"reference={inputs / 'reference.png'}", f"reference_poses={inputs / 'reference.npz'}", model]
    given += ["steps=1", "tpc.keypoints=trunk", "stride=2", "compare=false"]
    for fit in ("contain", "cover"):
        infer.main([*given, f"output={tmp_path / fit}", f"reference_fit={fit}", "upscale=source", "cuts=[3]"])
    contained, covered = (read_video(tmp_path / fit / "animation.mp4") for fit in ("contain", "cover"))
    assert contained.frames.shape == (6, 96, 170, 3) and contained.fps == 4
    assert not np.array_equal(contained.frames, covered.frames)
    for name in ("animation.mp4", "comparison.mp4"):
        codec, first, last, _ = loud(tmp_path / "cover" / name)
        assert codec == "aac" and abs(first - 1) < 0.03 and abs(last - 1.1) < 0.03
    assert json.loads((tmp_path / "cover" / "result.json").read_text())["cuts"] == [3]
    square = np.full((1, 32, 32, 3), 9, np.uint8)  # of another shape than the video, which gives the resolution
    np.testing.assert_array_equal(next(upscaled(square, (170, 96))), np.full((96, 96, 3), 9))


def test_pairs_run_once(model, inputs, tmp_path):
    common = dict(argument.split("=", 1) for argument in given(inputs))
    lines = [json.dumps({**common, "output": str(tmp_path / name)}) for name in ("a", "b")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8-sig")
    command = [f"pairs={tmp_path / 'pairs.jsonl'}", model, "compare=false", *QUICK]
    infer.main(command)
    times = [(tmp_path / name / "result.json").stat().st_mtime_ns for name in ("a", "b")]
    infer.main(command)
    assert times == [(tmp_path / name / "result.json").stat().st_mtime_ns for name in ("a", "b")]


def test_pairs_side_by_side(model, inputs, tmp_path, capsys):
    """The next pair read and the last one written in threads: the same files, lines, and error of the third pair."""
    Poses.load(inputs / "driving.npz")[:1].save(tmp_path / "short.npz")
    common = dict(argument.split("=", 1) for argument in given(inputs))
    lines = [json.dumps(common)] * 2 + [json.dumps(common | {"driving_poses": str(tmp_path / "short.npz")})]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    command, said = [f"pairs={tmp_path / 'pairs.jsonl'}", model, "compare=false", *QUICK], {}
    for folder in ("one_by_one", "beside"):
        with pytest.raises(UserError, match="driving_poses=.*short.npz has 1 frames"):
            infer.main([*command, f"output={tmp_path / folder}", f"prefetch={folder == 'beside'}"])
        said[folder] = capsys.readouterr().out.replace(folder, "").splitlines()[2:]
        assert not list((tmp_path / folder / "0003").iterdir())
    assert said["beside"][:2] == [line for line in said["one_by_one"] if "results in" in line]
    assert said["beside"][2:] == [line for line in said["one_by_one"] if "results in" not in line]
    for name in ("0001", "0002"):
        one, other = (
            [np.stack([np.asarray(Image.open(file)) for file in sorted((folder / "calibration").rglob("*_p0.png"))])]
            + [read_video(folder / f"{video}.mp4").frames for video in ("animation", "comparison")]
            for folder in (tmp_path / "one_by_one" / name, tmp_path / "beside" / name)
        )
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_demo_at_reduced_size(tmp_path):
    """No argument but the size of the work: shipped model, shipped samples, real pose estimation."""
    command = [sys.executable, "infer.py", f"output={tmp_path / 'demo'}", "steps=2", "num_frames=4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("rendered", "photo"):
        written = json.loads((tmp_path / "demo" / name / "result.json").read_text())
        assert written["calibration"]["calibrated"] == 4
        assert str(tmp_path / "demo" / name) in done.stdout
    record = json.loads((tmp_path / "demo" / "rendered" / "calibration" / "calibration.json").read_text())
    person = record["frames"][0]["persons"][0]
    # The sample is turned by 100 degrees clockwise; calibration turns it back.
    assert abs(person["rotation_deg"] + 100) < 15


class TestBadInput:
    """Each ends in one line that names the argument, and leaves no result."""

    def fails(self, arguments: list[str], match: str, output: Path) -> None:
        with pytest.raises(UserError, match=match) as caught:
            infer.main([*arguments, f"output={output}"])
        assert "\n" not in str(caught.value).strip()
        assert not (output / "result.json").is_file()

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"reference": "nowhere.png"}, "reference=nowhere.png does not exist"),
            ({"driving": "nowhere.mp4"}, "driving=nowhere.mp4"),
            ({"model": "nowhere"}, "model=nowhere does not exist"),
            ({"steps": "0"}, "steps=0"),
            ({"upscale": "4k"}, "upscale=4k must be source, or null"),
            ({"reference_fit": "crop"}, "reference_fit=crop must be one of cover, contain"),
            ({"cuts": "[3]"}, r"cuts=\[3\] must be frames in order"),
            ({"num_frames": "0"}, "num_frames=0"),
            ({"size": "[30,32]"}, "size="),
            ({"size": "[32]"}, "size="),
            ({"stepz": "3"}, "unknown key 'stepz'.*'steps'"),
            ({"tpc.presett": "paper"}, "unknown key.*tpc.preset"),
            ({"tpc.preset": "papper"}, "tpc.preset"),
            ({"device": "warp"}, "device=warp"),
            ({"dtype": "int3"}, "dtype=int3"),
            ({"reference_poses": "nowhere.npz"}, "reference_poses=nowhere.npz"),
            ({"driving_masks": "nowhere"}, "driving_masks=nowhere"),
        ],
    )
    def test_a_wrong_argument(self, model, inputs, tmp_path, change, match):
        arguments = dict(argument.split("=", 1) for argument in [*given(inputs), model, *QUICK])
        self.fails([f"{key}={value}" for key, value in {**arguments, **change}.items()], match, tmp_path / "o")

    def test_files_of_the_wrong_kind(self, model, inputs, tmp_path):
        text, empty = tmp_path / "text.png", tmp_path / "empty.mp4"
        text.write_text("not an image")
        empty.write_bytes(b"")
        cut = tmp_path / "cut.mp4"
        cut.write_bytes((inputs / "driving.mp4").read_bytes()[:2000])
        base = dict(argument.split("=", 1) for argument in [*given(inputs), model, *QUICK])
        for change in ({"reference": text}, {"driving": text}, {"driving": empty}, {"driving": cut}):
            (key,) = change
            self.fails([f"{k}={v}" for k, v in {**base, **change}.items()], f"{key}=", tmp_path / "o")

    def test_nobody_in_the_image_or_the_video(self, model, inputs, tmp_path):
        Image.fromarray(np.full((96, 96, 3), 90, np.uint8)).save(tmp_path / "grey.png")
        write_video(tmp_path / "grey.mp4", [np.full((96, 96, 3), 90, np.uint8)] * 4, 8)
        arguments = dict(argument.split("=", 1) for argument in [*given(inputs), model, *QUICK])
        grey = {k: v for k, v in arguments.items() if k not in ("reference_poses", "reference_mask")}
        grey["reference"] = str(tmp_path / "grey.png")
        self.fails([f"{k}={v}" for k, v in grey.items()], "reference=.*no person", tmp_path / "o")
        infer.main([*(f"{k}={v}" for k, v in grey.items()), "tpc.enabled=false", f"output={tmp_path / 'off'}"])
        assert (tmp_path / "off" / "result.json").is_file()
        empty = {k: v for k, v in arguments.items() if k not in ("driving_poses", "driving_masks")}
        empty["driving"] = str(tmp_path / "grey.mp4")
        self.fails([f"{k}={v}" for k, v in empty.items()], "driving=.*no person", tmp_path / "o")

    def test_output_that_is_a_file(self, model, inputs, tmp_path):
        (tmp_path / "o").write_text("x")
        self.fails([*given(inputs), model, *QUICK], "output=.* is a file", tmp_path / "o")
        assert (tmp_path / "o").read_text() == "x"

    def test_only_one_of_two(self, model, inputs, tmp_path):
        self.fails([given(inputs)[0], model], "driving= is required", tmp_path / "o")
        self.fails([given(inputs)[1], model], "reference= is required", tmp_path / "o")

    def test_models_that_no_figure_can_be_drawn_for(self, magic_model, inputs, densepose, tmp_path):
        self.fails([*given(inputs), magic_model, *QUICK], "pose_images= is required.*DensePose", tmp_path / "o")
        images = [given(inputs)[0], f"pose_images={densepose / 'video.mp4'}"]
        self.fails([*images, magic_model], "TPC needs driving= or driving_poses=", tmp_path / "o")
        self.fails([images[1], magic_model], "reference= is required", tmp_path / "o")
        self.fails(
            [images[0], "pose_images=nowhere", "tpc.enabled=false", magic_model], "pose_images=nowhere", tmp_path
        )

    def test_lists_with_mistakes(self, model, tmp_path):
        pairs = tmp_path / "pairs.jsonl"
        mistakes = [("", "no line"), ("{", "line 1"), ('{"refrence": "a"}', "refrence"), ("[1]", "line 1: the line")]
        for value in ("7", "[]", "{}", "true"):
            mistakes.append((f'{{"reference": {value}}}', r"line 1: reference=.* is not text; give a path in quotes"))
        for text, match in mistakes:
            pairs.write_text(text)
            self.fails([f"pairs={pairs}", model], match, tmp_path / "o")

    def test_as_a_command_one_line_and_code_2(self, tmp_path):
        done = subprocess.run(
            [sys.executable, "infer.py", "reference=nowhere.png", "driving=x.mp4", f"output={tmp_path / 'o'}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert lines == ["error: reference=nowhere.png does not exist"]
        assert "Traceback" not in done.stderr


def test_rendered_pair_is_what_the_data_set_holds(inputs):
    item = RenderedPeople(size=(96, 96), num_frames=6, stride=3, split="heldout", seed=1, length=1)[0]
    poses = Poses.load(inputs / "driving.npz")
    assert np.allclose(poses.keypoints[:, 0], item["keypoints"][..., :2])
