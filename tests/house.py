"""Print how large the source is and how it hangs together: files, prose, start-up, circles, floors.

    python -m tests.house

`tests/core/test_architecture.py` holds the floors; the other figures are for readers.
"""

import ast
import io
import statistics
import subprocess
import sys
import tokenize
from collections import Counter
from functools import cache
from pathlib import Path

from benchmarks.source import imports, module_name

ROOT = Path(__file__).parent.parent
# A package imports from the floors below its own and from itself; `metrics` and `data` stand side by side.
FLOORS = (
    {"core"},
    {"data", "metrics"},
    {"models"},
    {"tpc"},
    {"inference"},
    {"training"},
    {"evaluation"},
    {"train", "infer", "evaluate", "prepare", "viewer", "integrations"},
    {"benchmarks"},
    {"tests"},
)
STARTS = ("models.unets", "infer")  # what each of them loads is counted
LONG, SHORT = 300, 30


def source_files(*packages: str) -> list[Path]:
    """Python files of packages and of the scripts of the same names, relative to the root."""
    files = [path for name in packages for path in (ROOT / name).rglob("*.py")]
    files += [ROOT / f"{name}.py" for name in packages if (ROOT / f"{name}.py").is_file()]
    return sorted(path.relative_to(ROOT) for path in files)


def product_files() -> list[Path]:
    """All source but tests and benchmarks."""
    return source_files(*(name for floor in FLOORS[:-2] for name in floor))


@cache
def import_graph() -> dict[str, set[str]]:
    """Every module of the product, and of tests and benchmarks, and those of ours that it imports."""
    files = source_files(*(name for floor in FLOORS for name in floor))
    modules = {module_name(path) for path in files}
    trees = {module_name(path): ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in files}
    return {name: imports(tree, modules) - {name} for name, tree in trees.items()}


def floor_of(module: str) -> int:
    """The floor's index, 0 lowest."""
    return next(index for index, names in enumerate(FLOORS) if module.split(".")[0] in names)


def upward_imports(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """(importing, imported) pairs of modules where the first may not import the second."""
    return [
        (module, other)
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if module.split(".")[0] != other.split(".")[0] and floor_of(other) >= floor_of(module)
    ]


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that all reach each other by imports."""
    reached = {}
    for start in graph:
        reached[start], waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - reached[start]
            reached[start] |= new
            waiting += new
    found = {frozenset(other for other in reached[m] if m in reached[other]) for m in graph if m in reached[m]}
    return sorted(map(set, found), key=sorted)


def prose_lines(text: str) -> tuple[int, int]:
    """Lines of docstrings, and lines with a comment."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with_docstring = [n for n in ast.walk(ast.parse(text)) if isinstance(n, kinds) and ast.get_docstring(n)]
    docstrings = sum(node.body[0].end_lineno - node.body[0].lineno + 1 for node in with_docstring)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return docstrings, sum(token.type == tokenize.COMMENT for token in tokens)


def loaded_modules(module: str) -> list[Path]:
    """Source files of ours, `__init__.py` left out, that a fresh interpreter has loaded after importing a module."""
    code = f"import sys, {module}; print(*(getattr(m, '__file__', None) for m in [*sys.modules.values()]), sep='\\n')"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = {str(ROOT / path): path for path in product_files() if path.name != "__init__.py"}
    return sorted(known[line] for line in shown.splitlines() if line in known)


def main() -> None:
    files = product_files()
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in files}
    lengths = {path: len(text.splitlines()) for path, text in texts.items()}
    total = sum(lengths.values())
    sources = [path for path in files if path.name != "__init__.py"]
    folder, side_by_side = Counter(path.parent for path in sources).most_common(1)[0]
    benchmarks = [len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in source_files("benchmarks")]
    docstrings, comments = map(sum, zip(*map(prose_lines, texts.values()), strict=True))
    graph = import_graph()

    print(f"source: {len(files)} files, {total} lines; median {statistics.median(lengths.values()):.0f} lines")
    print(f"benchmarks: {len(benchmarks)} files, {sum(benchmarks)} lines")
    print(f"largest folder: {folder}, {side_by_side} files")
    for words, paths in (
        (f"above {LONG} lines", [path for path in sources if lengths[path] > LONG]),
        (f"below {SHORT} lines", [path for path in sources if lengths[path] < SHORT]),
    ):
        print(f"{words}: {len(paths)} {' '.join(f'{path} ({lengths[path]})' for path in paths)}")
    print(f"docstrings: {docstrings / total:.1%} of the lines; comments: {comments / total:.1%}")
    for start in STARTS:
        print(f"import {start}: {len(loaded_modules(start))} modules of ours")
    print(f"circles: {len(circles(graph))} {' '.join(str(sorted(circle)) for circle in circles(graph))}")
    upwards = upward_imports(graph)
    print(f"upward imports: {len(upwards)} {', '.join(f'{a} -> {b}' for a, b in upwards)}")


if __name__ == "__main__":
    main()
