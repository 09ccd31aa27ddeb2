"""What the source of a repository hangs together by: imports, and modules and files that code names in strings."""

import ast
import re
import shlex
import subprocess
from contextlib import suppress
from importlib.util import resolve_name
from pathlib import Path


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout


def module_name(path: Path) -> str:
    """The name under which a file is imported."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, modules: set[str]) -> set[str]:
    """Modules out of `modules` that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {node.module}
    return found & modules


def without_docstrings(text: str) -> ast.Module:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = node.body[ast.get_docstring(node) is not None :]
    return tree


class Source:
    """The modules of a repository, tests apart, and what each of them names."""

    def __init__(self, root: Path) -> None:
        files = map(Path, git(root, "ls-files", "*.py", ":!tests").splitlines())
        self.root, self.modules = root, {module_name(path): path for path in files}
        self.named = {name: self._named(path) for name, path in self.modules.items()}

    def _named(self, path: Path) -> tuple[set[str], set[str]]:
        """Modules that a file imports or names, and other files and folders that it names."""
        tree, files = without_docstrings((self.root / path).read_text(encoding="utf-8")), set()
        divided = {node.right for node in ast.walk(tree) if isinstance(node, ast.BinOp)}
        found, package = imports(tree, set(self.modules)), ".".join(path.parent.parts)
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and re.fullmatch(r"\.{0,2}\w[\w./:-]*", text):
                if "." in text:  # as in "a.b:Class", "..b" and f"{__package__}.b"
                    with suppress(ImportError):  # of "..HEAD", above all packages
                        found.add(resolve_name(text.split(":")[0], package))
                places = [Path("assets") / text] if node in divided else []  # as in FOLDER / "name"
                places += [Path(text), path.parent / text] if "/" in text or text.endswith(".py") else []
                files |= {place.as_posix() for place in places if (self.root / place).exists()}
        return (found | {module_name(Path(name)) for name in files}) & self.modules.keys(), files

    def under(self, command: str) -> set[str]:
        """Files and folders that a command's numbers follow from; none if it starts nothing of ours."""
        words = [*shlex.split(command), ""]
        at = next((n for n, word in enumerate(words) if word == "-m" or word.endswith(".py")), -1)
        entry = words[at + 1] if words[at] == "-m" else words[at].removesuffix(".py")
        starts = {f"evaluation.tasks.{words[at + 1]}"} if entry == "evaluate" else {entry, f"{entry}.__main__"}
        waiting, found = (starts | {entry}) & self.modules.keys(), set()
        if not starts & waiting:
            return set()
        files = {path for path in re.findall(r"\w[\w.-]*/[\w./-]+", command) if (self.root / path).exists()}
        while waiting:
            found.add(module := waiting.pop())
            packages = {module[: dot.start()] for dot in re.finditer(r"\.", module)} & self.modules.keys()
            waiting |= (self.named[module][0] | packages) - found
            files |= self.named[module][1]
        return files | {self.modules[module].as_posix() for module in found}
