"""The layers of the project: imports point downwards only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A package may import those before it, and itself. `metrics` imports nothing of ours but `core`.
LAYERS = ("core", "data", "tpc", "models", "analysis", "evaluation", "training")
ALLOWED = {
    "core": set(),
    "data": {"core"},
    "tpc": {"core", "data"},
    "models": {"core", "data", "tpc"},
    "training": {"core", "data", "tpc", "models", "metrics"},
    "analysis": {"core", "data", "tpc", "models"},
    "metrics": {"core"},
    "evaluation": {"core", "data", "tpc", "models", "analysis", "metrics"},
}
PACKAGES = set(LAYERS) | {"metrics", "benchmarks", "tests"}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_downwards(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        upwards = imported(path) & (PACKAGES | SCRIPTS) - ALLOWED[package] - {package}
        assert not upwards, f"{path.relative_to(ROOT)} imports {sorted(upwards)}"


def test_no_forbidden_dependencies():
    for path in ROOT.glob("*/*.py"):
        assert not imported(path) & {"torchvision", "xformers", "mmcv", "detectron2", "mediapipe", "triton"}, path
