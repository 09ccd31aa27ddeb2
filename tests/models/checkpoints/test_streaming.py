"""Tensors from file to file, one at a time: the bytes of the library's own file, and digests that notice training."""

import json
import weakref

import pytest
import torch
from safetensors.torch import save_file

from core.errors import UserError
from models.checkpoints.loading import current_names
from models.checkpoints.streaming import StoredTensors, Written, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "z.weight": torch.randn(30, 4, generator=generator),
        "a.weight": torch.randn(5, generator=generator),
        "half": torch.randn(3, 3, generator=generator).half(),
        "brain": torch.randn(7, generator=generator).bfloat16(),
        "index": torch.arange(4),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
        "é": torch.randn(2, 3, generator=generator).t(),
    }


def test_the_file_is_the_librarys_own_and_one_tensor_is_alive_at_a_time(tmp_path):
    made = tensors()
    alive = weakref.WeakSet()

    def make(name: str) -> torch.Tensor:
        assert not alive, name
        tensor = made[name].clone()
        alive.add(tensor)
        return tensor

    written = {n: Written(tuple(t.shape), t.dtype, lambda n=n: make(n)) for n, t in made.items()}
    write_tensors(tmp_path / "ours.safetensors", written)
    save_file({n: t.contiguous() for n, t in made.items()}, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_tensors_are_cast_and_another_shape_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    write_tensors(file, {"a": Written((2,), torch.float16, lambda: torch.tensor([1.0, 70000.0]))})
    assert StoredTensors(file, "x")["a"].tolist() == [1.0, float("inf")]
    stored = StoredTensors(file, "x")
    file.unlink()
    assert "a" in stored and "b" not in stored, "names are known without the file"
    with pytest.raises(ValueError, match="a must have shape"):
        write_tensors(file, {"a": Written((2, 1), torch.float16, lambda: torch.zeros(2))})


def test_every_layout_reads_alike(tmp_path):
    """One safetensors file, shards, and torch's own; a VAE's old names are today's."""
    made = tensors() | {"encoder.mid_block.attentions.0.query.weight": torch.ones(2, 2)}
    made = {name: tensor.contiguous() for name, tensor in made.items()}
    for folder in ("one", "shards", "torch"):
        (tmp_path / folder).mkdir()
    save_file(made, tmp_path / "one" / "diffusion_pytorch_model.safetensors")
    torch.save(made, tmp_path / "torch" / "diffusion_pytorch_model.bin")
    index = {name: f"{number % 2}.safetensors" for number, name in enumerate(made)}
    for shard in set(index.values()):
        save_file({n: t for n, t in made.items() if index[n] == shard}, tmp_path / "shards" / shard)
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    digests = set()
    for folder in ("one", "shards", "torch"):
        stored = StoredTensors(tmp_path / folder, "x", current_names)
        assert set(stored) == {name.replace(".query.", ".to_q.") for name in made}
        assert all(torch.equal(tensor, stored[name.replace(".query.", ".to_q.")]) for name, tensor in made.items())
        digests.add(stored.digest())
    assert len(digests) == 1


@pytest.mark.parametrize("change", ["trained", "rounded", "renamed", "reshaped", "gone"])
def test_digests_tell_weights_apart(tmp_path, change):
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    save_file({"a": weight, "b": weight.clone()}, tmp_path / "x.safetensors")
    other = {
        "trained": {"a": weight, "b": weight + 1e-5},
        "rounded": {"a": weight, "b": weight.half()},
        "renamed": {"a": weight, "c": weight.clone()},
        "reshaped": {"a": weight, "b": weight.view(30, 40).clone()},
        "gone": {"a": weight},
    }[change]
    save_file(other, tmp_path / "y.safetensors")
    digests = [StoredTensors(tmp_path / f"{name}.safetensors", name).digest() for name in ("x", "x", "y")]
    assert digests[0] == digests[1] != digests[2]


def test_a_damaged_file_is_one_line(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x10" + bytes(20))
    with pytest.raises(UserError, match="x.safetensors is not a complete safetensors file"):
        StoredTensors(tmp_path / "x.safetensors", "model=x")
