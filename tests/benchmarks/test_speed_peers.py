"""Comparison with published implementations: our driver through the protocol, what goes wrong, equal weights.

The peers themselves run where TPC_ANIMATE_PEER_PYTHON names the interpreter of their environment, and
TPC_ANIMATE_PEER_MOORE or TPC_ANIMATE_PEER_MAGIC_ANIMATE their checkout.
"""

import json
import mmap
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.config import CompareConfig
from benchmarks.speed.peers import compare as comparison
from benchmarks.speed.peers.driver_ours import Inference
from benchmarks.speed.peers.driver_protocol import Job, PrivatePeak, resident_peak, status_bytes
from benchmarks.speed.peers.session import PEERS, PeerSession
from benchmarks.speed.peers.table import Row, markdown
from benchmarks.speed.peers.weights import peer_settings, training_batch, write_weights
from benchmarks.speed.sizes import SIZES
from core.errors import UserError
from models.checkpoints.loading import MOTION, module_names, published_names, shapes_of
from training.config import NoiseConfig
from training.objective import draw, sample_generators

SMALL = replace(SIZES["tiny"], image_encoder=(32, 1, 4), frames=2, clip_frames=2)
SETTINGS = peer_settings("animate_anyone", SMALL, "float32", "cpu", threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("peers") / "weights"
    write_weights(path, "animate_anyone", SMALL)
    return path


@pytest.fixture(scope="module")
def inference(folder):
    """Our driver's, in this process."""
    return Inference(Job(Path("."), json.loads(json.dumps(asdict(SETTINGS))), folder))


def scripted(code: str, folder: Path) -> PeerSession:
    """A session with a driver of a few lines."""
    return PeerSession("peer", [sys.executable, "-c", code], ".", SETTINGS, folder, wait_seconds=0.5)


def test_weights_have_the_published_names(folder, inference):
    """What is written is what our networks hold after strict loading, renamed."""
    parts = [torch.load(folder / f"{name}.pth", weights_only=True) for name in ("denoising_unet", "motion_module")]
    written = parts[0] | parts[1]
    state = inference.pipeline.denoising_unet.state_dict()
    assert published_names(shapes_of(state)) == shapes_of(written)
    assert all(MOTION not in name for name in parts[0]) and all(MOTION in name for name in parts[1])
    for name, tensor in module_names(written).items():
        assert torch.equal(state[name], tensor)


def test_weights_keep_the_size_of_activations(inference):
    """Random latents through the denoising UNet come out of about their own size."""
    with torch.no_grad():
        out = inference.pipeline.denoising_unet(
            torch.randn(1, 4, 2, 8, 8), 500, torch.randn(1, 1, SMALL.unet.cross_attention_dim)
        )
    assert 0.1 < out.std() < 10


def test_a_batch_says_what_the_objective_draws():
    """Noise and timesteps of the batch are those that the objective takes from the same generators."""
    batch = training_batch(SMALL, "image", seed=0)
    drawn = draw((4, 1, 8, 8), NoiseConfig(noise_offset=0.05), sample_generators(0, range(SMALL.batch)))
    assert torch.equal(batch["noise"], drawn.noise) and torch.equal(batch["timesteps"], drawn.timesteps)
    assert batch["frames"].shape == batch["poses"].shape == (SMALL.batch, 3, 1, 64, 64)
    assert batch["frames"].min() >= -1 and batch["poses"].min() >= 0 and batch["frames"].max() <= 1


def test_our_driver_infers_and_trains(folder, inference, tmp_path):
    """Through the protocol, in a process of its own: the latents that the pipeline gives here, and a falling loss."""
    inference.run(2, 3.5, peer_rounding=False)
    with PeerSession.of_ours(SETTINGS, folder) as session:
        answer = session.ask("infer", steps=2, guidance=3.5)
        session.ask("result", path=str(tmp_path / "latents.safetensors"))
        assert 0 < answer["step_seconds"] < answer["seconds"]
        assert answer["loop_peak_bytes"] <= answer["peak_bytes"]
        assert answer["peak_bytes"] > 2**27 or not resident_peak()
        found = load_file(tmp_path / "latents.safetensors")["latents"]
        torch.testing.assert_close(found, inference.times.latents, atol=1e-4, rtol=1e-4)
        for stage in ("image", "motion"):
            losses = [session.ask("train", stage=stage, gradient_checkpointing=False)["loss"] for _ in range(2)]
            assert losses[1] < losses[0] < 3
        with pytest.raises(UserError, match="failed at train: ValueError: stage must be one of image, motion"):
            session.ask("train", stage="last", gradient_checkpointing=False)
        # It goes on after a failure, with new networks.
        checkpointed = session.ask("train", stage="motion", gradient_checkpointing=True)["loss"]
    assert checkpointed == pytest.approx(losses[0], rel=1e-4)


def test_rounding_as_the_peers_do_changes_little_but_something(inference):
    found = []
    for rounding in (False, True):
        inference.run(2, 3.5, peer_rounding=rounding)
        found.append(inference.times.latents)
    apart = (found[0] - found[1]).abs().max()
    assert 0 < apart < 0.05


def test_a_driver_that_dies(folder):
    with scripted("import sys; sys.exit('no module of that name')", folder) as session:
        with pytest.raises(UserError, match="peer ended with code 1: no module of that name"):
            session.ask("infer", steps=2, guidance=3.5)


def test_a_driver_that_talks_out_of_turn(folder):
    with scripted("print('hello', flush=True); input()", folder) as session:
        with pytest.raises(UserError, match="peer answered 'hello', which is no JSON"):
            session.ask("infer", steps=2, guidance=3.5)


def test_a_driver_is_told_everything(folder):
    """Paths are absolute, settings are JSON, and a driver that does not listen is ended."""
    code = "import sys, json; input(); print(json.dumps(sys.argv[1:]), flush=True); import time; time.sleep(3600)"
    with scripted(code, folder) as session:
        checkout, settings, weights = session.ask("infer")
        assert Path(checkout) == Path.cwd() and Path(weights) == folder
        told = json.loads(Path(settings).read_text())
        assert told["latent_size"] == [8, 8] and told["unet"]["block_out_channels"] == [32, 64, 128, 128]
    assert not Path(settings).exists()


def test_what_is_no_checkout(folder, tmp_path):
    with pytest.raises(UserError, match="is not a checkout of moore: it has no src/pipelines/"):
        PeerSession.of_peer("moore", sys.executable, tmp_path, SETTINGS, folder)
    with pytest.raises(UserError, match="peer=disco is not one of moore, magic_animate, tpc_animate"):
        PeerSession.of_peer("disco", sys.executable, tmp_path, SETTINGS, folder)
    with pytest.raises(UserError, match="cannot be started with python=/no/python: No such file"):
        PeerSession("peer", ["/no/python"], ".", SETTINGS, folder)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("works=[speech]", "works=.* must be a list of one or more inference, image, motion"),
        ("works=[image]", "works has image; of magic_animate there are inference"),
        ("dtypes=[int8]", r"dtypes=\['int8'\] must be a list of one or more float32"),
        ("dtypes=[]", r"dtypes=\[\] must be a list of one or more"),
        ("steps=1", "steps=1 must be an integer, 2 to"),
        ("side=100", "side=100 must be a multiple of 64 pixels"),
        ("frames=0", "frames=0 must be an integer, 1 to"),
        ("guidance=1", "guidance=1 must be a number, 1 to 100 but not 1"),
        ("size=vast", "size=vast must be one of tiny, half, sd15"),
    ],
)
def test_arguments_that_cannot_work(argument, message, tmp_path):
    with pytest.raises(UserError, match=message):
        comparison.main(["peer=magic_animate", f"checkout={tmp_path}", "python=python", argument])


