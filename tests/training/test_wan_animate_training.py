"""Training of Wan-Animate: flow matching on clips, with faces, carried frames and calibrated images."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils.dataclasses import get_module_class_from_name
from diffusers import AutoencoderTiny
from torch.utils.data import default_collate

from core.errors import UserError
from data.poses.drawing import draw_thin_pose
from models.animators.base import Condition, TrainingBatch
from models.animators.registry import load_pipeline
from models.animators.wan_animate.model import NULL_FACE, SOURCE, SegmentInputs, WanAnimate, WanConditioning
from models.animators.wan_animate.text import encoded_images
from models.attention.context import ReferenceContext
from models.noise import FlowNoise
from models.vae import clip_encode, load_vae, video_encode
from tests.networks import TINY
from tests.training_runs import VIDEO_CLIPS, make_video_vae
from tpc.config import CalibratedTrainingConfig
from training.build import make_scheduler, set_trainable
from training.config import (
    AttentionLossConfig,
    AugmentationConfig,
    LoraConfig,
    NoiseConfig,
    TrainConfig,
    ValidationConfig,
)
from training.data import driven_clips, ensure_latents, latents_folder, make_dataset
from training.loop import build, run_training
from training.memory import estimate
from training.objective import Objective, sample_generators
from training.validate import sample_clips

SIZE, FRAMES = VIDEO_CLIPS.size, VIDEO_CLIPS.num_frames
SIZES = replace(TINY, animator="wan_animate", block_out_channels=[16], layers_per_block=2, image_encoder_layers=2)
SIZES.pose_channels = [8, 8, 8, 8]  # of which it has none, so that they say nothing of latents
DATA = VIDEO_CLIPS
CALIBRATED = CalibratedTrainingConfig(probability=1.0, images=2)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    return make_video_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def vae(vae_folder):
    return load_vae(vae_folder).requires_grad_(False).eval()


def networks(trainable: str | None = None) -> WanAnimate:
    """Tiny networks without a zero anywhere, with what a run trains chosen."""
    torch.manual_seed(1)
    model = WanAnimate.small(SIZES, 4, max(SIZE) // 4).train()
    for parameter in model.parameters():
        if parameter.numel() and parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    set_trainable(model, config(trainable=trainable, lora=LoraConfig(rank=2, alpha=2.0)))
    return model


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"stage": "motion", "output": "x", "data": DATA, "model": SIZES} | changes)


def batch_of(model: WanAnimate, count: int = 2) -> dict[str, torch.Tensor]:
    clips = driven_clips(make_dataset(DATA, count), DATA, model)
    return default_collate([clips[i] for i in range(count)])


def objective(model: WanAnimate, vae, **changes) -> Objective:
    return Objective(model, vae, config(**changes), model.constant_inputs(vae, (FRAMES, *SIZE), {}))


def test_flow_noise_is_what_samplers_take_away():
    """A model that predicts the target exactly leads every sampler from noise to the truth."""
    scheduler = make_scheduler(NoiseConfig(timestep_shift=3.0), noise="flow")
    flow, levels = FlowNoise(scheduler), torch.tensor([0, 499, 999])
    latents, noise = torch.randn(2, 3, 4, 1, 2, 2)
    noisy = flow.added(latents, noise, levels)
    assert torch.equal(noisy[2], noise[2]) and torch.allclose(noisy[1], (latents[1] + noise[1]) / 2)
    share = flow.timesteps(levels).view(-1, 1, 1, 1, 1) / flow.levels
    assert torch.allclose(noisy - share * flow.target(latents, noise, levels), latents, atol=1e-6)
    assert torch.equal(flow.weights(levels, 5.0), torch.ones(3))
    assert scheduler.config.flow_shift == 3.0
    scheduler.set_timesteps(4)
    sample = noise[:1]
    for timestep in scheduler.timesteps:
        sample = scheduler.step(flow.target(latents[:1], noise[:1], timestep), timestep, sample).prev_sample
    assert torch.allclose(sample, latents[:1], atol=1e-5)


def test_clips_are_driven_as_in_inference():
    """Thin figures, faces cut out of the frames; a clip without a head has black ones."""
    model = networks()
    dataset = make_dataset(DATA, 2)
    item, plain = driven_clips(dataset, DATA, model)[0], dataset[0]
    drawn = draw_thin_pose(plain["keypoints"][1:2, :, :2].numpy(), plain["keypoints"][1:2, :, 2].numpy(), (32, 32))
    assert torch.equal((item["poses"][:, 1] * 255).byte().permute(1, 2, 0), torch.from_numpy(drawn))
    assert item["faces"].shape == (3, FRAMES, model.face_size, model.face_size) and item["faces"].std() > 0.01

    class Headless(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return plain | {"keypoints": plain["keypoints"] * torch.tensor([1.0, 1.0, 0.0])}

    assert (driven_clips(Headless(), DATA, model)[0]["faces"] == NULL_FACE).all()


def test_carried_clips_are_given_their_first_frame(vae):
    model = networks()
    batch = batch_of(model)
    constant = model.constant_inputs(vae, (FRAMES, *SIZE), {})
    known = model.clip_inputs(vae, batch, [False, True], constant)["carried"]
    mask, latents = known[:, :4], known[:, 4:]
    assert not mask[0].any() and mask[1, :, 0].all() and not mask[1, :, 1:].any()
    assert torch.equal(latents[0], constant["unknown"][0])
    # A causal VAE: the first latent is of the first frame alone.
    assert torch.allclose(latents[1, :, 0], clip_encode(vae, batch["frames"][1:, :, :1])[0, :, 0], atol=1e-5)
    assert not torch.allclose(latents[1, :, 1], latents[0, :, 1], atol=1e-3)
    # Of a single image that would be all of it.
    images = {name: batch[name][:, :, :1] for name in ("frames", "poses", "faces")} | {"reference": batch["reference"]}
    alone = model.clip_inputs(vae, images, [True, True], model.constant_inputs(vae, (1, *SIZE), {}))["carried"]
    assert alone.shape[2] == 1 and not alone[:, :4].any()


@pytest.mark.parametrize("calibrated", [False, True])
def test_training_predicts_as_inference_does(vae, calibrated):
    """Clips in a batch, some with a condition dropped, as `predict` sees them one by one."""
    model, shared = networks().eval(), torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=shared)  # noqa: E731
    clips, images, (height, width) = 2, 2, (8, 8)
    batch = batch_of(model)
    constant = model.constant_inputs(vae, (FRAMES, *SIZE), {})
    inputs = {**constant, **model.clip_inputs(vae, batch, [True, False], constant)}
    latents = draw(clips * (1 + images * calibrated), 4, height, width)
    context = None
    if calibrated:  # each clip its own two images, which frames 0 to 2, and 3 and 4, attend to
        own = torch.tensor([0, 0, 0, 1, 1])
        rows = [torch.stack([torch.full((FRAMES,), j), clips + j * images + own], dim=1) for j in range(clips)]
        context = ReferenceContext({}, torch.cat(rows))
    given = TrainingBatch(
        noisy_latents=draw(clips, 4, 3, height, width),
        timestep=torch.tensor([700, 300]),
        reference_latents=latents,
        reference_image=batch["reference"],
        poses=batch["poses"],
        dropped=torch.tensor([0, 1]),
        reference=context,
        inputs=inputs,
    )
    with torch.no_grad():
        trained = model.training_prediction(given)
        for j, (timestep, dropped) in enumerate(((700, 0), (300, 1))):
            seen = [j, *(clips + j * images + i for i in range(images * calibrated))]
            tokens = {SOURCE: latents[seen].flatten(2).transpose(1, 2)}
            index = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 2], [0, 2]]) if calibrated else torch.zeros(1, 1).long()
            whole = model.segment_context(ReferenceContext(tokens, index), (height, width))
            words = WanConditioning(
                vae,
                inputs["prompt"],
                inputs["negative_prompt"],
                encoded_images(inputs["image"][j : j + 1], model.image_encoder),
            )
            driving = SegmentInputs(*(inputs[name][j : j + 1] for name in ("poses", "faces", "carried")))
            sample = given.noisy_latents[j : j + 1]
            alone = model.predict(sample, torch.tensor(timestep), Condition(words, driving, whole), (dropped,))
            assert torch.allclose(trained[j : j + 1], alone, atol=1e-5), j


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_every_trained_parameter_gets_a_gradient(vae, trainable):
    model = networks(trainable)
    augmentation = AugmentationConfig(calibrated=CALIBRATED)
    trained = objective(model, vae, augmentation=augmentation)
    trained.loss(model, batch_of(model), sample_generators(0, range(2))).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # A's gradient is through B, which begins as zeros.
    assert not [name for name in missing if "lora_A" not in name]
    assert any(p.requires_grad for p in model.parameters())
    if trainable == "lora":  # every projection of attention, those of faces and of CLIP's tokens too
        adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
        layers = [n for n, m in model.transformer.named_modules() if isinstance(m, torch.nn.Linear)]
        attention = [n for n in layers if ".attn" in n or n.startswith("face_adapter")]
        assert {
            f"transformer.{name.removesuffix('.base_layer')}" for name in attention if "lora_" not in name
        } == adapted


def test_units_of_sharding_are_layers_that_accelerate_finds():
    model = networks()
    assert [get_module_class_from_name(model, name).__name__ for name in model._no_split_modules] == list(model.blocks)


def test_gradient_checkpointing_changes_nothing(vae):
    losses = []
    for checkpointed in (False, True):
        model = networks()
        if checkpointed:
            model.transformer.enable_gradient_checkpointing()
        result = objective(model, vae).loss(model, batch_of(model), sample_generators(0, range(2)))
        result.loss.backward()
        losses.append((result.loss.detach(), model.transformer.patch_embedding.weight.grad))
    assert torch.equal(losses[0][0], losses[1][0]) and torch.allclose(losses[0][1], losses[1][1], atol=1e-6)


def test_half_precision_networks_are_trained_without_autocast(vae):
    """As DeepSpeed has them; rotary angles stay in single precision."""
    model = networks()
    single = objective(model, vae).loss(model, batch_of(model), sample_generators(0, range(2)))
    trained = objective(model, vae)
    half = trained.loss(model.bfloat16(), batch_of(model), sample_generators(0, range(2)))
    half.loss.backward()
    assert torch.allclose(half.loss, single.loss, rtol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_cached_latents_are_those_of_the_clips(vae, tmp_path):
    model = networks()
    data = replace(DATA, cache=str(tmp_path / "cache"), cache_clips=2, cache_latents=True)
    clips = make_dataset(data, 2)
    ensure_latents(clips, vae, model.pose_kind)
    cached = clips.with_latents(latents_folder(clips.folder, vae, model.pose_kind))
    item, other = driven_clips(cached, data, model)[1], driven_clips(clips, data, model)[1]
    pairs = {
        "latent_mean": video_encode(vae, other["frames"].transpose(0, 1))[0],
        "pose_latents": video_encode(vae, other["poses"].transpose(0, 1) * 2 - 1)[0],
        "reference_latents": video_encode(vae, other["reference"][None])[0, :, 0],
    }
    for name, wanted in pairs.items():
        assert item[name].shape == wanted.shape
        # The cache holds float16.
        assert torch.allclose(item[name], wanted, atol=1e-3 * float(wanted.abs().max())), name
    other = deepcopy(vae)
    other.register_to_config(latents_mean=[1.0] * 4)
    assert latents_folder(clips.folder, other, model.pose_kind) != latents_folder(clips.folder, vae, model.pose_kind)


@pytest.fixture
def other_precision():
    """accelerate keeps the first precision of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def trained(vae_folder, tmp_path_factory) -> Path:
    """Output of a training from nothing, in which everything takes part."""
    output = tmp_path_factory.mktemp("trained")
    run_training(run_config(output, vae_folder))
    return output


