"""`evaluate.py attention` with the smallest model: its numbers, files, resumption and errors."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import pearsonr, spearmanr

import evaluate
from core.config import load_config
from core.errors import UserError
from evaluation.attention_measures import (
    ATTENTION_MEASURES,
    Correlation,
    Group,
    MeasuredAttention,
    Outcome,
    correlations,
)
from evaluation.config import AttentionTaskConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tiny_pipeline, tmp_path_factory) -> tuple[list[str], Path]:
    """The command's arguments and its output folder after a run."""
    folder = tmp_path_factory.mktemp("attention")
    tiny_pipeline.save_pretrained(folder / "tiny")
    command = ["attention", f"model={folder / 'tiny'}", f"output={folder / 'o'}", "clips=3", "frames=2", "source=96"]
    command += ["sampling.steps=2", "sampling.size=[64,64]", "seeds=[0,1]", "columns=2", "tpc.keypoints=trunk"]
    evaluate.main(command)
    return command, folder / "o"


def measured(accuracy: float, psnr: float | None) -> Outcome:
    steps = {name: np.full((2, 3), accuracy) for name in ATTENTION_MEASURES}
    return Outcome(MeasuredAttention(("a", "b"), steps, {}, {}), psnr)


def test_files_and_numbers(finished):
    _, output = finished
    results = json.loads((output / "results.json").read_text())
    subsets = [subset for subset in ("aligned", "misaligned") if results["counts"][subset]]
    assert sum(results["counts"][subset] for subset in subsets) == 3
    labels = [f"{subset}, {condition}" for subset in subsets for condition in ("without TPC", "with TPC")]
    assert list(results["results"]) == labels == list(results["keypoints"])
    rows = list(csv.DictReader((output / "trials.csv").open()))
    assert len(rows) == 3 * 2 * 2
    for label, numbers in results["results"].items():
        subset, condition = label.split(", ")
        trials = [row for row in rows if (row["reference"], row["condition"]) == (subset, condition)]
        for name, key in (("strongest", "strongest"), ("foreground_psnr", "person_psnr_db")):
            by_seed = [np.mean([float(row[key]) for row in trials if row["seed"] == seed]) for seed in "01"]
            assert list(numbers[name]["by_seed"].values()) == pytest.approx(by_seed, rel=1e-4)
            assert numbers[name]["mean"] == pytest.approx(np.mean(by_seed), rel=1e-4)
            assert numbers[name]["deviation"] == pytest.approx(np.std(by_seed, ddof=1), rel=1e-2, abs=1e-6)
        parts = [
            numbers[name]["mean"]
            for name in ATTENTION_MEASURES
            if name.startswith(("self", "reference", "calibrated"))
        ]
        assert sum(part or 0 for part in parts) == pytest.approx(1, abs=1e-5)
        assert (numbers["calibrated images"]["mean"] is None) == (condition == "without TPC")
        assert 0 <= numbers["strongest"]["mean"] <= 1 and 0 < numbers["chance"]["mean"] < 1
    correlation = results["correlation of pointing accuracy with person PSNR"]
    gains = {f"gain with TPC, {subset}" for subset in subsets}
    assert set(correlation) == {"all", *subsets, "gain with TPC", *gains, *labels}
    assert correlation["all"]["points"] == 6 and correlation["all"]["pearson"]["n"] == 3
    table = (output / "table.md").read_text()
    assert "Attention supervised in training: not recorded" in table and "| all (3 clips, 6 points) |" in table
    assert "pointing accuracy, maximum ↑" in table and "±" in table and "misaligned, with TPC" in table
    assert r"\begin{tabular}" in (output / "table.tex").read_text()
    for name in ("pck", "denoising", "correlation", "looks"):
        assert np.asarray(Image.open(output / f"{name}.png").convert("L")).std() > 5
    assert (output / "pck.pdf").read_bytes().startswith(b"%PDF")


def test_the_same_command_does_nothing_again(finished):
    command, output = finished
    first = (output / "results.json").read_text()
    parts = {part: part.stat().st_mtime_ns for part in (output / "parts").iterdir()}
    evaluate.main(command)
    assert (output / "results.json").read_text() == first
    assert {part: part.stat().st_mtime_ns for part in (output / "parts").iterdir()} == parts and len(parts) == 12
    with pytest.raises(UserError, match="begun with other radius"):
        evaluate.main([*command, "radius=0.3"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("layers=[up_blocks.9]", "layers: 'up_blocks.9' does not read the reference; the nearest that do are 'up_bl"),
        ("radius=0", "radius=0 must be a number, 0 to 100 but not 0"),
        ("radii=[]", r"radii=\[\] must be a list of one or more numbers"),
        ("columns=0", "columns=0 must be an integer, 1 to"),
        ("keypoints=[tail]", "keypoints=.*tail.* must be a list of one or more nose"),
        ("clips=0", "clips=0 must be at least 1"),
    ],
)
def test_bad_input(finished, tmp_path, argument, message):
    command, _ = finished
    with pytest.raises(UserError, match=message):
        evaluate.main([*command, f"output={tmp_path / 'o'}", argument])
    assert not list(tmp_path.rglob("results.json"))


