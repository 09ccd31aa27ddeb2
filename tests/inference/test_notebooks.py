"""The notebooks are short, import only, shown with their outputs, and run on the shipped model."""

import ast
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OURS = {"core", "data", "evaluation", "inference", "models", "tpc"}
ALLOWED = OURS | {"PIL", "matplotlib", "numpy", "sys"}


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    """Python of a cell, without IPython's own commands."""
    return "".join(line for line in cell["source"] if not line.startswith("%"))


def test_there_are_four():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_short_and_import_only(path):
    assert len(cells(path)) + len(cells(path, "markdown")) <= 12
    for cell in cells(path):
        for node in ast.walk(ast.parse(source(cell))):
            assert not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)), path
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED, path
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in ALLOWED, path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_there_and_say_nothing_of_this_machine(path):
    code = cells(path)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(output["output_type"] in ("stream", "display_data", "execute_result") for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert str(ROOT) not in path.read_text(encoding="utf-8")
    assert path.stat().st_size < 2_000_000


@pytest.mark.slow
def test_all_run_on_the_shipped_model():
    """In one kernel, so that libraries are imported once; that each defines all names that it uses, ruff checks."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    notebooks = [nbformat.read(path, as_version=4) for path in NOTEBOOKS]
    cells = [cell for notebook in notebooks for cell in notebook.cells]
    for number, cell in enumerate(cells):  # the notebooks number theirs from 0, each for itself
        cell["id"] = f"cell-{number}"
    joined = nbformat.v4.new_notebook(cells=cells)
    client.NotebookClient(
        joined, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS[0].parent)}}
    ).execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
    for path, notebook in zip(NOTEBOOKS, notebooks, strict=True):
        shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        assert sum("image/png" in output.get("data", {}) for output in shown) >= 2, path
