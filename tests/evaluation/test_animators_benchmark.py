"""The table of animators: its means over kinds of clips, and its command on the four of them."""

import json
import shutil

import numpy as np
import pytest
import torch

import evaluate
from core.errors import UserError
from evaluation.config import AnimatorsConfig
from evaluation.statistics import Values
from evaluation.tasks.animators import (
    COLUMNS,
    animators_table,
    differences_table,
    kinds_table,
    subsets_of,
    variants_of,
)
from evaluation.trials import Variant, trials_identity
from models.animators.registry import animator_class, write_training_facts
from models.vae import load_vae
from tests.networks import TINY, TRAINABLE
from tests.training_runs import make_vae
from training.build import make_pipeline
from training.config import NoiseConfig

KIND_CLIPS = {"aligned": ["a"], "scale": ["b", "c"], "rotation": ["d"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Pipeline folders of new tiny networks of every kind."""
    folder = tmp_path_factory.mktemp("models")
    vae = load_vae(make_vae(folder / "vae"))
    for kind in TRAINABLE:
        torch.manual_seed(0)
        make_pipeline(vae, animator_class(kind).small(TINY, 4, 8), NoiseConfig()).save_pretrained(folder / kind)
    write_training_facts(folder / "animate_anyone", attention_supervised=False)
    return [str(folder / kind) for kind in TRAINABLE]


def known_values() -> Values:
    """PSNR 20 on the aligned clip, 10 and 12 on those of one kind and 19 on that of the other; seed 1: 1 more."""
    by_trial = {}
    for seed in (0, 1):
        for clip, value in {"a": 20.0, "b": 10.0, "c": 12.0, "d": 19.0}.items():
            for condition, more in {"without": 0.0, "add": 2.0}.items():
                by_trial[condition, clip, seed] = dict.fromkeys(COLUMNS, value + more + seed)
    return Values(by_trial, KIND_CLIPS, {}, [0, 1])


def test_kinds_count_alike_however_many_clips_they_have():
    values = known_values()
    assert subsets_of(list(KIND_CLIPS)) == {"original": ["aligned"], "misaligned": ["scale", "rotation"]}
    assert subsets_of(["scale", "identity"]) == {"misaligned": ["scale"], "cross-identity": ["identity"]}
    assert values.by_seed(["scale", "rotation"], "without", COLUMNS[0]) == [15.0, 16.0]
    values.by_trial["without", "d", 1][COLUMNS[0]] = None
    assert values.by_seed(["scale", "rotation"], "without", COLUMNS[0]) == [15.0, None]


def test_the_table_has_means_and_deviations_and_the_best():
    values, variants = known_values(), {n: Variant(v, "", None) for n, v in (("A", "without"), ("A + TPC", "add"))}
    table = animators_table(values, variants, "")
    assert table.columns[0] == "original: foreground PSNR (dB) ↑" and len(table.columns) == 2 * len(COLUMNS)
    (plain, (original, *_, misaligned)), (_, with_tpc) = table.rows
    assert plain == "A" and (original.mean, misaligned.mean) == (20.5, 15.5)
    assert misaligned.deviation == pytest.approx(np.std([15, 16], ddof=1))
    assert [cell.bold for cell in with_tpc] == [True] * len(table.columns) and not original.bold
    (_, cells), *_ = kinds_table(values, variants, COLUMNS[0]).rows
    assert [cell.mean for cell in cells] == [20.5, 11.5, 19.5]


def test_variants_of_one_model_are_compared():
    values = known_values()
    variants = {
        "A": Variant("without", "1", None),
        "A + TPC": Variant("add", "1", None),
        "B": Variant("without", "2", None),
    }
    table = differences_table(values, variants, subsets_of(list(KIND_CLIPS)))
    ((label, cells),) = table.rows
    assert label == "A + TPC minus A" and [cell.mean for cell in cells] == [2] * 6
    assert [cell.interval.n for cell in cells] == [1] * 3 + [3] * 3


def test_variants_are_there_once_more_with_each_way_of_retargeting(models):
    variants = variants_of(AnimatorsConfig(models=models[:1], names=["A"], attachments=["add"], retargets=["bones"]))
    assert list(variants) == ["A", "A + TPC", "A, bones", "A + TPC, bones"]
    assert len({variant.name for variant in variants.values()}) == 4
    several = variants_of(AnimatorsConfig(models=models[:2], names=["A", "B"], attachments=[], retargets=["bones"]))
    assert list(several) == ["A", "A, bones", "B", "B, bones"]
    assert [variant.retarget for variant in variants.values()] == ["off", "off", "bones", "bones"]


def test_a_recorded_fact_is_no_other_model(models, tmp_path):
    folder = shutil.copytree(models[2], tmp_path / "model")
    variants = [Variant("a", str(folder), None)]
    before = trials_identity("animators", AnimatorsConfig(), variants)
    write_training_facts(folder, attention_supervised=True)
    assert trials_identity("animators", AnimatorsConfig(), variants) == before


def test_the_command_compares_all_animators(models, tmp_path, capsys):
    arguments = [f"models=[{','.join(models)}]", f"output={tmp_path}", "kinds=[aligned,rotation]", "clips=1"]
    evaluate.main(["animators", *arguments, "seeds=[0]", "sampling.steps=1", "sampling.size=[32,32]"])
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["counts"] == {"original": 1, "misaligned": 1, "seeds": 1}
    names = ["AnimateAnyone", "DisCo", "DreamPose", "MagicAnimate"]
    assert sorted(results["results"]) == sorted(n + tpc for n in names for tpc in ("", " + TPC", " + TPC (replace)"))
    assert len(results["trials"]) == 2 * 3 * len(names)
    assert len(results["differences"]) == len(results["differences by kind"]) == 3 * len(names)
    cells = results["results"]
    gain = cells["DisCo + TPC"]["misaligned: foreground PSNR (dB) ↑"]["mean"]
    gain -= cells["DisCo"]["misaligned: foreground PSNR (dB) ↑"]["mean"]
    for differences, column in (("differences", "misaligned"), ("differences by kind", "rotation")):
        found = results[differences]["DisCo + TPC minus DisCo"][f"{column}: foreground PSNR (dB) ↑"]
        assert found == {"value": pytest.approx(gain), "low": None, "high": None, "n": 1}
    columns = next(iter(results["results"].values()))
    assert len(columns) == 2 * len(COLUMNS) and all(np.isfinite(cell["mean"]) for cell in columns.values())
    for name in ("strips.png", "table.md", "table.tex", "config.yaml"):
        assert (tmp_path / name).stat().st_size > 0
    shown = capsys.readouterr().out
    assert "| DisCo + TPC (replace) |" in shown
    assert "supervised in training: AnimateAnyone no, MagicAnimate not recorded, DisCo not recorded" in shown
    assert results["attention supervised"] == {"AnimateAnyone": False} | dict.fromkeys(names[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models=[]"], r"models=\[\]"),
        (["models=[nowhere]"], "nowhere"),
        (["names=[a,b]"], "names="),
        (["attachments=[glue]"], "attachments="),
        (["attachments=[add,add]"], "attachments="),
        (["kinds=[sideways]"], "kinds="),
    ],
)
def test_wrong_arguments_are_named(models, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(["animators", f"models=[{models[0]}]", *arguments, f"output={tmp_path}"])
    with pytest.raises(UserError, match="names="):
        evaluate.main(["animators", f"models=[{models[0]},{models[0]}]", f"output={tmp_path}"])
