"""Poses and masks as estimators give them, which animators are handed in place of exact ones."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

import evaluate
from core.config import load_config
from core.errors import UserError
from data.poses.person import PersonEstimate
from data.poses.poses import Poses
from evaluation.clips import (
    MASK_OFFSET,
    MASK_RAGGEDNESS,
    EvaluationClip,
    estimated_mask,
    open_clips,
    with_estimates,
    with_masks,
)
from evaluation.config import ClipsConfig
from evaluation.misaligned_clips import MisalignedClips
from inference.animate import animate
from inference.config import SamplingConfig
from tests.evaluation.test_evaluate_experiments import pose_models
from tests.small_animators import small_pipeline
from tpc import calibrate
from tpc.silhouettes import draw_silhouettes

FARTHEST = MASK_OFFSET + 2 * MASK_RAGGEDNESS  # that a boundary moves, in sizes of the person


@settings(max_examples=30, deadline=None)
@given(
    box=st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(8, 100), st.integers(8, 100)),
    seed=st.integers(0, 2**32 - 1),
)
def test_only_what_is_near_the_boundary_of_a_mask_changes(box, seed):
    top, left, height, width = box
    mask = np.zeros((96, 128), bool)
    mask[top : top + height, left : left + width] = True
    size = max(np.ptp(indices) + 1 for indices in np.nonzero(mask))
    found = estimated_mask(mask, np.random.default_rng(seed))
    assert found.dtype == bool and found.shape == mask.shape
    if mask.all():
        assert found.all()
        return
    depth = np.where(mask, distance_transform_edt(mask), distance_transform_edt(~mask)) - 0.5
    far = depth > FARTHEST * size
    np.testing.assert_array_equal(found[far], mask[far])
    np.testing.assert_array_equal(found, estimated_mask(mask, np.random.default_rng(seed)))


def test_masks_of_nobody_and_of_nothing_else_stay():
    for mask in (np.zeros((9, 12), bool), np.ones((9, 12), bool)):
        np.testing.assert_array_equal(estimated_mask(mask, np.random.default_rng(0)), mask)


def test_a_straight_boundary_moves_as_far_as_is_said_on_average_and_smoothly():
    """Half of an image, 300 pixels high: where the boundary lies in each row, over 60 masks."""
    mask = np.zeros((300, 60), bool)
    mask[:, :30] = True
    rng = np.random.default_rng(4)
    moved = np.stack([estimated_mask(mask, rng).sum(1) - 30 for _ in range(60)]) / 300
    assert abs(moved.mean()) < 0.001  # neither wider nor narrower
    assert moved.mean(1).std() == pytest.approx(MASK_OFFSET / np.sqrt(3), rel=0.25)
    ragged = moved - moved.mean(1, keepdims=True)
    assert ragged.std() == pytest.approx(MASK_RAGGEDNESS, rel=0.15)
    near, apart = (np.mean(ragged[:, lag:] * ragged[:, :-lag]) / ragged.var() for lag in (1, 45))
    assert near > 0.8 and abs(apart) < 0.1


@dataclass
class KnownPersons:
    """An estimator whose answers are given, image by image; the first is that of the still."""

    answers: list[list[PersonEstimate | None]]

    def image(self, image: np.ndarray, max_persons: int = 1) -> list[PersonEstimate]:
        return [person for person in self.answers[0] if person is not None][:max_persons]

    def video(self, frames: Iterable[np.ndarray], max_persons: int = 1) -> Iterator[list[PersonEstimate | None]]:
        for _, persons in zip(frames, self.answers[1:], strict=True):
            yield (persons + [None] * max_persons)[:max_persons]


@pytest.fixture(scope="module")
def pair() -> EvaluationClip:
    """Two persons side by side, in two frames."""
    clip = MisalignedClips(["two_persons"], 1, "development").clip("two_persons-dev-00")
    driving = clip.driving
    return replace(
        clip, driving=replace(driving, frames=driving.frames[:2], poses=driving.poses[:2], masks=driving.masks[:2])
    )


def answers(clip: EvaluationClip, order: list[int], shift: float, with_mask: bool) -> list[list[PersonEstimate]]:
    """The clip's own persons in another order, moved by some pixels, image by image."""
    found = []
    for part, masks in ((clip.reference, clip.reference.masks[None]), (clip.driving, clip.driving.masks)):
        for points, scores, mask in zip(part.poses.keypoints, part.poses.scores, masks, strict=True):
            found.append(
                [PersonEstimate(points[k] + shift, scores[k], mask[k] if with_mask else None, 1.0) for k in order]
            )
    return found


