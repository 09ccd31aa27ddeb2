"""Attention kernels of training change how fast a pass is, not what it computes."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from training.run import FEW_TOKENS, attention_kernels

CPU = torch.device("cpu")


def kernels_used(tokens: int, half: bool, dtype: torch.dtype) -> tuple[set[str], torch.Tensor, torch.Tensor]:
    """Names of the attention operators that ran, with result and gradient."""
    torch.manual_seed(0)
    query = torch.randn(2, 3, tokens, 8).to(dtype).requires_grad_()
    with attention_kernels(CPU, tokens, half), torch.profiler.profile() as profile:
        result = scaled_dot_product_attention(query, query, query)
        result.square().sum().backward()
    names = {event.key for event in profile.key_averages() if "flash_attention" in event.key or "math" in event.key}
    return names, result.detach(), query.grad


def test_few_tokens_in_half_precision_take_products():
    names, result, gradient = kernels_used(FEW_TOKENS, True, torch.bfloat16)
    plain_names, plain, plain_gradient = kernels_used(FEW_TOKENS, False, torch.bfloat16)
    assert not any("flash" in name for name in names) and any("flash" in name for name in plain_names)
    for value, expected in ((result, plain), (gradient, plain_gradient)):
        assert 0 < (value - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize(("tokens", "half"), [(FEW_TOKENS + 1, True), (16, False)])
def test_other_passes_take_what_torch_chooses(tokens, half):
    names, _, _ = kernels_used(tokens, half, torch.float32)
    assert any("flash" in name for name in names)


def test_settings_are_what_they_were_afterwards():
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
    before = allowed(), torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(RuntimeError), attention_kernels(CPU, 4, True):
        assert allowed() and not torch.backends.cuda.flash_sdp_enabled()
        raise RuntimeError
    assert (allowed(), torch.backends.cuda.flash_sdp_enabled()) == before
