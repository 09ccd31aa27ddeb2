"""DWPose on small ONNX networks that are written here byte by byte, so that the tests need no exporter."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from data.config import PoseConfig
from data.poses.dwpose import DWPose, box_matrix, decode_boxes, decode_simcc, letterbox, turn_image
from data.poses.person import Box
from data.poses.poses import estimate_image, estimate_poses, open_estimator

FLOAT, INT64 = 1, 7  # types of tensors
INT, INTS = 2, 7  # types of attributes
DETECTOR_SIDE = 64
POSE_SIZE = (48, 64)
KEYPOINTS = 26
CELLS = 8 * 8 + 4 * 4 + 2 * 2


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    encoded = b""
    while value > 127:
        encoded += bytes([value & 127 | 128])
        value >>= 7
    return encoded + bytes([value])


def entry(number: int, value: int | str | bytes) -> bytes:
    """A protocol buffer entry: numbers as varints, the rest with a length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name: str, values: np.ndarray) -> bytes:
    kind = INT64 if values.dtype == np.int64 else FLOAT
    dims = b"".join(entry(1, n) for n in values.shape)
    return dims + entry(2, kind) + entry(8, name) + entry(9, values.tobytes())


def node(kind: str, inputs: list[str], output: str, **attributes: int) -> bytes:
    content = b"".join(entry(1, name) for name in inputs) + entry(2, output) + entry(4, kind)
    for name, value in attributes.items():
        content += entry(5, entry(1, name) + entry(3, value) + entry(20, INT))
    return content


def maximum_over(axis: int, source: str, output: str) -> bytes:
    axes = entry(1, "axes") + entry(8, axis) + entry(20, INTS)
    return node("ReduceMax", [source], output, keepdims=1) + entry(5, axes)


def image_value(name: str, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(entry(1, entry(1, n)) for n in shape)
    return entry(1, name) + entry(2, entry(1, entry(1, FLOAT) + entry(2, dims)))


def write_onnx(path, size, nodes: list[bytes], constants: dict[str, np.ndarray], outputs: dict[str, tuple[int, ...]]):
    graph = b"".join(entry(1, n) for n in nodes) + entry(2, "graph")
    graph += b"".join(entry(5, tensor(name, values)) for name, values in constants.items())
    graph += entry(11, image_value("input", (1, 3, size[1], size[0])))
    graph += b"".join(entry(12, image_value(name, shape)) for name, shape in outputs.items())
    path.write_bytes(entry(1, 8) + entry(7, graph) + entry(8, entry(1, "") + entry(2, 13)))


def write_detector(path):
    """Sees a person in the whole input when there is red in its upper half and none in the lower one."""
    raw = np.zeros((1, CELLS, 6), np.float32)
    raw[0, 64 + 2 * 4 + 2] = (0, 0, math.log(4), math.log(4), 0, 1)  # stride 16, cell (2, 2): centre 32, side 64
    objectness = np.zeros((1, CELLS, 6), np.float32)
    objectness[0, 64 + 2 * 4 + 2, 4] = 1 / 255
    constants = {"raw": raw, "objectness": objectness, "axes": np.array([1, 2], np.int64)}
    nodes = []
    for half, (start, end) in {"upper": (0, 32), "lower": (32, 64)}.items():
        constants[f"{half}_start"] = np.array([2, start], np.int64)  # channel 2 is red: the input is BGR
        constants[f"{half}_end"] = np.array([3, end], np.int64)
        nodes.append(node("Slice", ["input", f"{half}_start", f"{half}_end", "axes"], half))
        nodes.append(node("ReduceMax", [half], f"{half}_max", keepdims=0))
    nodes += [
        node("Sub", ["upper_max", "lower_max"], "difference"),
        node("Mul", ["objectness", "difference"], "scaled"),
        node("Add", ["scaled", "raw"], "output"),
    ]
    write_onnx(path, (DETECTOR_SIDE, DETECTOR_SIDE), nodes, constants, {"output": (1, CELLS, 6)})


# Where the pose network puts its keypoints around the dot that it sees, in pixels of its input; the first 17 have the
# dot as their mean.
OFFSETS = np.stack([np.arange(KEYPOINTS) % 17 - 8, 5 * np.arange(KEYPOINTS) % 17 - 8], axis=-1)


def write_pose(path):
    """Puts the keypoints at `OFFSETS` from the brightest pixel; two bins a pixel, as RTMPose has them."""
    nodes, constants, outputs = [], {}, {}
    for axis, (name, side) in enumerate({"simcc_x": POSE_SIZE[0], "simcc_y": POSE_SIZE[1]}.items()):
        spread = np.zeros((1, KEYPOINTS, side, 2 * side), np.float32)
        for k, offset in enumerate(OFFSETS[:, axis]):
            pixels = np.arange(max(0, -offset), min(side, side - offset))
            spread[0, k, pixels, 2 * (pixels + offset)] = 1
        constants[f"{name}_spread"] = spread
        constants[f"{name}_line"] = np.array([1, 1, 1, side], np.int64)
        constants[f"{name}_bins"] = np.array([1, KEYPOINTS, 2 * side], np.int64)
        nodes += [
            maximum_over(1, "input", f"{name}_grey"),
            maximum_over(2 if axis == 0 else 3, f"{name}_grey", f"{name}_max"),
            node("Reshape", [f"{name}_max", f"{name}_line"], f"{name}_flat"),
            node("MatMul", [f"{name}_flat", f"{name}_spread"], f"{name}_all"),
            node("Reshape", [f"{name}_all", f"{name}_bins"], name),
        ]
        outputs[name] = (1, KEYPOINTS, 2 * side)
    write_onnx(path, POSE_SIZE, nodes, constants, outputs)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    write_detector(folder / "detector.onnx")
    write_pose(folder / "pose.onnx")
    return f"{folder / 'detector.onnx'},{folder / 'pose.onnx'}"


CROP_SCALE = 1.25 * 128 / POSE_SIZE[0]  # pixels of a square image of 128 pixels in one of the pose network's input


def image_with_red_dot(x: int, y: int, size: tuple[int, int] = (128, 128)) -> np.ndarray:
    rows, columns = np.mgrid[: size[1], : size[0]]
    image = np.zeros((size[1], size[0], 3), np.uint8)
    image[..., 0] = 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 50)
    return image


