"""Steps that are not finite: left out by all processes alike, counted, and too many end the run."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from core.errors import UserError
from tests.training_runs import ARGUMENTS, launch, logged, make_vae, train
from training.checkpoint import checkpoints
from training.distributed import end_together
from training.run import StepGuard


def step(
    model, optimizer, guard: StepGuard, accelerator: Accelerator, inputs: list[torch.Tensor], number: int
) -> bool:
    """One step of one or more accumulated batches, as train.py takes it."""
    for place, batch in enumerate(inputs):
        accelerator.gradient_state._set_sync_gradients(place == len(inputs) - 1)
        loss = model(batch).square().mean()
        accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    taken = guard.allows_step(norm, accelerator)
    if taken:
        optimizer.step()
    optimizer.zero_grad()
    guard.count(taken, number)
    return taken


def prepared() -> tuple:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return accelerator, *accelerator.prepare(model, optimizer)


GOOD, BAD = torch.ones(2, 3), torch.tensor([[math.nan, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize("bad", [[BAD], [GOOD, BAD], [BAD, GOOD]], ids=["alone", "last", "first"])
def test_a_step_with_nan_moves_nothing_and_the_next_one_is_as_if_it_had_not_been(bad):
    accelerator, model, optimizer = prepared()
    guard = StepGuard(limit=3)
    assert step(model, optimizer, guard, accelerator, [GOOD], 1)
    before = [parameter.clone() for parameter in model.parameters()]
    assert not step(model, optimizer, guard, accelerator, bad, 2)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert (guard.skipped, guard.streak) == (1, 1)
    assert step(model, optimizer, guard, accelerator, [GOOD], 3)
    assert (guard.skipped, guard.streak) == (1, 0)

    accelerator, other, optimizer = prepared()
    for number in (1, 2):
        step(other, optimizer, StepGuard(limit=3), accelerator, [GOOD], number)
    assert all(torch.equal(*pair) for pair in zip(other.parameters(), model.parameters(), strict=True))


def test_a_finite_loss_with_an_infinite_gradient_is_left_out():
    accelerator, model, optimizer = prepared()
    guard = StepGuard(limit=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    # The square root of zero has a value and no slope.
    loss = model(GOOD).square().sum().sqrt()
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    assert torch.isfinite(loss) and not guard.allows_step(norm, accelerator)


def test_as_many_in_a_row_as_the_limit_end_the_run():
    accelerator, model, optimizer = prepared()
    guard = StepGuard(limit=2)
    for number, batch in enumerate([BAD, GOOD, BAD]):
        step(model, optimizer, guard, accelerator, [batch], number)
    with pytest.raises(UserError, match="last 2 steps up to step 3"):
        step(model, optimizer, guard, accelerator, [BAD], 3)
    assert guard.skipped == 3


def one_of_two(folder: str) -> None:
    """One of two processes, the second of which has a NaN in its second step; the launcher's variables are set."""
    accelerator, model, optimizer = prepared()
    guard = StepGuard(limit=5)
    rank, taken = accelerator.process_index, []
    for number in range(4):
        bad = number == 1 and rank == 1
        # Accumulation over two batches; the NaN is in the one whose gradients are exchanged.
        taken.append(step(model, optimizer, guard, accelerator, [GOOD, BAD if bad else GOOD * (rank + 1)], number))
    found = {"taken": taken, "weights": [p.detach().flatten().tolist() for p in model.parameters()]}
    Path(folder, f"{rank}.json").write_text(json.dumps({**found, "processes": accelerator.num_processes}))
    end_together(accelerator)


def test_two_processes_leave_the_same_steps_out(tmp_path):
    """DDP: one process's NaN makes both leave the step out; they go on with equal weights and end."""
    code = f"from tests.training.test_guard import one_of_two; one_of_two({str(tmp_path)!r})"
    (tmp_path / "script.py").write_text(code)
    launch(["torchrun", "--standalone", "--nproc_per_node", "2", str(tmp_path / "script.py")])
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and first["processes"] == 2
    assert first["taken"] == [True, False, True, True]


def test_a_diverging_run_stops_and_keeps_the_checkpoint_from_before(tmp_path):
    """Absurd learning rates make weights infinite: the run ends with a message, and the good checkpoint stays."""
    vae = make_vae(tmp_path / "vae")
    command = [
        "stage=image",
        f"output={tmp_path / 'run'}",
        f"model.vae={vae}",
        *ARGUMENTS,
        "max_steps=4",
        "checkpoint_steps=1",
        "keep_checkpoints=1",
        "ema_decay=0",
    ]
    train(tmp_path / "good.log", *command)
    good = (tmp_path / "run" / "checkpoint-4" / "model.safetensors").read_bytes()
    diverging = ["optimizer.learning_rate=1e38", "optimizer.warmup_steps=0", "max_steps=40", "max_skipped_steps=3"]
    text = train(tmp_path / "bad.log", *command, *diverging, "checkpoint_steps=10", expect=2)
    assert "error: loss or gradient of the last 3 steps" in text and "Traceback" not in text
    (kept,) = checkpoints(tmp_path / "run")
    assert kept[0] == 4 and (kept[1] / "model.safetensors").read_bytes() == good
    assert logged(tmp_path / "run", "skipped_steps")[4] == 0
    # The same command with a sound rate goes on from there.
    train(tmp_path / "again.log", *command, "max_steps=6")
    assert [number for number, _ in checkpoints(tmp_path / "run")] == [6]
