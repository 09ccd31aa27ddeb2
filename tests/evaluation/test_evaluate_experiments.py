"""`evaluate.py sweep`, `ablation` and `table` with the smallest model, tables, and the measures of persons."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from core.config import load_config
from core.errors import UserError
from data.clips.rendered import RenderedPeople
from data.config import PoseConfig
from data.inputs import Driving, Reference
from data.poses.poses import Poses, open_estimator
from data.poses.weights import fetch_models
from data.preparation.manifest import Fingerprint, write_manifest, write_record
from evaluation.clips import EvaluationClip, open_clips, rendered_clip, with_pose_noise
from evaluation.config import ClipsConfig
from evaluation.folders import pair_clips
from evaluation.plots import STYLES
from evaluation.report import (
    Cell,
    Table,
    comparison_table,
    interval_cell,
    latex,
    markdown,
    over_seeds,
    with_best,
)
from evaluation.statistics import Interval, Values
from evaluation.tasks.ablation import ALL, ablation_variants, differences_table
from evaluation.tasks.metrics import frame_pairs
from evaluation.trials import WITHOUT, Variant, frame_pairs_of
from metrics.protocols import PROTOCOLS
from tests.clips import STANDING, posed, save_rendered_pair
from tpc.silhouettes import body_height

ROOT = Path(__file__).parents[2]
QUICK = ["sampling.steps=1", "sampling.size=[32,32]", "source=48", "frames=2", "seeds=[0,1]"]


@pytest.fixture(scope="module")
def model(tiny_pipeline, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline.save_pretrained(folder)
    return str(folder)


def pose_models() -> None:
    """The pose estimator's files, or a skip where they cannot be had."""
    try:
        fetch_models()
    except UserError as error:
        pytest.skip(f"the pose models cannot be had: {error}")


def results_of(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def test_pose_noise_is_in_parts_of_the_height_and_leaves_the_rest():
    """A thousand frames of one pose, the smaller half of them: the error's deviation goes with the person's size."""
    person = posed([(0, 1)] * 500 + [(0, 0.5)] * 500)
    scores = person.scores.copy()
    scores[:, :, 3] = 0
    poses = replace(person, scores=scores)
    image = np.zeros((1, 100, 100, 3), np.uint8)
    mask = np.zeros((1, 1, 100, 100), np.uint8)
    clip = EvaluationClip("a", Reference(image[0], posed([(0, 1)]), mask[0]), Driving(image, poses, mask))
    noisy = with_pose_noise(clip, 0.02, np.random.default_rng(3))
    again = with_pose_noise(clip, 0.02, np.random.default_rng(3))
    np.testing.assert_array_equal(noisy.driving.poses.keypoints, again.driving.poses.keypoints)
    errors = noisy.driving.poses.keypoints - poses.keypoints
    assert not errors[:, :, 3].any()
    seen = np.delete(errors, 3, axis=2)
    height = body_height(STANDING, scores[0, 0] > 0)
    assert seen[:500].std() == pytest.approx(0.02 * height, rel=0.03)
    assert seen[500:].std() == pytest.approx(0.01 * height, rel=0.03)
    assert np.abs(noisy.reference.poses.keypoints - clip.reference.poses.keypoints).max() > 0
    assert noisy.driving.masks is mask
    np.testing.assert_array_equal(noisy.driving.poses.scores, scores)


def test_pose_noise_changes_what_the_animator_gets_and_not_what_it_is_measured_by(model, tmp_path):
    quick = [f"model={model}", *QUICK, "clips=1", "seeds=[0]", "transforms=[procrustes]", "subsets=[all]"]
    quick += ["propagations=['off']", "measures=[psnr]", "features=none"]
    found = {}
    for name, noise in (("exact", 0.0), ("noisy", 0.1)):
        evaluate.main(["ablation", *quick, f"output={tmp_path / name}", f"pose_noise={noise}"])
        results = json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))["results"]
        found[name] = results["procrustes, all, IP off"]["foreground_psnr"]["mean"]
    assert found["exact"] != found["noisy"]
    assert abs(found["exact"] - found["noisy"]) < 3
    with pytest.raises(UserError, match="pose_noise=-1"):
        evaluate.main(["ablation", *quick, f"output={tmp_path / 'none'}", "pose_noise=-1"])