def run_config(output: Path, vae_folder: Path, **changes) -> TrainConfig:
    settings = {
        "output": str(output),
        "batch_size": 2,
        "max_steps": 2,
        "checkpoint_steps": 1,
        "ema_decay": 0.5,
        "mixed_precision": "no",
        "model": replace(SIZES, vae=str(vae_folder)),
        "augmentation": AugmentationConfig(calibrated=CALIBRATED),
    }
    return config(**settings | changes)


def test_trained_and_resumed_weights_are_the_same(trained, vae_folder, tmp_path):
    run_training(run_config(tmp_path, vae_folder, max_steps=1))
    run_training(run_config(tmp_path, vae_folder))
    whole, parts = (load_pipeline(folder / "pipeline").transformer.state_dict() for folder in (trained, tmp_path))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_result_animates_in_segments(trained):
    """With encoders and sizes of its own, by the command that training ends with."""
    pipeline = load_pipeline(trained / "pipeline")
    assert pipeline.default_size((100, 100)) == (32, 32) and pipeline.config.window_size == FRAMES
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(images[0], images, num_inference_steps=2, output_type="np").frames
    assert frames.shape == images.shape and np.isfinite(frames).all()
    # Validation attaches calibrated images as infer.py does.
    pipeline.animator.attachments = ("replace",)
    validation = ValidationConfig(clips=1, num_frames=FRAMES, num_inference_steps=1)
    (clip,) = sample_clips(pipeline, DATA, validation, {})
    assert not np.array_equal(clip.columns["with TPC"], clip.columns["without TPC"])


