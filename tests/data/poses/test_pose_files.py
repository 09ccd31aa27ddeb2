import json

import numpy as np
import pytest

from core.errors import UserError
from data.poses.files import load_poses
from data.poses.poses import Poses

SIZE = (640, 480)
# Where the COCO keypoints are in OpenPose's BODY_25 and in COCO-18, by the names that OpenPose gives them.
BODY25_NAMES = (
    "Nose Neck RShoulder RElbow RWrist LShoulder LElbow LWrist MidHip RHip RKnee RAnkle LHip LKnee LAnkle REye LEye "
    "REar LEar LBigToe LSmallToe LHeel RBigToe RSmallToe RHeel"
).split()
COCO18_NAMES = (
    "Nose Neck RShoulder RElbow RWrist LShoulder LElbow LWrist RHip RKnee RAnkle LHip LKnee LAnkle REye LEye REar LEar"
).split()
COCO_NAMES = (
    "Nose LEye REye LEar REar LShoulder RShoulder LElbow RElbow LWrist RWrist LHip RHip LKnee RKnee LAnkle RAnkle"
).split()


def coco_person(x: float, y: float = 100, seed: int = 0) -> np.ndarray:
    """(17, 3): keypoints scattered around (x, y) with scores; the right wrist is not seen."""
    rng = np.random.default_rng(seed)
    person = np.column_stack([rng.uniform(-40, 40, (17, 2)) + (x, y), rng.uniform(0.4, 1, 17)])
    person[10] = 0
    return person


def in_order(person: np.ndarray, names: list[str]) -> np.ndarray:
    """The same person in OpenPose's order; keypoints that COCO lacks get numbers of their own."""
    return np.array([person[COCO_NAMES.index(n)] if n in COCO_NAMES else (5, 6, 0.7) for n in names])


