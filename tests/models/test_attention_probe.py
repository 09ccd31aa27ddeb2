"""Probes in the networks: masked rows, training modules, gradients."""

from dataclasses import replace

import torch

from models.attention.context import same_reference
from models.attention.layers import token_levels, unet_layers
from models.attention.masking import masked_attention
from models.attention.probe import AttentionProbe, attention_rows
from models.attention.recording import AttentionConfig, AttentionRecording, AttentionRun

SIZE, LATENTS = (32, 24), (6, 8)
LAYER = "up_blocks.0.attentions.0.transformer_blocks.0.attn1"


def test_masked_rows_match_masked_attention():
    """The kernel of the run hides with a penalty, the recording exactly; both give the same values."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, generator=generator) for n in (5, 9, 9))
    flags = (torch.rand(2, 5, 2, generator=generator) > 0.5).float(), torch.rand(2, 9, 2, generator=generator) > 0.5
    flags = flags[0], flags[1].float() * (torch.arange(9) > 3)[:, None]
    rows = attention_rows(query, key, flags, 0.35)
    assert torch.allclose(rows @ value, masked_attention(query, key, value, *flags, scale=0.35), atol=1e-5)


def test_training_module(tiny_pipeline):
    """Two clips of a batch, with gradient checkpointing: same prediction, same gradients, maps of every frame."""
    model = tiny_pipeline.animator
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(2, 4, 3, *LATENTS, generator=generator)
    batch = {
        "noisy_latents": clips,
        "timestep": torch.tensor([3, 700]),
        "reference_latents": torch.randn(2, 4, *LATENTS, generator=generator),
        "reference_image": torch.rand(2, 3, 24, 32, generator=generator) * 2 - 1,
        "poses": torch.rand(2, 3, 3, 24, 32, generator=generator),
        "dropped": torch.tensor([False, True]),
    }
    unet, parameter = model.denoising_unet, model.reference_net.conv_in.weight
    results = []
    try:
        unet.enable_gradient_checkpointing()
        unet.train()
        for recorded in (False, True):
            with AttentionRecording(AttentionConfig(mean=["steps"])) as recording:
                recording.begin(AttentionRun(unet_layers(unet, LATENTS), SIZE, 6, 1))
                probe = recording.probe(0, 3, [range(6)], 0)
                prediction = model(**batch, probe=probe if recorded else None)
                (gradient,) = torch.autograd.grad(prediction.square().mean(), parameter)
            results.append((prediction.detach(), gradient))
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval()
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    maps = recording.result.maps[LAYER][0].sum((1, 2, 3, 4))
    assert (maps[:3] > 0.1).all() and (maps[3:] == 0).all(), "the second clip is blind to its reference"


def test_probe_passes_gradients(tiny_pipeline):
    unet = tiny_pipeline.denoising_unet
    grids = [level.queries for level in token_levels(unet_layers(unet, LATENTS))]
    tokens = {layer: torch.randn(1, *shape, requires_grad=True) for layer, shape in _token_shapes(unet).items()}
    probe = AttentionProbe({h * w: torch.zeros(2, 3, dtype=torch.long) for h, w in grids})
    seen = same_reference(tokens, 2)
    unet(
        torch.randn(1, 4, 2, *LATENTS),
        3,
        torch.randn(1, 1, 8),
        torch.zeros(1, 16, 2, *LATENTS),
        replace(seen, probe=probe),
    )
    assert set(probe.maps) == set(tokens)
    probe.maps[LAYER][..., -1].sum().backward()
    assert tokens[LAYER].grad.abs().max() > 0


def _token_shapes(unet) -> dict[str, tuple[int, int]]:
    shapes = unet_layers(unet, LATENTS)
    return {layer: (shape.tokens, shape.channels) for layer, shape in shapes.items()}
