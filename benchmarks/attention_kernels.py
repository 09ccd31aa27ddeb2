"""Forward and backward pass of attention by kernel: torch's fused one, and two products with a softmax between them.

    python -m benchmarks.attention_kernels [tokens=[64,256,512,1024]] [dtypes=[float32,bfloat16]] [threads=2]

`training.run` follows from it.
"""

from benchmarks.config import KernelsConfig
from core.config import check_first

check_first(__name__, KernelsConfig, __doc__)


import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.speed.measuring import chosen_dtype, in_turns, timed
from core.config import load_config
from core.errors import run_command

KERNELS = {"fused": SDPBackend.FLASH_ATTENTION, "products": SDPBackend.MATH}


def measure(config: KernelsConfig, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """Least seconds of a forward and backward pass, by kernel."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def drawn(count: int) -> Tensor:
        values = torch.randn(config.frames, count, config.heads, config.channels, device=device).to(dtype)
        return values.transpose(1, 2).requires_grad_()

    # Keys are twice as many, as where frames attend to themselves and a reference.
    query, key, value = drawn(tokens), drawn(2 * tokens), drawn(2 * tokens)

    def once(kernel: SDPBackend) -> float:
        with sdpa_kernel(kernel):
            return timed(lambda: scaled_dot_product_attention(query, key, value).sum().backward(), device)

    works = {name: lambda kernel=kernel: once(kernel) for name, kernel in KERNELS.items()}
    return {name: min(seconds) for name, seconds in in_turns(works, config.repeats).items()}


def main(arguments: list[str]) -> None:
    config = load_config(KernelsConfig, arguments, about=__doc__)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    print("| tokens | dtype | fused, ms | products, ms |\n|---|---|---|---|")
    for tokens in config.tokens:
        for name in config.dtypes:
            taken = measure(config, tokens, chosen_dtype(name))
            print(f"| {tokens} | {name} | " + " | ".join(f"{1e3 * taken[kernel]:.1f}" for kernel in KERNELS) + " |")


if __name__ == "__main__":
    run_command(main)
