"""Several processes do what one does with their batches together, whatever the strategy; what cannot is refused."""

import json
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from core.errors import UserError
from tests.fsdp_parts import small_model
from tests.training_runs import (
    ARGUMENTS,
    BIN,
    ENVIRONMENT,
    ROOT,
    Fork,
    difference,
    launch,
    logged,
    make_vae,
    make_video_vae,
    start_two,
    train,
)
from training.config import TrainConfig
from training.distributed import check_launch, spread_batch
from training.export import checkpoint_weights

STEPS = 3
CONFIGURATIONS = ROOT / "configs" / "accelerate"


def deepspeed_environment(name: str) -> dict[str, str]:
    """The variables that `accelerate launch` sets for a configuration file."""
    settings = yaml.safe_load((CONFIGURATIONS / f"{name}.yaml").read_text())["deepspeed_config"]
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(settings["zero_stage"]),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(settings.get("zero3_init_flag", False)).lower(),
    }


ZERO = {name: deepspeed_environment(name) for name in ("zero2", "zero3")}
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("c++")), reason="DeepSpeed on CPUs compiles an extension; no C++ compiler"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def stages(folder) -> dict[str, list[str]]:
    """Arguments of either stage: three steps of four clips; the first two are saved before the end."""
    shared = [*ARGUMENTS, f"model.vae={make_vae(folder / 'vae')}", f"max_steps={STEPS}", "checkpoint_steps=2"]
    return {
        "image": [*shared, "stage=image", f"data.cache={folder / 'images'}"],
        "motion": [*shared, "stage=motion", "data.num_frames=3", f"data.cache={folder / 'clips'}"],
    }


@pytest.fixture(scope="module")
def alone(folder, stages) -> dict[str, Path]:
    """Each stage by one process with the doubled batch."""
    outputs = {}
    for stage, arguments in stages.items():
        outputs[stage] = folder / f"alone_{stage}"
        train(folder / "alone.log", *arguments, "batch_size=4", f"output={outputs[stage]}")
    return outputs


def check_same_training(output: Path, expected: Path) -> None:
    """Loss curve to 4 digits and exported weights, the moving average of float32 ones."""
    assert logged(output) == pytest.approx(logged(expected), rel=1e-4)
    assert logged(output, "grad_norm") == pytest.approx(logged(expected, "grad_norm"), rel=1e-3)
    assert difference(output / "pipeline", expected / "pipeline") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("configuration", "stage", "strategy"),
    [
        ("ddp", "image", "replicated"),
        pytest.param("zero2_offload", "image", "zero2", marks=needs_compiler),
        pytest.param("zero3_offload", "motion", "zero3", marks=needs_compiler),
    ],
)
def test_configurations_train_with_two_processes(folder, stages, alone, configuration, stage, strategy):
    """Launched as in the documentation; those without offload are below, with forks for processes."""
    output = folder / configuration
    file = CONFIGURATIONS / f"{configuration}.yaml"
    launch(["accelerate", "launch", "--config_file", str(file), "train.py", *stages[stage], f"output={output}"])
    saved = json.loads((output / f"checkpoint-{STEPS}" / "progress.json").read_text())
    assert (saved["processes"], saved["strategy"], saved["clips"]) == (2, strategy, 4 * STEPS)
    check_same_training(output, alone[stage])


def test_motion_stage_of_two_processes(folder, stages, alone):
    output = folder / "two_motion"
    for fork in start_two(folder / "two_motion.log", *stages["motion"], f"output={output}"):
        fork.finish()
    check_same_training(output, alone["motion"])