def test_other_images_than_those_of_a_size():
    sizes = comparison.sizes_of(CompareConfig(size="half", side=512))
    assert (sizes.side, sizes.frames, sizes.unet) == (512, SIZES["half"].frames, SIZES["half"].unet)
    assert comparison.sizes_of(CompareConfig(frames=3)) == replace(SIZES["tiny"], frames=3)


def test_weights_of_another_size_are_not_taken(folder, tmp_path):
    arguments = [f"checkout={tmp_path}", "python=python", f"weights={folder}", "size=half"]
    with pytest.raises(UserError, match="holds no settings.json of animate_anyone at size=half"):
        comparison.main(arguments)


@pytest.mark.skipif(not status_bytes("RssAnon"), reason="this system does not tell private memory apart")
def test_private_memory_counts_what_is_computed_and_not_what_is_mapped(tmp_path):
    size = 2**26
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    before = status_bytes("RssAnon")
    with PrivatePeak() as mapped:
        whole = torch.from_file(str(path), size=size // 4)
        assert whole.sum() == 0
    assert mapped.most - before < size / 4
    fresh = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)  # torch's allocator may give what it still holds from before
    with PrivatePeak() as computed:
        more = torch.frombuffer(fresh, dtype=torch.float32).copy_(whole).add_(1)
    assert size / 2 < computed.most - before < 2 * size
    assert more[0] == 1