def test_sweep(model, tmp_path):
    command = ["sweep", f"model={model}", f"output={tmp_path / 'o'}", "clips=1", "angles=2", "scales=[0.5]", *QUICK]
    evaluate.main(command)
    results = results_of(tmp_path / "o")
    assert results["curves"]["angle"]["with TPC"]["x"] == [-180, 0, 180]
    without = [t for t in results["trials"] if not t["tpc"] and t["angle_deg"] == 180]
    assert [t["seed"] for t in without] == [0, 1]
    values = [t["person_psnr_db"] for t in without]
    curve = results["curves"]["angle"]["without TPC"]
    assert curve["mean"][0] == curve["mean"][2] == pytest.approx(np.mean(values))
    assert curve["deviation"][0] == pytest.approx(np.std(values, ddof=1))
    assert results["curves"]["scale"]["with TPC"]["x"] == [0.5, 1]
    aligned, scaled = (
        {(t["tpc"], t["seed"]): t["person_psnr_db"] for t in results["trials"][-8:] if t["scale"] == scale}
        for scale in (1.0, 0.5)
    )
    iou = results["curves"]["box IoU"]
    for label, tpc in (("without TPC", False), ("with TPC", True)):
        lost = np.mean([scaled[tpc, seed] - aligned[False, seed] for seed in (0, 1)])
        assert iou[label]["mean"][0] == pytest.approx(lost), "the smaller IoU is the scaled one's"
    assert iou["without TPC"]["mean"][-1] == 0
    # A quarter of the size is an IoU of its own, so both curves have the same gain there.
    gains = {(quantity, point["x"]): point for quantity, at_x in results["gains"].items() for point in at_x}
    gained = np.mean([scaled[True, seed] - scaled[False, seed] for seed in (0, 1)])
    for key in (("scale", 0.5), ("box IoU", iou["with TPC"]["x"][0])):
        assert gains[key] == {"x": key[1], "value": pytest.approx(gained), "low": None, "high": None, "n": 1}
    assert "with TPC minus without TPC (dB)" in (tmp_path / "o" / "table.md").read_text()
    assert next(t for t in results["trials"] if t["scale"] == 0.5)["box_iou"] < 0.7
    colours = np.asarray(Image.open(tmp_path / "o" / "sweep.png").convert("RGB")).reshape(-1, 3)
    for colour, _ in STYLES[:2]:
        wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
        assert (np.abs(colours.astype(int) - wanted).sum(1) < 12).any(), "both curves are drawn"
    first = (tmp_path / "o" / "results.json").read_text()
    evaluate.main(command)
    assert (tmp_path / "o" / "results.json").read_text() == first
    with pytest.raises(UserError, match="begun with other sampling"):
        evaluate.main([*command, "sampling.steps=2"])
    with pytest.raises(UserError, match="scales=.* must be"):
        evaluate.main([*command, "scales=[0]"])


def test_a_sweep_to_where_nothing_can_be_compared(model, tmp_path):
    """A reference that shows a piece of the trunk alone has no box, and no place among the IoUs."""
    command = [
        "sweep",
        f"model={model}",
        f"output={tmp_path}",
        "clips=1",
        "angles=0",
        "scales=[40]",
        *QUICK,
        "seeds=[0]",
    ]
    evaluate.main(command)
    results = results_of(tmp_path)
    assert {trial["scale"]: trial["box_iou"] for trial in results["trials"]} == {
        40: None,
        1: pytest.approx(0.75, abs=0.05),
    }
    assert len(results["curves"]["box IoU"]["with TPC"]["x"]) == 1 and results["curves"]["scale"]["with TPC"]["x"] == [
        1,
        40,
    ]


