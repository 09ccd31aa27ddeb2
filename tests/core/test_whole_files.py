"""Files and folders that appear whole: after kills, on full disks, with the mode that others expect."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from core.files import check_room, complete_file, complete_folder, remove_leftovers, remove_partial

KILLED = """
import os, sys, time
from core.files import complete_file, complete_folder
with {writer}({path!r}) as part:
    (part / "half" if part.is_dir() else part).write_bytes(b"x" * 10)
    print("writing", flush=True)
    {end}
"""


def writing_process(writer: str, path: Path, end: str) -> subprocess.Popen:
    """A process that is in the middle of writing `path`."""
    program = KILLED.format(writer=writer, path=str(path), end=end)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    return process


@pytest.mark.parametrize("writer", ["complete_file", "complete_folder"])
def test_what_killed_processes_leave_goes_and_what_living_ones_write_stays(tmp_path, writer):
    living = writing_process(writer, tmp_path / "b", "sys.stdin.read()")
    writing_process(writer, tmp_path / "a", "os.kill(os.getpid(), 9)").wait()
    writing_process(writer, tmp_path / "c", "os.kill(os.getpid(), 9)").wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.partial", ".b.partial", ".c.partial"]
    with complete_folder(tmp_path / "a") as folder:  # the same target again
        assert not list(folder.iterdir())
    remove_partial(tmp_path / "b")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.partial", "a"]
    living.communicate()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_two_writers_of_one_target_take_turns(tmp_path):
    first = writing_process("complete_folder", tmp_path / "a", "time.sleep(0.5); (part / 'first').touch()")
    with complete_folder(tmp_path / "a") as folder:
        assert first.wait() == 0 and [path.name for path in (tmp_path / "a").iterdir()]
        (folder / "second").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["second"]


WRITERS = {
    "safetensors": lambda path: save_file({"a": torch.ones(2)}, path),
    "torch": lambda path: torch.save({"a": torch.ones(2)}, path),
    "numpy": lambda path: np.savez(path, a=np.ones(2)),
    "text": lambda path: path.write_text("a"),
}


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_mode_of_the_umask(tmp_path, umask):
    """safetensors leaves files that are their owner's alone."""
    before = os.umask(umask)
    try:
        for name, write in WRITERS.items():
            with complete_file(tmp_path / f"{name}.npz") as file:
                write(file)
            with complete_folder(tmp_path / name) as folder:
                (folder / "inside").mkdir()
                write(folder / "inside" / "a.npz")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.npz")}
    assert modes == {0o666 & ~umask} and len(list(tmp_path.rglob("*.npz"))) == 2 * len(WRITERS)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "x"),
        RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_writers_of_all_kinds_tell_a_full_disk_alike(tmp_path, error):
    for writer in (complete_file, complete_folder):
        with pytest.raises(OSError, match=rf"{tmp_path}/new/a") as caught, writer(tmp_path / "new" / "a"):
            raise error
        assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="MiB are needed and .* free"):
        check_room(tmp_path, 2**62)


def test_targets_that_cannot_be_are_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a", tmp_path / ("a" * 300)):
        with pytest.raises(OSError, match=str(path)), complete_folder(path):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
