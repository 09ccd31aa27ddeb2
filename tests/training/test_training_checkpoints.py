"""Runs that are killed, stopped, or out of room: nothing is lost, and the same command goes on exactly."""

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from core.errors import UserError
from core.files import locked_folder, remove_leftovers
from tests.filmed import figure_film, save_prepared_videos
from tests.training_runs import ARGUMENTS, Fork, difference, logged, make_vae, start_two, train, weights
from training.checkpoint import (
    PROGRESS,
    Layout,
    check_layout,
    checkpoints,
    publish,
    retire,
)

STEPS = 24
KILLS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def arguments(folder) -> list[str]:
    """A run of 24 steps of two clips with a checkpoint at every second step."""
    return [
        *ARGUMENTS,
        "stage=image",
        f"model.vae={make_vae(folder / 'vae')}",
        f"data.cache={folder / 'cache'}",
        f"max_steps={STEPS}",
        "checkpoint_steps=2",
        "total_batch_size=2",
    ]


@pytest.fixture(scope="module")
def undisturbed(folder, arguments) -> Path:
    train(folder / "undisturbed.log", *arguments, f"output={folder / 'undisturbed'}")
    return folder / "undisturbed"


def kill_at_random(start, output: Path) -> None:
    """Start a run and kill its processes, six times: around the next checkpoints, every third time within one."""
    rng = random.Random(0)
    for number in range(KILLS):
        within = number % 3 == 0
        done = newest(output)
        target = done + 2 * rng.randint(0, 1)
        forks = start()
        while all(fork.process.is_alive() for fork in forks):
            if any(output.glob(".checkpoint-*.partial")) if within else newest(output) >= target:
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01 if within else 0.05))
        for fork in forks:
            fork.process.kill()
        for fork in forks:
            fork.process.join()
        assert forks[0].process.exitcode == -signal.SIGKILL, forks[0].log.read_text()


def newest(output: Path) -> int:
    """Step of the newest complete checkpoint."""
    return max([step for step, _ in checkpoints(output)], default=0) if output.is_dir() else 0


def test_killed_at_any_moment_the_run_ends_as_if_it_had_not_been(folder, arguments, undisturbed):
    output, log = folder / "killed", folder / "killed.log"
    command = [*arguments, f"output={output}"]
    kill_at_random(lambda: [Fork(log, "train.py", command)], output)
    train(log, *command)
    assert difference(output / "pipeline", undisturbed / "pipeline") == 0
    assert [step for step, _ in checkpoints(output)] == [STEPS - 2, STEPS]
    assert not list(output.glob(".checkpoint-*")) and not list(output.glob(".pipeline*"))
    losses, others = logged(output), logged(undisturbed)
    assert losses == {step: others[step] for step in losses}


def test_two_killed_processes_end_as_undisturbed_ones(folder, arguments):
    outputs, log = (folder / "two", folder / "killed_two"), folder / "two.log"
    commands = [[*arguments, "batch_size=1", f"output={output}"] for output in outputs]
    kill_at_random(lambda: start_two(log, *commands[1]), outputs[1])
    for command in commands:
        for fork in start_two(log, *command):
            fork.finish()
    assert json.loads((outputs[1] / f"checkpoint-{STEPS}" / PROGRESS).read_text())["processes"] == 2
    assert difference(*(output / "pipeline" for output in outputs)) < 1e-5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_saves_and_ends_all(folder, arguments, undisturbed, number):
    """Then one process goes on where two stopped."""
    output, log = folder / f"stopped{number}", folder / f"signal{number}.log"
    command = [*arguments, "batch_size=1", "checkpoint_steps=1000", "data.workers=1", f"output={output}"]
    forks = start_two(log, *command)
    forks[0].log.touch()
    while "loss=" not in forks[0].log.read_text(errors="replace"):
        assert all(fork.process.is_alive() for fork in forks), forks[0].log.read_text()
        time.sleep(0.01)
    # As cluster managers do, to the loader's process too.
    process = psutil.Process(forks[1].process.pid)
    for signalled in [*process.children(recursive=True), process]:
        signalled.send_signal(number)
    text = forks[0].finish() + forks[1].finish()
    [(step, saved)] = checkpoints(output)
    assert 0 < step < STEPS and f"saved {saved}" in text
    assert not (output / "pipeline").exists()
    train(log, *arguments, f"output={output}")
    assert difference(output / "pipeline", undisturbed / "pipeline") < 1e-5