def test_adapters_are_trained_as_in_the_recipe(trained, other_precision, tmp_path, capsys):
    """From a folder, without the text encoder, frozen layers rounded; with cached latents, and validation.

    Merged, they give what the folder with separate adapters gives.
    """
    from safetensors.torch import save_file

    begun = trained / "pipeline"
    words = load_pipeline(begun).animator.constant_inputs(load_pipeline(begun).vae, (FRAMES, *SIZE), {})
    save_file({name: words[name] for name in ("prompt", "negative_prompt")}, tmp_path / "words.safetensors")
    model = replace(SIZES, init=str(begun), embeddings=str(tmp_path / "words.safetensors"))
    found = {}
    for export in ("merged", "separate"):
        lora = LoraConfig(rank=2, export=export)
        changed = {"model": model, "lora": lora, "trainable": "lora", "augmentation": AugmentationConfig()}
        changed |= {"mixed_precision": "bf16", "frozen_dtype": "bfloat16"}
        changed["data"] = replace(DATA, cache=str(tmp_path / "cache"), cache_clips=2, cache_latents=True)
        changed["validation"] = ValidationConfig(steps=2, clips=1, num_frames=FRAMES, num_inference_steps=1)
        run_training(run_config(tmp_path / export, tmp_path, **changed))
        run = build(run_config(tmp_path / export, tmp_path, **changed))[1]
        assert run.text_encoder is None
        assert (tmp_path / export / "samples" / "0000002.png").is_file()
    # The text encoder's folder is not copied.
    assert (
        f"infer.py model={tmp_path / 'merged' / 'pipeline'} embeddings={model.embeddings}" in capsys.readouterr().out
    )
    found["merged"] = load_pipeline(tmp_path / "merged" / "pipeline", embeddings=("prompt",))
    found["separate"] = load_pipeline(begun, lora=tmp_path / "separate" / "lora")
    first, second = (pipeline.transformer.state_dict() for pipeline in found.values())
    start = load_pipeline(begun).transformer.state_dict()
    assert all(torch.allclose(value, second[name], atol=1e-6) for name, value in first.items())
    assert any(not torch.equal(value, start[name]) for name, value in first.items())


