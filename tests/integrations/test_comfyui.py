"""The node for ComfyUI, called as ComfyUI calls it."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import UserError
from integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from tests.clips import STANDING
from tests.tpc_bodies import silhouette

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "integrations" / "comfyui"
SIZE = (96, 128)  # (width, height) of the driving frames
NAME = "TPCCalibrateReference"
# Index of each COCO keypoint in OpenPose's order of 18, whose second is the neck.
SEEN = (0, 5, 6, 11, 12, 15, 16)  # few: every subset of them is tried
OPENPOSE = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)


def person(scale: float = 1.0, middle: tuple[float, float] = (48, 64)) -> np.ndarray:
    """(17, 2) of somebody standing, 84 pixels from nose to ankles times the scale."""
    return (STANDING - STANDING.mean(0)) * scale + middle


def keypoints(frames: list[list[np.ndarray]], size: tuple[int, int] = SIZE, parts: bool = False) -> list[dict]:
    """POSE_KEYPOINT of persons (17, 2) by frame, in pixels or as `parts` of the picture."""

    def flat(points: np.ndarray) -> list[float]:
        points = points / np.array(size if parts else 1)
        return [float(v) for i in OPENPOSE for v in ((*points[i], 1) if i in SEEN else (0, 0, 0))]

    none = {"face_keypoints_2d": None, "hand_left_keypoints_2d": None, "hand_right_keypoints_2d": None}
    return [
        {
            "people": [{"pose_keypoints_2d": flat(each), **none} for each in frame],
            "canvas_width": size[0],
            "canvas_height": size[1],
        }
        for frame in frames
    ]


def picture(size: tuple[int, int] = SIZE, count: int = 1) -> torch.Tensor:
    pixels = np.random.default_rng(0).random((1, size[1], size[0], 3), np.float32)
    return torch.from_numpy(pixels).expand(count, -1, -1, -1)


def mask_of(points: np.ndarray, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.from_numpy(silhouette(points, size)[None].astype(np.float32))


def run(**given):
    """What the node returns for these inputs and, of the others, what its widgets show at first."""
    node = NODE_CLASS_MAPPINGS[NAME]()
    required = node.INPUT_TYPES()["required"]
    widgets = {name: options["default"] for name, (_, options) in required.items() if "default" in options}
    return dict(zip(node.RETURN_NAMES, getattr(node, node.FUNCTION)(**widgets | given), strict=True))


POSE = keypoints([[person()]])


def height_of(mask: torch.Tensor) -> int:
    rows = torch.nonzero(mask.any(1))
    return int(rows[-1] - rows[0]) + 1


def test_node_declares_what_comfyui_reads():
    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)
    for node in NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        assert set(inputs) == {"required", "optional"}
        parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
        assert list(parameters)[1:] == [*inputs["required"], *inputs["optional"]]
        assert all(parameters[name].default is None for name in inputs["optional"])
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS)
        assert node.CATEGORY and node.DESCRIPTION
        for kind, options in {**inputs["required"], **inputs["optional"]}.values():
            assert options["tooltip"]
            if isinstance(kind, list):
                assert options["default"] in kind
            elif kind in ("INT", "FLOAT"):
                assert options["min"] <= options["default"] <= options["max"] and options["step"] > 0


def test_example_workflow_fits_the_node():
    """Sockets, widgets and links, the latter from both ends; docs/comfyui.md tells of every input."""
    workflow = json.loads((FOLDER / "example_workflows" / "calibrate_reference.json").read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, origin, slot, target, place, kind in workflow["links"]:
        output, given = nodes[origin]["outputs"][slot], nodes[target]["inputs"][place]
        assert number in output["links"] and given["link"] == number
        assert output["type"] == kind and given["type"] in (kind, "*")
    assert sum(len(o["links"] or ()) for n in nodes.values() for o in n["outputs"]) == len(workflow["links"])
    (ours,) = [node for node in nodes.values() if node["type"] in NODE_CLASS_MAPPINGS]
    node = NODE_CLASS_MAPPINGS[ours["type"]]
    declared = node.INPUT_TYPES()
    inputs = declared["required"] | declared["optional"]
    sockets = {name: kind for name, (kind, _) in inputs.items() if kind in ("IMAGE", "MASK", "POSE_KEYPOINT")}
    assert {given["name"]: given["type"] for given in ours["inputs"]} == sockets
    assert {given["name"] for given in ours["inputs"] if given["link"]} >= {"reference", "driving"}
    outputs = [(output["name"], output["type"]) for output in ours["outputs"]]
    assert outputs == list(zip(node.RETURN_NAMES, node.RETURN_TYPES, strict=True))
    widgets = {name: each for name, each in inputs.items() if name not in sockets}
    for (kind, options), value in zip(widgets.values(), ours["widgets_values"], strict=True):
        assert value in kind if isinstance(kind, list) else options["min"] <= value <= options["max"]
    page = (ROOT / "docs" / "comfyui.md").read_text()
    assert all(f"`{name}`" in page for name in inputs)


def test_comfyui_loads_the_folder_from_its_custom_nodes(tmp_path):
    """By its path, under a name that is no identifier; neither torch nor anything heavy is imported for it."""
    link = tmp_path / "tpc-animate"
    link.symlink_to(FOLDER)
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location({str(link)!r}, {str(link / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules[{str(link)!r}] = module
spec.loader.exec_module(module)
heavy = {{"torch", "cv2", "diffusers", "transformers", "scipy", "numba", "matplotlib", "tpc"}} & set(sys.modules)
assert not heavy, heavy
node = module.NODE_CLASS_MAPPINGS[{NAME!r}]()
try:
    getattr(node, node.FUNCTION)(*[None] * 8)
except ImportError as error:
    print(error)"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"In the Python that runs ComfyUI: pip install {ROOT}" in run.stdout


@pytest.mark.parametrize("parts", [False, True])
def test_somebody_of_half_the_size_becomes_as_large_as_the_driver(parts):
    small, large = person(0.5, (30, 90)), person(1.2)
    found = run(
        reference=picture(),
        reference_mask=mask_of(small),
        driving_keypoints=keypoints([[large]], parts=parts),
        reference_keypoints=keypoints([[small]], parts=parts),
    )
    assert found["reference_images"].shape == (1, 128, 96, 3) and found["person_masks"].shape == (1, 128, 96)
    assert found["reference_images"].dtype == found["person_masks"].dtype == torch.float32
    assert 0 <= found["reference_images"].min() and 0.9 < found["reference_images"].max() <= 1
    assert found["person_masks"].unique().tolist() == [0, 1]
    assert height_of(found["person_masks"][0]) == pytest.approx(height_of(mask_of(large)[0]), rel=0.03)
    overlap = (found["person_masks"] * mask_of(large)).sum() / mask_of(large).sum()
    assert overlap > 0.93
    assert found["segments"] == 1 and found["notes"].splitlines()[0].startswith("1 calibrated, 0 interpolated")
    assert found["report"].shape[0] == 1 and found["report"].shape[3] == 3 and found["report"].max() <= 1


def test_strength_and_the_size_of_the_images():
    small, large = person(0.5), person(1.0)
    given = {
        "reference": picture(),
        "reference_mask": mask_of(small),
        "driving_keypoints": keypoints([[large]]),
        "reference_keypoints": keypoints([[small]]),
    }
    heights = [height_of(run(**given, strength=strength)["person_masks"][0]) for strength in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(np.divide(heights[1:], heights[0]), [2**0.5, 2], rtol=0.04)
    wide = run(**given, width=192)
    assert wide["reference_images"].shape == (1, 256, 192, 3) and "cut to" not in wide["notes"]
    assert height_of(wide["person_masks"][0]) == pytest.approx(2 * heights[2], rel=0.03)
    square = run(**given, width=64, height=64)
    assert square["reference_images"].shape == (1, 64, 64, 3)
    assert "driving frames of 96 x 128 are cut to the shape of 64 x 64" in square["notes"]


def test_three_hundred_frames_in_segments_of_77_that_overlap_by_one():
    steps = np.linspace(0.6, 1.2, 300)
    found = run(
        reference=picture(),
        reference_mask=mask_of(person()),
        reference_keypoints=POSE,
        driving_keypoints=keypoints([[person(scale)] for scale in steps]),
        segment_length=77,
        segment_overlap=1,
    )
    assert found["segments"] == len(found["reference_images"]) == len(found["person_masks"]) == 4
    assert found["notes"].splitlines()[-1] == "segments: 0 to 76, 76 to 152, 152 to 228, 228 to 299"
    for mask, start in zip(found["person_masks"], (0, 76, 152, 228), strict=True):
        least, most = (height_of(mask_of(person(steps[i]))[0]) for i in (start, min(start + 76, 299)))
        assert 0.97 * least <= height_of(mask) <= 1.03 * most


def test_every_frame_its_own_reference():
    frames = keypoints([[person(scale)] for scale in (0.6, 0.8, 1.0)])
    given = {"reference": picture(), "reference_mask": mask_of(person()), "reference_keypoints": POSE}
    found = run(**given, driving_keypoints=frames, segment_length=1)
    heights = [height_of(mask) for mask in found["person_masks"]]
    np.testing.assert_allclose(heights, [height_of(mask_of(person(s))[0]) for s in (0.6, 0.8, 1.0)], rtol=0.03)
    with pytest.raises(UserError, match="segment_overlap=2 must be 0 to 0"):
        run(**given, driving_keypoints=frames, segment_length=1, segment_overlap=2)


def test_nobody_in_the_picture_or_in_the_clip_passes_the_reference_through():
    """Poses are estimated in noise; the reference is fitted into the frame, whole."""
    reference = torch.full((2, 64, 96, 3), 0.5)
    reference[:, :, :48] = 0.25
    pose, nobody = keypoints([[person(0.5, (48, 32))]], (96, 64)), keypoints([[]] * 3)
    for given, missing in (
        ({"driving_keypoints": 3 * POSE, "driving": picture(count=3)}, "no person was found in the reference"),
        ({"driving_keypoints": nobody, "reference_keypoints": pose}, "no person was found in the driving clip"),
        ({"driving": torch.zeros(3, 128, 96, 3)}, "no person was found in the driving clip"),
    ):
        found = run(reference=reference, **given, segment_length=2)
        assert found["segments"] == 2 and missing in found["notes"]
        assert "the first of 2 references is calibrated" in found["notes"]
        assert "nobody is calibrated in segment 0, 1; its reference is the image as it was" in found["notes"]
        shown = found["reference_images"][:, 40:88, :, 0].numpy()
        np.testing.assert_allclose(shown[..., :46], 0.25, atol=0.01)
        np.testing.assert_allclose(shown[..., 50:], 0.5, atol=0.01)


def test_several_persons_share_a_mask_by_who_is_nearest():
    left, right = person(0.4, (24, 64)), person(0.5, (70, 64))
    both = torch.maximum(mask_of(left), mask_of(right))
    apart = [person(0.4, (30, 40)), person(0.6, (66, 80))]
    found = run(
        reference=picture(),
        reference_mask=both,
        reference_keypoints=keypoints([[left, right]]),
        driving_keypoints=keypoints([apart] * 2),
        driving_mask=torch.maximum(mask_of(apart[0]), mask_of(apart[1])),
        max_persons=2,
    )
    assert found["notes"].startswith("4 calibrated")
    expected = torch.maximum(mask_of(apart[0]), mask_of(apart[1]))
    overlap = (found["person_masks"] * expected).sum() / torch.maximum(found["person_masks"], expected).sum()
    assert overlap > 0.8
    alone = run(
        reference=picture(), reference_keypoints=keypoints([[left, right]]), driving_keypoints=keypoints([apart] * 2)
    )
    assert alone["notes"].startswith("2 calibrated")


def test_keypoints_of_another_resolution_and_pictures_with_alpha_are_taken():
    small, large = person(0.5), person()
    given = {"reference_mask": mask_of(small)[0], "driving": picture(count=2)}
    twice = keypoints([[2 * large]] * 2, (2 * SIZE[0], 2 * SIZE[1]))
    rgba = torch.cat([picture(), torch.zeros(1, 128, 96, 1)], -1)
    found = run(reference=rgba, reference_keypoints=keypoints([[small]]), driving_keypoints=twice, **given)
    assert height_of(found["person_masks"][0]) == pytest.approx(height_of(mask_of(large)[0]), rel=0.03)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give driving frames, or driving keypoints"),
        ({"driving": picture(count=3), "driving_keypoints": POSE}, "of 1 frames, .* has 3"),
        ({"driving": picture((128, 96)), "driving_keypoints": POSE}, "driving_keypoints are for 96x128"),
        ({"driving_keypoints": [{"animals": [], "canvas_width": 96}]}, "driving_keypoints cannot be read"),
        (
            {"driving_keypoints": 3 * POSE, "driving_mask": mask_of(person()).expand(2, -1, -1)},
            "masks of 2 frames, and poses of 3",
        ),
    ],
)
def test_inputs_that_do_not_belong_together(given, message):
    with pytest.raises(UserError, match=message):
        run(reference=picture(), reference_keypoints=POSE, **given)
