"""The dry run: sizes and memory by strategy, against what a step really takes."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import profile

import train as train_py
from core.config import load_config
from core.errors import UserError
from tests.networks import TINY
from tests.training_runs import make_vae, train
from training import vae as train_vae
from training.build import (
    describe_networks,
    enable_gradient_checkpointing,
    make_networks,
    published_networks,
    set_trainable,
)
from training.config import DataConfig, OptimizerConfig, TrainConfig
from training.loop import report_costs
from training.memory import (
    RESERVE,
    Amounts,
    LiveStorages,
    amounts,
    context_index,
    estimate,
    free_gradients,
    memory_report,
    needs,
    step_inputs,
)

ROOT = Path(__file__).parents[2]
SIZES = {"trained": 1000, "frozen": 500, "frozen_bytes": 1000, "vae": 100, "unit": 64, "outside": 32}
SMALL = Amounts(**SIZES, moments=8, average=4, half=True, step=7)


def configuration(vae: Path, **changes) -> TrainConfig:
    model = replace(TINY, vae=str(vae))
    data = DataConfig(size=[64, 64], num_frames=4)
    settings = {"mixed_precision": "no", "batch_size": 2, "data": data, "model": model}
    return TrainConfig(stage="motion", output="x", **settings | changes)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return make_vae(tmp_path_factory.mktemp("vae"))


def measured_peak(config: TrainConfig) -> int:
    """Bytes that the allocator has had at most in a real forward and backward pass."""
    _, model = make_networks(config)
    set_trainable(model.train(), config)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    free_gradients(model)
    inputs = step_inputs(model, config, (config.data.size[1] // 4, config.data.size[0] // 4), context_index(config))
    with profile(profile_memory=True) as profiled:
        model(**inputs).float().square().mean().backward()
    held = peak = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trainable", ["motion", "full"])
def test_the_estimate_of_a_step_is_what_the_allocator_sees(vae, trainable, checkpointing):
    config = configuration(vae, trainable=trainable, gradient_checkpointing=checkpointing)
    network, model, step = estimate(config)
    assert step.training == pytest.approx(measured_peak(config), rel=0.15)


def test_checkpointing_smaller_batches_and_smaller_chunks_take_less(vae):
    plain = estimate(configuration(vae))[2]
    assert estimate(configuration(vae, gradient_checkpointing=True))[2].training < 0.7 * plain.training
    assert estimate(configuration(vae, batch_size=1))[2].training < 0.6 * plain.training
    assert estimate(configuration(vae, vae_chunk=1))[2].encoding < 0.5 * plain.encoding
    assert estimate(configuration(vae, mixed_precision="bf16"))[2].training < plain.training


def test_only_living_storages_made_meanwhile_count():
    weight = torch.nn.Linear(4, 4)
    with LiveStorages(weight) as live:
        view = weight.weight.t()
        first = torch.zeros(100)
        second = first[:50]
        assert live.bytes == 400 and view is not None and second is not None
        del first, second
        assert live.bytes == 0 and live.peak == 400
        torch.zeros(50)
    assert live.peak == 400


def test_shares_by_strategy_add_up():
    """Closed form: what is divided among n processes is there n times smaller, and nothing is lost."""
    one, four = (needs(SMALL, n) for n in (1, 4))
    by_name = {name.split(",")[0]: need for name, need in four.items()}
    assert by_name["one GPU"] == by_name["DDP"] == one["one GPU"]
    assert by_name["one GPU"].weights == 4 * 1000 + 1000 + 100 and by_name["one GPU"].optimizer == 8 * 1000
    assert by_name["one GPU"].gradients == by_name["one GPU"].average == 4 * 1000
    zero2, zero3, fsdp = by_name["ZeRO-2"], by_name["ZeRO-3"], by_name["FSDP"]
    assert (
        zero2.weights == 2 * 1500 + 100 and zero2.optimizer == (4 + 8) * 1000 / 4 and zero2.gradients == 2 * 1000 / 4
    )
    assert zero3.weights == 2 * 1500 / 4 + 100 and zero3.average == 1000
    assert fsdp.weights == (4 * 1000 + 1000) / 4 + 100 and fsdp.optimizer == 8 * 1000 / 4
    assert fsdp.buffers == RESERVE + 32 + 2 * 64
    for name in ("ZeRO-2 offload", "ZeRO-3 offload"):
        assert by_name[name].gradients == by_name[name].optimizer == 0 and by_name[name].host >= 16 * 1000
    assert all(need.gpu == sum(vars(need).values()) - need.host for need in four.values())


@pytest.mark.parametrize(("name", "limit"), [("train_stage1_24gb", 24), ("train_stage2_24gb", 24)])
def test_configurations_for_24_gigabytes_fit(name, limit):
    """At full size, from the configuration alone, in seconds."""
    config = load_config(TrainConfig, ["output=x", "dry_run=true"], files=[ROOT / "configs" / f"{name}.yaml"])
    started = time.process_time()
    report, _ = memory_report(config)
    one = next(line for line in report.splitlines() if line.startswith("one GPU"))
    assert 10 < float(one.split()[-2]) < limit - 1
    assert time.process_time() - started < 60
    assert "859,508,800" in report and "1,312,730,244" in report


def test_published_sizes_are_the_published_ones():
    with torch.device("meta"):
        vae, model = published_networks()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["reference_net"] == 859_508_800 and counts["pose_guider"] == 1_086_480
    motion = sum(p.numel() for name, p in model.denoising_unet.named_parameters() if "motion_modules" in name)
    assert (counts["denoising_unet"] - motion, motion) == (859_520_964, 453_209_280)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863


def test_a_folder_is_described_as_it_loads():
    """The estimate of `model.init` reads configurations only, and has the sizes of the loaded networks."""
    from models.animators.registry import load_pipeline

    config = TrainConfig(stage="image", output="x")
    config.model.init = str(ROOT / "assets" / "tiny_model")
    vae, model = describe_networks(config)
    pipeline = load_pipeline(config.model.init)
    for described, loaded in ((vae, pipeline.vae), (model.denoising_unet, pipeline.denoising_unet)):
        shapes = {name: tensor.shape for name, tensor in loaded.state_dict().items()}
        assert {name: tensor.shape for name, tensor in described.state_dict().items()} == shapes
        assert {p.device.type for p in described.parameters()} == {"meta"}


def test_a_folder_saved_in_half_precision_is_described_in_the_dtype_of_training(tmp_path):
    """CLIP's configuration says what its weights were saved in; networks are built in float32 all the same."""
    source = ROOT / "assets" / "small_animators" / "disco"
    for file in source.rglob("*.json"):
        settings = json.loads(file.read_text())
        if file.parent.name == "image_encoder":
            settings |= {"dtype": "float16", "torch_dtype": "float16"}
        (tmp_path / file.relative_to(source)).parent.mkdir(exist_ok=True)
        (tmp_path / file.relative_to(source)).write_text(json.dumps(settings))
    config = TrainConfig(stage="image", output="x")
    config.model.init = str(tmp_path)
    assert {p.dtype for network in describe_networks(config) for p in network.parameters()} == {torch.float32}


