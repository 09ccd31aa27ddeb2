"""Wan-Animate's files: known answers of diffusers' own classes, and what `inspect` says of them."""

import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import UserError
from models.animators.registry import load_pipeline
from models.animators.wan_animate.checkpoint import outputs, recognise_transformer
from models.checkpoints.__main__ import main
from models.checkpoints.loading import load_folder, shapes_on_meta
from models.checkpoints.verify import Fixture, difference, read_fixture, synthetic_tensors
from tests.fixtures.make_wan_animate import Sizes, make
from tests.wan_parts import TRANSFORMER, published_folder

SHIPPED = Path(__file__).parents[2] / "fixtures" / "wan_animate_tiny"


def test_the_shipped_fixture_is_reproduced(capsys):
    main(["verify", f"fixture={SHIPPED}"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _, _ in lines] == list(read_fixture(SHIPPED).expected)
    assert all(float(found) <= float(allowed) for _, found, allowed in lines)


def test_a_fixture_of_other_sizes_is_reproduced_and_another_seed_is_not(tmp_path, capsys):
    sizes = {"heads": 3, "head_dim": 8, "layers": 3, "face_layers": 1, "columns": 1, "latent_channels": 4}
    frames = {"width": 32, "height": 48, "face_size": 32, "segment_frames": 9, "steps": 1}
    make(Sizes(str(tmp_path / "other"), **sizes, **frames, text_dim=12, image_dim=16))
    main(["verify", f"fixture={tmp_path / 'other'}"])
    file = tmp_path / "other.json"
    file.write_text(file.read_text().replace('"vae": 12', '"vae": 13'))
    with pytest.raises(SystemExit) as stop:
        main(["verify", f"fixture={file}"])
    assert stop.value.code == 1
    assert "failed: 4 of 6 outputs differ: pose_latents, one_segment" in capsys.readouterr().err


@dataclass(frozen=True)
class OneChanged(Fixture):
    """A fixture one of whose weights has another seed."""

    changed: str = ""

    def checkpoint(self, file: str) -> dict[str, torch.Tensor]:
        tensors, shapes = super().checkpoint(file), self.shapes[file]
        return tensors | synthetic_tensors({name: shapes[name] for name in shapes if name == self.changed}, 99)


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("blocks.3.attn2.add_k_proj.weight", "flow"),
        ("face_adapter.1.to_v.bias", "flow"),
        ("motion_encoder.res_blocks.1.conv2.weight", "flow"),
        ("pose_patch_embedding.bias", "flow"),
        ("encoder.conv_in.bias", "pose_latents"),
    ],
)
def test_one_weight_that_is_changed_shows(name, output):
    fixture = OneChanged(**vars(read_fixture(SHIPPED)), changed=name)
    with torch.inference_mode():
        found = dict(islice(outputs(fixture), 2))
    assert difference(found[output], fixture.expected[output]) > 10 * fixture.tolerances[output]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return published_folder(tmp_path_factory.mktemp("published") / "wan")


def inspected(capsys, *paths: Path, code: int = 0) -> list[str]:
    try:
        main(["inspect", *map(str, paths)])
        assert code == 0
    except SystemExit as stop:
        assert stop.code == code
    return capsys.readouterr().out.splitlines()


def test_inspect_knows_the_transformer_and_its_shards(folder, capsys):
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    total = sum(len(load_file(shard)) for shard in shards)
    whole, complete, *lines = inspected(capsys, folder / "transformer", *shards[:2])
    assert f"transformer: Wan-Animate transformer; {total} tensors" in whole and "4 layers of 24 channels" in whole
    assert [complete, *lines[1::2]] == ["  complete"] * 3
    assert all(f"4 layers of 24 channels; shard of {total} tensors" in line for line in lines[::2])


def test_inspect_names_what_a_transformer_lacks(folder, tmp_path, capsys):
    path = shutil.copytree(folder / "transformer", tmp_path / "transformer")
    first, *_, last = sorted(path.glob("*.safetensors"))
    lost = list(load_file(last))
    last.unlink()
    lines = inspected(capsys, first, code=1)
    assert "Wan-Animate transformer" in lines[0] and f"missing {len(lost)}: " in lines[1] and len(lines) == 2
    tensors = dict(load_file(first))
    name = next(name for name in tensors if name.endswith(".bias"))
    save_file({n: t for n, t in tensors.items() if n != name} | {"blocks.0.stray": torch.ones(2)}, first)
    lines = inspected(capsys, first, code=1)
    assert f"missing {len(lost) + 1}: " in lines[1] and "unexpected 1: blocks.0.stray" in lines[2]


OTHERS = {name: TRANSFORMER[name] for name in ("num_attention_heads", "attention_head_dim", "text_dim", "freq_dim")}
OTHERS |= {"ffn_dim": 32, "num_layers": 3, "out_channels": 8}
WAN = {
    "text or image to video": (diffusers.WanTransformer3DModel, {"in_channels": 8}),
    "text or image": (diffusers.WanTransformer3DModel, {"in_channels": 20, "image_dim": 8, "added_kv_proj_dim": 24}),
    "VACE": (diffusers.WanVACETransformer3DModel, {"in_channels": 8, "vace_layers": [0, 2], "vace_in_channels": 12}),
    "Wan-Animate transformer": (diffusers.WanAnimateTransformer3DModel, None),
}


@pytest.mark.parametrize("kind", WAN)
def test_transformers_of_wan_are_told_apart(kind):
    cls, settings = WAN[kind]
    shapes = shapes_on_meta(cls, **({"added_kv_proj_dim": 5120} if settings is None else OTHERS | settings))
    found = recognise_transformer(shapes)
    assert kind in found.kind and not found.mismatch, found
    assert recognise_transformer({name: shape for name, shape in shapes.items() if name != "proj_out.bias"}).mismatch


def test_other_parts_of_the_folder(folder, capsys):
    vae, _, clip, _ = inspected(capsys, folder / "vae", folder / "image_encoder")
    assert vae.endswith(": AutoencoderKLWan") and clip.endswith(": CLIPVisionModel")
    files = folder / "vae/diffusion_pytorch_model.safetensors", folder / "text_encoder/model.safetensors"
    told = "\n".join(inspected(capsys, *files))
    assert "autoencoder of videos" in told and "T5 text encoder" in told


def test_weights_without_their_folder_name_the_repository(folder, tmp_path):
    single = tmp_path / "diffusion_pytorch_model.safetensors"
    shards = map(load_file, (folder / "transformer").glob("*.safetensors"))
    save_file({name: tensor for shard in shards for name, tensor in shard.items()}, single)
    with pytest.raises(UserError, match=r"\(Wan-Animate transformer\) .*; Wan-AI/Wan2.2-Animate-14B-Diffusers is one"):
        load_pipeline(single)
    with pytest.raises(UserError, match="family=wan_animate is not one of animate_anyone"):
        main(["convert", "family=wan_animate", f"output={tmp_path / 'x'}"])
    # Which files of earlier releases hold and no release uses.
    tensors = load_file(single) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}
    save_file(tensors, single)
    shutil.copy(folder / "transformer/config.json", tmp_path)
    load_folder(diffusers.WanAnimateTransformer3DModel, tmp_path, "transformer")
    assert not recognise_transformer({name: tuple(tensor.shape) for name, tensor in tensors.items()}).mismatch
