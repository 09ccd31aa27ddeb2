"""`make gpu-check` on the CPU: every part at its smallest, the budget, and how it ends."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.config import GPU_PARTS, GPUCheckConfig
from benchmarks.gpu_check.__main__ import main, table
from benchmarks.gpu_check.attention import Chosen, attention_cases, attention_work, is_fused
from benchmarks.gpu_check.parts import BOUNDS, PARTS, RATE, RECIPES, Check, rows_of, training_row
from benchmarks.gpu_check.worker import NotHere, Part
from core.errors import UserError

TRIED = ["size=tiny", "device=cpu"]


@pytest.mark.slow  # it has to run before a GPU is there to run it on
def test_every_part_runs_on_a_cpu_or_says_what_it_lacks():
    config, rows, absent = GPUCheckConfig(size="tiny", device="cpu"), {}, {}
    for name in PARTS:
        if name == "training":  # three recipes, of which the last has most to go wrong
            check = Check(config, rows)
            rows[name] = [training_row(check, "stage 1", check.recipe(RECIPES["LoRA"]))]
            continue
        try:
            rows[name] = list(rows_of(config, name, rows))
        except NotHere as reason:
            absent[name] = str(reason)
    assert "peer=DIR" in absent["peer"] and set(PARTS) == {"machine", *GPU_PARTS}
    assert [row["option"][-6:] for row in rows["options"]] == ["time=1", "time=2", "time=4", "t=true"]
    assert all(row["mean of pixels, 1/255"] < BOUNDS["rounded"][0] for row in rows["options"])
    assert rows["machine"][0][RATE] > 0
    exact, rounded = rows["agreement"]
    assert exact["mean of pixels, 1/255"] == exact["gradients, share"] == 0
    assert 0 < rounded["gradients, share"] < BOUNDS["rounded"][2]
    assert {row["bfloat16"] for row in rows["attention"]} == {"flash_attention_for_cpu"}
    assert all(row["cudnn, ms"] == "refuses" and row["flash, ms"] > 0 for row in rows["attention"])
    plain, calibrated = rows["inference"]
    assert calibrated["TFLOP"] > plain["TFLOP"] > 0 and plain["of matrix rate"] > 0
    assert rows["training"][0]["--dry-run, GiB"] > 0 and rows["training"][0]["TFLOP"] > 0
    assert rows["loading"][0]["workers for it"] >= 1 and rows["loading"][1]["of one worker"] > 0


def test_attention_of_every_head_size_with_and_without_flags():
    cases = list(attention_cases(tiny=False))
    shapes = {(case.channels, case.flags, case.queries) for case in cases if case.name.startswith("images")}
    assert shapes == {(d, g, n) for d, n in ((40, 98 * 64), (80, 49 * 32), (160, 25 * 16)) for g in (0, 3)}
    assert cases[0].operations == 4 * 4 * 8 * 6272 * 18816 * 40


def test_attention_that_writes_its_scores_down_is_noticed():
    work = attention_work(next(attention_cases(tiny=True)), torch.bfloat16, torch.device("cpu"))
    found = []
    for kernels in ([SDPBackend.MATH], [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        with sdpa_kernel(kernels), Chosen() as chosen:
            work()
        found.append(is_fused(dict.fromkeys(("bfloat16", "float16"), chosen.name)))
    assert found == [False, True]


def test_what_does_not_fit_into_the_minutes_is_left_out_and_said(tmp_path, capsys):
    main([*TRIED, "minutes=0", f"output={tmp_path}"])
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert list(parts) == list(PARTS)
    assert all("are left of minutes=0" in part["skipped"] for part in parts.values())
    assert "skipped: takes about 110 s" in capsys.readouterr().out


@pytest.mark.slow  # a process of its own loads torch
def test_a_part_that_fails_is_a_line_and_the_exit_code(tmp_path):
    with pytest.raises(SystemExit) as ended:
        main([*TRIED, "minutes=60", "parts=[peer]", f"peer={tmp_path}", f"output={tmp_path}/out"])
    assert ended.value.code == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["config"]["size"] == "tiny" and results["parts"]["machine"]["rows"][0]["device"]
    assert "is not a checkout of moore" in results["parts"]["peer"]["error"]
    assert "**failed**: UserError: checkout=" in (tmp_path / "out" / "table.md").read_text()


def test_without_a_gpu_the_command_says_how_to_try_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="torch finds no GPU here; device=cpu size=tiny"):
        main([f"output={tmp_path}"])


def test_the_table():
    parts = {
        "inference": Part([{"run": "plain", "s": 0.12345}, {"run": "a|b", "GiB": 7}], 12.4, error="no room"),
        "peer": Part(skipped="not given"),
    }
    assert table(parts).splitlines() == [
        "## inference (12 s)", "", "| run | s | GiB |", "| --- | --- | --- |", "| plain | 0.123 |  |",
        "| a\\|b |  | 7 |", "", "**failed**: no room", "", "## peer (0 s)", "", "skipped: not given",
    ]  # fmt: skip
