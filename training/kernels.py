"""Which attention kernel trains fastest."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Tokens of a frame up to which writing the probabilities down is faster than recomputing them, on CPUs.
FEW_TOKENS = 128


@contextmanager
def attention_kernels(device: torch.device, tokens: int, half: bool) -> Iterator[None]:
    """The kernels for a forward and backward pass: those that torch chooses, but for few tokens on CPUs.

    There two products and a softmax take half the time of torch's fused kernel up to 128 tokens in bfloat16, as much
    at 256, and more from there on and in float32; with half precision kept between them, which torch leaves to the
    user to allow. `python -m benchmarks.attention_kernels` measures it.

    Args:
        tokens: of a frame, in the layer that has most.
        half: whether the pass computes in bfloat16.
    """
    if device.type != "cpu" or not half or tokens > FEW_TOKENS:
        yield
        return
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name, of CPUs too
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)