def test_memory_is_estimated_without_weights(trained, vae_folder, tmp_path):
    made = estimate(run_config(tmp_path, vae_folder))[2]
    found = estimate(run_config(tmp_path, vae_folder, model=replace(SIZES, init=str(trained / "pipeline"))))[2]
    assert made == found and made.training > 0 and made.encoding > 0


IMAGE_VAE = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8), "latent_channels": 4}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": replace(DATA, num_frames=8)}, "data.num_frames=8 must be 1 more than a multiple of 4"),
        ({"noise": NoiseConfig(beta_start=0.1)}, "noise.beta_start= is of diffusion"),
        (
            {"augmentation": AugmentationConfig(calibrated=replace(CALIBRATED, start=0.5, images=5))},
            "augmentation.calibrated.start=0.5 is for diffusion",
        ),
        ({"stage": "image", "data": replace(DATA, num_frames=1, cache="x", cache_latents=True)}, "cache_latents=true"),
        ({"attention": AttentionLossConfig(weight=0.1)}, "attention.weight=0.1 is for models with a latent"),
        ({"trainable": "motion"}, "trainable=motion is not one of full, lora"),
        ({"model": replace(SIZES, block_out_channels=[8, 16])}, "block_out_channels=\\[8, 16\\].*one number each"),
        ({"model": replace(SIZES, block_out_channels=[18], norm_num_groups=9)}, "even number of channels"),
        ({"image_vae": True}, "AutoencoderTiny; wan_animate needs a VAE of videos"),
        ({"image_model": True}, "AutoencoderKLWan; animate_anyone needs a VAE of images"),
    ],
)
def test_what_does_not_fit_is_refused(vae_folder, tmp_path, changes, words):
    wanted = changes.pop("model", SIZES)
    if changes.pop("image_model", False):
        wanted = TINY
    if changes.pop("image_vae", False):
        blocks = {"num_encoder_blocks": (0, 0, 0), "num_decoder_blocks": (0, 0, 0)}
        AutoencoderTiny(**IMAGE_VAE, **blocks).save_pretrained(vae_folder := tmp_path / "image")
    with pytest.raises(UserError, match=words):
        run_training(run_config(tmp_path, vae_folder, model=replace(wanted, vae=str(vae_folder)), **changes))