def test_the_table():
    """A row is held against its own peer and against plain float32; a peer that failed is explained below."""
    mib = 2**20
    plain = Row(
        "inference",
        "float32",
        ours={"seconds": 2.0, "step_seconds": 0.5, "peak_bytes": 300 * mib, "loop_peak_bytes": 200 * mib}
        | {"private_peak_bytes": 50 * mib},
        theirs={"seconds": 3.0, "step_seconds": 1.0, "peak_bytes": 600 * mib, "loop_peak_bytes": 500 * mib}
        | {"private_peak_bytes": 500 * mib},
        difference={"largest": 1e-3, "deviation": 1.0, "peer_rounding": {"largest": 1e-5}},
    )
    half = Row("inference", "bfloat16", ours={**plain.ours, "seconds": 0.5}, reason="moore failed")
    rows = [plain, half]
    ratios = {"speed": 1.5, "memory": 0.5, "step_speed": 2.0, "step_memory": 0.4, "private_memory": 0.1}
    assert plain.numbers(rows)["ratios"] == {"float32": pytest.approx(ratios)}
    assert half.numbers(rows)["ratios"]["float32"]["speed"] == 6.0
    lines = markdown(rows, "moore").splitlines()
    assert lines[2].split("|")[4:10] == [" 2.00 ", " 3.00 ", " 1.50 ", " 300 ", " 600 ", " 0.50 "]
    assert lines[2].split("|")[10:13] == [" 50 ", " 500 ", " 0.10 "]
    assert lines[2].endswith("| 1.0e-03 of 1.0; 1.0e-05 when rounding alike |")
    assert "inference, a step" in lines[3] and "bfloat16 | float32 | 0.50 | 3.00 | 6.00" in lines[4]
    assert lines[-1] == "inference, bfloat16: moore failed"
    assert all(line.count("|") == 14 for line in lines[:6])


@pytest.mark.parametrize("peer", ["moore", "magic_animate"])
def test_the_peer_computes_the_same(peer, tmp_path):
    checkout, python = os.environ.get(f"TPC_ANIMATE_PEER_{peer.upper()}"), os.environ.get("TPC_ANIMATE_PEER_PYTHON")
    if not (checkout and python):
        pytest.skip("no checkout of the peer")
    arguments = [f"peer={peer}", f"checkout={checkout}", f"python={python}", "dtypes=[float32]", "rounds=1"]
    comparison.main([*arguments, "threads=1", f"output={tmp_path}"])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["work"] for row in rows] == ["inference", *PEERS[peer].stages]
    assert rows[0]["difference"]["peer_rounding"]["largest"] < 1e-3
    assert all(row["difference"]["loss"] < 1e-3 for row in rows[1:])
    assert (tmp_path / "table.md").read_text().startswith("| work |")
