"""Wan-Animate from a folder as diffusers writes it: what is there fits, and what is not is told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from core.errors import UserError
from models.animators.registry import load_pipeline
from models.animators.wan_animate.context import Sight, joint_context
from models.animators.wan_animate.model import WanAnimatePipeline
from models.animators.wan_animate.networks import WanAnimateTransformer3DModel, set_self_attention
from models.attention.context import ReferenceContext
from models.attention.masking import Visibility
from models.checkpoints.loading import on_meta, shapes_on_meta
from models.images import Words
from tests.wan_parts import SEGMENT, TRANSFORMER, components, images, published_folder, wan_pipeline

INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = published_folder(tmp_path_factory.mktemp("published") / "wan")
    assert len(list((path / "transformer").glob("*.safetensors"))) > 2
    return path


def one_segment(pipeline: WanAnimatePipeline, **arguments) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 1, "guidance_scale": 2.0, "output_type": "np", **arguments}
    return pipeline(**images(SEGMENT), generator=torch.Generator().manual_seed(0), **arguments).frames


def test_a_folder_of_diffusers_is_a_pipeline_and_is_saved_as_one(folder, tmp_path):
    pipeline = load_pipeline(folder)
    assert type(pipeline) is WanAnimatePipeline and pipeline.sizes.multiple == 16
    expected = one_segment(wan_pipeline())
    assert np.array_equal(one_segment(pipeline), expected)
    pipeline.save_pretrained(tmp_path / "again")
    assert np.array_equal(one_segment(load_pipeline(tmp_path / "again")), expected)


def test_cached_embeddings_stand_in_for_encoders(folder):
    given = load_pipeline(folder)
    reference = given.prepare_images(images(1)["reference"], None, None, (48, 32), Words(negative_prompt="bad"))
    known = given.animator.encode_reference(reference)
    embeddings = {"prompt": known.prompt, "negative_prompt": known.negative, "image": known.image}
    bare = load_pipeline(folder, embeddings=embeddings)
    assert bare.text_encoder is None and bare.animator.image_encoder is None
    assert load_pipeline(folder, embeddings=["image"]).text_encoder is not None
    expected = one_segment(given, words=Words(negative_prompt="bad"))
    assert np.array_equal(one_segment(bare, words=Words(embeddings=embeddings)), expected)
    # What is shorter ends in zeros.
    assert not known.prompt[:, 226:].any()
    shorter = embeddings | {"prompt": known.prompt[:, :226]}
    assert np.array_equal(one_segment(bare, words=Words(embeddings=shorter)), expected)
    image = known.image
    refused = {
        "guidance needs the embedding of a negative prompt": {"negative_prompt": None},
        "entry prompt": {"prompt": None},
        "entry image": {"image": None},
        "prompt of 513 tokens with 16 channels; the model reads at most 512": {"prompt": torch.zeros(1, 513, 16)},
        "negative_prompt of 512 tokens with 8": {"negative_prompt": torch.zeros(1, 512, 8)},
        f"image of {image.shape[1]} tokens with 9 channels; .* with 8": {"image": torch.zeros(*image.shape[:2], 9)},
    }
    for told, changed in refused.items():
        given = {key: value for key, value in (embeddings | changed).items() if value is not None}
        with pytest.raises(UserError, match=told):
            one_segment(bare, words=Words(embeddings=given))
    del embeddings["negative_prompt"]
    assert one_segment(bare, words=Words(embeddings=embeddings), guidance_scale=1.0).shape == expected.shape


@pytest.mark.parametrize(("missing", "told"), [("tokenizer", "text encoder"), ("image_processor", "image encoder")])
def test_encoders_need_what_prepares_their_inputs(missing, told):
    with pytest.raises(UserError, match=f"the {told} is missing"):
        one_segment(WanAnimatePipeline(**components() | {missing: None}))


def other_class(path: Path) -> None:
    index = json.loads((path / "model_index.json").read_text())
    index["_class_name"] = "WanVACEPipeline"
    (path / "model_index.json").write_text(json.dumps(index))


def image_to_video(path: Path) -> None:
    """The transformer of Wan's I2V under the name of this one."""
    settings = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 20}
    settings |= {"out_channels": 8, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 4, "image_dim": 8}
    shutil.rmtree(path / "transformer")
    diffusers.WanTransformer3DModel(**settings, added_kv_proj_dim=24).save_pretrained(path / "transformer")
    config = path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | TRANSFORMER))