@pytest.mark.parametrize("with_mask", [True, False])
def test_persons_found_take_the_places_of_those_they_are(pair, with_mask):
    found = with_estimates(pair, KnownPersons(answers(pair, [1, 0], 2.0, with_mask)))
    for part, true in ((found.reference, pair.reference), (found.driving, pair.driving)):
        np.testing.assert_allclose(part.poses.keypoints, true.poses.keypoints + 2, atol=1e-4)
        np.testing.assert_array_equal(part.poses.scores, true.poses.scores)
        if with_mask:
            np.testing.assert_array_equal(part.masks, true.masks)
        else:
            assert part.masks is None
    assert found.driving.frames is pair.driving.frames


def test_persons_who_are_not_found_are_nowhere(pair):
    known = answers(pair, [1], 0.0, True)
    one = with_estimates(pair, KnownPersons(known))
    np.testing.assert_array_equal(one.driving.poses.present(), [[False, True]] * 2)
    assert one.driving.masks[:, 1].any() and not one.driving.masks[:, 0].any()
    nobody = with_estimates(pair, KnownPersons([[]] * 3))
    assert not nobody.driving.poses.present().any() and not nobody.reference.poses.present().any()
    assert nobody.driving.masks.shape == pair.driving.masks.shape and not nobody.driving.masks.any()
    for clip in (one, nobody):  # which the calibration copes with
        reference, driving = clip.reference, clip.driving
        record = calibrate(
            reference.image,
            reference.poses,
            driving.poses,
            (64, 64),
            reference_masks=reference.masks,
            driving_masks=driving.masks,
        ).records
        assert [person.status for row in record for person in row].count("uncalibrated") == (2 if clip is one else 4)


def test_masks_are_exact_estimated_the_estimators_own_or_none(pair):
    def masks(kind: str, clip: EvaluationClip = pair, seed: int = 0) -> list[np.ndarray | None]:
        given = with_masks(clip, pair, kind, np.random.default_rng(seed))
        return [given.reference.masks, given.driving.masks]

    exact = [pair.reference.masks, pair.driving.masks]
    assert all(a is b for a, b in zip(masks("exact"), exact, strict=True))
    assert masks("drawn") == [None, None]
    for found, again, other, true in zip(
        masks("estimated"), masks("estimated"), masks("estimated", seed=1), exact, strict=True
    ):
        np.testing.assert_array_equal(found, again)
        assert found.shape == true.shape
        assert 0.85 < (found & true).sum() / (found | true).sum() < 0.99
        assert (found != other).any()
    still = replace(pair, driving=replace(pair.driving, masks=pair.driving.masks[[0, 0]]))
    first, second = with_masks(still, still, "estimated", np.random.default_rng(0)).driving.masks
    assert (first != second).any()  # errors of every image apart, also where nobody moves
    own = with_estimates(pair, KnownPersons(answers(pair, [0, 1], 0.0, True)))
    assert all(a is b for a, b in zip(masks("estimated", own), (own.reference.masks, own.driving.masks), strict=True))
    assert masks("exact", own)[1] is pair.driving.masks
    without = with_estimates(pair, KnownPersons(answers(pair, [0, 1], 0.0, False)))
    np.testing.assert_array_equal(masks("estimated", without)[1], masks("estimated")[1])


