"""Wan-Animate's published folder, which is a pipeline folder as it comes: what tells its files, and known answers.

Shapes use c = channels, t = latent frames, f = frames, h, w = latent size, H, W = image size, n = tokens.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanAnimateTransformer3DModel, WanTransformer3DModel, WanVACETransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from models.animators.registry import load_pipeline
from models.animators.wan_animate.text import TOKENS
from models.checkpoints.convert import PublishedModel, Recognised
from models.checkpoints.loading import Shapes, compare, shapes_on_meta
from models.checkpoints.networks import has
from models.checkpoints.verify import Fixture
from models.images import Words
from models.vae import latent_statistics, video_encode

# Settings of a transformer -> the tensor, and its axis, that tell them; 0 stands for the number of any block.
AXES = {
    "in_channels": ("patch_embedding.weight", 1),
    "text_dim": ("condition_embedder.text_embedder.linear_1.weight", 1),
    "freq_dim": ("condition_embedder.time_embedder.linear_1.weight", 1),
    "ffn_dim": ("blocks.0.ffn.net.0.proj.weight", 0),
    "image_dim": ("condition_embedder.image_embedder.norm1.weight", 0),
    "added_kv_proj_dim": ("blocks.0.attn2.add_k_proj.weight", 1),
    "pos_embed_seq_len": ("condition_embedder.image_embedder.pos_embed", 1),
}
ANIMATE_AXES = {
    "latent_channels": ("pose_patch_embedding.weight", 1),
    "motion_style_dim": ("motion_encoder.conv_out.weight", 0),
    "motion_dim": ("motion_encoder.motion_synthesis_weight", 1),
    "motion_encoder_dim": ("motion_encoder.motion_synthesis_weight", 0),
    "face_encoder_hidden_dim": ("face_encoder.conv2.weight", 0),
    "attention_head_dim": ("face_adapter.0.norm_q.weight", 0),
}
MAY_LACK = {"image_dim", "added_kv_proj_dim", "pos_embed_seq_len"}  # which a transformer need not have
RES_BLOCKS, VACE_PATCH = "motion_encoder.res_blocks", "vace_patch_embedding.weight"
HEAD = 128  # channels, of transformers whose shapes do not tell
COMPONENTS = {
    "transformer": "WanAnimateTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "scheduler": "UniPCMultistepScheduler",
}


def recognise_transformer(shapes: Shapes) -> Recognised | None:
    """A transformer of Wan: that of Wan-Animate, of VACE, or of videos from text or an image."""
    patches = shapes.get("patch_embedding.weight", ())
    if len(patches) != 5 or not has(shapes, "condition_embedder."):
        return None
    channels, _, *patch = patches
    kind, cls, settings = "Wan transformer (text or image to video)", WanTransformer3DModel, {}
    if count(shapes, "face_adapter") or "pose_patch_embedding.weight" in shapes:
        kind, cls, settings = "Wan-Animate transformer", WanAnimateTransformer3DModel, animate_settings(shapes)
    elif layers := count(shapes, "vace_blocks"):
        kind, cls = "Wan VACE transformer", WanVACETransformer3DModel
        settings = {"vace_layers": list(range(layers))} | told(shapes, {"vace_in_channels": (VACE_PATCH, 1)})
    settings = told(shapes, AXES) | settings
    head = math.gcd(settings.pop("attention_head_dim", HEAD), channels)
    layers = count(shapes, "blocks")
    if "proj_out.weight" in shapes:
        settings["out_channels"] = shapes["proj_out.weight"][0] // math.prod(patch)
    settings |= {"patch_size": tuple(patch), "num_layers": layers, "cross_attn_norm": has(shapes, "blocks.0.norm2.")}
    settings |= {"num_attention_heads": channels // head, "attention_head_dim": head}
    try:
        wanted = shapes_on_meta(cls, **settings)
    except (RuntimeError, TypeError, AssertionError, ZeroDivisionError) as error:
        raise ValueError(f"no {cls.__name__} has {settings}") from error
    unused = cls._keys_to_ignore_on_load_unexpected or ()
    found = {name: shape for name, shape in shapes.items() if not any(part in name for part in unused)}
    return Recognised(kind, f"{layers} layers of {channels} channels", compare(wanted, found))


def animate_settings(shapes: Shapes) -> dict[str, Any]:
    """Settings that Wan-Animate's transformer has and others of Wan have not."""
    settings = {key: value for key, value in told(shapes, AXES | ANIMATE_AXES).items() if value is not None}
    settings.setdefault("added_kv_proj_dim", shapes["patch_embedding.weight"][0])
    adapters, layers, halvings = (count(shapes, name) for name in ("face_adapter", "blocks", RES_BLOCKS))
    settings["inject_face_latents_blocks"] = layers // adapters if adapters else layers + 1
    if "face_encoder.conv1_local.weight" in shapes and "face_encoder_hidden_dim" in settings:
        heads = shapes["face_encoder.conv1_local.weight"][0] // settings["face_encoder_hidden_dim"]
        settings["face_encoder_num_heads"] = heads
    side = 4 * 2**halvings  # of a face image
    widths = {side: shapes.get("motion_encoder.conv_in.weight", (0,))[0]}
    for i in range(halvings):
        widths[side // 2 ** (i + 1)] = shapes.get(f"{RES_BLOCKS}.{i}.conv2.weight", (0,))[0]
    sizes = {str(side): width for side, width in widths.items()}
    return settings | {"motion_encoder_size": side, "motion_encoder_channel_sizes": sizes}


def told(shapes: Shapes, axes: Mapping[str, tuple[str, int]]) -> dict[str, int | None]:
    """Settings by the lengths of axes, as far as the tensors are there; None: the transformer lacks it."""
    plain = {re.sub(r"^(\w+)\.\d+\.", r"\1.0.", name): shape for name, shape in shapes.items()}
    found = {key: plain[name][axis] for key, (name, axis) in axes.items() if name in plain}
    return dict.fromkeys(MAY_LACK & axes.keys()) | found


def count(shapes: Shapes, name: str) -> int:
    """One more than the highest number among the parts `name.0`, `name.1`, ...; 0 where there are none."""
    numbers = [re.match(rf"{re.escape(name)}\.(\d+)\.", found) for found in shapes]
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def write_folder(folder: Path, fixture: Fixture) -> None:
    """Write a fixture's networks as the published folder holds them, the transformer in shards."""
    index = {name: ["diffusers", cls] for name, cls in COMPONENTS.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanAnimatePipeline", **index}))
    for name, cls in COMPONENTS.items():
        (folder / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps({"_class_name": cls, **fixture.config[name]}))
    stem = "diffusion_pytorch_model"
    save_file(fixture.checkpoint("vae"), folder / "vae" / f"{stem}.safetensors")
    tensors, places = fixture.checkpoint("transformer"), {}
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"{stem}-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / "transformer" / shard)
        places |= dict.fromkeys(part, shard)
    text = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "transformer" / f"{stem}.safetensors.index.json").write_text(text)


def outputs(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    config, inputs = fixture.config, fixture.inputs
    texts = {name: inputs[name] for name in ("prompt", "negative_prompt")}
    words = {name: F.pad(text, (0, 0, 0, TOKENS - text.shape[1])) for name, text in texts.items()}
    words["image"] = inputs["image"]
    with TemporaryDirectory() as name:
        write_folder(Path(name), fixture)
        pipeline = load_pipeline(name, embeddings=words)
        pipeline.set_progress_bar_config(disable=True)
        poses = inputs["poses"].movedim(-1, 1) / 127.5 - 1
        yield "pose_latents", video_encode(pipeline.vae, poses)

        noisy, faces = (inputs["noisy_latents"], inputs["timestep"]), inputs["noisy_faces"]
        branches = {"flow": ("prompt", faces), "flow_unconditional": ("negative_prompt", torch.full_like(faces, -1))}
        for output, (prompt, faces) in branches.items():
            yield output, pipeline.transformer(*noisy, words[prompt], words["image"], inputs["noisy_poses"], faces)

        def run(segments: int, guidance: float, form: str) -> Tensor:
            frames = config["segment_frames"] + (segments - 1) * (config["segment_frames"] - 1)
            noise = inputs["noise"].unflatten(2, (2, -1))[:, :, :segments].flatten(2, 3)
            return pipeline(
                inputs["reference"].numpy(),
                inputs["poses"][:frames].numpy(),
                faces=inputs["faces"][:frames].numpy(),
                words=Words(embeddings=words),
                latents=noise,
                window_size=config["segment_frames"],
                window_overlap=1,
                num_inference_steps=config["steps"],
                guidance_scale=guidance,
                output_type=form,
            ).frames

        length = inputs["noise"].shape[2] // 2 - 1
        for output, segments in (("one_segment", 1), ("two_segments", 2)):
            last = run(segments, 1.0, "latent")[:, :, -length:]
            mean, std = latent_statistics(pipeline.vae, last)
            yield output, last * std + mean
        yield "two_segments_guided", torch.from_numpy(run(2, config["guidance_scale"], "np"))


FAMILIES = (
    PublishedModel(
        name="wan_animate",
        repository="Wan-AI/Wan2.2-Animate-14B-Diffusers",
        recognisers=(recognise_transformer,),
        fixture=frozenset({"transformer", "vae"}),
        outputs=outputs,
    ),
)
