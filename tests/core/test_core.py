"""Configuration, user errors, whole files."""

import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import yaml
from omegaconf import MISSING, OmegaConf

from core.config import RENAMED_KEYS, check_config, config_dict, load_config, save_config
from core.errors import UserError
from core.files import complete_file, complete_folder, existing_file, output_folder
from core.help import describe


@dataclass
class Inner:
    steps: int = 20
    guidance_scale: float = 3.5


@dataclass
class Outer:
    output: str = MISSING
    seed: int | None = None
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    dry_run: bool = False
    inner: Inner = field(default_factory=Inner)


def test_overrides_win_over_files_and_files_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("output: a\nseed: 3\ninner:\n  steps: 5\n")
    config = load_config(Outer, ["--config", str(file), "inner.steps=7", "sizes=[4,5,6]"], file_option="--config")
    assert (config.output, config.seed, config.inner.steps, config.sizes) == ("a", 3, 7, [4, 5, 6])
    assert config.inner.guidance_scale == 3.5


def test_words_that_yaml_takes_for_booleans(tmp_path):
    config = load_config(Outer, ["output=no", "dry_run=yes"])
    assert config.output == "no" and config.dry_run is True
    save_config(config, tmp_path / "c.yaml")
    assert load_config(Outer, [], files=[tmp_path / "c.yaml"]).output == "no"


def test_saved_configuration_loads_back_equal(tmp_path):
    config = load_config(Outer, ["output=x", "seed=null", "inner.guidance_scale=1"])
    save_config(config, tmp_path / "c.yaml")
    assert load_config(Outer, [], files=[tmp_path / "c.yaml"]) == config
    assert config_dict(config)["inner"] == {"steps": 20, "guidance_scale": 1.0}


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [("sed=1", "'seed'"), ("inner.step=1", "'inner.steps'"), ("steps=1", "'inner.steps'"), ("outptu=1", "'output'")],
)
def test_unknown_key_names_the_nearest(argument, nearest):
    with pytest.raises(UserError, match=nearest):
        load_config(Outer, ["output=x", argument])


@pytest.mark.parametrize(
    "name", ["take: 2.mp4", "take:2", "a #2.mp4", "#1", "007", "2024-01-01", "[a]", "{b}", "дубль 1", "1e3"]
)
def test_names_of_files_are_taken_as_they_stand(name):
    assert load_config(Outer, [f"output={name}"]).output == name
    assert load_config(Outer, [f"output='{name}'"]).output == name


@dataclass
class Calibrated:
    images: int = 1


@dataclass
class Model:
    animator: str = "a"


@dataclass
class Renamed:
    """Every group and key that `RENAMED_KEYS` leads to."""

    pose_images: str | None = None
    guidance_interval: str | None = None
    solver: str | None = None
    calibrated: Calibrated = field(default_factory=Calibrated)
    model: Model = field(default_factory=Model)


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_renamed_keys_are_still_read(old, new, tmp_path):
    file = tmp_path / "old.yaml"
    OmegaConf.save(OmegaConf.from_dotlist([f"{old}=7"]), file)
    expected = load_config(Renamed, [f"{new}=7"])
    assert load_config(Renamed, [f"{old}=7"]) == load_config(Renamed, [], files=[file]) == expected != Renamed()
    with pytest.raises(UserError, match="unknown key"):
        load_config(Outer, ["output=x", f"{old}=7"])