def shard_missing(path: Path) -> None:
    next(path.glob("transformer/*-00002-of-*.safetensors")).unlink()


FAULTS = {
    "another pipeline": (other_class, "is a WanVACEPipeline; the pipelines known here are .*WanAnimate"),
    "another transformer": (image_to_video, "does not fit WanAnimateTransformer3DModel: missing"),
    "a missing shard": (shard_missing, "1 of .* shards are missing: .*-00002-of-"),
    "a missing index": (lambda path: (path / INDEX).unlink(), "holds shards .* and not their index"),
    "no VAE": (lambda path: shutil.rmtree(path / "vae"), "is incomplete: .* vae/ are missing"),
    "no weights of the text encoder": (lambda path: next(path.glob("text_encoder/*.safetensors")).unlink(),
                                       "text_encoder"),
    "a damaged tokenizer": (lambda path: (path / "tokenizer/tokenizer.json").write_text("{"), "component tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_folders_that_do_not_fit(folder, tmp_path, fault):
    change, told = FAULTS[fault]
    path = shutil.copytree(folder, tmp_path / "wan")
    change(path)
    with pytest.raises(UserError, match=told) as error:
        load_pipeline(path)
    assert "\n" not in str(error.value)


def test_the_published_sizes():
    """All tensors of the transformer of 14B, whose configuration differs from the stock defaults in one number."""
    shapes = shapes_on_meta(WanAnimatePipeline.__init__.__annotations__["transformer"], added_kv_proj_dim=5120)
    assert len(shapes) == len(shapes_on_meta(diffusers.WanAnimateTransformer3DModel, added_kv_proj_dim=5120))
    assert shapes["patch_embedding.weight"] == (5120, 36, 1, 2, 2)
    assert shapes["blocks.39.attn2.add_k_proj.weight"] == (5120, 5120)
    assert shapes["face_adapter.7.to_k.weight"] == (5120, 5120)
    assert round(sum(np.prod(shape) for shape in shapes.values()) / 1e9, 1) == 17.3


def operations(images: int) -> int:
    """Of a forward pass of five of the published blocks at 832 x 480 pixels and 77 frames, counted without numbers."""
    faces = {name: TRANSFORMER[name] for name in ("motion_encoder_size", "motion_encoder_channel_sizes")}
    network = on_meta(WanAnimateTransformer3DModel, added_kv_proj_dim=5120, num_layers=5, **faces)
    set_self_attention(network)
    frames, n, sights = 77, 30 * 52, None
    if images:
        index = torch.tensor([[0, 1 + frame * images // frames] for frame in range(frames)])
        flags = Visibility({n: torch.zeros(frames, n, 3)}, {n: torch.zeros(frames, 3 * n, 3)})
        found = joint_context(ReferenceContext({}, index, flags), n, 4).sights
        sights = [Sight(*tree_map(lambda x: x.to("meta"), (s.queries, s.keys, s.flags or ()))) for s in found]
        sights = [replace(sight, flags=sight.flags or None) for sight in sights]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes = [(1, 36, 21 + images, 60, 104), (1,), (1, 512, 4096), (1, 257, 1280), (1, 16, 20, 60, 104)]
        network(*map(torch.empty, [*shapes, (1, 3, frames, 16, 16)]), sights)
    return counter.get_total_flops()


def test_four_images_beside_the_reference_cost_less_than_a_third_more():
    assert 1.1 < operations(4) / operations(0) < 1.2
