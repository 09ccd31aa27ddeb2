"""What `pip install` would put into site-packages, used from a folder of somebody else's."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from data.config import SAMPLES
from tests.house import FLOORS, ROOT, import_graph

OURS = {name for floor in FLOORS for name in floor}
NAMES = {"cv2": "opencv-python-headless", "PIL": "pillow"}  # of packages that are called otherwise than their modules
ELSEWHERE = {"onnxruntime", "yaml"}  # for pose.backend=dwpose, whose error names it; of OmegaConf


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder as site-packages is after an installation."""
    folder = tmp_path_factory.mktemp("site-packages")
    build = ["build_py", "--build-lib", str(folder), "dist_info", "--output-dir", str(folder)]
    subprocess.run([sys.executable, "setup.py", "-q", *build], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture
def python(installed, tmp_path):
    """Runs Python beside a user's own `data`, `models` and `core`, which must not be imported."""
    for name in ("data", "models", "core"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user has this one')")

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and line[0].isalpha()]


def test_two_names_and_no_more_data_than_is_read(installed):
    assert sorted(path.name for path in installed.iterdir() if path.suffix != ".dist-info") == ["tpc", "tpc_animate"]
    inside = installed / "tpc_animate"
    others = {"__init__", "assets", "configs"}
    assert {path.stem for path in inside.iterdir()} == OURS - {"tpc", "tests", "benchmarks", "integrations"} | others
    assert {path.name for path in (inside / "assets").iterdir()} == {"misalignment", "people", "samples", "tiny_model"}
    for name in ("assets/misalignment", "assets/people", "assets/samples", "assets/tiny_model", "configs"):
        there = {path.relative_to(ROOT) for path in (ROOT / name).rglob("*") if path.is_file()}
        assert {path.relative_to(inside) for path in (inside / name).rglob("*") if path.is_file()} == there


def test_modules_name_each_other_as_they_are_installed(installed):
    for path in installed.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & (OURS - {"tpc"}), f"{path}, line {node.lineno}"
        stale = re.search(rf"python (-m )?({'|'.join(OURS - {'tpc', 'benchmarks'})})\b(?! is)", text)
        assert stale is None, f"{path} names {stale[0]}"


def test_everything_is_found_beside_folders_of_the_same_names(python):
    python(
        "-c",
        """import sys, tpc, tpc_animate.infer, tpc_animate.train, tpc_animate.evaluate, tpc_animate.prepare
from tpc_animate.data.people.bodies import PEOPLE_FOLDER
from tpc_animate.evaluation.config import MANIFESTS
from tpc_animate.models.config import ANIMATORS, SHIPPED_MODEL
assert all(path.is_dir() for path in (PEOPLE_FOLDER, MANIFESTS, SHIPPED_MODEL))
assert all(name.startswith("tpc_animate.models.") for name in ANIMATORS.values())
assert all(getattr(tpc, name).__name__ == name for name in tpc.__all__)
assert tpc_animate.evaluate.task_words("attention") and "torch" not in sys.modules""",
    )


def test_the_command_runs_beside_folders_of_the_same_names(python, tmp_path):
    inputs = [f"reference={SAMPLES / 'rendered.png'}", f"driving={SAMPLES / 'dance.mp4'}", "max_side=64"]
    python("-m", "tpc", *inputs, "output=out", "max_frames=1", "tpc.preset=release")  # compiles nothing
    assert (tmp_path / "out" / "calibration.json").is_file()


def test_the_core_requires_what_tpc_imports(installed):
    core = [Requirement(line) for line in Distribution.at(next(installed.glob("*.dist-info"))).requires]
    core = {found.name: found.specifier for found in core if found.marker is None}
    graph, waiting, modules = import_graph(), ["tpc.__main__", "tpc.export.inputs"], set()
    networks = {name for name in graph if name.startswith("models.")} | {"tpc.attach"}  # for types, or when asked for
    while waiting:
        modules.add(module := waiting.pop())
        waiting += graph[module] - modules - networks
    imported = set()
    for module in modules:
        path = ROOT / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported |= {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()
            imported |= {node.module.split(".")[0]} if isinstance(node, ast.ImportFrom) and not node.level else set()
    imported -= OURS | sys.stdlib_module_names | ELSEWHERE
    assert {NAMES.get(name, name.replace("_", "-")) for name in imported} == set(core)
    pinned = {found.name: found.specifier for found in requirements("requirements.txt")}
    for name, allowed in core.items():
        lowest = min(re.findall(r"[\d.]+", str(pinned[name])), key=lambda text: [int(n) for n in text.split(".")])
        assert allowed.contains(lowest), f"{name}: pyproject.toml {allowed}, requirements.txt {pinned[name]}"


def test_extras_are_the_requirements_files(installed):
    lines = [Requirement(line) for line in Distribution.at(next(installed.glob("*.dist-info"))).requires]
    of_extras = {(line.name, str(line.specifier)) for line in lines if line.marker and line.name != "tpc-animate"}
    files = ("requirements.txt", "requirements-dev.txt", "requirements-viewer.txt")
    assert of_extras == {(line.name, str(line.specifier)) for file in files for line in requirements(file)}
    at = {
        extra: {line.name for line in lines if line.marker and line.marker.evaluate({"extra": extra})}
        for extra in ("models", "train", "dev")
    }
    assert "torch" in at["models"] and not {"deepspeed", "pytest"} & at["models"]
    assert "tensorboard" in at["train"] and {"pytest", "gradio"} <= at["dev"]
