"""The speed benchmark: what it counts and adds up has known answers; how fast anything is, no test says."""

import json
import mmap
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.config import PARTS, SpeedConfig
from benchmarks.speed.__main__ import main
from benchmarks.speed.inference import StepClock
from benchmarks.speed.measuring import Measured, counting, in_turns, peak_memory
from benchmarks.speed.parts import works
from benchmarks.speed.report import speed_tables
from benchmarks.speed.scene import make_scene
from benchmarks.speed.sizes import SIZES, chosen_sizes, make_pipeline
from benchmarks.speed.training import TrainingStep, measure_training, noise_batch
from core.errors import UserError
from tpc import CalibrationConfig
from training.config import TrainConfig

CPU = torch.device("cpu")


def test_operations_of_products_convolutions_and_attention():
    linear, convolution = nn.Linear(8, 16, bias=False), nn.Conv2d(3, 5, 3, padding=1, bias=False)
    query, key = torch.randn(1, 2, 6, 4, requires_grad=True), torch.randn(1, 2, 10, 4, requires_grad=True)
    with counting() as counted:
        linear(torch.randn(7, 8))
        assert counted() == 2 * 7 * 8 * 16
        convolution(torch.randn(1, 3, 4, 4))
        assert counted() - 2 * 7 * 8 * 16 == 2 * 16 * 5 * 3 * 9
        before = counted()
        seen = nn.functional.scaled_dot_product_attention(query, key, key)
        product = 2 * 2 * 6 * 10 * 4  # of one of attention's matrix products
        assert counted() - before == 2 * product
        seen.sum().backward()
        assert counted() - before == 7 * product  # scores are computed anew, and four gradients


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_peak_memory_is_that_of_the_work_alone():
    def hold(mebibytes: int) -> int:
        with peak_memory(CPU) as peak:
            before = peak()
            # Mapped, as the allocator may hand out room that earlier work has left resident.
            with mmap.mmap(-1, mebibytes * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
                for start in range(0, len(held), mmap.PAGESIZE):
                    held[start] = 1
            return (peak() - before) // 2**20

    # The system may drop other pages of a large process meanwhile, which hides some of the growth.
    assert 195 <= max(hold(200) for _ in range(3)) <= 230
    assert 45 <= max(hold(50) for _ in range(3)) <= 80  # the larger one before does not count


def test_parts_of_a_run_from_marks():
    counts = iter([0.0, 13.0, 17.0, 21.0, 25.0, 40.0])  # start, four steps, the end
    clock = StepClock(lambda: next(counts))
    for step in range(4):
        clock(None, step, 0, {})
    assert clock.parts() == {"encoding": [9.0], "step": [4.0], "decoding": [15.0]}


def test_things_are_measured_in_turns():
    order = []
    found = in_turns({name: lambda name=name: order.append(name) or 1.0 for name in "ab"}, 2)
    assert order == ["a", "b", "a", "b"] and found == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_scene_has_every_person_in_every_frame():
    scene = make_scene(2, 3, (64, 64))
    assert scene.reference_masks.any(axis=(1, 2)).all() and scene.masks.any(axis=(2, 3)).all()
    calibration = scene.calibration(CalibrationConfig(keypoints="trunk"))
    assert calibration.persons == 2 and (calibration.member >= 0).all()
    assert scene.images.shape == (3, 64, 64, 3) and scene.images.any()
    enlarged = make_scene(2, 2, (64, 96), times=2)
    assert enlarged.masks.shape == (2, 2, 48, 32) and enlarged.images.shape == (2, 96, 64, 3)
    calibration = enlarged.calibration(CalibrationConfig(keypoints="trunk"))
    assert calibration.size == (64, 96) and (calibration.member >= 0).all()


@pytest.mark.parametrize("stage", ["image", "motion"])
def test_training_step_trains_what_the_stage_trains(stage):
    sizes = SIZES["tiny"]
    pipeline = make_pipeline(sizes)
    before = {name: value.clone() for name, value in pipeline.denoising_unet.named_parameters()}
    batch = noise_batch(1, 1 if stage == "image" else 2, (sizes.side, sizes.side), CPU)
    measured = measure_training(TrainingStep(pipeline, TrainConfig(stage, output=""), batch), None, 1)
    changed = {
        name for name, value in pipeline.denoising_unet.named_parameters() if not torch.equal(value, before[name])
    }
    motion = {name for name in before if "motion_modules" in name}
    assert changed and (changed <= motion if stage == "motion" else not changed & motion)
    trained = sum(
        p.numel()
        for n in ("denoising_unet", "reference_net", "pose_guider")
        for p in getattr(pipeline, n).parameters()
        if p.requires_grad
    )
    assert measured.facts["trained_parameters"] == trained
    assert set(measured.parts) == {"forward", "backward", "optimiser"} and measured.operations > 1e6


def test_tables_say_share_of_the_rate_and_extra_time():
    runs = {
        "without TPC": Measured([2.0], 2**20, 40e9, {"step": [0.5]}).numbers(),
        "TPC, 1 person": Measured([2.2], 2**21, 44e9, {"step": [0.5]}).numbers(),
    }
    machine = {"device": "D", "threads": 2, "torch": "1", "diffusers": "2", "python": "3"}
    rates = {"float32": Measured([1.0], facts={"gflop_per_second": 100.0}).numbers()}
    text = speed_tables({"machine": machine, "parts": {"machine": rates, "inference float32": runs}})
    row = next(line for line in text.splitlines() if line.startswith("| TPC, 1 person"))
    assert "+10.0%" in row and "20%" in row and "| 2 |" in row
    assert "float32 100 GFLOP/s" in text


def test_every_part_has_work():
    assert {name.split()[0] for name in works(SpeedConfig())} == set(PARTS)
    assert list(works(SpeedConfig(parts=["training"], dtypes=["float32"]))) == [
        "training image float32",
        "training motion float32",
    ]


def test_unknown_sizes_are_refused():
    with pytest.raises(UserError, match="size=huge is not one of tiny, half, sd15"):
        chosen_sizes("huge")


def test_command_measures_each_part_once(tmp_path, capsys):
    settings = ["parts=[inference]", "dtypes=[float32]", "frames=2", "steps=2", "side=64", "persons=[1]"]
    settings += ["repeats=1", "threads=1", f"output={tmp_path}"]
    main(settings)
    printed, results = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
    runs = results["parts"]["inference float32"]
    assert results["machine"]["threads"] == 1 and set(runs) == {"without TPC", "TPC, 1 person"}
    assert runs["TPC, 1 person"]["gflop"] > runs["without TPC"]["gflop"] > 0
    assert "measuring inference float32" in printed and (tmp_path / "table.md").read_text() in printed
    main(settings)
    assert "measuring" not in capsys.readouterr().out
    with pytest.raises(UserError, match="was measured with other settings"):
        main([*settings, "guidance_scale=1"])


def test_bad_settings_end_in_one_line(tmp_path):
    for argument, message in (
        ("parts=[inference,speed]", "must be a list of one or more machine"),
        ("dtypes=[float8]", "must be a list of one or more float32, bfloat16, float16"),
        ("steps=1", "steps=1 must be"),
    ):
        with pytest.raises(UserError, match=message):
            main([argument, f"output={tmp_path}"])
