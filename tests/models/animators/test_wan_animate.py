"""Wan-Animate against diffusers' own pipeline with the same weights."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from models.images import Words
from tests.wan_parts import SEGMENT, SIZE, TRANSFORMER, components, images, wan_pipeline


def pictures(array: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(image) for image in array]


@pytest.fixture(scope="module")
def published() -> diffusers.WanAnimatePipeline:
    stock = diffusers.WanAnimateTransformer3DModel(**TRANSFORMER)
    stock.load_state_dict(components()["transformer"].state_dict())
    pipeline = diffusers.WanAnimatePipeline(**components() | {"transformer": stock.eval()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def published_frames(pipeline, given: dict, **arguments) -> np.ndarray:
    return pipeline(
        image=Image.fromarray(given["reference"]),
        pose_video=pictures(given["poses"]),
        face_video=pictures(given["faces"]),
        width=SIZE[0],
        height=SIZE[1],
        segment_frame_length=SEGMENT,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
        **arguments,
    ).frames[0]


def our_frames(given: dict, words: Words, **arguments) -> np.ndarray:
    arguments = {"num_inference_steps": 3, "window_size": SEGMENT, "output_type": "np", **arguments}
    return wan_pipeline()(**given, words=words, generator=torch.Generator().manual_seed(1), **arguments).frames


@torch.no_grad()
def embedding(text: str) -> torch.Tensor:
    """(1, 512, c), of the prompt's own tokens without padding."""
    tokens = components()["tokenizer"](text, return_tensors="pt").input_ids
    hidden = components()["text_encoder"](tokens).last_hidden_state
    return torch.cat([hidden, hidden.new_zeros(1, 512 - hidden.shape[1], hidden.shape[2])], dim=1)


@pytest.mark.parametrize(
    ("frames", "scale", "carried"), [(SEGMENT, 1.0, 1), (2 * SEGMENT - 2, 3.0, 1)], ids=["one segment", "two, guided"]
)
def test_frames_are_those_of_diffusers(published, frames, scale, carried):
    given = images(frames)
    # Without its cleaning of text, which wants a package more.
    embeddings = {"prompt_embeds": embedding("a fan"), "negative_prompt_embeds": embedding("bad")}
    expected = published_frames(
        published, given, guidance_scale=scale, prev_segment_conditioning_frames=carried, **embeddings
    )
    words = Words(" a  &#102;an", "bad")
    found = our_frames(given, words, guidance_scale=scale, window_overlap=carried)
    assert found.shape == expected.shape == (frames, *SIZE[::-1], 3)
    assert expected.std() > 0.02, "the comparison would show nothing"
    assert np.abs(found - expected).max() < 1e-5
