"""`prepare.py` as it is used: from a video to training steps, its tasks and its errors."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import prepare
from core.errors import UserError
from data.preparation.manifest import read_manifest
from tests.filmed import damage, figure_film, save_prepared_videos
from tests.training_runs import TINY_NETWORKS, train

ROOT = Path(__file__).parents[2]
MOTION = ["stage=motion", "batch_size=2", "max_steps=2", "log_steps=1", "mixed_precision=no", "data.source=videos"]
MOTION += ["data.size=[32,32]", "data.num_frames=3", "data.stride=2", "data.workers=1", *TINY_NETWORKS]


def error_line(printed: str) -> str:
    """The one line that tells the user what is wrong; no traceback beside it."""
    (line,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert "Traceback" not in printed
    return line


def losses(output: Path) -> list[float]:
    events = EventAccumulator(str(output / "logs"))
    events.Reload()
    return [event.value for event in events.Scalars("loss")]


@pytest.fixture(scope="module")
def vae(tiny_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    tiny_pipeline.vae.save_pretrained(folder)
    return folder


@pytest.fixture
def videos(tmp_path) -> Path:
    return save_prepared_videos(tmp_path / "videos", {"a": figure_film(6), "b": figure_film(7)})


@pytest.mark.slow
def test_a_video_becomes_training_steps(vae, tmp_path, capsys):
    """The real estimator on the shipped clip; the validator; cached latents; two steps with and without them."""
    dataset = tmp_path / "set"
    prepare.main([f"source={ROOT / 'assets/samples'}", f"output={dataset}"])
    assert "1 clips for training, 0 left out" in capsys.readouterr().out
    prepare.main(["check", f"dataset={dataset}", "size=[32,32]", "num_frames=3", "stride=2", "crop=pad"])
    assert "1 of 1 clips without errors, 16 frames" in capsys.readouterr().out
    assert json.loads((dataset / "report.json").read_text())["clips"][0]["missing_joints"] < 0.1
    prepare.main(["latents", f"dataset={dataset}", f"vae={vae}", "size=[32,32]", "crop=pad", "device=cpu"])
    assert "latents of 1 clips made, 0 were there" in capsys.readouterr().out
    shared = [*MOTION, f"data.root={dataset}", "data.crop=pad", f"model.vae={vae}"]
    train(tmp_path / "plain.log", *shared, f"output={tmp_path / 'plain'}")
    train(tmp_path / "cached.log", *shared, f"output={tmp_path / 'cached'}", f"data.latents={dataset / 'latents'}")
    expected = losses(tmp_path / "plain")
    assert len(expected) == 2 and losses(tmp_path / "cached") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_training_on_nothing_usable_ends_in_one_line(vae, videos, tmp_path):
    """Clips that are too short are seen before the first step, damage in a loader process."""
    arguments = [*MOTION, f"output={tmp_path / 'out'}", f"data.root={videos}", f"model.vae={vae}", "data.crop=pad"]
    short = train(tmp_path / "short.log", *arguments, "data.stride=4", expect=2)
    assert error_line(short) == (
        f"error: root={videos} holds no clip that can be used: 2 of 2 clips are left out: 2 too short (a, b); "
        "num_frames=3 at stride=4 needs 9 frames, the longest clip has 7"
    )
    for name in "ab":
        damage(videos / f"{name}.mp4")
    broken = train(tmp_path / "broken.log", *arguments, expect=2)
    line = error_line(broken)
    assert line.startswith(f"error: root={videos}: none of 2 clips can be read") and "prepare.py check" in line
    assert broken.count("is left out from now on") == 2


def test_tasks_run_on_a_whole_data_set(videos, tmp_path, capsys):
    output = tmp_path / "set"
    prepare.main([f"source={videos}", f"output={output}", "num_shards=2", "shard=0"])
    assert "1 clips for training, 0 left out, 1 to be prepared by others" in capsys.readouterr().out
    prepare.main([f"source={videos}", f"output={output}", "num_shards=2", "shard=1"])
    assert "(part 2 of 2)" in capsys.readouterr().out
    prepare.main([f"source={videos}", f"output={output}"])
    assert "0 clips prepared, 2 were done before" in capsys.readouterr().out
    assert len(read_manifest(output).clips) == 2


def test_check_ends_with_code_1_when_a_clip_has_an_error(videos, tmp_path, capsys):
    prepare.main(["check", f"dataset={videos}", f"output={tmp_path / 'report'}"])
    assert (tmp_path / "report" / "report.md").is_file() and not (videos / "report.json").exists()
    with pytest.raises(SystemExit) as ended:
        prepare.main(["check", f"dataset={videos}", f"output={tmp_path / 'report'}", "num_frames=24"])
    assert ended.value.code == 1 and "error: too short" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["chek", "dataset=x"],
            "one of check, latents, embeddings, got 'chek'; the nearest is 'check'",
        ),
        (["output=x"], "source= is required"),
        (["source=nowhere", "output=x"], "source=.*nowhere does not exist"),
        (["source=x", "output=y", "fps=3"], "unknown key 'fps'"),
        (["source=x", "output=y", "shard=2"], "shard=2"),
        (["check", "data=x"], "unknown key 'data'; the nearest known one is 'dataset'"),
        (["latents", "dataset=x"], "dataset=x is not prepared"),
        (["latents"], "dataset= is required"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, named):
    with pytest.raises(UserError, match=named) as caught:
        prepare.main(arguments)
    assert "\n" not in str(caught.value)


def test_a_source_without_one_usable_clip_is_an_error(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"garbage")
    with pytest.raises(UserError, match="none of 1 clips can be used; the reasons are above"):
        prepare.main([f"source={tmp_path / 'videos'}", f"output={tmp_path / 'set'}"])
    assert "left out: a: clip=" in capsys.readouterr().out
