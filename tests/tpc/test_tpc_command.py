"""`python -m tpc` from files to files, and what it says when it cannot."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from core.errors import UserError
from data.config import SAMPLES
from data.video.files import read_video, write_video
from tests.tpc_bodies import body, place, poses, silhouette
from tpc import Calibration
from tpc.__main__ import frame_size, main

ROOT = Path(__file__).parents[2]
SIZE = (96, 80)
FRAMES = 6


def save_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(path), mask.astype(np.uint8) * 255)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two persons in an image and in a clip, as files."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    people = np.stack([place(body(rng), 50, 0.4, (25, 42)), place(body(rng), 45, -0.3, (68, 40))])
    driving = np.stack([people * 0.9 + [f, 3] for f in range(FRAMES)])
    scores = np.ones((FRAMES, 2, 17))
    scores[4, 0] = 0
    cv2.imwrite(str(folder / "reference.png"), rng.integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8))
    write_video(folder / "driving.mp4", rng.integers(0, 256, (FRAMES, SIZE[1], SIZE[0], 3), np.uint8), 25.0)
    poses(people[None], SIZE).save(folder / "reference.npz")
    poses(driving, SIZE, scores).save(folder / "driving.npz")
    poses(people[:1][None], SIZE).save(folder / "one.npz")
    poses(driving[:, :1], SIZE).save(folder / "one_driving.npz")
    for person in range(2):
        save_mask(folder / "reference_masks" / f"p{person}.png", silhouette(people[person], SIZE))
        for frame in range(FRAMES):
            save_mask(folder / "masks" / f"{frame:06d}_p{person}.png", silhouette(driving[frame, person], SIZE))
    for frame in range(FRAMES):
        save_mask(folder / "one_masks" / f"{frame:06d}.png", silhouette(driving[frame, 0], SIZE))
    save_mask(folder / "reference_mask.png", silhouette(people[0], SIZE))
    return folder


def arguments(files: Path, output: Path, **options: str) -> list[str]:
    given = {
        "reference": files / "reference.png",
        "output": output,
        "reference_poses": files / "one.npz",
        "driving_poses": files / "one_driving.npz",
        **options,
    }
    return [f"{key.replace('__', '.')}={value}" for key, value in given.items() if value is not None]


def test_two_persons_with_everything_given(files, tmp_path, capsys):
    output = tmp_path / "new" / "out"
    main(
        arguments(
            files,
            output,
            driving=files / "driving.mp4",
            reference_poses=files / "reference.npz",
            driving_poses=files / "driving.npz",
            reference_mask=files / "reference_masks",
            driving_masks=files / "masks",
        )
    )
    report = json.loads((output / "calibration.json").read_text())
    assert report["reference"] == {"size": list(SIZE), "persons": 2}
    assert report["driving"] == {"size": list(SIZE), "frames": FRAMES, "fps": 25.0}
    assert [len(frame["persons"]) for frame in report["frames"]] == [2] * FRAMES
    assert report["frames"][4]["persons"][0]["status"] == "interpolated"
    assert report["summary"]["calibrated"] == 2 * FRAMES - 1 and report["summary"]["interpolated"] == 1
    first = report["frames"][0]["persons"][1]
    assert set(first) >= {"person", "status", "reason", "matrix", "scale", "rotation_deg", "keypoints", "residual_px"}
    assert first["scale"] == pytest.approx(0.9, abs=0.02) and first["mask_iou"] > 0.8
    for frame in range(FRAMES):
        for person in range(2):
            name = output / "calibrated" / f"{frame:06d}_p{person}"
            assert cv2.imread(f"{name}.png").shape == (SIZE[1], SIZE[0], 3)
            assert set(np.unique(cv2.imread(f"{name}_mask.png", cv2.IMREAD_GRAYSCALE))) == {0, 255}
    video = read_video(output / "calibrated.mp4")
    assert video.frames.shape == (FRAMES, SIZE[1], 2 * SIZE[0], 3)
    assert cv2.imread(str(output / "report.png")).shape[0] > 500
    assert sorted(p.name for p in output.iterdir()) == [
        "calibrated", "calibrated.mp4", "calibration.json", "calibration.npz", "config.yaml", "report.png",
    ]  # fmt: skip
    assert Calibration.load(output).report() == report
    assert (
        "11 calibrated, 1 interpolated, 0 uncalibrated (the person is not in the frame: 1); see"
        in capsys.readouterr().out
    )


def test_poses_alone_are_enough_and_options_are_obeyed(files, tmp_path, capsys):
    options = {
        "tpc__preset": "release",
        "tpc__keypoints": "all",
        "tpc__transform": "affine",
        "max_side": "48",
        "stride": "2",
        "tpc__groups": "3",
    }
    main(arguments(files, tmp_path / "out", **options))
    report = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert report["driving"]["frames"] == FRAMES // 2 and report["size"] == [48, 40]
    config = report["config"]
    assert (config["preset"], config["keypoints"], config["transform"]) == ("release", "all", "affine")
    assert config["propagation"] == "hold"
    assert "note: tpc.groups=3 gives each of the 3 frames a group of its own" in capsys.readouterr().out


def test_an_output_folder_keeps_other_files(files, tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    for _ in range(2):
        main(
            arguments(files, tmp_path, driving_masks=files / "one_masks", reference_mask=files / "reference_mask.png")
        )
    assert (tmp_path / "notes.txt").read_text() == "precious"
    assert len(list((tmp_path / "calibrated").iterdir())) == 2 * FRAMES


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"reference": "missing.png"}, "reference=missing.png does not exist"),
        ({"driving_poses": None}, "driving= or driving_poses="),
        ({"driving": "missing.mp4"}, "driving=missing.mp4 does not exist"),
        ({"tpc__preset": "papr"}, "tpc.preset=papr must be one of best, paper, release"),
        ({"tpc__keypoint": "all"}, "tpc.keypoints"),
        ({"tpc__min_keypoints": "many"}, "min_keypoints"),
        ({"max_side": "-1"}, "max_side=-1"),
        ({"stride": "0"}, "stride=0"),
        ({"max_frames": "0"}, "max_frames=0"),
        ({"reference_poses": "{files}/driving.npz"}, "reference_poses"),
        ({"reference_poses": "{files}/reference.png"}, "reference_poses=.*as poses"),
        ({"driving_poses": "{files}/reference_mask.png"}, "as poses"),
        ({"reference": "{files}/one.npz"}, "reference="),
        ({"reference_mask": "{files}/wrong.png"}, "is 10x12, the image is 96x80"),
        ({"reference_mask": "{files}/one.npz"}, "reference_mask="),
        ({"driving_masks": "{files}/reference_masks"}, "000000"),
        ({"driving_masks": "{files}/reference.png"}, "is not a folder"),
    ],
)
def test_user_errors_are_one_line_and_leave_nothing(files, tmp_path, options, match):
    save_mask(files / "wrong.png", np.ones((12, 10), bool))
    options = {key: value and str(value).format(files=files) for key, value in options.items()}
    with pytest.raises(UserError, match=match) as error:
        main(arguments(files, tmp_path / "out", **options))
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_user_error_ends_the_process_with_code_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "tpc",
        "reference=missing.png",
        "driving=missing.mp4",
        f"output={tmp_path / 'out'}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: reference=missing.png does not exist" and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_frame_size_keeps_the_aspect_ratio():
    assert frame_size((1920, 1080), 0) == (1920, 1080)
    assert frame_size((1920, 1080), 512) == (512, 288)
    assert frame_size((3, 4000), 100) == (1, 100)


def test_interrupted_it_ends_with_one_line_and_no_folder(tmp_path):
    # A shell's background jobs, which tests may run in, ignore Ctrl-C.
    program = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "sys.argv[1:] = sys.argv[2:]; runpy.run_module('tpc', run_name='__main__')"
    inputs = [
        f"reference={SAMPLES / 'photo.jpg'}",
        f"driving={SAMPLES / 'dance.mp4'}",
        f"output={tmp_path / 'a' / 'b'}",
        "max_side=2000",  # so that there is more to do than a busy machine can be late for
    ]
    command = [sys.executable, "-c", program, "tpc", *inputs]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        begun = b""
        while begun.count(b"%|") < 2 and (char := process.stderr.read(1)):
            begun += char
        process.send_signal(signal.SIGINT)
        lines = process.stderr.read().decode().splitlines()
    assert process.returncode == 130
    assert lines[-1] == "error: interrupted" and not any("Traceback" in line for line in lines)
    assert not list(tmp_path.iterdir())