def test_ablation(model, tmp_path, capsys):
    command = ["ablation", f"model={model}", f"output={tmp_path / 'o'}", "clips=1", "features=none", *QUICK]
    command += ["measures=[psnr,ssim]", "transforms=[procrustes,linear]", "propagations=[off,1]", "subsets=[torso]"]
    evaluate.main(command)
    results = results_of(tmp_path / "o")["results"]
    assert list(results) == ["without TPC"] + [
        f"{transform}, torso, {way}" for transform in ("procrustes", "linear") for way in ("IP off", "IP, M = 1")
    ]
    cell = results["without TPC"]["foreground_ssim"]
    assert cell["mean"] == pytest.approx(np.mean(list(cell["by_seed"].values()))) and cell["samples"] == 2
    assert {"foreground_psnr", "background_psnr"} <= results["linear, torso, IP off"].keys()
    compared = results_of(tmp_path / "o")["differences"]["linear, torso, IP off minus procrustes, torso, IP off"]
    gain = results["linear, torso, IP off"]["foreground_ssim"]["mean"]
    gain -= results["procrustes, torso, IP off"]["foreground_ssim"]["mean"]
    assert compared["foreground SSIM ↑"]["value"] == pytest.approx(gain) and compared["foreground SSIM ↑"]["n"] == 1
    table = (tmp_path / "o" / "table.md").read_text()
    assert "protocol native" in table and "foreground PSNR (dB) ↑" in table and "±" in table
    assert r"\textbf" in (tmp_path / "o" / "table.tex").read_text()
    parts = {part: part.stat().st_mtime_ns for part in (tmp_path / "o" / "parts").iterdir()}
    evaluate.main([*command, "seeds=[0,1,2]"])
    extended = results_of(tmp_path / "o")["results"]["without TPC"]["foreground_ssim"]
    assert list(extended["by_seed"]) == ["0", "1", "2"] and extended["by_seed"]["1"] == cell["by_seed"]["1"]
    assert all(part.stat().st_mtime_ns == time for part, time in parts.items()), "a finished run is extended"
    with pytest.raises(UserError, match="propagations has 'of', which is neither off, hold nor a number"):
        evaluate.main([*command, "propagations=[of]"])
    with pytest.raises(UserError, match="transforms=.* must be a list of one or more"):
        evaluate.main([*command, "transforms=[cubic]"])


def test_table(model, tmp_path):
    command = ["table", f"models=[{model},{model}]", "names=[a,b]", f"output={tmp_path / 'o'}", "clips=2", *QUICK]
    command += ["features=none", "seeds=[0]", "protocol=disco-2023", "measures=[psnr,psnr_overflow]"]
    evaluate.main(command)
    results = results_of(tmp_path / "o")
    assert list(results["results"]) == ["a", "a + TPC", "b", "b + TPC"]
    assert sum(results["counts"][subset] for subset in ("original", "misaligned")) == 2
    assert "rendered-001" in results["subsets"]["misaligned"], "its reference is turned"
    gain = results["differences"]["a + TPC minus a"]["misaligned: PSNR (dB) ↑"]["value"]
    of_misaligned = [results["results"][name]["misaligned"]["psnr"]["mean"] for name in ("a + TPC", "a")]
    assert gain == pytest.approx(of_misaligned[0] - of_misaligned[1])
    same = [results["results"][name]["misaligned"]["psnr"]["mean"] for name in ("a", "b")]
    assert same[0] == same[1], "the same weights and seeds"
    assert (
        results["protocol"]["name"] == "disco-2023" and "PSNR (overflow)" in (tmp_path / "o" / "table.md").read_text()
    )
    with pytest.raises(UserError, match="names="):
        evaluate.main([*command, "names=[a,a]"])