def test_the_shipped_configuration_fits():
    config = load_config(AttentionTaskConfig, [], files=[ROOT / "configs" / "evaluation" / "attention.yaml"])
    config.check()
    assert config.output == "outputs/attention" and config.radius in config.radii


class TestMeasured:
    def test_written_and_read(self, tmp_path):
        steps = {"strongest": np.array([[0.5, np.nan], [1.0, 0.0]]), "near": np.full((2, 2), np.nan)}
        value = MeasuredAttention(
            ("a", "b"), steps, {"centroid": np.array([0.0, 1.0])}, {"nose": 0.5, "left_eye": None}
        )
        value.write(tmp_path / "a.json")
        read = MeasuredAttention.read(tmp_path / "a.json")
        assert read.layers == value.layers and read.keypoints == value.keypoints
        assert np.array_equal(read.steps["strongest"], steps["strongest"], equal_nan=True)
        assert read.mean("strongest") == 0.5 and read.mean("near") is None
        assert read.pck["centroid"].tolist() == [0, 1]

    def test_groups_average_clips_then_seeds(self):
        outcomes = {("a", 0): measured(0.1, 10), ("b", 0): measured(0.3, None), ("a", 1): measured(0.5, 20)}
        group = Group("aligned", "with TPC", outcomes, "a")
        assert group.by_seed([0, 1], lambda o: o.attention.mean("near")) == pytest.approx([0.2, 0.5])
        assert group.by_seed([0, 1, 2], lambda o: o.person_psnr) == [10, 20, None]
        assert group.clip_means(lambda o: o.person_psnr) == {"a": 15}

    def test_correlations(self):
        """PSNR follows pointing exactly within rows; TPC adds 0.1 and 2 dB to every clip but one."""
        rows = []
        for condition, shift in (("without TPC", 0.0), ("with TPC", 0.1)):
            outcomes = {(name, 0): measured(0.1 * k + shift, 10 + k + 20 * shift) for k, name in enumerate("abcd")}
            rows.append(Group("misaligned", condition, outcomes, "a"))
        rows[1].outcomes["d", 0] = measured(0.9, 19)
        found = correlations(rows)
        within = found["misaligned, without TPC"]
        assert within.pearson.value == pytest.approx(1) and within.spearman.value == pytest.approx(1)
        assert (within.points, within.pearson.n, within.pearson.low) == (4, 4, None), "four clips are too few"
        gain = found["gain with TPC"]
        assert gain.points == 4 and gain.pearson.value == pytest.approx(1)
        assert found["gain with TPC, misaligned"] == gain and "gain with TPC, aligned" not in found
        assert found["all"].points == 8 and found["all"].pearson.n == 4 and found["all"].pearson.value < 1
        few = correlations([Group("aligned", "with TPC", {("a", 0): measured(0.1, 10)}, "a")])
        assert few["all"].plain() == {
            "pearson": {"value": None, "low": None, "high": None, "n": 1},
            "spearman": {"value": None, "low": None, "high": None, "n": 1},
            "points": 1,
        }

    def test_pooled_correlations_may_be_those_between_the_groups(self):
        """Misaligned clips point worse and come out worse; within each group neither follows the other."""
        rng, groups = np.random.default_rng(5), []
        for subset, accuracy, psnr in (("aligned", 0.8, 20), ("misaligned", 0.2, 10)):
            for condition in ("without TPC", "with TPC"):
                noise = rng.normal(0, 0.05, (12, 2))
                outcomes = {
                    (f"{subset}{k}", 0): measured(accuracy + a, psnr + 10 * b) for k, (a, b) in enumerate(noise)
                }
                groups.append(Group(subset, condition, outcomes, ""))
        found = correlations(groups)
        assert list(found)[:4] == ["all", "aligned", "misaligned", "gain with TPC"]
        assert found["all"].pearson.low > 0.9 and found["all"].pearson.n == 24 and found["all"].points == 48
        for subset in ("aligned", "misaligned"):
            assert found[subset].pearson.n == 12 and found[subset].points == 24
            assert not found[subset].pearson.excludes_zero and not found[subset].spearman.excludes_zero

    def test_correlations_are_scipys(self):
        values = np.random.default_rng(2).normal(0, 1, (10, 1, 2)).round(1)  # with ties
        found = Correlation.of(values)
        assert found.pearson.value == pytest.approx(pearsonr(*values[:, 0].T).statistic)
        assert found.spearman.value == pytest.approx(spearmanr(*values[:, 0].T).statistic)
        assert -1 <= found.pearson.low < found.pearson.value < found.pearson.high <= 1
        # A clip's second point is no second clip.
        twice = Correlation.of(np.repeat(values, 2, axis=1))
        assert twice.pearson.n == 10 and twice.points == 20
        assert (twice.pearson.low, twice.pearson.high) == pytest.approx((found.pearson.low, found.pearson.high))
