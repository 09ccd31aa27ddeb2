"""MMD, motion of keypoints, face identity and steadiness: closed forms, properties, and `evaluate.py metrics`."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
from core.errors import UserError
from data.poses.poses import Poses
from metrics.face import PLACES, SIDE, FaceNetwork, face_matrix
from metrics.frechet import Moments, frechet_distance
from metrics.mmd import polynomial_mmd
from metrics.motion import PARTS, motion_dimension, motion_histograms, normalised_keypoints
from metrics.protocols import MEASURES
from metrics.steadiness import consistency, smoothness
from tests.data.poses.test_dwpose import maximum_over, node, write_onnx
from tests.evaluation.test_evaluate_metrics import images, packaged, results_of, save_frames


def single(vectors) -> list[np.ndarray]:
    """Clips of one window each."""
    return list(np.asarray(vectors, np.float64)[:, None])


class TestMmd:
    def test_by_hand(self):
        """k(x1, x2) + k(y1, y2) - k(x1, y2) - k(x2, y1) with k = (x.y / 2)^2, times 100."""
        generated, truth = single([[2, 0], [2, 2]]), single([[0, 2], [0, 2]])
        assert polynomial_mmd(generated, truth).value == pytest.approx(100 * (4 + 4 - 0 - 4))
        assert polynomial_mmd(single([[1, 0], [0, 1]]), single([[0, 0], [0, 0]])).value == 0
        mirrored = [-vectors for vectors in generated]
        assert polynomial_mmd(generated, mirrored).value == 0, "the kernel sees second moments alone"

    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.integers(1, 4), min_size=2, max_size=6), st.integers(0, 99))
    def test_every_pair_of_clips_by_the_mean_over_their_windows(self, windows, seed):
        rng = np.random.default_rng(seed)
        generated, truth = ([rng.normal(size=(count, 3)) for count in windows] for _ in range(2))

        def between(a: np.ndarray, b: np.ndarray) -> float:
            return float(((a @ b.T / 3) ** 2).mean())

        def estimate(kept: list[int]) -> float:
            pairs = [(i, j) for i in kept for j in kept if i != j]
            terms = [
                between(generated[i], generated[j]) + between(truth[i], truth[j]) - 2 * between(generated[i], truth[j])
                for i, j in pairs
            ]
            return 100 * float(np.mean(terms))

        clips, found = list(range(len(windows))), polynomial_mmd(generated, truth)
        assert found.value == pytest.approx(estimate(clips), abs=1e-9) and found.clips == len(clips)
        if len(clips) == 2:
            assert found.error is None
        else:
            without = np.array([estimate([clip for clip in clips if clip != left]) for left in clips])
            expected = np.sqrt((len(clips) - 1) * without.var())
            assert found.error == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert polynomial_mmd(truth, truth).value == pytest.approx(0, abs=1e-9), "a set with itself"

    @pytest.mark.parametrize("scale", [1.0, 2.0])
    def test_with_few_clips_it_is_right_on_average_and_the_frechet_distance_is_not(self, scale):
        """Normal vectors of 8 dimensions: the truth is 100 |s^2 I - I|^2 / d^2, and d (s - 1)^2 of the Frechet one."""
        rng, dimension, values = np.random.default_rng(0), 8, {4: [], 16: []}
        for count, found in values.items():
            for _ in range(400):
                sides = scale * rng.normal(size=(count, dimension)), rng.normal(size=(count, dimension))
                moments = [Moments(dimension) for _ in sides]
                for side, total in zip(sides, moments, strict=True):
                    total.update(side)
                found.append((polynomial_mmd(*map(single, sides)).value, frechet_distance(*moments).value))
        for found in values.values():
            estimates = np.array(found)[:, 0]
            right = 100 * (scale**2 - 1) ** 2 / dimension
            assert abs(estimates.mean() - right) < 4 * estimates.std() / np.sqrt(len(estimates))
        bias = [np.mean(values[count], axis=0)[1] - dimension * (scale - 1) ** 2 for count in (4, 16)]
        assert bias[0] > 2 * bias[1] > 2

    def test_the_standard_error_is_the_spread_of_estimates(self):
        rng = np.random.default_rng(1)
        found = [
            polynomial_mmd(single(rng.normal(1, 1, (12, 4))), single(rng.normal(0, 1, (12, 4)))) for _ in range(300)
        ]
        spread = np.std([estimate.value for estimate in found])
        error = np.sqrt(np.mean([estimate.error**2 for estimate in found]))
        assert 0.9 * spread < error < 1.3 * spread, "right, or a little too careful"

    def test_wrong_vectors(self):
        with pytest.raises(ValueError, match="two clips or more, as many of each side, got 1 and 1"):
            polynomial_mmd(single([[1]]), single([[1]]))
        with pytest.raises(ValueError, match="finite"):
            polynomial_mmd(single([[1], [np.nan]]), single([[1], [2]]))


class TestMotion:
    def walk(self, velocity: tuple[float, float], frames: int = 16) -> np.ndarray:
        start = np.random.default_rng(0).uniform(50, 150, (17, 2))
        return start + np.arange(frames)[:, None, None] * np.asarray(velocity)

    def histograms(self, keypoints: np.ndarray, visible: np.ndarray | None = None) -> np.ndarray:
        """(velocity and acceleration, cells in time, parts, directions) of the only window."""
        seen = np.ones(keypoints.shape[:2], bool) if visible is None else visible
        (vector,) = motion_histograms(keypoints, seen, 16, 16)
        assert len(vector) == motion_dimension(16) == 384
        return vector.reshape(2, 4, len(PARTS), 8)

    def test_steady_motion_has_one_direction_and_no_acceleration(self):
        found = self.histograms(self.walk((3, 3e-3)))
        assert found[1].max() < 1e-3
        # log2(1 + 3) / 8 for each point and frame; the first frame of a window has moved from nowhere.
        sizes = np.array([len(part) for part in PARTS])
        np.testing.assert_allclose(found[0, :, :, 4], 0.25 * np.outer([3, 4, 4, 4], sizes), rtol=1e-5)
        assert found[0][..., [0, 1, 2, 3, 5, 6, 7]].max() == 0
        assert self.histograms(self.walk((0, 0))).max() == 0

    def test_where_the_person_stands_and_the_size_of_the_image_do_not_matter(self):
        path = self.walk((2, 5)) + np.random.default_rng(1).normal(size=(16, 17, 2))
        found = self.histograms(normalised_keypoints(path, (256, 256)))
        np.testing.assert_allclose(self.histograms(path + [20, -7]), found, atol=1e-5)
        larger = normalised_keypoints(path * [2, 3], (512, 768))
        np.testing.assert_allclose(self.histograms(larger), found, atol=1e-5)

    def test_a_turn_is_an_acceleration(self):
        path = self.walk((2, 1e-3))
        path[8:] = path[7] - np.arange(1, 9)[:, None, None] * np.array([2, 1e-3])
        found = self.histograms(path)
        assert np.argwhere(found[1].sum(axis=1) > 0.01).tolist() == [[2, 0]], "in frame 8, to the left"

    def test_points_that_are_not_seen_do_not_move(self):
        visible = np.ones((16, 17), bool)
        visible[5, 7] = False
        found = self.histograms(self.walk((3, 3e-3)), visible)
        arm = PARTS.index((7, 9))
        assert found[0, 1, arm, 4] == pytest.approx(0.25 * (2 * 4 - 2)), "neither into frame 5 nor out of it"
        assert found[1].max() < 1e-3
        assert motion_histograms(self.walk((1, 1), 15), visible[:15], 16, 16).shape == (0, 384), (
            "shorter than a window"
        )


FACE = np.zeros((17, 2))
FACE[:3] = PLACES


class TestFace:
    @pytest.fixture(scope="class")
    def network(self, tmp_path_factory) -> FaceNetwork:
        return FaceNetwork(write_embedding(tmp_path_factory.mktemp("face") / "colour.onnx"))

    def test_a_turned_scaled_and_shifted_face_comes_to_arcfaces_places(self):
        scores = np.ones(17)
        for angle in (0.0, 0.5, 3.1):
            turn = 2.5 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            matrix = face_matrix(FACE @ turn.T + [30, -4], scores)
            np.testing.assert_allclose((FACE[:3] @ turn.T + [30, -4]) @ matrix[:, :2].T + matrix[:, 2], PLACES)

    def test_no_face(self):
        scores = np.ones(17)
        for point in range(3):
            unseen = scores.copy()
            unseen[point] = 0.2
            assert face_matrix(FACE, unseen) is None
        behind, aside = FACE.copy(), FACE.copy()
        behind[[1, 2]] = behind[[2, 1]]
        aside[0, 0] = 90
        assert face_matrix(behind, scores) is None and face_matrix(aside, scores) is None
        assert face_matrix(0 * FACE, scores) is None

    def test_similarity(self, network):
        """The embedding is the brightest colour in [-1, 1]."""
        image, scores = np.zeros((SIDE, SIDE, 3), np.uint8), np.ones(17)
        image[60:70, 50:60] = [255, 255, 255]
        red = image.copy()
        red[60:70, 50:60] = [255, 0, 0]
        truth = image, FACE, scores
        assert network.similarity(truth, truth) == pytest.approx(1)
        assert network.similarity((red, FACE, scores), truth) == pytest.approx((1 - 1 - 1) / 3, abs=1e-6)
        moved = np.pad(image, ((20, 0), (9, 0), (0, 0)))
        assert network.similarity((moved, FACE + [9, 20], scores), truth) == pytest.approx(1)
        assert network.similarity((red, FACE, 0 * scores), truth) == 0, "a lost face is a stranger's"
        assert np.isnan(network.similarity(truth, (image, FACE, 0 * scores)))
        assert np.isnan(network.similarity(truth, (image, FACE / 5, scores))), "too small to be told from others"

    def test_files_that_are_no_embedding(self, tmp_path):
        write_onnx(tmp_path / "small.onnx", (64, 64), [node("Relu", ["input"], "y")], {}, {"y": (1, 3, 64, 64)})
        write_onnx(tmp_path / "image.onnx", (SIDE, SIDE), [node("Relu", ["input"], "y")], {}, {"y": (1, 3, 112, 112)})
        (tmp_path / "text.onnx").write_text("text")
        faults = {
            "small": r"takes tensor\(float\) \[1, 3, 64, 64\]; an embedding of faces has one input of floats \(1, 3",
            "image": r"gives \[\[1, 3, 112, 112\]\]; an embedding has one output \(1, dimension\)",
            "text": "is not an ONNX network",
            "missing": "does not exist",
        }
        for name, message in faults.items():
            with pytest.raises(UserError, match=message) as caught:
                FaceNetwork(tmp_path / f"{name}.onnx")
            assert str(caught.value).startswith("face=") and "\n" not in str(caught.value)

    def test_a_damaged_embedding(self, tmp_path):
        network = FaceNetwork(write_embedding(tmp_path / "zero.onnx", 0.0))
        with pytest.raises(UserError, match="an embedding of length 0"):
            network(np.zeros((SIDE, SIDE, 3), np.uint8), face_matrix(FACE, np.ones(17)))


def write_embedding(path: Path, factor: float = 1.0) -> Path:
    """The largest value of each channel, times a factor."""
    nodes = [
        maximum_over(3, "input", "rows"),
        maximum_over(2, "rows", "colour"),
        node("Mul", ["colour", "factor"], "scaled"),
        node("Reshape", ["scaled", "shape"], "output"),
    ]
    constants = {"shape": np.array([1, 3], np.int64), "factor": np.array([factor], np.float32)}
    write_onnx(path, (SIDE, SIDE), nodes, constants, {"output": (1, 3)})
    return path


class TestSteadiness:
    def test_known_clips(self):
        still = np.tile([3.0, 4.0], (5, 1))
        assert consistency(still) == pytest.approx(np.ones(4)) and smoothness(still) == pytest.approx(np.ones(3))
        angles = 0.2 * np.arange(5)
        turning = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        assert consistency(turning) == pytest.approx((np.cos(angles[1:]) + np.cos(0.2)) / 2)
        assert smoothness(turning) == pytest.approx(np.full(3, np.cos(0.2)))
        line = np.array([1.0, 0.0]) + np.arange(5)[:, None] * [0.0, 2.0]
        assert smoothness(line) == pytest.approx(np.ones(3))
        flickering = np.array([[1.0, 0], [0, 1], [1, 0], [0, 1]])
        assert consistency(flickering) == pytest.approx([0, 0.5, 0])
        assert smoothness(flickering) == pytest.approx(np.full(2, 1 - np.sqrt(2)))

    def test_clips_of_few_frames_have_no_values(self):
        assert [len(consistency(np.ones((n, 2)))) for n in (1, 2, 3)] == [0, 1, 2]
        assert [len(smoothness(np.ones((n, 2)))) for n in (1, 2, 3)] == [0, 0, 1]


FRAMES = (16, 17, 16)


def body(frames: int, seed: int) -> Poses:
    """A face as large as SMALLEST allows, and other keypoints that wander."""
    rng = np.random.default_rng(seed)
    keypoints = rng.uniform(4, 24, (1, 1, 17, 2)) + rng.normal(0, 1, (frames, 1, 17, 2)).cumsum(axis=0)
    keypoints[:, 0, :3] = PLACES / 4 - [2, 0]
    return Poses(keypoints, np.ones((frames, 1, 17)), (24, 24), 10)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Three clips of 24 x 24, darker and unsteady ones, their poses, features and an embedding of faces."""
    root, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    features = {"generated": {}, "truth": {}}
    for number, count in enumerate(FRAMES):
        truth = np.repeat(images(number, 1, (24, 24)), count, axis=0)
        generated = truth.copy()
        generated[1::2] //= 2
        for side, frames in (("truth", truth), ("generated", generated)):
            save_frames(root / side / f"clip{number}", frames)
            features[side][f"clip{number}"] = rng.normal(size=(2, 5)) + (side == "truth")
            (root / "poses" / side).mkdir(parents=True, exist_ok=True)
            body(count, number + 7 * (side == "truth")).save(root / "poses" / side / f"clip{number}.npz")
    for side, of_side in features.items():
        np.savez(root / f"{side}.npz", **of_side)
    write_embedding(root / "face.onnx")
    return root