def openpose_frame(persons: list[np.ndarray], names: list[str] = BODY25_NAMES, **extra) -> dict:
    people = [{"person_id": [-1], "pose_keypoints_2d": in_order(p, names).reshape(-1).tolist()} for p in persons]
    return {"version": 1.3, "people": people, **extra}


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def assert_person(poses: Poses, frame: int, slot: int, person: np.ndarray) -> None:
    np.testing.assert_allclose(poses.keypoints[frame, slot], person[:, :2], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(poses.scores[frame, slot], person[:, 2], rtol=1e-5)


@pytest.mark.parametrize("names", [BODY25_NAMES, COCO18_NAMES])
def test_openpose_folder(tmp_path, names):
    frames = [[coco_person(100 + k), coco_person(400 - k, seed=1)] for k in range(11)]
    frames[4] = frames[4][::-1]  # OpenPose lists people in no order
    frames[6] = frames[6][1:]
    for k, persons in enumerate(frames):
        write(tmp_path / f"clip_{k}_keypoints.json", openpose_frame(persons, names))
    poses = load_poses(tmp_path, size=SIZE, fps=30)
    assert (poses.frames, poses.persons, poses.size, poses.fps) == (11, 2, SIZE, 30)
    first = 0 if abs(poses.keypoints[0, 0, 0, 0] - 100) < 60 else 1
    for k in (0, 3, 4, 5, 10):
        assert_person(poses, k, first, coco_person(100 + k))
        assert_person(poses, k, 1 - first, coco_person(400 - k, seed=1))
    assert not poses.scores[6, first].any() and not poses.keypoints[6, first].any()
    assert_person(poses, 6, 1 - first, coco_person(394, seed=1))


def test_openpose_list_with_canvas_in_pixels_or_parts(tmp_path):
    person = coco_person(200)
    canvas = {"canvas_width": 640, "canvas_height": 480}
    content = [openpose_frame([person], COCO18_NAMES, **canvas), openpose_frame([], **canvas)]
    poses = load_poses(write(tmp_path / "pixels.json", content))
    assert poses.size == SIZE and poses.fps == 25 and poses.persons == 1
    assert_person(poses, 0, 0, person)
    assert not poses.scores[1].any()
    parts = person / (640, 480, 1)
    frame = openpose_frame([parts], COCO18_NAMES, **canvas)
    for entry in frame["people"]:
        entry["pose_keypoints_2d"][3:6] = [0.5, 0.5, 1]  # the neck, in parts too
    assert_person(load_poses(write(tmp_path / "parts.json", frame)), 0, 0, person)


def test_dwpose_bodies(tmp_path):
    people = [coco_person(150), coco_person(450, seed=1)]
    ordered = [in_order(person, COCO18_NAMES) for person in people]
    candidate = np.concatenate(ordered)[:, :2] / SIZE
    subset = np.arange(36.0).reshape(2, 18)
    subset[np.stack(ordered)[..., 2] == 0] = -1
    bodies = {"candidate": candidate.tolist(), "subset": subset.tolist(), "score": np.stack(ordered)[..., 2].tolist()}
    poses = load_poses(write(tmp_path / "dwpose.json", [{"bodies": bodies}]), size=SIZE)
    for slot in range(2):
        person = people[0] if poses.keypoints[0, slot, 0, 0] < 300 else people[1]
        assert_person(poses, 0, slot, person)
    del bodies["score"]
    poses = load_poses(write(tmp_path / "dwpose.json", {"bodies": bodies}), size=SIZE)
    assert set(np.unique(poses.scores)) == {0, 1}


def test_mmpose_predictions_with_whole_body_keypoints(tmp_path):
    person = coco_person(200)
    whole = np.concatenate([person, np.full((116, 3), 7.0)])
    instance = {"keypoints": whole[:, :2].tolist(), "keypoint_scores": np.clip(whole[:, 2], 0, 1).tolist()}
    frames = [{"frame_id": 0, "instances": [instance]}, {"frame_id": 1, "instances": []}]
    for content in (frames, {"meta_info": {}, "instance_info": frames}):
        poses = load_poses(write(tmp_path / "mmpose.json", content), size=SIZE)
        assert_person(poses, 0, 0, person)
        assert poses.frames == 2 and not poses.scores[1].any()


def test_coco_results_of_a_clip_keep_frames_without_persons(tmp_path):
    people = {3: coco_person(100), 4: coco_person(101), 6: coco_person(103)}
    records = [
        {"image_id": k, "category_id": 1, "keypoints": p.reshape(-1).tolist(), "score": 0.9} for k, p in people.items()
    ]
    poses = load_poses(write(tmp_path / "results.json", records[::-1]), size=SIZE)
    assert poses.frames == 4 and poses.persons == 1
    for k, person in people.items():
        assert_person(poses, k - 3, 0, person)
    assert not poses.scores[2].any()


def test_coco_results_of_single_images_are_sorted_by_name(tmp_path):
    names = ["frame10.png", "frame9.png"]
    records = [
        {"image_id": n, "category_id": 1, "keypoints": coco_person(100, seed=k).reshape(-1).tolist(), "score": 1}
        for k, n in enumerate(names)
    ]
    poses = load_poses(write(tmp_path / "results.json", records), size=SIZE)
    assert_person(poses, 0, 0, coco_person(100, seed=1))
    assert_person(poses, 1, 0, coco_person(100, seed=0))


def test_coco_annotations_have_their_size_and_flags(tmp_path):
    person = coco_person(100)
    flagged = np.column_stack([person[:, :2], np.where(person[:, 2] > 0, 2, 0)])
    flagged[3, 2] = 1  # labelled, hidden
    content = {
        "images": [{"id": 7, "width": 640, "height": 480, "file_name": "a.png"}],
        "annotations": [{"image_id": 7, "keypoints": flagged.reshape(-1).tolist()}, {"image_id": 7, "bbox": [0] * 4}],
    }
    poses = load_poses(write(tmp_path / "annotations.json", content))
    assert poses.size == SIZE and poses.persons == 1
    np.testing.assert_array_equal(poses.scores[0, 0], flagged[:, 2] > 0)
    content["images"].append({"id": 8, "width": 10, "height": 10, "file_name": "b.png"})
    with pytest.raises(UserError, match="2 different sizes"):
        load_poses(write(tmp_path / "annotations.json", content))


def test_own_npz_and_whole_body_npz(tmp_path):
    person = coco_person(100)
    own = Poses(person[None, None, :, :2], person[None, None, :, 2], SIZE, 30)
    own.save(tmp_path / "own.npz")
    loaded = load_poses(tmp_path / "own.npz")
    assert loaded.fps == 30 and loaded.size == SIZE
    assert_person(loaded, 0, 0, person)
    whole = np.concatenate([person, np.full((116, 3), 7.0)])[None, None]
    np.savez(tmp_path / "whole.npz", keypoints=whole[..., :2], keypoint_scores=np.clip(whole[..., 2], 0, 1))
    assert_person(load_poses(tmp_path / "whole.npz", size=SIZE), 0, 0, person)
    np.savez(tmp_path / "triplets.npz", keypoints=whole, size=SIZE, fps=12.5)
    poses = load_poses(tmp_path / "triplets.npz")
    assert poses.fps == 12.5
    assert_person(poses, 0, 0, person)


UNITS = {
    "pixels": lambda points: points,
    "parts": lambda points: points / SIZE,
    "centred": lambda points: 2 * points / SIZE - 1,
}


def walk(frames: int = 6) -> list[np.ndarray]:
    """A person who walks, one joint of whom leaves the picture on the left; the right wrist is never seen."""
    people = [coco_person(220 + 20 * k, 180) for k in range(frames)]
    for person in people:
        person[9, 0] = -12
    return people


def openpose_content(points: list[np.ndarray], **canvas) -> list:
    frames = [openpose_frame([person], COCO18_NAMES, **canvas) for person in points]
    for frame, person in zip(frames, points, strict=True):
        frame["people"][0]["pose_keypoints_2d"][3:6] = [*person[0, :2], 1]  # the neck is near the nose, in any unit
    return frames


def dwpose_content(points: list[np.ndarray], scores_in_subset: bool = False, dimensions: int = 2) -> list:
    content = []
    for person in points:
        ordered = np.array([person[COCO_NAMES.index(n)] if n != "Neck" else person[0] for n in COCO18_NAMES])
        subset = np.where(ordered[:, 2] > 0, np.arange(18), -1)
        bodies = {"candidate": ordered[None, :, :2] if dimensions == 3 else ordered[:, :2], "subset": [subset]}
        bodies |= {"subset": ordered[None, :, 2]} if scores_in_subset else {"score": ordered[None, :, 2]}
        content.append({"bodies": {name: np.asarray(value).tolist() for name, value in bodies.items()}})
    return content


def save_arrays(path, points: list[np.ndarray], **further):
    stacked = np.stack(points)[:, None]
    np.savez(path, keypoints=stacked[..., :2], scores=stacked[..., 2], **further)


def save_folder(path, content: list, encoding: str = "utf-8"):
    path.mkdir()
    for number, frame in enumerate(content):
        (path / f"clip_{number:012d}_keypoints.json").write_text(json.dumps(frame), encoding=encoding)


WRITERS = {
    "openpose folder": lambda path, points: save_folder(path, openpose_content(points)),
    "openpose list": lambda path, points: write(path, openpose_content(points, canvas_width=640, canvas_height=480)),
    "dwpose": lambda path, points: write(path, dwpose_content(points)),
    "dwpose, scores in subset": lambda path, points: write(path, dwpose_content(points, scores_in_subset=True)),
    "dwpose, person by person": lambda path, points: write(path, dwpose_content(points, True, dimensions=3)),
    "arrays": save_arrays,
    "arrays of our own": lambda path, points: save_arrays(path, points, size=SIZE, fps=25.0),
    "mmpose": lambda path, points: write(
        path,
        [{"instances": [{"keypoints": p[:, :2].tolist(), "keypoint_scores": p[:, 2].tolist()}]} for p in points],
    ),
    "coco": lambda path, points: write(
        path, [{"image_id": k, "keypoints": p.reshape(-1).tolist()} for k, p in enumerate(points)]
    ),
}


def save_walk(tmp_path, writer: str, change):
    path = tmp_path / ("walk.npz" if "arrays" in writer else "folder" if "folder" in writer else "walk.json")
    WRITERS[writer](path, [np.column_stack([change(person[:, :2]), person[:, 2]]) for person in walk()])
    return path


# Every unit in one format, every other format in one unit.
UNITS_OF_FORMATS = [("coco", unit) for unit in UNITS]
UNITS_OF_FORMATS += [(writer, unit) for writer, unit in zip(WRITERS, 3 * list(UNITS), strict=True) if writer != "coco"]


@pytest.mark.parametrize("writer, unit", UNITS_OF_FORMATS)
def test_units_are_told_from_the_whole_clip(tmp_path, writer, unit):
    poses = load_poses(save_walk(tmp_path, writer, UNITS[unit]), size=SIZE)
    assert (poses.frames, poses.persons, poses.size) == (6, 1, SIZE)
    for frame, person in enumerate(walk()):
        seen = person[:, 2] > 0
        np.testing.assert_allclose(poses.keypoints[frame, 0, seen], person[seen, :2], atol=0.01)
        np.testing.assert_allclose(poses.scores[frame, 0], person[:, 2], atol=1e-6)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda points: points / 30, "people are 2.* pixels large in the picture of 640x480"),
        (lambda points: points / SIZE * 10, "pixels large in the picture"),
        (lambda points: points * 8, "% of its keypoints lie outside the picture of 640x480"),
        (lambda points: (points - (240, 140)) / SIZE, r"may be in \[0, 1\] or in \[-1, 1\]"),
    ],
)
@pytest.mark.parametrize("writer", ["dwpose", "arrays of our own"])
def test_coordinates_that_make_no_sense_are_refused(tmp_path, writer, change, named):
    with pytest.raises(UserError, match=f"poses=.* cannot be read as poses: .*{named}"):
        load_poses(save_walk(tmp_path, writer, change), size=SIZE)