def test_a_full_disk_ends_the_run_in_one_line_and_spares_the_last_checkpoint(folder, arguments, undisturbed):
    """The system refuses to write files above a size, as a full disk or a quota does, in the middle of a file."""
    output, log = folder / "full", folder / "full.log"
    command = [*arguments, f"output={output}"]
    train(log, *command, "max_steps=2", "optimizer.schedule=constant")
    shutil.rmtree(output / "pipeline")
    before = {path.name: path.read_bytes() for path in (output / "checkpoint-2").iterdir()}
    largest = max(len(content) for content in before.values())
    fork = Fork(log, "train.py", command)
    resource.prlimit(fork.process.pid, resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
    text = fork.finish(expect=2)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in text
    assert "checkpoint-4 could not be written" in errors[0] and str(output / "checkpoint-2") in errors[0]
    assert {path.name: path.read_bytes() for path in (output / "checkpoint-2").iterdir()} == before
    assert not list(output.glob(".checkpoint*")) and [step for step, _ in checkpoints(output)] == [2]


@pytest.mark.parametrize(("frames", "broken", "named"), [(3, False, "num_frames=8"), (30, True, "root=")])
def test_without_a_usable_clip_nothing_is_written(folder, arguments, tmp_path, frames, broken, named):
    """Videos shorter than the clips asked for, or none that can be read: two processes end in one line each."""
    root = save_prepared_videos(tmp_path / "videos", {"a": figure_film(frames), "b": figure_film(frames)})
    if broken:
        for video in root.glob("*.mp4"):
            video.write_bytes(b"no video")
    command = [*arguments, "stage=motion", "data.source=videos", f"data.root={root}", "data.num_frames=8"]
    command += ["data.cache=null", "batch_size=1", f"output={tmp_path / 'run'}"]
    for fork in start_two(tmp_path / "log", *command):
        text = fork.finish(expect=2)
        assert named in text and "Traceback" not in text and text.count("error: ") == 1
    assert not checkpoints(tmp_path / "run")


def test_a_second_run_in_the_same_folder_is_refused(folder, arguments, tmp_path):
    with locked_folder(tmp_path):
        text = train(tmp_path / "log", *arguments, f"output={tmp_path}", expect=2)
        assert f"output={tmp_path} is being written" in text and str(os.getpid()) in text
        assert not (tmp_path / "logs").exists()
    with locked_folder(tmp_path), pytest.raises(UserError, match=str(os.getpid())), locked_folder(tmp_path):
        pass


def test_a_broken_checkpoint_is_named_and_the_one_before_goes_on(folder, arguments, undisturbed):
    output, log = folder / "broken", folder / "broken.log"
    shutil.copytree(undisturbed, output, ignore=shutil.ignore_patterns("pipeline"))
    newest = output / f"checkpoint-{STEPS}"
    (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:5000])
    text = train(log, *arguments, f"output={output}", expect=2)
    assert f"error: {newest} cannot be read" in text and "Traceback" not in text
    shutil.rmtree(newest)
    train(log, *arguments, f"output={output}")
    assert difference(output / "pipeline", undisturbed / "pipeline") == 0


