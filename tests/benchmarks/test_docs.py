"""What measured the numbers of the documentation, and whether its code has changed since."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.docs import ROOT, blocks, report
from benchmarks.source import Source

TABLE = "| kind | dB |\n|---|---|\n| a | 12.5 |\n| b | 13.5 |\n"
SOURCE = '"""Doc."""\n\nVALUE = 1  # of something\n'


def commit(root: Path) -> str:
    for command in (["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "next"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout[:8]


@pytest.fixture
def repository(tmp_path) -> tuple[Path, str]:
    """Commands of every kind, of which each imports a module of its own; and the commit at which all were measured."""
    subprocess.run(["git", "init", "-q", "."], cwd=tmp_path, check=True)
    files = {
        "README.md": "# Title\n",
        "evaluate.py": "from importlib import import_module\n",
        "evaluation/tasks/speed.py": "from lib.code import VALUE\nfrom lib import words\n",
        "bench/quality.py": "import lib.words\n\nFOLDER = ROOT / 'people'\n",
        "bench/tool/__main__.py": "from bench.tool import reader\n\nSCRIPT = FOLDER / 'script.py'\n",
        "bench/tool/reader.py": "NAMES = {'a': 'lib.plugin:Class', 'b': f'{__package__}.words:C', 'c': '..near'}\n",
        "bench/tool/words.py": SOURCE,
        "bench/near.py": SOURCE,
        "bench/tool/script.py": "x = 1\n",
        "lib/__init__.py": "",
        "lib/code.py": SOURCE,
        "lib/words.py": SOURCE,
        "lib/plugin.py": SOURCE,
        "lib/moved.py": SOURCE + "\n\ndef long(a: int) -> int:\n    return a + 1\n",
        "train.py": "import lib.moved\n",
        "assets/people/bodies.txt": "one",
        "configs/a.yaml": "a: 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path, commit(tmp_path)


def mark(at: str, command: str) -> str:
    return f"<!-- measured at {at} by: {command} -->\n"


def states(root: Path, page: str, **options: bool) -> list[str]:
    """Last cells of the table of blocks, for a page in docs/."""
    (root / "docs").mkdir(exist_ok=True)
    (root / "docs" / "page.md").write_text(page)
    return [line.split(" | ")[-1].removesuffix(" |") for line in report(root, **options).splitlines()[2:]]


SPEED, QUALITY = "python evaluate.py speed steps=2", "python -m bench.quality"


def test_numbers_are_unchanged_as_long_as_code_is(repository):
    root, at = repository
    (root / "lib" / "words.py").write_text('"""Another one."""\n\n# above\nVALUE = (\n    1\n)\n')
    (root / "lib" / "code.py").write_text(SOURCE.replace("Doc.", "Docs."))
    commit(root)
    assert states(root, mark(at, SPEED) + TABLE + "\n" + mark(at, QUALITY) + TABLE) == ["unchanged"] * 2
    assert states(root, mark(at, SPEED) + TABLE, stale=True) == []


@pytest.mark.parametrize(
    ("command", "file", "told"),
    [
        (SPEED, "lib/code.py", "**1 commits**: lib/code.py"),
        (SPEED, "evaluation/tasks/speed.py", "**1 commits**: evaluation/tasks/speed.py"),
        (SPEED, "lib/plugin.py", "unchanged"),
        (QUALITY, "lib/__init__.py", "**1 commits**: lib/__init__.py"),
        (QUALITY, "assets/people/bodies.txt", "**1 commits**: assets/people/bodies.txt"),
        (QUALITY, "lib/code.py", "unchanged"),
        ("python -m bench.tool", "bench/tool/script.py", "**1 commits**: bench/tool/script.py"),
        ("python -m bench.tool", "bench/tool/words.py", "**1 commits**: bench/tool/words.py"),
        ("python -m bench.tool", "bench/near.py", "**1 commits**: bench/near.py"),
        ("python -m bench.tool", "lib/plugin.py", "**1 commits**: lib/plugin.py"),
        ("accelerate launch train.py --config configs/a.yaml", "configs/a.yaml", "**1 commits**: configs/a.yaml"),
        ("accelerate launch train.py", "configs/a.yaml", "unchanged"),
    ],
)
def test_what_lies_under_a_command(repository, command, file, told):
    root, at = repository
    (root / file).write_text("VALUE = 2\n")
    commit(root)
    assert states(root, mark(at, command) + TABLE) == [told]
    assert states(root, mark(at, command) + TABLE, stale=True) == [told] * (told != "unchanged")


def test_many_changes_are_counted(repository):
    root, at = repository
    for name in ("lib/code.py", "lib/words.py", "evaluate.py", "evaluation/tasks/speed.py"):
        (root / name).write_text((root / name).read_text() + "\nMORE = 1\n")
        commit(root)
    expected = "**4 commits**: evaluate.py, evaluation/tasks/speed.py, lib/code.py and 1 more"
    assert states(root, mark(at, SPEED) + TABLE) == [expected]


def test_a_moved_module_is_no_change(repository):
    root, at = repository
    (root / "lib" / "moved.py").rename(root / "lib" / "place.py")
    (root / "train.py").write_text("import lib.place\n")
    commit(root)
    assert states(root, mark(at, "accelerate launch train.py") + TABLE) == ["**1 commits**: train.py"]


def test_tables_and_images_of_every_kind(repository):
    root, at = repository
    (root / "lib" / "code.py").write_text("VALUE = 2\n")
    commit(root)
    page = "\n".join(
        [
            "# Numbers\n\n" + TABLE,  # nobody says where from
            "<!-- not measured -->\n" + TABLE,
            "| file | for |\n|---|---|\n| a | 12 and others |\n| b | words |\n| c | more |\n",
            "```\n" + TABLE + "```\n",
            "## Images\n\n![of nothing](a.png)\n" + mark(at, SPEED) + "![of numbers](b.png)\n",
            mark("0123abcd", SPEED) + TABLE,
            mark(at, "python evaluate.py nothing") + TABLE,
            mark(at, "make demo") + TABLE,
            mark(at, "python evaluate.py speed \\\n  'a=[b|c]'").replace("\\\n", "\n") + TABLE,
        ]
    )
    nothing = "**the command starts nothing of this repository**"
    changed = "**1 commits**: lib/code.py"
    expected = [
        "**no mark says what measured it**",
        changed,
        "**this clone lacks the commit**",
        nothing,
        nothing,
        changed,
    ]
    assert states(root, page) == expected
    rows = report(root).splitlines()[2:]
    assert rows[0].startswith("| docs/page.md:3 | Numbers |  |  |")
    assert rows[1].startswith(f"| docs/page.md:31 | Images | {SPEED} | {at} |")
    assert rows[-1].count(" | ") == 4 and "a=[b\\|c]" in rows[-1]


# The real pages


def test_every_table_of_numbers_says_what_measured_it():
    unmarked = [block.place for block in blocks(ROOT) if block.commit is None]
    assert not unmarked, "a comment above says what measured it: see benchmarks/docs.py"


def test_marked_commands_start_something():
    source = Source(ROOT)
    marked = [block for block in blocks(ROOT) if block.commit is not None]
    assert len(marked) > 20
    assert not [block.place for block in marked if not source.under(block.command)]
    shipped = next(source.under(block.command) for block in marked if "evaluate.py misalignment" in block.command)
    assert {"assets/tiny_model", "assets/misalignment", "models/animators/animate_anyone/model.py"} <= shipped
    assert "training/run.py" not in shipped and not [path for path in shipped if path.startswith("tests")]
