"""Tables and figures of README.md and docs/: what measured them, when, and whether its code has changed since.

    python -m benchmarks.docs [stale=true]

A comment on the line above a table or an image says where it is from; another one is for numbers that nobody measures:

    <!-- measured at c0592bc by: python evaluate.py misalignment dtype=bfloat16 -->
    <!-- not measured -->

Code under a command is its entry with all of ours that it imports, modules and files that this code names in strings,
and files that the command names. Changed is what differs in more than comments, docstrings and layout.
"""

import ast
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.source import Source, git, without_docstrings
from core.config import load_config
from core.errors import run_command

ROOT = Path(__file__).parent.parent


@dataclass
class DocsConfig:
    """Measured tables of the documents and what has changed since."""

    stale: bool = False  # leave out what is unchanged


@dataclass(frozen=True)
class Block:
    """A table of numbers, or a table or an image with a mark."""

    place: str  # file:line
    title: str  # the heading above
    commit: str | None  # of the measurement; None without a mark
    command: str


def blocks(root: Path) -> list[Block]:
    """Those of all pages, in order."""
    found = []
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        title, fenced, above = "", False, ""
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            fenced ^= line.startswith("```")
            if line.startswith("#") and not fenced:
                title = line.lstrip("# ")
            begins = line.startswith(("|", "![")) and not above.startswith("|") and not fenced
            if begins and above != "<!-- not measured -->":
                mark = re.fullmatch(r"<!-- measured at (\S+) by: (.+) -->", above)
                commit, command = mark.groups() if mark else (None, "")
                if mark or has_numbers(lines[number - 1 :]):
                    found.append(Block(f"{path.relative_to(root)}:{number}", title, commit, command))
            inside = above.startswith("<!--") and not above.endswith("-->")  # a comment may take several lines
            above = f"{above} {line.strip()}" if inside else line.strip()
    return found


def has_numbers(lines: list[str]) -> bool:
    """True if lines begin with a table that has numbers in half of its cells, first column and header apart."""
    end = next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))
    cells = [cell.strip(" *`") for line in lines[2:end] for cell in line.strip(" |").split("|")[1:] if cell.strip()]
    return bool(cells) and sum(bool(re.match(r"[-+−]?\d", cell)) for cell in cells) >= len(cells) / 2


def changes(root: Path, commit: str) -> set[str] | None:
    """Files that differ from a commit in more than words and layout; None if the clone does not have it."""
    if subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=root, capture_output=True).returncode:
        return None
    found = set()
    for line in git(root, "diff", "--name-status", "-M", commit).splitlines():
        status, *paths = line.split("\t")  # of a renamed file two, before and after
        if status[0] in "MR" and paths[-1].endswith(".py"):
            texts = git(root, "show", f"{commit}:{paths[0]}"), (root / paths[-1]).read_text(encoding="utf-8")
            before, after = (ast.dump(without_docstrings(text)) for text in texts)
            found |= {paths[-1]} if before != after else set()
        elif status != "R100" and not paths[-1].endswith(".md"):
            found.add(paths[-1])
    return found


def state(root: Path, block: Block, changed: set[str] | None, under: set[str]) -> str:
    """What a reader should know; `changed` are files since the block's commit, `under` those under its command."""
    if block.commit is None:
        return "**no mark says what measured it**"
    if not under:
        return "**the command starts nothing of this repository**"
    if changed is None:
        return "**this clone lacks the commit**"
    files = [path for path in changed if f"{path}/".startswith(tuple(f"{name}/" for name in under))]
    files = sorted(files, key=lambda path: (not path.endswith(".py"), path))  # code first
    commits = git(root, "rev-list", "--count", f"{block.commit}..HEAD", "--", *files).strip()
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"**{commits} commits**: {', '.join(files[:3])}{more}" if files else "unchanged"


def report(root: Path, stale: bool = False) -> str:
    """A Markdown table of all blocks, with `stale` of those whose numbers need not hold any more."""
    source, listed = Source(root), blocks(root)
    since = {commit: changes(root, commit) for commit in {block.commit for block in listed} if commit}
    lines = ["| place | section | measured by | at | since then |", "|---|---|---|---|---|"]
    for block in listed:
        told = state(root, block, since.get(block.commit), source.under(block.command))
        cells = (block.place, block.title, block.command.replace("|", "\\|"), block.commit or "", told)
        lines += [f"| {' | '.join(cells)} |"] if not stale or told != "unchanged" else []
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    print(report(ROOT, load_config(DocsConfig, arguments, about=__doc__).stale))


if __name__ == "__main__":
    run_command(main)