def test_an_animator_that_needs_a_mask_gets_a_silhouette():
    """DisCo without TPC, and without a mask beside the poses."""
    clip = open_clips(ClipsConfig(clips=1, frames=2, source=48)).clip("rendered-000")
    pipeline = small_pipeline("disco")
    sampling = SamplingConfig(steps=1, guidance_scale=1.0, size=[32, 32])

    def animated(masks: np.ndarray | None) -> np.ndarray:
        reference = replace(clip.reference, masks=masks)
        return animate(pipeline, reference, clip.driving, sampling, None, show_progress=False).result

    drawn = animated(draw_silhouettes(clip.reference.poses)[0])
    np.testing.assert_array_equal(animated(None), drawn)
    assert (animated(np.ones_like(clip.reference.masks)) != drawn).any()


def test_silhouettes_of_everybody(pair):
    drawn = draw_silhouettes(pair.driving.poses)
    assert drawn.shape == pair.driving.masks.shape
    for frame, person in np.ndindex(2, 2):
        true = pair.driving.masks[frame, person]
        assert (drawn[frame, person] & true).sum() / (drawn[frame, person] | true).sum() > 0.4
    poses = pair.driving.poses
    unseen = Poses(poses.keypoints, np.zeros_like(poses.scores), poses.size, poses.fps)
    assert not draw_silhouettes(unseen).any()


def test_what_is_measured_stays_exact_whatever_the_animator_gets(tiny_pipeline, tmp_path):
    """Without TPC masks decide nothing, so numbers over person and background are those of exact masks."""
    pose_models()
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    command = [
        "misalignment",
        f"model={tmp_path / 'tiny'}",
        "split=development",
        "kinds=[scale]",
        "clips=1",
        "strips=0",
    ]
    command += ["seeds=[0]", "presets=[best]", "sampling.steps=1", "sampling.size=[64,64]"]
    values, calibrations = {}, {}
    for poses, masks in (("exact", "exact"), ("exact", "estimated"), ("exact", "drawn"), ("estimated", "estimated")):
        output = tmp_path / f"{poses}-{masks}"
        evaluate.main([*command, f"output={output}", f"poses={poses}", f"masks={masks}"])
        results = json.loads((output / "results.json").read_text(encoding="utf-8"))
        values[poses, masks] = {
            (t["condition"], t["clip"]): (t["foreground_psnr"], t["background_psnr"]) for t in results["trials"]
        }
        (file,) = output.glob("parts/tpc-best*/calibration.json")
        calibrations[poses, masks] = json.loads(file.read_text(encoding="utf-8"))
    exact = values["exact", "exact"]
    for masks in ("estimated", "drawn"):
        for trial, measured in values["exact", masks].items():
            assert (measured == exact[trial]) == (trial[0] == "without")
    assert len({(summary["mean_mask_iou"]) for summary in calibrations.values()}) == 4
    assert calibrations["estimated", "estimated"]["not_found"] == {"reference": 0, "frames": 0}
    assert "not_found" not in calibrations["exact", "drawn"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["masks=none"], "masks=none must be one of exact, estimated, drawn"),
        (["poses=drawn"], "poses=drawn must be one of exact, estimated"),
        (["poses=estimated", "pose_noise=0.02"], "pose_noise=0.02 is for poses=exact"),
        (["split=train"], "split=train must be one of heldout, development"),
    ],
)
def test_wrong_kinds_are_refused(arguments, message):
    schema = evaluate.TASKS["ablation"]
    with pytest.raises(UserError, match=message):
        load_config(schema, arguments)


def test_which_people_are_rendered():
    ablation = evaluate.TASKS["ablation"]
    sweep = evaluate.TASKS["sweep"]
    assert (load_config(ablation, []).split, load_config(sweep, []).split) == ("development", "heldout")
    images = [
        open_clips(ClipsConfig(clips=1, frames=1, source=48, split=split)).clip("rendered-000").reference.image
        for split in ("heldout", "development")
    ]
    assert (images[0] != images[1]).any()