def test_dwpose_frames_without_anybody(tmp_path):
    content = dwpose_content(walk(2))
    content.insert(1, {"bodies": {"candidate": [], "subset": []}})
    poses = load_poses(write(tmp_path / "walk.json", content), size=SIZE)
    assert poses.frames == 3 and poses.present()[:, 0].tolist() == [True, False, True]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_byte_order_marks_are_read(tmp_path, encoding):
    content = openpose_content(walk())
    save_folder(tmp_path / "folder", content, encoding)
    (tmp_path / "list.json").write_text(json.dumps(content), encoding=encoding)
    for path in (tmp_path / "folder", tmp_path / "list.json"):
        assert_person(load_poses(path, size=SIZE), 5, 0, walk()[5])


def test_every_bad_file_is_one_clear_line(tmp_path):
    def message(path, **options):
        with pytest.raises(UserError) as error:
            load_poses(path, argument="driving_poses", **options)
        assert str(error.value).startswith(f"driving_poses={path}") and "\n" not in str(error.value)
        return str(error.value)

    assert "does not exist" in message(tmp_path / "missing.json")
    (tmp_path / "empty").mkdir()
    assert "without .json files" in message(tmp_path / "empty")
    (tmp_path / "cut.json").write_text('{"people": [')
    assert "cut.json is not JSON" in message(tmp_path / "cut.json")
    (tmp_path / "text.txt").write_text("hello")
    assert "give .npz, .json or a folder" in message(tmp_path / "text.txt")
    (tmp_path / "text.npz").write_text("hello")
    assert "cannot be read as poses" in message(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", values=np.zeros(3))
    assert "no array 'keypoints', only values" in message(tmp_path / "other.npz")
    np.savez(tmp_path / "shape.npz", keypoints=np.zeros((1, 1, 19, 3)))
    assert "got (1, 1, 19, 3)" in message(tmp_path / "shape.npz", size=SIZE)
    for content in ([], [1, 2], 3, {"a": 1}):
        assert "unknown layout" in message(write(tmp_path / "bad.json", content), size=SIZE)
    person = openpose_frame([coco_person(100)])
    assert "does not state the size" in message(write(tmp_path / "sizeless.json", person))
    person["people"][0]["pose_keypoints_2d"].pop()
    assert "74 numbers" in message(write(tmp_path / "short.json", person), size=SIZE)
    assert "unexpected content" in message(write(tmp_path / "odd.json", {"people": [{"face": 1}]}), size=SIZE)
    (tmp_path / "empty" / "0.json").write_text("[1]")
    assert "0.json is not an OpenPose frame" in message(tmp_path / "empty", size=SIZE)