@needs_compiler
@pytest.mark.parametrize("strategy", list(ZERO))
def test_divided_states_go_on_and_are_exported(folder, stages, alone, strategy):
    """Resume, moving average and export of states that no process has whole; and what one process says to them.

    Divided weights (zero3) are validated by all processes on the way, with their average and as one process does.
    """
    output, log = folder / f"{strategy}_image", folder / f"{strategy}.log"
    command = [*stages["image"], f"output={output}"]
    validation = ["validation.steps=2", "validation.clips=1", "validation.num_inference_steps=1"]
    validation = [*validation, "validation.tpc=false"] if strategy == "zero3" else []
    for fork in start_two(log, *command, *validation, **ZERO[strategy]):
        fork.finish()
    check_same_training(output, alone["image"])
    if validation:
        train(log, *stages["image"], *validation, "batch_size=4", f"output={folder / 'validated'}")
        curves = [logged(run, "validation/aligned/psnr/without_tpc") for run in (output, folder / "validated")]
        assert curves[0].keys() == {2} and curves[0] == pytest.approx(curves[1], rel=1e-5)
    shutil.rmtree(output / "pipeline")
    shutil.rmtree(output / f"checkpoint-{STEPS}")
    for fork in start_two(log, *command, *validation, **ZERO[strategy]):
        fork.finish()
    check_same_training(output, alone["image"])
    checkpoint = output / f"checkpoint-{STEPS}"
    text = train(log, *command, "batch_size=4", expect=2)
    assert f"error: {checkpoint} was written by 2 process(es) of {strategy}" in text and "Traceback" not in text
    Fork(log, "training/export.py", [f"checkpoint={checkpoint}", f"output={output / 'again'}"]).finish()
    assert difference(output / "again", alone["image"] / "pipeline") < 1e-5
    text = train(
        log, *stages["image"], "stage=motion", "data.num_frames=2", "data.cache=null", f"output={output}", expect=2
    )
    assert "error: " in text and "other parameters" in text


@needs_compiler
@pytest.mark.parametrize("strategy", list(ZERO))
def test_half_precision_of_deepspeed(folder, stages, alone, strategy):
    """DeepSpeed keeps bfloat16 weights and float32 masters; the export has the masters."""
    output = folder / f"bf16_{strategy}"
    command = [*stages["image"], "mixed_precision=bf16", "max_steps=2", f"output={output}"]
    for fork in start_two(folder / "bf16.log", *command, "checkpoint_steps=100", **ZERO[strategy]):
        fork.finish()
    expected = logged(alone["image"])
    assert logged(output) == pytest.approx({step: expected[step] for step in (1, 2)}, rel=0.05)
    weights = checkpoint_weights(output / "checkpoint-2")
    trained = [weights[name] for name in load_file(output / "checkpoint-2" / "average.safetensors")]
    assert {tensor.dtype for tensor in trained} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in trained)


@pytest.fixture(scope="module")
def segments(folder) -> tuple[list[str], Path]:
    """Arguments of Wan-Animate's training, and the run of one process with the doubled batch."""
    vae = make_video_vae(folder / "video_vae")
    arguments = [*ARGUMENTS, "stage=motion", "model.animator=wan_animate", f"model.vae={vae}", "max_steps=2"]
    arguments += ["data.num_frames=5", "model.block_out_channels=[16]", "model.layers_per_block=2"]
    # A flow has neither an offset of noise nor images to train.
    arguments += ["noise.noise_offset=0", "model.train_image_encoder=false", "model.image_encoder_layers=2"]
    train(folder / "segments.log", *arguments, "batch_size=4", f"output={folder / 'segments'}")
    return arguments, folder / "segments"


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=needs_compiler)])
def test_segments_are_trained_by_two_processes(folder, segments, strategy):
    """Their blocks are handed more than tensors, which sharding takes apart and puts together."""
    arguments, alone = segments
    log, output = folder / f"segments_{strategy}.log", folder / f"segments_{strategy}"
    for fork in start_two(log, *arguments, f"output={output}", **ZERO.get(strategy, {})):
        fork.finish()
    check_same_training(output, alone)


def test_one_process_goes_on_where_two_stopped(folder, stages, alone):
    output, log = folder / "fewer", folder / "fewer.log"
    for fork in start_two(log, *stages["image"], "total_batch_size=4", f"output={output}"):
        fork.finish()
    shutil.rmtree(output / "pipeline")
    shutil.rmtree(output / f"checkpoint-{STEPS}")
    train(log, *stages["image"], "total_batch_size=4", f"output={output}")
    check_same_training(output, alone["image"])


