"""Build of the distribution, whose only top-level names are `tpc` and `tpc_animate`; the rest is in pyproject.toml.

In the repository `core`, `data`, `models` and the others stand side by side. Installed under such names they would
give way to a user's own `data/` or `models/`: all but `tpc` goes into `tpc_animate`, and what names it is rewritten.
"""

import ast
import re
import shutil
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

FOLDERS = ["core", "data", "metrics", "models", "inference", "training", "evaluation", "viewer"]
SCRIPTS = ["evaluate", "infer", "prepare", "train"]
TRAIN, DEV = ("deepspeed", "tensorboard"), ("decord",)  # of requirements.txt, what the extra `models` does without


def rewritten(text: str) -> str:
    """Source whose imports, and commands in texts, name modules as they are called when installed."""
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in FOLDERS + SCRIPTS:
            line, at = lines[node.lineno - 1], node.col_offset + len("from ")
            lines[node.lineno - 1] = f"{line[:at]}tpc_animate.{line[at:]}"
    text = re.sub(rf"\bpython -m (?=({'|'.join(FOLDERS)})\b)", "python -m tpc_animate.", "\n".join(lines))
    return re.sub(rf"\b(python|accelerate launch) ({'|'.join(SCRIPTS)})\.py\b", r"\1 -m tpc_animate.\2", text)


class Build(build_py):
    def run(self) -> None:
        for name in ("tpc", "tpc_animate"):  # with what an earlier build left
            shutil.rmtree(Path(self.build_lib, name), ignore_errors=True)
        super().run()
        Path(self.build_lib, "tpc_animate", "__init__.py").write_text('"""All of TPC-Animate but `tpc`."""\n')

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        target, copied = super().build_module(module, module_file, package)
        Path(target).write_text(rewritten(Path(module_file).read_text(encoding="utf-8")), encoding="utf-8")
        return target, copied


class Editable(editable_wheel):
    def run(self) -> None:
        raise SystemExit(
            "error: not to be had as editable, since installed modules have other names: put this folder on PYTHONPATH"
        )


def requirements(name: str) -> list[str]:
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-"))]


needed = requirements("requirements.txt")
included = [pattern for name in ("tpc", *FOLDERS) for pattern in (name, f"{name}.*")]
packages = find_namespace_packages(include=included, exclude=["*__pycache__"])
setup(
    cmdclass={"build_py": Build, "editable_wheel": Editable},
    package_dir={"tpc_animate": "."},
    packages=["tpc_animate", *(name if name.startswith("tpc") else f"tpc_animate.{name}" for name in packages)],
    extras_require={
        "models": [line for line in needed if not line.startswith(TRAIN + DEV)],
        "train": ["tpc-animate[models]", *(line for line in needed if line.startswith(TRAIN))],
        "dev": ["tpc-animate[train]", *(line for line in needed if line.startswith(DEV))]
        + requirements("requirements-dev.txt")
        + requirements("requirements-viewer.txt"),
    },
)
