"""Clips of the misalignment benchmark that another body drives: their truth, and driving poses brought to it."""

from dataclasses import replace

import numpy as np
import pytest

from evaluation.clips import with_retargeting
from evaluation.config import DRIVEN_KINDS
from evaluation.misaligned_clips import (
    ClipManifest,
    ClipSpec,
    Driver,
    MisalignedClips,
    PersonSpec,
    Placement,
    draw,
    read_manifest,
)
from evaluation.tasks.misalignment import compared, retargeted_variants
from evaluation.trials import WITHOUT, Variant
from tpc import CalibrationConfig

PLAIN = Placement()


@pytest.fixture(scope="module")
def clips() -> MisalignedClips:
    return MisalignedClips([*DRIVEN_KINDS, "aligned"])


def test_the_truth_of_a_driven_clip_is_its_person_driving_themselves(clips):
    for kind in ("identity", "proportions_scale"):
        clip, persons = clips.clip(f"{kind}-01"), clips._found[f"{kind}-01"][1].persons
        (own,) = (clips.clip(name) for name in clips.fitting[clip.name])
        assert own.target is None and not np.array_equal(clip.driving.frames, own.driving.frames)
        for part in ("frames", "masks"):
            np.testing.assert_array_equal(getattr(clip.target, part), getattr(own.driving, part))
        np.testing.assert_array_equal(clip.target.poses.keypoints, own.driving.poses.keypoints)
        np.testing.assert_array_equal(clip.truth((64, 64))[0], own.truth((64, 64))[0])
        assert (persons[0].proportions, persons[0].driver.proportions) != ("own", "own") or kind == "identity"
        # Both stand on one line, in one place.
        soles = [np.nonzero(part.masks)[2].max() for part in (clip.driving, clip.target)]
        assert abs(soles[0] - soles[1]) < 8


def test_who_drives_a_clip_has_another_body():
    for kind in DRIVEN_KINDS:
        manifest = read_manifest(kind, "development")
        people, (person,) = manifest.scenes(), manifest.clips[3].persons
        first, second = (people.scene(shown.scene).person.identity for shown in (person, person.driver))
        assert first.body != second.body and first.seed != second.seed


def test_a_driver_of_the_same_body_changes_nothing():
    manifest = ClipManifest("identity", "development", 5, 2, 3, (64, 64), ())
    person = PersonSpec(0, Placement(0.5), PLAIN, PLAIN)
    plain, driven = (draw(manifest, ClipSpec("a", (p,))) for p in (person, replace(person, driver=Driver(0))))
    for part in (driven.driving, driven.target):
        np.testing.assert_array_equal(part.frames, plain.driving.frames)
        np.testing.assert_array_equal(part.poses.keypoints, plain.driving.poses.keypoints)
    np.testing.assert_array_equal(driven.reference.image, plain.reference.image)


def test_retargeting_without_errors_gives_the_true_poses_and_masks(clips):
    clip = clips.clip("proportions-00")
    assert with_retargeting(clip, clip, "off") is clip
    exact, bones = (with_retargeting(clip, clip, mode) for mode in ("exact", "bones"))
    assert exact.driving.poses is clip.target.poses and exact.driving.masks is clip.target.masks
    errors = [
        np.linalg.norm(shown.driving.poses.keypoints - clip.target.poses.keypoints, axis=-1).mean()
        for shown in (clip, bones)
    ]
    assert errors[1] < errors[0]
    aligned = clips.clip("aligned-00")
    assert with_retargeting(aligned, aligned, "exact").driving.poses is aligned.driving.poses


def test_retargeted_variants_are_compared_with_their_likes():
    plain = {WITHOUT: Variant("without", "", None)}
    for preset in ("best", "paper"):
        plain[f"TPC {preset}"] = Variant(f"tpc-{preset}", "", CalibrationConfig(preset=preset))
    variants = plain | retargeted_variants(plain, ["bones"])
    assert list(variants) == [*plain, f"{WITHOUT}, bones", "TPC best, bones", "TPC paper, bones"]
    assert variants["TPC best, bones"].name == "tpc-best-bones"
    assert variants["TPC best, bones"].tpc == plain["TPC best"].tpc
    assert compared(variants) == [
        ("fitting reference", WITHOUT),
        *((label, WITHOUT) for label in list(variants)[1:]),
        ("TPC paper", "TPC best"),
        ("TPC best, bones", "TPC best"),
        ("TPC best, bones", f"{WITHOUT}, bones"),
        ("TPC paper, bones", "TPC paper"),
        ("TPC paper, bones", f"{WITHOUT}, bones"),
    ]
