"""Merging of reference tokens: what is averaged, and that merging equal tokens changes nothing."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention.context import ReferenceContext
from models.attention.layers import LayerShape
from models.attention.probe import AttentionProbe
from models.attention.processors import ReferenceReadProcessor
from models.images import as_images
from models.merging import TokenMerging
from models.reference_images import ReferenceImages
from tests.small_animators import FRAMES, LATENTS, calibrated, images, small_pipeline
from tpc.attach import dense_mask, frame_visibility

CHANNELS, HEADS, GRID = 32, 2, (3, 6)
QUERIES = GRID[0] * GRID[1]


def test_blocks_are_averaged_and_counted():
    tokens = torch.arange(15.0).reshape(1, 15, 1).expand(2, -1, 3)  # 3 x 5
    merging = TokenMerging(2)
    assert merging.grid((3, 5)) == (2, 3)
    merged = merging.tokens(tokens, (3, 5))
    assert merged.shape == (2, 6, 3)
    assert merged[1, :, 2].tolist() == [3.0, 5.0, 6.5, 10.5, 12.5, 14.0]
    assert merging.log_counts((3, 5)).exp().tolist() == pytest.approx([4, 4, 2, 2, 2, 1])


@settings(max_examples=20, deadline=None)
@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.sampled_from([2, 4]))
def test_nothing_is_lost(grid, factor):
    merging, count = TokenMerging(factor), grid[0] * grid[1]
    tokens = torch.randn(1, count, 2, generator=torch.Generator().manual_seed(count))
    weights = merging.log_counts(grid).exp()
    assert len(weights) == merging.grid(grid)[0] * merging.grid(grid)[1]
    assert float(weights.sum()) == pytest.approx(count)
    assert torch.allclose((merging.tokens(tokens, grid) * weights[:, None]).sum(1), tokens.sum(1), atol=1e-4)


def test_only_the_finest_grids_are_merged():
    layers = {f"{side}-{k}": LayerShape((side, side), 2, 32) for side in (16, 8, 4) for k in (0, 1)}
    for levels, merged in ((1, {16}), (2, {16, 8}), (9, {16, 8, 4})):
        for layer, shape in TokenMerging(4, levels).layers(layers).items():
            side = shape.grid[0]
            assert shape.layout.own and shape.layout.grid == ((side // 4,) * 2 if side in merged else shape.grid), (
                layer
            )


@pytest.mark.parametrize("masked", [False, True])
def test_equal_tokens_can_be_merged(masked):
    """Attention and what a probe sees of it; the masks are equal within blocks, too."""
    torch.manual_seed(0)
    attention = Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS)
    processor, merging = ReferenceReadProcessor("layer"), TokenMerging(2)
    coarse = torch.randn(2, 6, CHANNELS)  # two images of 2 x 3
    rows, columns = torch.arange(GRID[0]) // 2, torch.arange(GRID[1]) // 2
    places = (rows[:, None] * 3 + columns).flatten()
    index = torch.tensor([[0, 1]] * FRAMES)
    hidden = torch.tensor([1, 0, 1, 0, 0, 1.0])
    query = {QUERIES: (torch.arange(QUERIES) % 2).float()[None, :, None].expand(FRAMES, -1, -1)}

    def flags(image: torch.Tensor) -> dict[int, torch.Tensor]:
        key = torch.cat([torch.zeros(QUERIES), image, 1 - image])
        return {QUERIES: key[None, :, None].expand(FRAMES, -1, -1)}

    fine = ReferenceContext({"layer": coarse[:, places]}, index)
    merged = ReferenceContext(
        {"layer": merging.tokens(coarse[:, places], GRID)}, index, merged={QUERIES: merging.log_counts(GRID)}
    )
    if masked:
        fine = replace(fine, query_flags=query, key_flags=flags(hidden[places]))
        merged = replace(merged, query_flags=query, key_flags=flags(hidden))
    frames = torch.randn(FRAMES, QUERIES, CHANNELS)
    probes = [AttentionProbe({QUERIES: torch.arange(QUERIES).expand(FRAMES, -1)}) for _ in range(2)]
    with torch.no_grad():
        expected, result, uncounted = (
            processor(attention, frames, reference=seen)
            for seen in (
                replace(fine, probe=probes[0]),
                replace(merged, probe=probes[1]),
                replace(merged, merged=None),
            )
        )
    assert torch.allclose(result, expected, atol=1e-5)
    assert not torch.allclose(uncounted, expected, atol=1e-3), "tokens would count too little"
    looked, looked_merged = (probe.maps["layer"] for probe in probes)
    images = looked[..., QUERIES:].unflatten(-1, (2, QUERIES))
    blocks = torch.zeros(*images.shape[:-1], 6).index_add_(-1, places, images)
    assert torch.allclose(looked_merged[..., QUERIES:].unflatten(-1, (2, 6)), blocks, atol=1e-5)


def test_half_precision_counts_alike():
    attention = Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS).to(torch.bfloat16)
    tokens, frames = torch.randn(1, 1, CHANNELS).expand(-1, 4, -1), torch.randn(1, 4, CHANNELS)
    fine = ReferenceContext({"layer": tokens.bfloat16()}, torch.zeros(1, 1, dtype=torch.long))
    merged = replace(fine, tokens={"layer": tokens[:, :1].bfloat16()}, merged={4: torch.tensor([4.0]).log()})
    with torch.no_grad():
        results = [ReferenceReadProcessor("layer")(attention, frames.bfloat16(), reference=s) for s in (fine, merged)]
    assert torch.allclose(*(result.float() for result in results), atol=0.02)


def test_masks_are_those_of_a_coarser_grid():
    """A merged token belongs to a person when any of its tokens does, in the reference and in calibrated images."""
    pipeline, made = small_pipeline("animate_anyone"), calibrated("add")
    reference = as_images(images()["reference"], "reference") * 2 - 1
    seen, levels = [], []
    with torch.no_grad():
        for merging in (None, TokenMerging(2)):
            run = ReferenceImages(pipeline.animator(), pipeline.vae, reference, made, 1, merging=merging)
            seen.append(run.context_of(run.bank(0, 0, range(FRAMES)), range(FRAMES), 0))
            levels.append(run.levels)
    fine, merged = seen
    count, few = LATENTS[0] * LATENTS[1], 3 * 4
    assert list(merged.merged) == [count] and fine.merged is None
    assert merged.key_flags[count].shape[1] == count + 2 * few
    assert torch.equal(merged.key_flags[few], fine.key_flags[few]), "the other level is as it was"
    visible = []
    for known in levels:
        flags = frame_visibility(made, range(FRAMES), made.index(0), None, known, preset="release")
        visible.append(dense_mask(flags, count)[..., count:])
    blocks = visible[0].unflatten(2, (2, 3, 2, 4, 2)).movedim(4, 5).flatten(-2)  # (f, n, 2, 3, 4, tokens)
    keys = visible[1].unflatten(2, (2, 3, 4))
    # Calibrated tokens are shown where the person is, to the person; reference tokens to others where nobody is.
    person = keys[:, :, 1].flatten(2).any(2)
    assert person.any() and not keys[:, :, 0][~person].all()
    assert torch.equal(keys[:, :, 1][person], blocks[:, :, 1].any(-1)[person])
    assert torch.equal(keys[:, :, 0][~person], blocks[:, :, 0].all(-1)[~person])
