"""Low-rank adapters: what is adapted, saved, loaded and merged."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import training.export
from core.errors import UserError
from models.animators.animate_anyone.checkpoint import RELEASED
from models.animators.animate_anyone.checkpoint import VELOCITY as VELOCITY_SETTINGS
from models.animators.animate_anyone.model import AnimateAnyone
from models.animators.registry import load_pipeline
from models.checkpoints.convert import IMAGE_SCHEDULE
from models.checkpoints.streaming import StoredTensors
from models.lora import FACTORS, FILE, FOLDER, adaptable_layers, add_lora, has_lora, load_lora, merge, save_lora
from models.unets import one_token_parameters
from tests.training_runs import ARGUMENTS, make_vae, train, weights
from training.checkpoint import PROGRESS

VELOCITY = {"beta_schedule": "scaled_linear", **VELOCITY_SETTINGS}
ADAPTED = AnimateAnyone.adapted_networks


def adapted_copy(pipeline, seed: int = 0):
    """The pipeline with random adapters of both networks."""
    pipeline = plain_copy(pipeline)
    torch.manual_seed(seed)
    add_lora(pipeline.animator, rank=3, alpha=6.0, motion=True)
    for name, parameter in pipeline.animator.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return pipeline


def predict(pipeline) -> torch.Tensor:
    torch.manual_seed(1)
    noisy, latents = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 4, 8, 8)
    image, poses = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 2, 32, 32)
    with torch.no_grad():
        return pipeline.animator(
            noisy_latents=noisy,
            timestep=torch.tensor([300]),
            reference_latents=latents,
            reference_image=image,
            poses=poses,
            dropped=torch.tensor([False]),
        )


def plain_copy(pipeline):
    return type(pipeline)(**{name: copy.deepcopy(part) for name, part in pipeline.components.items()})


def test_adapters_start_as_no_change_and_are_all_that_is_trained(tiny_pipeline):
    before, pipeline = predict(tiny_pipeline), plain_copy(tiny_pipeline)
    add_lora(pipeline.animator, rank=2, alpha=2.0, motion=True)
    for name in ADAPTED:
        trained = [n for n, p in getattr(pipeline, name).named_parameters() if p.requires_grad]
        assert trained and all("lora_" in n for n in trained) and has_lora(getattr(pipeline, name))
    assert torch.allclose(predict(pipeline), before, atol=1e-6)


def test_only_layers_that_a_result_depends_on_are_adapted(tiny_pipeline):
    unet, reference = tiny_pipeline.denoising_unet, tiny_pipeline.reference_net
    layers = adaptable_layers(unet, one_token_parameters(unet))
    assert any("motion_modules" in layer for layer in layers)
    still = adaptable_layers(unet, one_token_parameters(unet), excluded=AnimateAnyone.motion_parts)
    assert still and not any("motion_modules" in layer for layer in still)
    one_token = [layer for layer in layers if ".attn2.to_q" in layer or ".attn2.to_k" in layer]
    assert all("motion_modules" in layer for layer in one_token)
    unread = {name.removesuffix(".weight") for name in reference.unused_parameters()}
    assert not unread & set(adaptable_layers(reference, reference.unused_parameters()))
    adapted = plain_copy(tiny_pipeline)
    add_lora(adapted.animator, rank=2, alpha=2.0, motion=True)
    names = {name.split(".lora_")[0] for name, _ in adapted.reference_net.named_parameters() if "lora_" in name}
    assert names and not unread & names


def test_saved_merged_and_live_adapters_give_one_result(tiny_pipeline, tmp_path):
    live = adapted_copy(tiny_pipeline)
    expected = predict(live)
    assert (expected - predict(tiny_pipeline)).abs().max() > 1e-2
    save_lora(live, tmp_path / "lora")
    loaded = plain_copy(tiny_pipeline)
    load_lora(loaded, tmp_path / "lora")
    assert torch.allclose(predict(loaded), expected, atol=1e-5)
    for name in ADAPTED:
        merge(getattr(live, name))
        assert getattr(live, name).state_dict().keys() == getattr(tiny_pipeline, name).state_dict().keys()
    assert torch.allclose(predict(live), expected, atol=1e-5)


def test_scale_weighs_the_adapters(tiny_pipeline, tmp_path):
    save_lora(adapted_copy(tiny_pipeline), tmp_path / "lora")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    base = tiny_pipeline.denoising_unet.state_dict()[name]
    changes = []
    for scale in (1.0, 0.5):
        pipeline = plain_copy(tiny_pipeline)
        load_lora(pipeline, tmp_path / "lora", scale)
        changes.append(pipeline.denoising_unet.state_dict()[name] - base)
    assert changes[0].abs().max() > 0 and torch.allclose(changes[1], changes[0] / 2, atol=1e-6)


def test_adapters_in_a_pipeline_folder_and_beside_it_are_used(tiny_pipeline, tmp_path):
    live = adapted_copy(tiny_pipeline)
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    save_lora(live, tmp_path / "lora")
    beside = load_pipeline(tmp_path / "pipeline", lora=tmp_path / "lora")
    assert torch.allclose(predict(beside), predict(live), atol=1e-5)
    shutil.move(tmp_path / "lora", tmp_path / "pipeline" / FOLDER)
    assert torch.allclose(predict(load_pipeline(tmp_path / "pipeline")), predict(live), atol=1e-5)


def test_adapters_that_do_not_fit_are_refused(tiny_pipeline, tmp_path):
    with pytest.raises(UserError, match="holds no adapters"):
        load_lora(tiny_pipeline, tmp_path)
    save_lora(adapted_copy(tiny_pipeline), tmp_path / "lora")
    shutil.copy(tmp_path / "lora" / "denoising_unet" / FILE, tmp_path / "lora" / "reference_net" / FILE)
    pipeline = plain_copy(tiny_pipeline)
    with pytest.raises(UserError, match="does not have"):
        load_lora(pipeline, tmp_path / "lora")
    (tmp_path / "lora" / "reference_net" / FILE).write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_lora(plain_copy(tiny_pipeline), tmp_path / "lora")


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
A, B = (LAYER + factor for factor in FACTORS)


def without(*keys):
    return lambda t: {key: tensor for key, tensor in t.items() if key not in keys}


@pytest.mark.parametrize(
    "change, named",
    [
        (without(B), f"half a pair: {LAYER} has no lora_B.weight"),
        (without(A), f"half a pair: {LAYER} has no lora_A.weight"),
        (lambda t: {**t, f"{LAYER}.alpha": torch.tensor(4.0)}, f"holds {LAYER}.alpha; adapters here are pairs"),
        (
            lambda t: {key.replace("lora_A", "lora_down"): x for key, x in t.items()},
            "lora_down.* adapters here are pairs",
        ),
        (lambda t: {f"{LAYER}.exp_avg": torch.ones(2)}, "exp_avg; adapters here are pairs"),
        (lambda t: {"conv_in.weight": torch.ones(2, 2)}, "holds conv_in.weight; adapters here are pairs"),
        (lambda t: {}, "holds nothing; adapters here are pairs"),
        (lambda t: {**t, A: t[A][:2].clone()}, f"adapts {LAYER} in another size"),
        (lambda t: {**t, A: t[A].flatten()}, f"adapts {LAYER} in another size"),
        (lambda t: {**t, A: torch.tensor(1.0)}, f"adapts {LAYER} in another size"),
        (lambda t: {**t, A: t[A].new_zeros(0), B: t[B].new_zeros(0)}, f"adapts {LAYER} in another size"),
        (lambda t: {**t, A: t[A] * float("nan")}, f"NaN or infinity in 1 tensors of float32: {A}"),
        (lambda t: {**t, B: t[B] / 0}, f"NaN or infinity in 1 tensors of float32: {B}"),
    ],
)
def test_odd_adapter_files_are_one_line(tiny_pipeline, tmp_path, change, named):
    save_lora(adapted_copy(tiny_pipeline), tmp_path)
    file = tmp_path / "denoising_unet" / FILE
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({key: tensor.contiguous() for key, tensor in change(load_file(file)).items()}, file, metadata)
    with pytest.raises(UserError, match=named) as refused:
        load_lora(plain_copy(tiny_pipeline), tmp_path)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize(
    "settings", ["{", "[]", '{"no_such_setting": 1}', '{"r": "many", "target_modules": ["to_q"]}']
)
def test_settings_of_adapters_that_make_no_sense_are_one_line(tiny_pipeline, tmp_path, settings):
    save_lora(adapted_copy(tiny_pipeline), tmp_path)
    file = tmp_path / "denoising_unet" / FILE
    save_file(load_file(file), file, {"format": "pt", "lora_adapter_metadata": settings})
    with pytest.raises(UserError, match="has settings that do not fit it"):
        load_lora(plain_copy(tiny_pipeline), tmp_path)


@pytest.mark.parametrize("schedule", [RELEASED, VELOCITY, IMAGE_SCHEDULE])
def test_adapters_bring_the_noise_schedule_that_they_were_trained_with(tiny_pipeline, tmp_path, schedule):
    """With the published one of every family, on a base of each of them."""
    trained = adapted_copy(tiny_pipeline)
    trained.scheduler = DDIMScheduler.from_config(trained.scheduler.config, **schedule)
    save_lora(trained, tmp_path)
    for base in (RELEASED, VELOCITY, IMAGE_SCHEDULE):
        pipeline = plain_copy(tiny_pipeline)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **base)
        notes = load_lora(pipeline, tmp_path)
        assert torch.equal(pipeline.scheduler.betas, trained.scheduler.betas)
        assert pipeline.components["scheduler"].config.prediction_type == trained.scheduler.config.prediction_type
        assert len(notes) == (base != schedule) and all("noise schedule" in note for note in notes)


def test_adapters_know_the_weights_that_they_were_trained_on(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "base")
    digests = {name: StoredTensors(tmp_path / "base" / name, name).digest() for name in ADAPTED}
    save_lora(adapted_copy(tiny_pipeline), tmp_path / "lora", digests)
    save_lora(adapted_copy(tiny_pipeline), tmp_path / "older")
    assert load_pipeline(tmp_path / "base", lora=tmp_path / "lora").notes == []
    file = tmp_path / "base" / "denoising_unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    [note] = load_pipeline(tmp_path / "base", lora=tmp_path / "lora").notes
    assert "other weights" in note and "denoising_unet" in note
    assert load_pipeline(tmp_path / "base", lora=tmp_path / "older").notes == []


def test_train_py_makes_adapters_that_load_and_checkpoints_of_adapters_alone(tmp_path):
    """A base, adapters kept apart, and adapters merged; apart or merged, the same model.

    Checkpoints hold no frozen weight, and go on exactly on the base that they were made on.
    """
    base = ["stage=image", f"output={tmp_path / 'base'}", f"model.vae={make_vae(tmp_path / 'vae')}", "max_steps=1"]
    train(tmp_path / "base.log", *ARGUMENTS, *base)
    pipeline = tmp_path / "base" / "pipeline"
    for export in ("separate", "merged"):
        text = train(
            tmp_path / f"{export}.log",
            *ARGUMENTS,
            "stage=motion",
            "data.num_frames=3",
            "trainable=lora",
            "lora.rank=2",
            f"lora.export={export}",
            "mixed_precision=bf16",
            "frozen_dtype=bfloat16",
            "max_steps=2",
            "checkpoint_steps=1",
            f"output={tmp_path / export}",
            f"model.init={pipeline}",
        )
        assert f"trained 2 steps; {'lora' if export == 'separate' else 'pipeline'} in" in text
    merged = weights(tmp_path / "merged" / "pipeline")
    original = weights(pipeline)
    loaded = load_pipeline(pipeline, lora=tmp_path / "separate" / FOLDER)
    assert merged.keys() == original.keys()
    changed = {name for name in merged if not torch.equal(merged[name], original[name])}
    assert changed and all(name.split(".")[0] in ADAPTED and ".attn" in name for name in changed)
    for network in ADAPTED:
        for name, tensor in getattr(loaded, network).state_dict().items():
            assert torch.allclose(tensor, merged[f"{network}.{name}"], atol=1e-6), name
    assert not Path(tmp_path / "separate" / "pipeline").exists()

    run, again = tmp_path / "merged", ["--config", str(tmp_path / "merged" / "config.yaml")]
    [first, last] = [run / f"checkpoint-{step}" for step in (1, 2)]
    assert all(".lora_" in name for name in load_file(last / "model.safetensors"))
    shutil.rmtree(last)
    train(tmp_path / "resumed.log", *again)
    resumed = weights(run / "pipeline")
    assert all(torch.equal(resumed[name], merged[name]) for name in merged)

    # A checkpoint of an earlier release holds everything, and does not say what its base was.
    whole = load_pipeline(pipeline).animator
    add_lora(whole, rank=2, alpha=16.0, motion=True)
    save_file(whole.state_dict() | load_file(first / "model.safetensors"), first / "model.safetensors")
    entry = json.loads((first / PROGRESS).read_text())
    (first / PROGRESS).write_text(json.dumps({key: value for key, value in entry.items() if key != "base"}))
    shutil.rmtree(last)
    train(tmp_path / "older.log", *again)
    older = weights(run / "pipeline")
    assert all(torch.equal(older[name], merged[name]) for name in merged)

    # With another base it would be completed by weights that nobody has trained.
    file = pipeline / "pose_guider" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="not those that"):
        training.export.main([f"checkpoint={last}", f"output={tmp_path / 'export'}"])
    with pytest.raises(UserError, match="say init="):
        training.export.main([f"checkpoint={last}", f"output={tmp_path / 'export'}", f"init={tmp_path / 'gone'}"])