def measuring(root: Path, output: Path, *more: str) -> list[str]:
    arguments = ["metrics", f"generated={root / 'generated'}", f"truth={root / 'truth'}", f"output={output}"]
    return [*arguments, "protocol=tpc-2026", *more]


def poses_of(root: Path, generated: str = "generated") -> list[str]:
    return [f"generated_poses={root / 'poses' / generated}", f"truth_poses={root / 'poses' / 'truth'}", "persons=true"]


def features_of(root: Path) -> list[str]:
    return [f"{side}_features={root / f'{side}.npz'}" for side in ("generated", "truth")]


class TestCommand:
    def test_all_of_the_protocol_from_files(self, clips, tmp_path, capsys):
        packaged()
        wanted = "vgg_consistency,vgg_consistency_truth,vgg_smoothness,vgg_smoothness_truth,mmd_vgg,vgg_frechet_video,"
        wanted += "mmd_given,keypoint_motion,keypoint_motion_mmd,face_identity"
        more = [*poses_of(clips), *features_of(clips), f"face={clips / 'face.onnx'}", "batch_size=32"]
        evaluate.main(measuring(clips, tmp_path / "o", *more, "features=stand-in", f"measures=[{wanted}]"))
        results, table = results_of(tmp_path / "o"), (tmp_path / "o" / "table.md").read_text()
        numbers = results["results"]
        assert set(numbers) == set(wanted.split(",")) and all(
            number["value"] is not None for number in numbers.values()
        )
        assert numbers["mmd_vgg"]["samples"] == 3 and numbers["vgg_frechet_video"]["samples"] == 3
        assert f"± {numbers['mmd_vgg']['error']:.2e} | 3 |" in table
        sides = [dict(np.load(clips / f"{side}.npz")).values() for side in ("generated", "truth")]
        assert numbers["mmd_given"]["value"] == pytest.approx(polynomial_mmd(*map(list, sides)).value)
        assert numbers["face_identity"]["samples"] == sum(FRAMES) and numbers["face_identity"]["value"] < 1
        # The true clips stand still, the generated ones are darker in every second frame.
        assert numbers["vgg_consistency_truth"]["value"] == pytest.approx(1, abs=1e-5)
        assert numbers["vgg_consistency"]["value"] < 0.995 and numbers["vgg_smoothness"]["value"] < 0.9
        assert numbers["keypoint_motion"]["samples"] == 3 and "3 generated" in numbers["keypoint_motion"]["warning"]
        assert results["networks"]["face_identity"]["network"].endswith("the user's file")
        assert "jackknife" in table and table in capsys.readouterr().out

    def test_equal_motion_is_no_distance_and_needs_no_networks(self, clips, tmp_path):
        evaluate.main(measuring(clips, tmp_path / "o", "features=none", *poses_of(clips, "truth")))
        numbers = results_of(tmp_path / "o")["results"]
        wanted = "mae psnr ssim flicker keypoint_motion keypoint_motion_mmd keypoint_error part_colour"
        assert set(numbers) == set(wanted.split()), "what needs files or networks is left out"
        for name in ("keypoint_motion", "keypoint_motion_mmd", "keypoint_error"):
            assert numbers[name]["value"] == pytest.approx(0, abs=1e-6)

    def test_one_clip_is_too_few_and_nobody_has_no_face(self, clips, tmp_path):
        save_frames(tmp_path / "truth" / "clip0", images(0, 16, (24, 24)))
        Poses(np.zeros((16, 0, 17, 2)), np.zeros((16, 0, 17)), (24, 24), 10).save(tmp_path / "nobody.npz")
        known = [f"{side}_poses={tmp_path / 'nobody.npz'}" for side in ("generated", "truth")]
        chosen = "measures=[keypoint_motion_mmd,face_identity]"
        paths = [f"generated={tmp_path / 'truth'}", f"truth={tmp_path / 'truth'}", f"output={tmp_path / 'o'}"]
        more = ["persons=true", "protocol=tpc-2026", chosen, f"face={clips / 'face.onnx'}"]
        evaluate.main(["metrics", *paths, *known, *more])
        numbers = results_of(tmp_path / "o")["results"]
        assert numbers["keypoint_motion_mmd"]["value"] is None and numbers["face_identity"]["value"] is None
        assert numbers["keypoint_motion_mmd"]["warning"] == "1 clips of 16 frames or more; an MMD needs two"
        assert numbers["face_identity"]["warning"] == "16 of 16 frames could not be measured"

    def test_features_and_faces_of_other_content_are_other_runs(self, clips, tmp_path):
        command = measuring(clips, tmp_path / "o", "measures=[mmd_given]")
        evaluate.main([*command, *features_of(clips)])
        first = results_of(tmp_path / "o")["results"]["mmd_given"]["value"]
        swapped = [f"generated_features={clips / 'truth.npz'}", f"truth_features={clips / 'generated.npz'}"]
        with pytest.raises(UserError, match="begun with other features given"):
            evaluate.main([*command, *swapped])
        rows = {
            side: np.stack([v[0] for v in np.load(clips / f"{side}.npz").values()]) for side in ("generated", "truth")
        }
        for side, array in rows.items():
            np.save(tmp_path / f"{side}.npy", array)
        given = [f"{side}_features={tmp_path / f'{side}.npy'}" for side in rows]
        evaluate.main([*measuring(clips, tmp_path / "rows", "measures=[mmd_given]"), *given])
        found = results_of(tmp_path / "rows")["results"]["mmd_given"]["value"]
        assert found == pytest.approx(polynomial_mmd(*map(single, rows.values())).value) and found != first

    def test_features_that_are_not_finite_are_named(self, clips, tmp_path):
        command = measuring(clips, tmp_path / "o", "measures=[keypoint_motion]", "keep_parts=true", *poses_of(clips))
        evaluate.main(command)
        (tmp_path / "o" / "results.json").unlink()
        np.full(384, np.nan, np.float32).tofile(tmp_path / "o/parts/clip1/keypoint_motion.generated.f32")
        with pytest.raises(UserError, match="keypoint_motion: features of the generated clip 'clip1' are not finite"):
            evaluate.main(command)

    def test_bad_input_is_one_line(self, clips, tmp_path):
        np.savez(tmp_path / "nan.npz", **{f"clip{k}": np.full((1, 5), np.nan) for k in range(3)})
        np.savez(tmp_path / "two.npz", clip0=np.ones(5), clip1=np.ones(5))
        np.savez(tmp_path / "four.npz", **{f"clip{k}": np.ones(4) for k in range(3)})
        np.save(tmp_path / "rows.npy", np.ones((2, 5)))
        (tmp_path / "text.npz").write_text("text")
        body(9, 0).save(tmp_path / "clip0.npz")
        Image.new("L", (4, 4)).save(tmp_path / "clip1.npz", format="png")
        truth = f"truth_features={clips / 'truth.npz'}"
        poses = f"truth_poses={clips / 'poses' / 'truth'}"
        faults = {
            "measures=[face_identity] persons=true": "face_identity needs an embedding of faces; bring an ONNX file",
            "measures=[keypoint_motion]": "keypoint_motion needs poses; add persons=true",
            "measures=[mmd_given]": "mmd_given needs generated_features= and truth_features=",
            truth: "generated_features and truth_features belong together",
            f"{truth} generated_features={tmp_path / 'nan.npz'}": "features of clip 'clip0' are not finite",
            f"{truth} generated_features={tmp_path / 'two.npz'}": "lacks 1 clips that truth has: clip2",
            f"{truth} generated_features={tmp_path / 'four.npz'}": "are of dimension 4, truth_features of 5",
            f"{truth} generated_features={tmp_path / 'rows.npy'}": r"is \(2, 5\); 3 clips need \(3, dimension\)",
            f"{truth} generated_features={tmp_path / 'text.npz'}": "is not a file of features",
            f"{truth} generated_features={tmp_path / 'none.npz'}": "none.npz does not exist",
            poses: "are for measures of the person; add persons=true",
            f"{poses} persons=true generated_poses={tmp_path / 'clip0.npz'}": "is a file, but there are 3 clips",
            f"{poses} persons=true generated_poses={tmp_path / 'none'}": "generated_poses=.*none does not exist",
            f"{poses} persons=true generated_poses={clips / 'poses'}": "holds neither clip0.npz nor clip0.json",
            f"{poses} persons=true generated_poses={tmp_path}": "holds neither clip2.npz",
            f"{poses} persons=true generated_poses={clips / 'poses' / 'truth'} protocol=disco-fixed": "own size",
        }
        for number, (arguments, message) in enumerate(faults.items()):
            with pytest.raises(UserError, match=message) as caught:
                evaluate.main([*measuring(clips, tmp_path / f"o{number}", "features=none"), *arguments.split()])
            assert "\n" not in str(caught.value)
        body(9, 0).save(tmp_path / "clip2.npz")
        with pytest.raises(UserError, match="clip0.npz has 9 frames, clip 'clip0' 16"):
            more = ["features=none", "persons=true", f"generated_poses={tmp_path}", poses]
            evaluate.main(measuring(clips, tmp_path / "short", *more))


def test_names_tell_these_measures_from_the_published_ones():
    labels = [measure.label for measure in MEASURES.values()]
    assert len(set(labels)) == len(labels)
    for measure in MEASURES.values():
        assert not any(word in measure.label for word in ("VBench", "JEDi", "FVMD"))
    for name in ("vgg_consistency", "vgg_smoothness", "keypoint_motion"):
        assert ", not " in MEASURES[name].definition