def test_keypoints_land_on_what_the_network_saw(weights):
    estimator = open_estimator(PoseConfig(backend="dwpose", weights=weights))
    estimate = estimate_image(image_with_red_dot(70, 40), estimator)
    assert estimate.masks is None and estimate.poses.keypoints.shape == (1, 1, 17, 2)
    np.testing.assert_allclose(estimate.poses.keypoints[0, 0], (70, 40) + CROP_SCALE * OFFSETS[:17], atol=2.5)
    assert estimate.poses.scores.max() <= 1


def test_persons_upside_down_are_found_and_mapped_back(weights):
    estimator = open_estimator(PoseConfig(backend="dwpose", weights=weights))
    for x, y in ((50, 90), (75, 85)):
        (person,) = estimator.image(image_with_red_dot(x, y))
        np.testing.assert_allclose(person.keypoints.mean(axis=0), (x, y), atol=4)  # a pixel of the turned crop
        # Turned and scaled as a whole, not mirrored: a similarity explains where the keypoints are.
        found, offsets = (person.keypoints - person.keypoints.mean(axis=0)) @ (1, 1j), OFFSETS[:17] @ (1, 1j)
        assert abs(np.vdot(found, offsets)) > 0.99 * np.linalg.norm(found) * np.linalg.norm(offsets)


def test_video_keeps_the_slot(weights):
    estimator = open_estimator(PoseConfig(backend="dwpose", weights=weights))
    frames = [image_with_red_dot(40 + 4 * k, 30) for k in range(5)]
    poses = estimate_poses(frames, 25, estimator, max_persons=2).poses
    assert (poses.frames, poses.persons) == (5, 1)
    dots = np.array([(40 + 4 * k, 30) for k in range(5)])
    np.testing.assert_allclose(poses.keypoints[:, 0], dots[:, None] + CROP_SCALE * OFFSETS[:17], atol=2.5)


def test_nobody_is_found_in_a_black_image(weights):
    assert open_estimator(PoseConfig(backend="dwpose", weights=weights)).image(np.zeros((60, 90, 3), np.uint8)) == []


