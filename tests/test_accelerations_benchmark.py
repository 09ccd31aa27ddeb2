"""The benchmark of accelerations: its settings, its tables, its count of operations, its command."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.accelerations import __main__ as command
from benchmarks.accelerations.cost import Cost, count_operations
from benchmarks.accelerations.full_size import step_cost
from benchmarks.accelerations.report import kinds_table, summary_table, trade_offs
from benchmarks.accelerations.settings import FAMILIES, settings_of
from benchmarks.inference_cost import Setting
from core.errors import UserError
from evaluation.benchmark_report import Values
from models.acceleration import AccelerationConfig
from models.checkpoints.sizes import UNetSizes
from tests.small_animators import small_pipeline


def test_settings_change_one_thing_each():
    found = settings_of(20, [4, 10], FAMILIES)
    assert len({setting.name for setting in found}) == len({setting.label for setting in found}) == len(found)
    plain, *others = found
    assert plain.acceleration == AccelerationConfig() and plain.steps == 20
    for setting in others:
        setting.acceleration.check()
        assert (setting.acceleration, setting.steps) != (plain.acceleration, plain.steps)
        assert setting.family in FAMILIES and (setting.steps == 20 or setting.acceleration.solver is not None)
    few = [(s.acceleration.solver, s.steps) for s in found if s.steps < 20]
    assert few == [(solver, steps) for steps in (10, 4) for solver in ("ddim", "dpm++", "unipc")]
    assert [s.family for s in settings_of(20, [], ["merging"])] == ["none", *["merging"] * 3]


def test_operations_are_counted_with_attention():
    """2 n k d for each of the two products of attention, 2 m n k for a product of matrices."""
    query, key = torch.zeros(3, 5, 8), torch.zeros(3, 7, 8)

    def compute() -> None:
        F.scaled_dot_product_attention(query, key, key)
        torch.zeros(4, 6) @ torch.zeros(6, 2)

    assert count_operations(compute) * 1e12 == 2 * (2 * 3 * 5 * 7 * 8) + 2 * 4 * 6 * 2


def test_tables_hold_changes_and_shares():
    settings = settings_of(20, [], ["merging"])[:2]
    plain, merged = (setting.name for setting in settings)
    by_trial = {}
    for seed in (0, 1):
        for clip, value in {"a": 10.0, "b": 20.0, "c": 30.0}.items():
            for name, more in ((plain, 0.0), (merged, -1.0 - seed)):
                by_trial[name, clip, seed] = {"foreground_ssim": 0.5, "foreground_psnr": value + more, "psnr": 1.0}
    values = Values(by_trial, {"aligned": ["a"], "rotation": ["b", "c"]}, {}, [0, 1])
    costs = {plain: Cost(4.0, 8.0, 0), merged: Cost(3.0, 2.0, 2**20)}
    (_, first), (label, second) = summary_table(values, settings, costs, "").rows
    assert label == settings[1].label
    assert [cell.mean for cell in first] == [17.5, 0.5, 4.0, 100.0, 8.0, 100.0, 0.0]
    assert [cell.mean for cell in second] == [-1.5, 0.0, 3.0, 75.0, 2.0, 25.0, 1.0]
    assert second[0].deviation == pytest.approx(np.std([1, 2], ddof=1))
    by_kind = kinds_table(values, settings)
    assert [[cell.mean for cell in cells] for _, cells in by_kind.rows] == [[10.0, 25.0], [-1.5, -1.5]]
    assert trade_offs(values, settings, costs) == {"merging": ([25.0], [-1.5])}


def test_the_command_measures_and_goes_on(tmp_path, capsys):
    model, output = tmp_path / "model", tmp_path / "output"
    small_pipeline("animate_anyone").save_pretrained(model)
    arguments = [f"model={model}", f"output={output}", "clips=1", "sampling.steps=3", "sampling.size=[32,32]"]
    arguments += ["lpips=false", "few_steps=[]"]
    command.main([*arguments, "families=[]", "kinds=[rotation]"])
    (made,) = (output / "parts").iterdir()
    written = (made / "cost.json").stat().st_mtime_ns
    command.main([*arguments, "families=[broadcast]", "kinds=[rotation]"])
    assert (made / "cost.json").stat().st_mtime_ns == written
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["counts"] == {"rotation": 1, "seeds": 1}
    assert len(results["results"]) == len(results["trials"]) == 1 + 3
    operations = [row["10^12 operations"]["mean"] for row in results["results"].values()]
    assert operations[0] > max(operations[1:]), "attention is left out"
    broadcast = results["results"]["attention at every 2nd step"]
    assert broadcast["kept attention (MiB)"]["mean"] > 0
    for name in ("strips.png", "tradeoff.png", "tradeoff.pdf", "table.md", "config.yaml"):
        assert (output / name).stat().st_size > 0
    assert "| attention at every 3rd step |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("families=[magic]", "families="),
        ("few_steps=[20]", "few_steps="),
        ("few_steps=[4,4]", "few_steps="),
        ("kinds=[sideways]", "kinds="),
        ("sampling.acceleration.broadcast=2", "sampling.acceleration"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, argument, message):
    with pytest.raises(UserError, match=message):
        command.main([f"output={tmp_path}", "lpips=false", argument])


def test_operations_at_full_size():
    """Smaller networks, counted the same way: every acceleration leaves less."""
    sizes = UNetSizes(4, 4, (32, 64), (True, True), 1, cross_attention_dim=8, num_attention_heads=2, norm_num_groups=4)
    cost = step_cost(Setting("window", 2, (16, 16), 2, 0, 1, "midup", True, 7), sizes)
    assert cost.whole / 2 < cost.unguided < cost.whole
    assert cost.reused < cost.whole - cost.motion_attention
    side = list(cost.merged.values())
    assert cost.whole > side[0] > side[1] and side[0] > side[2]
    assert cost.kept_gib > 0
