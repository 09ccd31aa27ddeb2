"""The floors of the house: imports point downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import FLOORS, circles, import_graph, upward_imports

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(name for floor in FLOORS[:-2] for name in floor)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return import_graph()


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_downwards(graph, package):
    upwards = [pair for pair in upward_imports(graph) if pair[0].split(".")[0] == package]
    assert not upwards, ", ".join(f"{module} imports {other}" for module, other in upwards)


def test_no_circles_of_imports(graph):
    assert not circles(graph)


def loaded_by(module: str, names: str) -> list[str]:
    """Loaded modules that have files, out of some top-level packages, when a fresh interpreter imports a module."""
    code = f"""
import sys, {module}
for name, loaded in sorted(sys.modules.items()):
    if name.split(".")[0] in {names.split()} and getattr(loaded, "__file__", None):
        print(name)"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_geometry_loads_no_networks():
    assert not loaded_by("tpc.calibration", "torch diffusers transformers models")


def test_configurations_load_nothing_heavy():
    """Commands check their arguments before they import what takes seconds."""
    configurations = "evaluation.config, training.config, tpc.__main__, viewer.__main__, models.checkpoints.__main__"
    commands = "infer, train, evaluate, prepare, training.vae, training.logs, metrics.weights, data.poses.weights"
    commands += ", integrations.comfyui"
    heavy = "torch diffusers transformers accelerate cv2 scipy numba av"
    assert not loaded_by(f"{configurations}, {commands}", heavy)


def test_the_unets_load_few_modules_of_ours():
    loaded = loaded_by("models.unets", " ".join(PACKAGES))
    assert len(loaded) <= 6, loaded


def test_no_forbidden_dependencies():
    for path in ROOT.rglob("*.py"):
        if not path.relative_to(ROOT).parts[0].startswith("."):
            assert not imported(path) & {"torchvision", "xformers", "mmcv", "detectron2", "mediapipe", "triton"}, path