def test_letterbox_keeps_the_aspect_and_turns_to_bgr():
    image = np.zeros((50, 200, 3), np.uint8)
    image[..., 0] = 250
    boxed, scale = letterbox(image, (64, 64))
    assert boxed.shape == (3, 64, 64) and boxed.dtype == np.float32 and scale == pytest.approx(0.32)
    np.testing.assert_array_equal(boxed[:, :16], np.broadcast_to([[[0]], [[0]], [[250]]], (3, 16, 64)))
    assert (boxed[:, 16:] == 114).all()


def test_boxes_are_decoded_in_closed_form_and_suppressed():
    raw = np.zeros((CELLS, 85), np.float32)
    raw[10, :6] = 0.25, 0.5, math.log(2), math.log(3), 0.9, 0.9  # stride 8, cell (2, 1)
    raw[11, :6] = -0.75, 0.5, math.log(2), math.log(3), 0.8, 0.9  # the same box from the next cell
    raw[64 + 16 + 3, :6] = 0.5, 0.5, 0, 0, 0.5, 0.8  # stride 32, cell (1, 1)
    raw[20, 4:7] = 0.9, 0.1, 0.9  # another class
    boxes = decode_boxes(raw, (64, 64), scale=0.5)
    assert [found.score for found in boxes] == pytest.approx([0.81, 0.4])
    np.testing.assert_allclose(boxes[0].box, (20, 0, 52, 48))  # centre 2 x (18, 12), size 2 x (16, 24)
    np.testing.assert_allclose(boxes[1].box, (64, 64, 128, 128))
    with pytest.raises(UserError, match="gives 80 boxes for an input of 64x64, YOLOX 84"):
        decode_boxes(raw[:80], (64, 64), 1)


def test_crop_pads_the_box_and_keeps_the_aspect():
    matrix = box_matrix(Box(100, 200, 136, 280), (288, 384))
    centre = matrix[:, :2] @ (144, 192) + matrix[:, 2]
    np.testing.assert_allclose(centre, (118, 240))
    np.testing.assert_allclose(matrix[:, :2], np.eye(2) * 1.25 * 80 / 384)  # the height binds
    np.testing.assert_allclose(box_matrix(Box(0, 0, 90, 80), (288, 384))[0, 0], 1.25 * 90 / 288)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 575), st.integers(0, 767), st.floats(0, 1.5), st.floats(0, 1.5))
def test_simcc_takes_the_highest_bins(x, y, height_x, height_y):
    bins_x, bins_y = np.zeros((1, 2, 576)), np.zeros((1, 2, 768))
    bins_x[0, 1, x], bins_y[0, 1, y] = height_x, height_y
    points, scores = decode_simcc(bins_x, bins_y, (288, 384))
    np.testing.assert_allclose(points[1], (x / 2 if height_x else 0, y / 2 if height_y else 0))
    assert scores[1] == pytest.approx(min(height_x, height_y, 1)) and scores[0] == 0


@settings(max_examples=20, deadline=None)
@given(st.floats(-7, 7), st.integers(20, 90), st.integers(20, 90))
def test_turned_images_show_everything_upright(rotation, width, height):
    image = np.full((height, width, 3), 200, np.uint8)
    turned, matrix = turn_image(image, rotation)
    corners = np.array([(0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)])
    mapped = corners @ matrix[:, :2].T + matrix[:, 2]
    assert (mapped > -1e-6).all() and (mapped < np.array(turned.shape[1::-1]) - 1 + 1e-6).all()
    up = np.array([math.sin(rotation), -math.cos(rotation)])  # of a person turned clockwise by `rotation`
    np.testing.assert_allclose(matrix[:, :2] @ up, (0, -1), atol=1e-9)
    assert float(turned.sum()) == pytest.approx(float(image.sum()), rel=0.1)


def test_wrong_files_are_named(tmp_path, weights):
    detector, pose = weights.split(",")
    with pytest.raises(UserError, match=r"pose.weights=.*missing\.onnx does not exist"):
        DWPose(tmp_path / "missing.onnx", pose)
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(UserError, match="not an ONNX network") as error:
        DWPose(detector, tmp_path / "text.onnx")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="not a YOLOX detector: it has 2 outputs, not 1"):
        DWPose(pose, detector)
    with pytest.raises(UserError, match="is a folder"):
        DWPose(tmp_path, pose)