def test_print_config_shows_everything_and_ends(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("inner:\n  steps: 5\n")
    with pytest.raises(SystemExit) as ended:
        load_config(Outer, ["--config", str(file), "seed=3", "--print-config"], file_option="--config")
    assert ended.value.code == 0
    inner = {"steps": 5, "guidance_scale": 3.5}
    assert yaml.safe_load(capsys.readouterr().out) == {
        "output": "???",
        "seed": 3,
        "sizes": [1, 2],
        "dry_run": False,
        "inner": inner,
    }


@dataclass
class Part:
    steps: int = 1

    def check(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps={self.steps} must be at least 1")


@dataclass
class Whole:
    part: Part = field(default_factory=Part)

    def check(self) -> None:
        raise UserError("part.steps is too small")


def test_nested_checks_name_the_whole_key():
    with pytest.raises(UserError, match=r"^part\.steps=0 must be at least 1$"):
        load_config(Whole, ["part.steps=0"])
    with pytest.raises(UserError, match=r"^outer\.part\.steps is too small$"):
        check_config(Whole(), "outer")


def test_unknown_key_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text("inner:\n  stepz: 5\n")
    with pytest.raises(UserError, match=r"wrong\.yaml.*inner\.stepz.*inner\.steps"):
        load_config(Outer, ["--config", str(file)], file_option="--config")


@pytest.mark.parametrize("argument", ["inner.steps=many", "sizes=3", "inner=4", "steps", "--unknown"])
def test_values_of_a_wrong_form_are_refused(argument):
    with pytest.raises(UserError):
        load_config(Outer, ["output=x", argument])


def test_required_value_is_named():
    with pytest.raises(UserError, match="output= is required"):
        load_config(Outer, [])


def test_flags_are_booleans():
    assert load_config(Outer, ["output=x", "--dry-run"], flags=("dry_run",)).dry_run


def test_help_names_every_key():
    text = describe(Outer)
    assert "inner.guidance_scale=3.5" in text and "output=  (required)" in text


def test_a_file_that_fails_leaves_nothing(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("before")
    with pytest.raises(RuntimeError), complete_file(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and target.read_text() == "before"


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "out"
    for content in ("first", "second"):
        with complete_folder(target) as folder:
            (folder / content).write_text(content)
    assert [p.name for p in target.iterdir()] == ["second"]
    with pytest.raises(RuntimeError), complete_folder(target) as folder:
        (folder / "third").write_text("x")
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["second"] and len(list(tmp_path.iterdir())) == 1


def test_paths_of_the_wrong_kind(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="is a file"):
        output_folder(file)
    with pytest.raises(UserError, match="reference=.*does not exist"):
        existing_file(tmp_path / "none", "reference")
    with pytest.raises(UserError, match="is a folder"):
        existing_file(tmp_path, "reference")


def end_of(statements: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """A command's process whose `main` runs these statements."""
    program = "\n    ".join(
        [
            "import os\nfrom core.errors import *\nfrom core.files import *\ndef main(arguments):",
            *statements.splitlines(),
        ]
    )
    return subprocess.run(
        [sys.executable, "-c", f"{program}\nrun_command(main)\n"],
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
    )


def test_commands_end_with_one_line_and_code_2():
    done = end_of("raise UserError('no such\\nfile')")
    assert (done.returncode, done.stderr) == (2, "error: no such file\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("PermissionError(13, 'Permission denied', 'a.pth')", "error: a.pth cannot be used: Permission denied"),
        ("OSError(28, 'No space left on device', 'p')", "error: p could not be written: No space left on device"),
        ("FileNotFoundError(2, 'No such file', 'own.json')", None),  # maybe a fault of the program
        (
            "ModuleNotFoundError(name='not_there.part')",
            "error: the package not_there is not installed; docs/installation.md says which extra or requirements "
            "file brings it",
        ),
        ("ModuleNotFoundError(name='core.no_such_module')", None),
    ],
)
def test_errors_of_files_and_packages_are_one_line(error, line):
    done = end_of(f"raise {error}")
    assert (done.returncode, done.stderr) == (2, f"{line}\n") if line else "Traceback" in done.stderr


@pytest.mark.parametrize(("rank", "printed"), [("0", "error: no such file\n"), ("1", "")])
def test_a_launcher_of_several_processes_is_told_the_error(rank, printed, tmp_path):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    told = str(tmp_path / "error.json")
    done = end_of("raise UserError('no such file')", {"TORCHELASTIC_ERROR_FILE": told, "LOCAL_RANK": rank})
    assert (done.returncode, done.stderr) == (2, printed)
    failure = ProcessFailure(local_rank=int(rank), pid=1, exitcode=2, error_file=told)
    assert failure.message == "error: no such file" and failure.timestamp > 1.7e9


def test_interrupted_and_failing_commands_leave_no_empty_folder(tmp_path):
    new, used = tmp_path / "a" / "b", tmp_path / "c"
    folders = f"output_folder({str(new)!r})\nopen(output_folder({str(used)!r}) / 'file', 'w')"
    handler = "import signal\nsignal.signal(2, signal.default_int_handler)"  # which background jobs of shells lack
    done = end_of(f"{handler}\n{folders}\nos.kill(os.getpid(), 2)")
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_lines_of_libraries_are_left_out_and_no_others():
    done = end_of(
        """import logging
logging.basicConfig(format="%(message)s")
for name in ("DeepSpeed", "diffusers.configuration_utils", "other"):
    logging.getLogger(name).warning("Setting accelerator to CPU.")
    logging.getLogger(name).warning("The config attributes {'block_out_channels': [64]} were passed")
from core.terminal import without_native_lines
with without_native_lines("delegate for CPU"):
    os.write(2, b"INFO: Created a delegate for CPU.\\nERROR: no memory\\n")"""
    )
    lines = [
        "The config attributes",
        "Setting accelerator",
        "Setting accelerator",
        "The config attributes",
        "ERROR: no",
    ]
    assert [line[: len(start)] for line, start in zip(done.stderr.splitlines(), lines, strict=True)] == lines