def test_validation_changes_nothing(folder, arguments, undisturbed):
    output, log = folder / "validated", folder / "validated.log"
    validation = ["validation.steps=10", "validation.clips=1", "validation.num_inference_steps=1"]
    train(log, *arguments, *validation, f"output={output}")
    assert len(list((output / "samples").glob("*.png"))) == STEPS // 10
    assert difference(output / "pipeline", undisturbed / "pipeline") == 0


def test_four_batches_of_one_are_one_of_four(folder, arguments):
    outputs = [folder / "accumulated", folder / "whole"]
    short = [*arguments, "max_steps=3", "total_batch_size=4", "checkpoint_steps=100"]
    for output, batch in zip(outputs, (1, 4), strict=True):
        train(folder / "accumulation.log", *short, f"batch_size={batch}", f"output={output}")
    assert difference(*(output / "pipeline" for output in outputs)) < 1e-5
    norms = [logged(output, "grad_norm") for output in outputs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_export_of_an_older_checkpoint(folder, arguments, undisturbed):
    """The command gives what the run itself exported then; the average can be left out."""
    output = folder / "exported"
    for name, options in (("averaged", []), ("plain", ["average=false"]), ("half", ["dtype=float16"])):
        command = [f"checkpoint={undisturbed}", f"output={output / name}", *options]
        Fork(folder / "export.log", "training/export.py", command).finish()
    assert difference(output / "averaged", undisturbed / "pipeline") == 0
    assert difference(output / "plain", undisturbed / "pipeline") > 1e-4
    assert {tensor.dtype for tensor in weights(output / "half").values()} <= {torch.float16, torch.int64}
    text = Fork(folder / "export.log", "training/export.py", [f"checkpoint={folder / 'vae'}", "output=x"]).finish(2)
    assert "no complete checkpoint" in text


def test_a_longer_run_goes_on_from_a_finished_one(folder, arguments):
    """Also one that averages from now on."""
    output, log = folder / "longer", folder / "longer.log"
    command = [*arguments, "optimizer.schedule=constant_with_warmup", f"output={output}"]
    train(log, *command, "max_steps=4", "ema_decay=0")
    assert not list(output.rglob("average.safetensors"))
    text = train(log, *command, "max_steps=6")
    assert f"goes on from {output / 'checkpoint-4'}" in text and f"tensorboard --logdir {output / 'logs'}" in text
    assert [step for step, _ in checkpoints(output)] == [4, 6] and len(logged(output)) == 6
    assert (output / "checkpoint-6" / "average.safetensors").is_file()


@pytest.mark.parametrize(
    ("saved", "named"),
    [
        (Layout("replicated", 1, "other"), "other parameters"),
        (Layout("zero2", 2, "same"), "2 process"),
        (Layout("zero3", 1, "same"), "zero3"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(saved, named):
    with pytest.raises(UserError, match=named):
        check_layout(Path("checkpoint-2"), saved, Layout("replicated", 1, "same"))


def test_whole_states_fit_any_number_of_processes():
    for strategy in ("replicated", "fsdp"):
        check_layout(Path("checkpoint-2"), Layout(strategy, 8, "same"), Layout(strategy, 2, "same"))
    with pytest.raises(UserError, match="training.export"):
        check_layout(Path("checkpoint-2"), Layout("zero2", 8, "same"), Layout("zero2", 2, "same"))


def test_names_change_at_once(tmp_path):
    """Whatever moment a run is killed at, a folder called checkpoint-<step> is whole."""
    for step in (2, 4):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-6").mkdir()  # without progress.json it is none
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 4]
    make_checkpoint(tmp_path / ".checkpoint-6.partial")
    publish(tmp_path, tmp_path / ".checkpoint-6.partial", tmp_path / "checkpoint-6", keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".checkpoint-6.old", "checkpoint-4", "checkpoint-6"]
    retire(tmp_path / "checkpoint-4")
    (tmp_path / ".config.yaml.partial").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


def make_checkpoint(folder: Path) -> None:
    folder.mkdir()
    (folder / PROGRESS).write_text("{}")