def test_clips_of_a_folder(tmp_path):
    save_rendered_pair(tmp_path)
    for name in ("driving.mp4", "driving.npz"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "set" / name)
    config = ClipsConfig(dataset=str(tmp_path / "set"), clips=0, frames=2, stride=2, reference_frame=1)
    (name,) = open_clips(config).names
    drawn = open_clips(config).clip(name)
    assert drawn.driving.masks.shape == (2, 1, 96, 96) and drawn.driving.masks.any(), "drawn around the keypoints"
    (tmp_path / "driving_masks").rename(tmp_path / "set" / "driving_masks")
    clip = open_clips(config).clip(name)
    poses = Poses.load(tmp_path / "set" / "driving.npz")
    assert np.array_equal(clip.driving.poses.keypoints, poses.keypoints[[0, 2]])
    assert np.array_equal(clip.reference.poses.keypoints, poses.keypoints[[1]])
    frames, masks = clip.truth((48, 48))
    assert frames.shape == (2, 48, 48, 3) and masks.shape == (2, 48, 48)
    assert clip.reference.masks.any() and not np.array_equal(clip.driving.masks, drawn.driving.masks)


def test_clips_that_were_prepared(tmp_path):
    """A manifest says where everything lies; clips that are marked as held out go first."""
    save_rendered_pair(tmp_path)
    (tmp_path / "driving_masks").rename(tmp_path / "a_masks")
    (tmp_path / "driving.npz").rename(tmp_path / "a.npz")
    facts = {"frames": 6, "fps": 8.0, "size": [96, 96], "box": None, "video": "driving.mp4", "poses": "a.npz"}
    fingerprint = {field.name: 0 for field in fields(Fingerprint)}
    records = [
        {"name": name, "state": "done", "masks": "a_masks", "split": split, "inputs": {"video": fingerprint}, **facts}
        for name, split in (("b/a", "heldout"), ("c", "train"))
    ]
    for record in records:
        write_record(tmp_path, record)
    write_manifest(tmp_path, [record["name"] for record in records], "videos", "here")
    clips = open_clips(ClipsConfig(dataset=str(tmp_path), clips=0, frames=0, stride=1))
    assert clips.names == ["b-a"]
    assert len(clips.clip("b-a").driving.frames) == 6 and len(clips.stamps("b-a")) == 2


def test_poses_of_generated_people(tmp_path):
    """A clip against itself, and against itself shifted by a tenth of the person's height."""
    pose_models()
    estimators = [open_estimator(PoseConfig()) for _ in range(2)]
    scene = RenderedPeople(size=(256, 256), num_frames=2, stride=2, split="heldout", seed=3, length=1).scene(0)
    for number, pose in enumerate(scene.poses):
        image = scene.render(pose).image
        for side, shift in (("truth", 0), ("same", 0), ("moved", 20)):
            (tmp_path / side).mkdir(exist_ok=True)
            Image.fromarray(np.roll(image, shift, axis=1)).save(tmp_path / side / f"{number:03d}.png")
    values = {}
    for side in ("same", "moved"):
        (pair,) = pair_clips(tmp_path / side, tmp_path / "truth")
        values[side] = [frame.person for frame in frame_pairs(pair, PROTOCOLS["native"], estimators)]
    assert [value["keypoint_error"] for value in values["same"]] == [0, 0]
    assert all(value["part_colour"] == 0 for value in values["same"])
    assert all(0.05 < value["keypoint_error"] < 0.2 for value in values["moved"])
    assert all(value["part_colour"] < 10 for value in values["moved"])
    # In an experiment the target is the exact pose that drove the animation.
    clip = rendered_clip(scene, scene.render(scene.poses[0]), "a")
    drawn = [
        frame.person for frame in frame_pairs_of(clip.truth((256, 256))[0], clip, PROTOCOLS["native"], estimators[0])
    ]
    assert all(0 < person["keypoint_error"] < 0.05 and person["part_colour"] < 5 for person in drawn)


