"""The misalignment benchmark: its frozen clips, its numbers, its command."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

import evaluate
from core.config import load_config
from core.errors import UserError
from data.people.bodies import load_people
from evaluation.config import DRIVEN_KINDS, KINDS, MISALIGNED_SPLITS, MisalignmentConfig
from evaluation.misaligned_clips import (
    ALL_KINDS,
    ClipManifest,
    ClipSpec,
    MisalignedClips,
    PersonSpec,
    Placement,
    digest_of,
    draw,
    fitting,
    make_manifest,
    read_manifest,
)
from evaluation.misalignment import misalignment
from evaluation.statistics import Values, mean_interval
from evaluation.tasks import misalignment as command
from evaluation.tasks.misalignment import AVERAGE, differences_table, measure_table, recovered_table, rows_of
from evaluation.trials import WITHOUT, Variant, trials_identity
from models.config import SMALL_ANIMATORS
from tpc import CalibrationConfig

VARIANTS = {WITHOUT: Variant("without", "", None), "TPC best": Variant("tpc-best", "", CalibrationConfig())}
PLAIN = Placement()


@pytest.fixture(scope="module")
def clips() -> MisalignedClips:
    return MisalignedClips(ALL_KINDS)


@pytest.fixture(scope="module")
def development() -> MisalignedClips:
    return MisalignedClips(ALL_KINDS, split="development")


def angle_and_iou(clips: MisalignedClips, name: str) -> tuple[np.ndarray, np.ndarray]:
    measured = misalignment(*clips.poses(name))
    return np.degrees(np.abs(measured.angle)), measured.box_iou


def test_every_kind_has_its_clips_and_none_shares_a_scene():
    scenes = []
    for split, count in (("test", 20), ("development", 10)):
        for kind in ALL_KINDS:
            manifest = read_manifest(kind, split)
            assert len(manifest.clips) == count
            persons = [person for clip in manifest.clips for person in clip.persons]
            assert all((person.driver is not None) == (kind in DRIVEN_KINDS) for person in persons)
            drivers = [person.driver for person in persons if person.driver]
            scenes += [(split, manifest.seed, shown.scene) for shown in (*persons, *drivers)]
    assert len(set(scenes)) == len(scenes)


def test_choices_and_reported_numbers_share_no_clip(clips, development):
    """Neither names nor bodies nor outfits nor backgrounds; and none of them is of the people of training."""
    assert not set(clips._found) & set(development._found)
    bodies, outfits, skies = set(), set(), []
    for kind in KINDS:
        manifest = read_manifest(kind, "development")
        scenes = [manifest.scenes().scene(p.scene) for clip in manifest.clips[:2] for p in clip.persons]
        bodies |= {scene.person.identity.body for scene in scenes}
        outfits |= {scene.person.identity.seed for scene in scenes}
        tested = read_manifest(kind).scenes().scene(manifest.clips[0].persons[0].scene)
        skies.append(not np.array_equal(tested.background, scenes[0].background))
    assert bodies <= set(load_people().names("development"))
    assert min(outfits) >= 2**31
    assert all(skies)


@pytest.mark.parametrize("split", MISALIGNED_SPLITS)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_clips_are_what_their_manifest_was_made_from(request, kind, split):
    clips = request.getfixturevalue({"test": "clips"}.get(split, split))
    clip = clips.clip(clips.by_kind[kind][0])
    persons = 2 if kind == "two_persons" else 1
    assert clip.driving.masks.shape[1] == persons == len(clip.reference.masks)
    assert clip.driving.masks.any(axis=(2, 3)).all()


def test_a_changed_renderer_is_noticed(clips, monkeypatch):
    manifest, spec = clips._found["aligned-00"]
    monkeypatch.setitem(clips._found, "aligned-00", (manifest, replace(spec, digest="0" * 16)))
    with pytest.raises(UserError, match="aligned-00 is not what its manifest was made from"):
        clips.clip("aligned-00")


def test_references_are_misaligned_as_their_kind_says(clips):
    angle, iou = angle_and_iou(clips, "aligned-00")
    assert angle[0] < 1
    assert iou[0] > 0.99
    angle, _ = angle_and_iou(clips, "rotation-00")
    assert angle[0] > 179
    for name in ("scale-00", "scale-01"):
        _, iou = angle_and_iou(clips, name)
        assert iou.max() < 0.6
    for name in ("temporal_scale-00", "temporal_scale-01"):
        _, iou = angle_and_iou(clips, name)
        assert iou[0] > 0.99
        assert iou[-1] < 0.5
    angle, _ = angle_and_iou(clips, "temporal_rotation-00")
    assert angle[0] < 1
    assert angle[-1] > 45


def test_fitting_clips_have_no_misalignment(clips):
    for name in ("scale-00", "rotation-00", "temporal_scale-00", "temporal_rotation-00"):
        counterparts = clips.fitting[name]
        assert len(counterparts) == (2 if name.startswith("temporal") else 1)
        for counterpart in counterparts:
            _, iou = angle_and_iou(clips, counterpart)
            assert iou[0] > 0.99
    assert clips.fitting["aligned-00"] == ["aligned-00"]


def test_framings_change_evenly_and_scales_in_their_logarithm():
    start, end = Placement(1.0, 0.0, (0.0, 0.0)), Placement(0.25, 90.0, (0.2, 0.1))
    assert start.towards(end, 0.0) == start
    assert start.towards(end, 1.0) == end
    middle = start.towards(end, 0.5)
    assert middle.scale == pytest.approx(0.5)
    assert middle.rotation_deg == 45
    assert middle.shift == pytest.approx((0.1, 0.05))


def test_a_manifest_is_a_function_of_its_seed():
    first, again, other = (make_manifest("rotation", 2, seed, frames=2, size=64) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    elsewhere = make_manifest("rotation", 2, 5, "development", frames=2, size=64)
    assert [clip.persons for clip in elsewhere.clips] == [clip.persons for clip in first.clips]
    assert elsewhere.clips[0].digest != first.clips[0].digest  # other people in the same places
    assert [clip.name for clip in elsewhere.clips] == ["rotation-dev-00", "rotation-dev-01"]
    assert first.clips[0].digest == digest_of(draw(first, first.clips[0]))


def test_fitting_of_a_clip_that_fits_is_nothing():
    person = PersonSpec(0, PLAIN, PLAIN, PLAIN)
    assert fitting(ClipSpec("a", (person,))) == []
    moved = replace(person, end=Placement(0.5))
    assert [spec.name for spec in fitting(ClipSpec("a", (moved,)))] == ["a-start", "a-end"]


def test_what_misalignment_costs_and_what_is_won_back():
    """Two clips, two seeds: cost 4 dB, 3 of which are won back."""
    by_trial = {}
    for seed in (0, 1):
        for clip in ("a", "b"):
            by_trial["without", f"{clip}-start", seed] = {"foreground_psnr": 20.0 + seed}
            by_trial["without", f"{clip}-end", seed] = {"foreground_psnr": 22.0 + seed}
            by_trial["without", clip, seed] = {"foreground_psnr": 17.0 + seed}
            by_trial["tpc-best", clip, seed] = {"foreground_psnr": 20.0 + seed}
    values = Values(by_trial, {"scale": ["a", "b"]}, {c: [f"{c}-start", f"{c}-end"] for c in "ab"}, [0, 1])
    (_, cells), *_ = recovered_table(values, VARIANTS, "foreground_psnr").rows
    assert [cell.mean for cell in cells] == pytest.approx([4.0, 75.0])
    (_, cells), *_ = measure_table(values, VARIANTS, "foreground_psnr", "").rows
    assert [cell.mean for cell in cells] == pytest.approx([21.5, 17.5, 20.5])
    assert cells[0].deviation == pytest.approx(np.std([21, 22], ddof=1))


def test_no_share_of_next_to_nothing():
    by_trial = {("without", "a", 0): {"foreground_psnr": 20.0}, ("tpc-best", "a", 0): {"foreground_psnr": 20.1}}
    values = Values(by_trial, {"aligned": ["a"]}, {"a": ["a"]}, [0])
    (_, cells), *_ = recovered_table(values, VARIANTS, "foreground_psnr").rows
    assert cells[0].mean == 0
    assert cells[1].mean is None


def many_values(gains: dict[str, np.ndarray], cost: np.ndarray, kinds: tuple[str, ...] = ("scale",)) -> Values:
    """Clips of every kind whose PSNR is 10 without TPC, 10 and the gain with it, 10 and the cost with a fitting
    reference; in the second of two seeds 1 dB more throughout.
    """
    by_trial, by_kind, fitting = {}, {}, {}
    for kind in kinds:
        by_kind[kind] = [f"{kind}-{k}" for k in range(len(cost))]
        for k, clip in enumerate(by_kind[kind]):
            fitting[clip] = [f"{clip}-fitting"]
            for seed in (0, 1):
                value = 10.0 + seed
                by_trial["without", clip, seed] = {"foreground_psnr": value}
                by_trial["without", f"{clip}-fitting", seed] = {"foreground_psnr": value + cost[k]}
                for name, gain in gains.items():
                    by_trial[name, clip, seed] = {"foreground_psnr": value + gain[k]}
    return Values(by_trial, by_kind, fitting, [0, 1])


def test_differences_are_of_a_clip_and_have_intervals_over_clips():
    """Without the pairing 1 dB between the seeds and none between the clips would decide; ten clips, not twenty."""
    gain, cost = np.linspace(0.1, 0.3, 10), np.full(10, 4.0)
    values = many_values({"tpc-best": gain, "tpc-release": gain + np.linspace(-0.5, 0.5, 10)}, cost)
    variants = VARIANTS | {"TPC release": Variant("tpc-release", "", CalibrationConfig())}
    table = differences_table(values, variants, "foreground_psnr")
    assert table.columns == (
        "fitting reference minus without TPC",
        "TPC best minus without TPC",
        "TPC release minus without TPC",
        "TPC release minus TPC best",
    )
    ((label, (of_cost, best, release, beside)),) = table.rows
    assert label == "scale" and (of_cost.interval.low, of_cost.interval.high) == pytest.approx((4, 4)) and of_cost.bold
    expected = mean_interval(gain)
    assert (best.interval.low, best.interval.high) == pytest.approx((expected.low, expected.high)) and best.bold
    assert best.mean == pytest.approx(0.2) and best.interval.n == 10 and 0.1 < best.interval.low
    assert beside.mean == pytest.approx(0) and not beside.bold and beside.interval.low < 0 < beside.interval.high
    assert release.mean == pytest.approx(0.2) and not release.bold
    assert table.plain()["scale"]["TPC best minus without TPC"] == best.interval.plain()


def test_the_share_won_back_has_an_interval_of_clips_drawn_jointly():
    cost = np.linspace(1, 5, 8)
    table = recovered_table(many_values({"tpc-best": cost / 2}, cost), VARIANTS, "foreground_psnr")
    ((_, (of_cost, share)),) = table.rows
    assert of_cost.mean == pytest.approx(3) and of_cost.interval.high - of_cost.interval.low > 1
    assert (share.interval.low, share.mean, share.interval.high) == pytest.approx((50, 50, 50)) and share.bold


def test_no_share_of_a_cost_that_may_be_none():
    """2 dB on average, of one clip alone."""
    cost = np.array([16.0, *np.zeros(7)])
    ((_, (of_cost, share)),) = recovered_table(
        many_values({"tpc-best": cost / 2}, cost), VARIANTS, "foreground_psnr"
    ).rows
    assert of_cost.mean == 2 and not of_cost.bold and share.mean is None


def test_the_mean_row_is_of_misaligned_kinds_of_one_person_each_alike():
    kinds = ("aligned", "scale", "rotation", "two_persons")
    values = many_values({"tpc-best": np.linspace(1, 2, 6)}, np.full(6, 2.0), kinds)
    for clip in values.by_kind["rotation"]:
        for seed in (0, 1):
            values.by_trial["tpc-best", clip, seed]["foreground_psnr"] += 2
    rows = dict(differences_table(values, VARIANTS, "foreground_psnr").rows)
    assert list(rows) == ["aligned", "scale", "rotation", "two persons", AVERAGE]
    assert rows[AVERAGE][1].mean == pytest.approx(2.5) and rows[AVERAGE][1].interval.n == 12
    # Differences between the kinds are none of the interval's.
    assert rows[AVERAGE][1].interval.high - rows[AVERAGE][1].interval.low < 1
    assert dict(measure_table(values, VARIANTS, "foreground_psnr", "").rows)[AVERAGE][2].mean == pytest.approx(13)
    assert AVERAGE not in rows_of(many_values({}, np.ones(2)))


def test_the_command_writes_tables_and_figures(tmp_path, capsys):
    arguments = [f"output={tmp_path}", "split=development", "kinds=[proportions]", "clips=1", "presets=[best]"]
    arguments += ['variants=["propagation=hold groups=2"]', "flicker=true", "pose_noise=0.02", "dtype=bfloat16"]
    arguments += [f"model={SMALL_ANIMATORS[0]}"]
    evaluate.main(["misalignment", *arguments, "sampling.steps=1", "seeds=[0]"])
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(results["trials"]) == 4  # without TPC, with it in two ways, and the fitting reference
    found = {trial["condition"]: trial for trial in results["trials"]}
    assert {"without", "variant-propagation=hold,groups=2"} < set(found)
    assert all(0 < trial["foreground_flicker"] < 255 for trial in found.values())
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "won back" in text and "with fewer than 6 clips there is none" in text
    assert "| propagation=hold groups=2 |" in text
    difference = results["tables"]["differences of foreground PSNR (dB) ↑ / clip by clip"]["proportions"]
    assert difference["TPC best minus without TPC"]["n"] == 1
    assert difference["TPC best minus without TPC"]["low"] is None
    for name in ("psnr.png", "psnr.pdf", "strips.png", "table.md", "config.yaml"):
        assert (tmp_path / name).stat().st_size > 0
    capsys.readouterr()
    further = ["seeds=[0,1]", "presets=[]", "variants=[]", "retargets=[bones]", "strips=0"]
    evaluate.main(["misalignment", *arguments, "sampling.steps=1", *further])
    assert "over 2 seeds" in (said := capsys.readouterr().out) and "2 of them before" in said
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    clip = {
        (t["condition"], t["seed"]): t["foreground_psnr"] for t in results["trials"] if not t["clip"].endswith("start")
    }
    assert clip["without-bones", 0] != clip["without", 0] and found["without"] in results["trials"]


def test_variants_are_the_preset_but_for_what_they_say():
    config = MisalignmentConfig(presets=[], variants=["smoothing=0 min_iou=0.3", "preset=paper groups=2"])
    config.tpc.max_gap = 3
    plain, first, second = command.variants_of(config).values()
    assert plain.tpc is None
    assert first.name == "variant-smoothing=0,min_iou=0.3"
    assert first.tpc == CalibrationConfig(smoothing=0, min_iou=0.3, max_gap=3)
    assert second.tpc == CalibrationConfig(preset="paper", groups=2, max_gap=3)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("kinds=[sideways]", "kinds="),
        ("retargets=[off]", "retargets="),
        ("retargets=[bones,bones]", "retargets="),
        ("clips=99", "clips=99"),
        ("presets=[best,best]", "presets="),
        ("presets=[worst]", "presets="),
        ("strips=-1", "strips=-1"),
        ("pose_noise=-0.1", "pose_noise=-0.1"),
        ("split=heldout", "split=heldout must be one of test, development"),
        ("split=development clips=11", "clips=11 must be 0"),
        ('variants=["smooth=1"]', "nearest known one is 'smoothing'"),
        ('variants=["smoothing=-1"]', "smoothing=-1 must be a number, 0 to 1000"),
        ('variants=["--help"]', "must be settings of tpc"),
        ('variants=["  "]', "must be a list of texts that are not empty"),
        ('variants=["groups=2","groups=2"]', "must be different ones"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, argument, message):
    arguments = argument.split(" ", 1) if argument.startswith("split=") else ["split=development", argument]
    with pytest.raises(UserError, match=message):
        evaluate.main(["misalignment", f"output={tmp_path / 'out'}", *arguments])


@pytest.mark.parametrize(
    ("task", "argument", "refused"),
    [
        ("misalignment", 'variants=["groups=2"]', True),
        ("misalignment", "tpc.smoothing=0", True),
        ("animators", "tpc.visibility=paper", True),
        ("misalignment", "presets=[paper]", False),
        ("misalignment", "tpc.preset=paper", False),
        ("animators", "attachments=[add,replace]", False),
    ],
)
def test_nothing_is_chosen_on_the_test_clips(task, argument, refused):
    schema = evaluate.TASKS[task]
    load_config(schema, [argument, "split=development"])
    asked_twice = load_config(schema, [argument, "variants_on_test=true"])
    assert "variants_on_test" not in trials_identity(task, asked_twice, [])
    with pytest.raises(UserError, match="choose with split=development") if refused else nullcontext():
        load_config(schema, [argument])


def test_manifest_size_is_what_is_drawn():
    manifest = ClipManifest("aligned", "test", 5, 1, 1, (48, 64), ())
    drawn = draw(manifest, ClipSpec("a", (PersonSpec(0, PLAIN, PLAIN, PLAIN),)))
    assert drawn.reference.image.shape == (64, 48, 3)
