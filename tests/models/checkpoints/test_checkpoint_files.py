"""Checkpoint files: every wrapping and prefix, no copy in memory, honest errors, code is never run."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.errors import UserError
from models.checkpoints.files import read_tensors
from models.checkpoints.networks import (
    UNetSizes,
    load_reference_net,
)
from tests.published import (
    published_tensors,
)

SD15 = UNetSizes()


@pytest.fixture
def tensors():
    return published_tensors("pose_guider")


WRAPPINGS = {
    "flat": lambda t: t,
    "state_dict": lambda t: {"state_dict": t, "global_step": 7},
    "module": lambda t: {"module": {f"module.{name}": value for name, value in t.items()}},
    "deep": lambda t: {"model": {"state_dict": {f"module._orig_mod.{name}": value for name, value in t.items()}}},
    "counted": lambda t: {"state_dict": t, "global_step": torch.tensor(7)},
    "extras": lambda t: {**t, "animatediff_config": {"layers": 1}, "epoch": 3},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torch_files_in_every_wrapping(tmp_path, tensors, wrapping, legacy):
    path = tmp_path / "file.ckpt"
    torch.save(WRAPPINGS[wrapping](tensors), path, _use_new_zipfile_serialization=not legacy)
    read = read_tensors(path, "file")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_folders_and_shards(tmp_path, tensors):
    names = list(tensors)
    parts = {"a-00001.safetensors": names[:5], "a-00002.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert read_tensors(tmp_path, "file").keys() == tensors.keys()
    save_file({"one": torch.ones(2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert list(read_tensors(tmp_path, "file")) == ["one"]  # the complete file comes before its shards


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_loading_holds_no_copy(tmp_path, suffix):
    """The parameters of the network are the mapped file itself."""
    path = tmp_path / f"unet.{suffix}"
    tensors = published_tensors("reference_unet")
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    network = load_reference_net(read_tensors(path, "file"), "file")
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            mapped.append([int(address, 16) for address in line.split()[0].split("-")])
    assert mapped
    for name, parameter in network.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in mapped), name
        assert torch.equal(parameter, tensors[name])


class Sentinel:
    """Unpickling it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path, save):
    path, trace = tmp_path / "file.pth", tmp_path / "trace"
    content = {"conv_in.weight": Sentinel(trace)}
    if save == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match="could run code"):
        read_tensors(path, "file")
    assert not trace.exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_truncated_files(tmp_path, tensors, suffix):
    path = tmp_path / f"file.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="file=.*(damaged|not a complete)"):
        read_tensors(path, "file")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "file=.*damaged"),
        (b"<!doctype html><html>not found</html>", "file=.*no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_that_are_no_checkpoints(tmp_path, content, named, suffix):
    path = tmp_path / f"file.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=named if suffix == "pth" or b"lfs" in content else "safetensors"):
        read_tensors(path, "file")


def test_files_without_tensors_or_at_all(tmp_path):
    torch.save({"step": 3}, tmp_path / "a.pth")
    torch.save([torch.ones(1)], tmp_path / "b.pth")
    torch.save({"x": torch.ones(1), "module.x": torch.ones(1)}, tmp_path / "c.pth")
    (tmp_path / "folder").mkdir()
    for name, named in {
        "a.pth": "no tensors; its entries are step",
        "b.pth": "holds a list",
        "c.pth": "names x twice",
        "folder": "folder without weights",
        "none.pth": "does not exist",
    }.items():
        with pytest.raises(UserError, match=named):
            read_tensors(tmp_path / name, "file")
