"""Prompts, and embeddings that stand in for a model's encoders: what files hold of them, and how these are made."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import UserError
from core.files import complete_file
from core.processes import choose_device
from data.transforms import fit_matrix
from data.video.images import read_image
from inference.animate import in_frame
from inference.config import EmbeddingsConfig, InferConfig
from models.animators.registry import component_classes, load_component, read_index, saved_class
from models.checkpoints.files import read_tensors
from models.images import Words, as_images


def words_of(job: InferConfig) -> Words | None:
    """What the configuration says in words, and cached embeddings; None: nothing."""
    if not job.has_words:
        return None
    embeddings = {} if job.embeddings is None else read_embeddings(job.embeddings)
    for name in ("prompt", "negative_prompt"):
        if name in embeddings and getattr(job, name) is not None:
            raise UserError(f"{name}= and embeddings={job.embeddings}, which has {name}: give one of the two")
    return Words(job.prompt, job.negative_prompt, embeddings)


def read_embeddings(path: str) -> dict[str, Tensor]:
    """Tensors of `models.images.Words` by name; a `UserError` where a file holds something else."""
    embeddings = read_tensors(path, "embeddings")
    try:
        Words(embeddings=embeddings)
    except ValueError as error:
        raise UserError(f"embeddings={path} {error}") from None
    return embeddings


@torch.no_grad()
def write_embeddings(config: EmbeddingsConfig) -> dict[str, Tensor]:
    """Write the file that `infer.py embeddings=` takes, and return what it holds.

    Of the pipeline folder only the encoders are loaded; a `UserError` where they are missing, or it has none.
    """
    folder = Path(config.model)
    index = read_index(folder)
    cls = saved_class(index)
    if cls is None or not cls.animator_cls.encoders:
        raise UserError(f"model={folder} ({index.get('_class_name')}) takes no embeddings")
    animator, (device, dtype) = cls.animator_cls, choose_device(config.device, config.dtype)

    def encoder(embedding: str) -> list[Any]:
        parts = [
            load_component(folder, name, index.get(name), component_classes(cls, name), dtype)
            for name in animator.encoders[embedding]
        ]
        return [part.to(device) if isinstance(part, nn.Module) else part for part in parts]

    image = None if config.reference is None else read_image(config.reference, "reference")
    prompt = animator.default_prompt if config.prompt is None else config.prompt
    texts = {"prompt": prompt, "negative_prompt": config.negative_prompt or ""}
    text_encoder = encoder("prompt")
    found = {name: animator.text_embedding(text, *text_encoder) for name, text in texts.items()}
    if image is not None:
        size = tuple(config.size)
        image = in_frame(image, fit_matrix(image.shape[1::-1], size, config.reference_fit), size)
        pixels = as_images(image, "reference").to(device, dtype) * 2 - 1  # as a pipeline has them
        found["image"] = animator.image_embedding(pixels, *encoder("image"))
    found = {name: tensor.contiguous().cpu() for name, tensor in found.items()}
    if bad := [name for name, tensor in found.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"the embedding {bad[0]} is not finite in dtype={config.dtype}; try bfloat16 or float32")
    with complete_file(config.output) as temporary:
        save_file(found, temporary)
    return found