@pytest.mark.slow
def test_two_machines(folder, stages, alone):
    """The example for several machines, with both of them this one."""
    output = folder / "machines"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def machine(rank: int) -> subprocess.CompletedProcess:
        command = [str(BIN / "accelerate"), "launch", "--config_file", str(CONFIGURATIONS / "multi_node.yaml")]
        command += ["--machine_rank", str(rank), "--num_processes", "2"]
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        command += ["train.py", *stages["image"], f"output={output}"]
        return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(machine, range(2)):
            assert done.returncode == 0, done.stderr[-3000:]
    check_same_training(output, alone["image"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FSDP needs a GPU; accelerate's does not run on CPUs")
def test_fsdp_trains_on_gpus(folder, stages, alone):
    output = folder / "fsdp"
    processes = min(2, torch.cuda.device_count())
    options = ["--config_file", str(CONFIGURATIONS / "fsdp.yaml"), "--num_processes", str(processes)]
    launch(["accelerate", "launch", *options, "train.py", *stages["image"], "total_batch_size=4", f"output={output}"])
    assert logged(output) == pytest.approx(logged(alone["image"]), rel=1e-2)


def test_parts_of_fsdp_are_averaged_saved_and_exported(tmp_path):
    """PyTorch's sharding itself runs on CPUs, so what we do with its parts is tested without GPUs."""
    forks = start_two(tmp_path / "log", str(tmp_path), script="tests/fsdp_parts.py")
    for fork in forks:
        fork.finish()
    torch.manual_seed(0)
    exported, averaged = checkpoint_weights(tmp_path), load_file(tmp_path / "average.safetensors")
    for name, parameter in small_model().named_parameters():
        # Moved by 0, 1 and 3 in all, averaged with decays 0, 2/11 and 3/12.
        assert torch.equal(exported[name], (parameter + 1) + 2)
        assert torch.allclose(averaged[name], parameter + 27 / 11, atol=1e-5)


def test_every_configuration_is_one_of_accelerate():
    for file in CONFIGURATIONS.glob("*.yaml"):
        assert load_config_from_file(str(file)).num_processes == yaml.safe_load(file.read_text())["num_processes"]
        assert yaml.safe_load(file.read_text())["mixed_precision"] == "no"  # train.py's configuration decides


def test_fsdp_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP needs GPUs"):
        check_launch(launched=2, deepspeed=False, has_gpu=False)


def test_deepspeed_without_a_compiler_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    check_launch(launched=2, deepspeed=True, has_gpu=True)
    with pytest.raises(UserError, match="g\\+\\+"):
        check_launch(launched=2, deepspeed=True, has_gpu=False)


def test_a_total_batch_that_does_not_divide_is_refused(folder, stages):
    output = folder / "undivided"
    text = train(folder / "undivided.log", *stages["image"], "total_batch_size=5", f"output={output}", expect=2)
    assert "total_batch_size=5" in text and "batch_size=2" in text and "Traceback" not in text
    assert not list(output.glob("checkpoint-*"))


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 6), (2, 3), (6, 1)])
def test_accumulation_reaches_the_total_batch(monkeypatch, processes, accumulation):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = TrainConfig(batch_size=2, total_batch_size=12)
    assert spread_batch(config) == replace(config, gradient_accumulation=accumulation)
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(UserError, match="5 process"):
        spread_batch(config)


@needs_compiler
def test_settings_that_deepspeed_cannot_serve_are_refused(folder, stages, tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 2}}))
    environment = {**ZERO["zero2"], "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    forks = start_two(folder / "file.log", *stages["image"], f"output={folder / 'file'}", **environment)
    text = [fork.finish(expect=2) for fork in forks][0]
    assert "train_micro_batch_size_per_gpu=3" in text and "Traceback" not in text
    command = [*stages["image"], "channels_last=true", f"output={folder / 'format'}"]
    text = [fork.finish(expect=2) for fork in start_two(folder / "format.log", *command, **ZERO["zero3"])][0]
    assert "error: DeepSpeed cannot spread channels_last=true" in text and "Traceback" not in text