class TestTables:
    def table(self) -> Table:
        rows = with_best(
            [[over_seeds([1.0, 3.0]), Cell(0.5)], [over_seeds([4.0, 4.0]), Cell(0.25)]], ["higher", "lower"]
        )
        return Table(
            "a_b", ("PSNR ↑", "x ↓"), tuple((f"row {k}", tuple(row)) for k, row in enumerate(rows)), "50 % of it"
        )

    def test_markdown(self):
        lines = markdown(self.table()).splitlines()
        assert lines[2] == "| row 0 | 2.00 ± 1.41 | 0.500 |" and lines[3] == "| row 1 | **4.00 ± 0.00** | **0.250** |"

    def test_latex(self):
        text = latex(self.table())
        assert r"a\_b & PSNR $\uparrow$ & x $\downarrow$ \\" in text and r"\caption{50 \% of it}" in text
        assert r"row 1 & \textbf{4.00\,$\pm$\,0.00} & \textbf{0.250} \\" in text

    def test_intervals(self):
        found = [Interval(0.1234, -0.5, 2.5, 9), Interval(-12.31, -20.0, -0.004, 9), Interval(0.5, None, None, 2)]
        table = Table("x", ("a", "b", "c"), (("row", tuple(map(interval_cell, found))),), "")
        shown = "0.12 [-0.50, 2.50] | **-12.3 [-20.0, -0.0]** | 0.500"
        assert markdown(table).splitlines()[2] == f"| row | {shown} |"
        assert r"\textbf{-12.3 [-20.0, -0.0]}" in latex(table)
        assert table.plain()["row"]["c"] == {"value": 0.5, "low": None, "high": None, "n": 2}

    def test_variants_are_compared_clip_by_clip(self):
        """Six clips a kind, 2 dB or 0 more of one; SSIM is lacking in the clips of one kind."""
        by_trial = {}
        for k, clip in enumerate("abcdefghijkl"):
            for variant, more in (("x", 0.0), ("y", 2.0 * (clip < "g"))):
                by_trial[variant, clip, 0] = {"psnr": 10.0 + k + more, "ssim": None if clip < "g" else 0.5}
        values = Values(by_trial, {"one": "abcdef", "two": "ghijkl"}, {}, [0])
        columns = [("one: ", ["one"], "psnr"), ("", ["one", "two"], "psnr"), ("one: ", ["one"], "ssim")]
        table = comparison_table("differences", columns, [("y minus x", "y", "x")], values)
        assert table.columns == ("one: PSNR (dB) ↑", "PSNR (dB) ↑", "one: SSIM ↑")
        ((label, (one, both, without)),) = table.rows
        assert (label, one.mean, one.bold, both.mean, both.interval.n) == ("y minus x", 2, True, 1, 12)
        assert without.mean is None and not without.bold

    def test_conditions_are_compared_with_none_and_with_the_first(self):
        variants = {WITHOUT: Variant("w", "", None)} | {name: Variant(name, "", None) for name in "abc"}
        values = Values({(name, "clip", 0): {"psnr": k} for k, name in enumerate("wabc")}, {ALL: ["clip"]}, {}, [0])
        rows = {label: cells[0].mean for label, cells in differences_table(values, variants, ["psnr"]).rows}
        assert rows == {f"{name} minus {WITHOUT}": k + 1 for k, name in enumerate("abc")} | {
            "b minus a": 1,
            "c minus a": 2,
        }

    def test_a_seed_without_a_number_is_no_number(self):
        assert over_seeds([1.0, None]).mean is None and over_seeds([]).mean is None
        assert over_seeds([1.0]) == Cell(1.0, None)


@pytest.mark.parametrize("task", ["sweep", "ablation", "table"])
def test_shipped_configurations_fit_their_tasks(task):
    schema = evaluate.TASKS[task]
    config = load_config(schema, [], files=[ROOT / "configs" / "evaluation" / f"{task}.yaml"])
    assert config.output == f"outputs/{task}"
    config.check()
    if task == "ablation":
        assert len(ablation_variants(config)) == 4 * 2 * 5 + 1
        both = ablation_variants(replace(config, attachments=["add", "replace"]))
        assert len(both) == 4 * 2 * 5 * 2 + 1 and ablation_variants(config).items() < both.items()
        assert {name: both[name].tpc.attach for name in both if "IP off" in name and "linear, all" in name} == {
            "linear, all, IP off": "add",
            "linear, all, IP off, replace": "replace",
        }
