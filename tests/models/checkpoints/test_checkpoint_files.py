"""Checkpoint files: every wrapping and prefix, no copy in memory, honest errors, code is never run."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.errors import UserError
from models.checkpoints.__main__ import main
from models.checkpoints.convert import Sources, convert_config
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


def changed(change, every: int = 1):
    """The tensors, every so many of them as `change` makes them."""
    return lambda t: {name: change(x) if number % every == 0 else x for number, (name, x) in enumerate(t.items())}


def pairs_named(*names: str):
    return lambda t: {f"down_blocks.0.attentions.0.to_q{name}": torch.ones(2, 2) for name in names}


# What other files of a run, and of other trainers, are -> what is said of them.
KINDS = {
    "ZeRO-3": (
        lambda t: {"module": changed(lambda x: x.new_zeros(0))(t), "ds_version": "0.19"},
        "shell of .*ZeRO-3, 12 ",
    ),
    "ZeRO-3, in part": (changed(lambda x: x.new_zeros(0), every=2), "shell of .*ZeRO-3, 6 of its 12"),
    "scalars": (changed(torch.mean), "12 single numbers"),
    "some scalars": (changed(torch.mean, every=2), "6 weights without their shapes, first conv_in.weight"),
    "flattened": (changed(torch.flatten), "6 weights without their shapes, first conv_in.weight"),
    "flattened by FSDP": (lambda t: {"_fsdp_wrapped_module._flat_param": torch.ones(9)}, "FSDP has flattened"),
    "adapter": (pairs_named(".lora_A.weight", ".lora_B.weight"), "an adapter"),
    "adapter of older diffusers": (pairs_named(".processor.to_q_lora.up.weight"), "an adapter"),
    "adapter of Kohya's": (pairs_named(".lora_down.weight", ".lora_up.weight", ".alpha"), "an adapter"),
    "alphas": (pairs_named(".alpha"), "an adapter"),
    "half an adapter": (pairs_named(".lora_A.weight"), "an adapter"),
    "moments by name": (lambda t: {f"state.{name}.exp_avg_sq": x for name, x in t.items()}, "state of an optimiser"),
    "optimiser": (lambda t: {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}, "state of an optimiser"),
    "optimiser of DeepSpeed": (lambda t: {"optimizer_state_dict": {}, "ds_version": "0.19"}, "state of an optimiser"),
    "numbered": (lambda t: dict(enumerate(t.values())), "tensors without names"),
    "averages": (lambda t: {"decay": 0.99, "shadow_params": list(t.values())}, "no tensors; its entries are decay"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_hold_no_weights_say_what_they_are_in_one_line(tmp_path, tensors, capsys, kind):
    content, named = KINDS[kind]
    path = tmp_path / "pose_guider.pth"
    torch.save(content(tensors), path)
    with pytest.raises(UserError, match=f"pose_guider=.* {named}") as refused:
        Sources(convert_config("animate_anyone", str(tmp_path / "p"), pose_guider=str(path))).tensors("pose_guider")
    assert "\n" not in str(refused.value)
    try:
        main(["inspect", str(path)])
    except SystemExit as ended:
        line, code = capsys.readouterr().out, ended.code
    except UserError as error:
        line, code = f"{error}\n", 1
    assert re.search(named, line) and line.count("\n") == 1 and code == 1


@pytest.mark.parametrize("shape", [lambda x: x[None], lambda x: x.reshape(1, -1), lambda x: x[: len(x) // 2]])
def test_weights_of_no_network_are_one_line(tmp_path, shape, capsys):
    path = tmp_path / "reference_unet.pth"
    torch.save(changed(shape)(published_tensors("reference_unet")), path)
    sources = Sources(convert_config("animate_anyone", str(tmp_path / "p"), reference_unet=str(path)))
    with pytest.raises(UserError, match="reference_unet=.*(of no network|does not fit)"):
        sources.load("reference_unet", load_reference_net)
    with pytest.raises(SystemExit):
        main(["inspect", str(path)])
    assert capsys.readouterr().out.startswith(f"{path}: unknown")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(tmp_path, capsys, value, dtype):
    path = tmp_path / "reference_unet.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in published_tensors("reference_unet").items()}
    names = ("conv_in.bias", "down_blocks.0.resnets.0.conv1.weight")
    for name in names:
        tensors[name].view(-1)[3] = value
    tensors["conv_in.weight"].fill_(torch.finfo(dtype).max)  # finite, though the sum is not
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"file holds NaN or infinity in 2 tensors of float32: {', '.join(names)}$"):
        load_reference_net(read_tensors(path, "file"), "file")
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(path)])
    assert ended.value.code == 1 and f"NaN or infinity in 2: {', '.join(names)}" in capsys.readouterr().out


def test_weights_beyond_a_dtype_are_named_with_another():
    tensors = published_tensors("reference_unet")
    tensors["conv_in.bias"][0] = 1e5
    load_reference_net(tensors, "file", dtype=torch.bfloat16)
    with pytest.raises(UserError, match="1 tensors of float16: conv_in.bias; .* dtype=bfloat16"):
        load_reference_net(tensors, "file", dtype=torch.float16)