def test_eight_bit_moments_take_a_quarter_and_say_what_they_need(vae, tmp_path):
    config = configuration(vae, optimizer=OptimizerConfig(name="adamw8bit"))
    network, model, step = estimate(config)
    found = amounts(network, model, config, step)
    assert found.moments < 0.3 * 8
    blocks = [
        m for m in model.modules() if type(m).__name__ in ("Transformer2DModel", "MotionModule", "ResnetBlock2D")
    ]
    sizes = [4 * sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    assert found.unit == max(sizes) and found.outside == 4 * (found.trained + found.frozen) - sum(sizes)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        # Before anything is loaded or a folder made in vain.
        arguments = [f"output={tmp_path / 'run'}", "optimizer.name=adamw8bit"]
        for main, given in {train_py.main: ["stage=image", f"model.vae={vae}"], train_vae.main: []}.items():
            with pytest.raises(UserError, match="optimizer.name=adamw8bit needs bitsandbytes"):
                main([*arguments, *given])
        assert not (tmp_path / "run").exists()


def test_dry_run_prints_and_writes_nothing(tmp_path, vae):
    command = ["--dry-run", "stage=image", f"output={tmp_path / 'run'}", f"model.vae={vae}"]
    command += ["mixed_precision=no", "data.size=[32,32]", "data.workers=0"]
    assert "error: model.pose_channels=" in train(tmp_path / "wrong", *command, expect=2)
    text = train(tmp_path / "log", *command, "model.pose_channels=[8,16,16]")
    for word in ("denoising_unet", "ZeRO-2", "ZeRO-3 offload", "FSDP", "one GPU", "host"):
        assert word in text
    assert re.search(r"[\d.]+ s a step \(1 x .* s for 1 samples, .* hours for 1000 steps of one process", text)
    assert not (tmp_path / "run").exists()


def test_time_is_not_measured_where_a_step_does_not_fit(vae, capsys):
    config = configuration(vae, dry_run=True)
    config.batch_size = config.vae_chunk = 10_000
    report_costs(config)
    printed = capsys.readouterr().out
    assert re.search(r"time is not measured: a step takes [\d.]+ GiB, of which [\d.]+ are free", printed)


def test_calibrated_training_takes_more(vae):
    plain = configuration(vae)
    calibrated = configuration(vae)
    calibrated.augmentation.calibrated.probability = 0.5
    assert estimate(calibrated)[2].training > estimate(plain)[2].training
