"""The rules of the second device: what is refused, what waits, what is the CPU's to the bit."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.second_device import SECOND, second_device

ROWS = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "operation",
    [
        lambda here, there: here + there,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: torch.stack([here.sum(), there.sum()]),  # numbers, but not of a pointwise operation
        lambda here, there: there[0, 0].add_(here.sum()),
        lambda here, there: there[torch.tensor([0], device=SECOND)],
        lambda here, there: here.gather(1, torch.zeros(2, 1, dtype=torch.long)),
        lambda here, there: here.index_put((torch.tensor([0]),), there[0]),
        lambda here, there: nn.Linear(3, 3)(here),
        lambda here, there: torch.randn(3, device=SECOND, generator=torch.Generator()),
        lambda here, there: here.numpy(),
    ],
)
def test_what_cuda_refuses(operation):
    with second_device(), pytest.raises((RuntimeError, TypeError), match="second:0|a generator of cpu"):
        operation(ROWS.to(SECOND), ROWS.clone())


def test_what_mps_refuses():
    with second_device(double=False):
        here = ROWS.to(SECOND)
        for operation in (
            here.double,
            lambda: ROWS.double().to(SECOND),
            lambda: here.new_zeros(1, dtype=torch.float64),
        ):
            with pytest.raises(TypeError, match="no tensors of float64"):
                operation()


WAITING = {
    "read": [
        lambda here: here.sum().item(),
        lambda here: bool((here > 0).any()),
        lambda here: torch.arange(9)[here[0, 1].long()],
        lambda here: torch.equal(here, here.clone()),
        lambda here: torch.linalg.inv(torch.eye(3, device=SECOND)),
    ],
    "size": [
        lambda here: here.nonzero(),
        lambda here: here[here > 1],
        lambda here: here.unique(),
        lambda here: here.repeat_interleave(torch.ones(2, dtype=torch.long, device=SECOND), dim=0),
    ],
    "to device": [
        lambda here: ROWS.to(SECOND),
        lambda here: ROWS.pin_memory().to(SECOND),
        lambda here: ROWS.to(SECOND, non_blocking=True),
        lambda here: torch.tensor([1.0, 2.0], device=SECOND),
        lambda here: here.new_tensor(3.0),
        lambda here: here[[0, 1]],
        lambda here: here[torch.tensor([0])],
        lambda here: torch.where(here > 0, here, torch.tensor(1.0)),
    ],
    "to CPU": [lambda here: here.cpu(), lambda here: torch.empty(2, 3).copy_(here), lambda here: here.tolist()],
    None: [
        lambda here: here * torch.tensor(2.0),
        lambda here: torch.where(here > 0, here, 1.0),
        lambda here: here.masked_fill_(here > 1, 0.0),
        lambda here: here[:, here.long().argmax(1)],
        lambda here: torch.full((2,), 7, device=SECOND),
        lambda here: here.repeat_interleave(2, dim=0),
        lambda here: torch.linalg.inv_ex(torch.eye(3, device=SECOND)),
        lambda here: ROWS.pin_memory()[1:].to(SECOND, non_blocking=True),
        lambda here: here.to("cpu", non_blocking=True),
    ],
}


@pytest.mark.parametrize("kind", WAITING)
def test_what_waits(kind):
    with second_device() as waits:
        here = ROWS.to(SECOND)
        for operation in WAITING[kind]:
            del waits[:]
            operation(here)
            assert {wait.kind for wait in waits} == ({kind} if kind else set())
            # Nothing of the project called it.
            assert all(wait.place == "autograd" for wait in waits)


def test_training_is_the_cpus_to_the_bit():
    """Attention, a norm and a convolution, backward, clipped, two steps of the fused optimiser; then saved."""

    def trained(device: torch.device | str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Linear(16, 16)).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        for _ in range(2):
            tokens = network(torch.ones(2, 4, 16, device=device)).unflatten(1, (2, 4))
            F.scaled_dot_product_attention(tokens, tokens, tokens.flip(2)).square().sum().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return pickle.loads(pickle.dumps(dict(network.named_parameters())))  # tensors of the CPU

    expected = trained("cpu")
    with second_device():
        found = trained(SECOND)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_autocast_follows_cudas_lists():
    with second_device(), torch.autocast(SECOND.type, torch.bfloat16):
        tokens = torch.ones(1, 2, 4, 8, device=SECOND)
        half = nn.Linear(8, 8).to(SECOND)(tokens)
        assert half.dtype == F.scaled_dot_product_attention(tokens, tokens, tokens).dtype == torch.bfloat16
        assert F.layer_norm(half, (8,)).dtype == half.softmax(-1).dtype == torch.float32
        assert (half + half).dtype == torch.bfloat16 and tokens.double().matmul(tokens.double().mT).dtype.itemsize == 8


def test_random_numbers_are_not_the_cpus():
    with second_device():
        for _ in range(2):
            torch.manual_seed(0)
            before, here = torch.get_rng_state(), torch.randn(4, device=SECOND)
            assert torch.equal(torch.get_rng_state(), before) and not torch.equal(here.cpu(), torch.randn(4))
