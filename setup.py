"""Build of the distribution, whose only top-level names are `tpc` and `tpc_animate`; the rest is in pyproject.toml.

Here `core`, `data`, `models` and the others stand side by side. Installed under such names they would give way to a
user's own `data/` or `models/`, so the build puts all but `tpc` into `tpc_animate` and rewrites what names them.
"""

import ast
import re
import shutil
from pathlib import Path

from setuptools import Command, find_namespace_packages, setup
from setuptools.command.build_py import build_py

INSIDE = "tpc_animate"
FOLDERS = ["core", "data", "metrics", "models", "inference", "training", "evaluation", "viewer"]
SCRIPTS = ["evaluate", "infer", "prepare", "train"]
TRAIN, DEV = ("deepspeed", "tensorboard"), ("decord",)  # of requirements.txt, what `models` does without


def rewritten(text: str) -> str:
    """Source whose imports, and commands in messages, name our modules as they are called when installed."""
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(name.split(".")[0] in FOLDERS + SCRIPTS for name in named):
            raise SyntaxError(
                f"the build rewrites `from ... import`, not `import {named[0]}`", ("", node.lineno, 0, "")
            )
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in FOLDERS + SCRIPTS:
            line, at = lines[node.lineno - 1], node.col_offset + len("from ")
            lines[node.lineno - 1] = f"{line[:at]}{INSIDE}.{line[at:]}"
    text = re.sub(rf"\bpython -m (?=({'|'.join(FOLDERS)})\b)", rf"python -m {INSIDE}.", "\n".join(lines))
    return re.sub(rf"\b(python|accelerate launch) ({'|'.join(SCRIPTS)})\.py\b", rf"\1 -m {INSIDE}.\2", text)


class BuildModules(build_py):
    def run(self) -> None:
        for name in ("tpc", INSIDE):  # modules of an earlier build that are no more
            shutil.rmtree(Path(self.build_lib) / name, ignore_errors=True)
        super().run()
        (Path(self.build_lib) / INSIDE / "__init__.py").write_text('"""All of TPC-Animate but `tpc`."""\n')

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        target = Path(self.get_module_outfile(self.build_lib, package.split("."), module))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rewritten(Path(module_file).read_text(encoding="utf-8")), encoding="utf-8")
        return str(target), True


class Editable(Command):
    user_options = [("dist-info-dir=", "d", ""), ("dist-dir=", "d", "")]

    def initialize_options(self) -> None:
        self.dist_info_dir = self.dist_dir = None

    def finalize_options(self) -> None:
        raise SystemExit(
            "error: no editable installation, whose modules have other names: put this folder on PYTHONPATH"
        )

    run = finalize_options


def pins(file: str) -> dict[str, str]:
    """Package -> line of a requirements file."""
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    return {re.match(r"[\w-]+", line)[0]: line for line in lines if re.match(r"\w", line)}


folders = find_namespace_packages(
    include=[name for top in ("tpc", *FOLDERS) for name in (top, f"{top}.*")], exclude=["*__pycache__*"]
)
needed = pins("requirements.txt")
setup(
    cmdclass={"build_py": BuildModules, "editable_wheel": Editable, "develop": Editable},
    package_dir={INSIDE: "."},
    packages=[INSIDE, *(name if name.startswith("tpc") else f"{INSIDE}.{name}" for name in folders)],
    extras_require={
        "models": [line for name, line in needed.items() if name not in TRAIN + DEV],
        "train": ["tpc-animate[models]", *(needed[name] for name in TRAIN)],
        "dev": ["tpc-animate[train]", *(needed[name] for name in DEV)]
        + [line for file in ("requirements-dev.txt", "requirements-viewer.txt") for line in pins(file).values()],
    },
)
