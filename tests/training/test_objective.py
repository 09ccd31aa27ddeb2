"""The training objective: random numbers by sample, weights, the null condition, gradients."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny

from core.config import check_config
from core.errors import UserError
from models.animators.animate_anyone.model import AnimateAnyone
from models.animators.base import Condition, TrainingBatch
from models.attention.context import same_reference
from models.attention.layers import KeyLayout, TokenLevel, token_levels
from models.denoising import guided_predictions
from models.noise import DiffusionNoise
from models.unets import one_token_parameters
from tests.networks import TINY
from tpc.config import CalibratedTrainingConfig, CompositionConfig
from training.build import enable_gradient_checkpointing, make_scheduler, set_trainable, shrink_frozen
from training.config import AugmentationConfig, DataConfig, LoraConfig, NoiseConfig, TrainConfig
from training.data import make_dataset
from training.objective import (
    Objective,
    check_supervised,
    compose_samples,
    draw,
    sample_generators,
    shifted,
)

SIZE = [32, 32]
OFF = CalibratedTrainingConfig()
ON = CalibratedTrainingConfig(probability=0.7)


@pytest.fixture(scope="module")
def vae() -> AutoencoderTiny:
    torch.manual_seed(0)
    widths = (8, 8, 8)
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(0, 0, 0),
        num_decoder_blocks=(0, 0, 0),
        latent_channels=4,
    ).eval()


def networks(stage: str = "motion", trainable: str | None = None) -> AnimateAnyone:
    """Tiny networks without a zero anywhere, with what a run trains chosen."""
    torch.manual_seed(1)
    model = AnimateAnyone.small(TINY, 4, max(SIZE) // 4).train()
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    config = TrainConfig(stage=stage, output="x", trainable=trainable, model=TINY, lora=LoraConfig(rank=2, alpha=2.0))
    set_trainable(model, config)
    return model


def batch_of(frames: int, count: int = 2) -> dict[str, torch.Tensor]:
    data = make_dataset(DataConfig(size=SIZE, num_frames=frames, stride=4, workers=0), count)
    return torch.utils.data.default_collate([data[i] for i in range(count)])


def loss_of(model, vae, batch, noise=None, calibrated=OFF, positions=None):
    noise = noise or NoiseConfig(noise_offset=0.1, condition_dropout=0.5)
    height, width = batch["frames"].shape[-2:]
    augmentation = AugmentationConfig(calibrated=calibrated)
    data = DataConfig(size=[width, height])
    config = TrainConfig(stage="image", output="x", noise=noise, augmentation=augmentation, data=data, vae_chunk=3)
    generators = sample_generators(0, positions or range(len(batch["frames"])))
    return Objective(model, vae, config).loss(model, batch, generators)


def saved_bytes(model, vae, batch) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda t: t):
        loss_of(model, vae, batch)
    return sum(sizes)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("calibrated", [OFF, ON], ids=["plain", "calibrated"])
def test_a_sample_is_drawn_for_alike_in_any_batch(vae, calibrated):
    """Two batches of one and one batch of two, composition, calibration, dropout and offset included: one loss."""
    model, batch = networks(), batch_of(2)
    composition = CompositionConfig(probability=0.7)

    def errors(rows: list[int]) -> torch.Tensor:
        part = {name: value[rows] for name, value in batch.items()}
        part = compose_samples(part, composition, 5, sample_generators(9, rows))
        with torch.no_grad():
            return loss_of(model, vae, part, calibrated=calibrated, positions=rows).errors

    assert torch.allclose(errors([0, 1]), torch.cat([errors([0]), errors([1])]), rtol=1e-4)
    assert not torch.allclose(errors([0, 0])[0], errors([1, 0])[0], rtol=1e-2)


def test_draws_follow_seed_and_position_alone():
    shape, noise = (4, 2, 8, 8), NoiseConfig(condition_dropout=0.5, noise_offset=0.1)
    first = draw(shape, noise, sample_generators(3, range(6)))
    again = draw(shape, noise, sample_generators(3, range(3, 6)))
    other = draw(shape, noise, sample_generators(4, range(3, 6)))
    assert torch.equal(first.noise[3:], again.noise) and torch.equal(first.timesteps[3:], again.timesteps)
    assert torch.equal(first.dropped[3:], again.dropped) and torch.equal(first.posterior[3:], again.posterior)
    assert not torch.equal(again.noise, other.noise)
    many = draw(shape, NoiseConfig(condition_dropout=0.5), sample_generators(3, range(200)))
    assert len(set(many.timesteps.tolist())) > 150


def test_noise_offset_is_a_constant_a_sample_and_channel_and_belongs_to_the_target():
    generators = [sample_generators(0, range(64)) for _ in range(2)]
    plain, shifted = (
        draw((8, 3, 4, 4), NoiseConfig(noise_offset=offset), g).noise
        for offset, g in zip((0.0, 1.0), generators, strict=True)
    )
    constant = shifted - plain
    assert torch.allclose(constant, constant[:, :, :1, :1, :1].expand_as(constant), atol=1e-5)
    assert abs(constant[:, :, 0, 0, 0].std() - 1) < 0.1
    # The target is made of the very noise that was added: at full noise and epsilon it is that noise.
    scheduler = make_scheduler(NoiseConfig(prediction_type="epsilon", rescale_betas_zero_snr=False))
    assert torch.equal(DiffusionNoise(scheduler).target(plain, shifted, torch.tensor([9] * 64)), shifted)


def test_shifted_timesteps_follow_their_closed_form():
    """A shift of s moves the middle to s / (s + 1), keeps order and ends, and is undone by 1 / s; 1 is nothing."""
    steps = torch.arange(1000)
    assert torch.equal(shifted(steps, 1000, 1.0), steps)
    moved = shifted(steps, 1000, 3.0)
    assert abs(moved[500] / 1000 - 0.75) < 2e-3
    assert (moved.diff() >= 0).all() and moved[0] < 3 and moved[-1] == 999
    assert (shifted(moved, 1000, 1 / 3) - steps).abs().max() <= 3
    many = draw((1, 1, 1, 1), NoiseConfig(timestep_shift=3.0), sample_generators(0, range(2000))).timesteps
    assert abs((many > 750).float().mean() - 0.5) < 0.04


def test_a_shift_must_be_positive():
    with pytest.raises(UserError, match=r"noise.timestep_shift=0.0 must be a number"):
        check_config(NoiseConfig(timestep_shift=0.0), "noise")


def test_the_share_of_dropped_samples_is_the_configured_one():
    drawn = draw((1, 1, 1, 1), NoiseConfig(condition_dropout=0.3), sample_generators(0, range(2000)))
    assert abs(drawn.dropped.float().mean() - 0.3) < 0.04
    assert not draw((1, 1, 1, 1), NoiseConfig(condition_dropout=0.0), sample_generators(0, range(100))).dropped.any()


def test_kinds_of_dropped_conditions_are_drawn_alike():
    """The same samples go without something, whatever there is to go without."""
    one = draw((1, 1, 1, 1), NoiseConfig(condition_dropout=0.6), sample_generators(0, range(3000)))
    three = draw((1, 1, 1, 1), NoiseConfig(condition_dropout=0.6), sample_generators(0, range(3000)), drop_modes=3)
    assert torch.equal(one.dropped > 0, three.dropped > 0) and torch.equal(one.noise, three.noise)
    assert set(one.dropped.tolist()) == {0, 1} and set(three.dropped.tolist()) == {0, 1, 2, 3}
    shares = torch.bincount(three.dropped) / 3000
    assert (shares - torch.tensor([0.4, 0.2, 0.2, 0.2])).abs().max() < 0.04


def test_what_a_model_does_not_train_is_refused():
    model = AnimateAnyone.small(TINY, 4, max(SIZE) // 4)
    for stage, choice in (("image", "motion"), ("motion", "adapter")):
        with pytest.raises(UserError, match=f"trainable={choice} is not one of .*lora, which AnimateAnyone has"):
            set_trainable(model, TrainConfig(stage=stage, output="x", trainable=choice, model=TINY))


def test_attention_supervision_needs_keys_on_the_queries_grid():
    model = AnimateAnyone.small(TINY, 4, max(SIZE) // 4)
    check_supervised(token_levels(model.attention_layers((8, 8))))
    with pytest.raises(UserError, match="attention.weight="):
        check_supervised([TokenLevel((8, 8), KeyLayout((4, 4), whole=1))])


def test_min_snr_weight_is_one_where_sampling_starts():
    """The form min(snr, gamma) / (snr + 1) would be 0 there: the step that sampling starts from would never train."""
    scheduler = make_scheduler(NoiseConfig())
    alpha, timesteps = scheduler.alphas_cumprod, torch.tensor([0, 100, 500, 900, 999])
    snr = alpha[timesteps] / (1 - alpha[timesteps])
    noise = DiffusionNoise(scheduler)
    assert torch.allclose(noise.weights(timesteps, 5.0), ((snr + 1).clamp(max=5) / (snr + 1)).float(), rtol=1e-4)
    assert alpha[999] == 0 and noise.weights(timesteps, 5.0)[-1] == 1
    assert scheduler.timesteps.max() == 999
    assert (noise.weights(torch.arange(1000), 5.0) > 0).all()
    assert torch.equal(noise.weights(timesteps, None), torch.ones(5))


def test_loss_is_the_weighted_mean_of_the_errors(vae):
    model, batch = networks(), batch_of(1)
    with torch.no_grad():
        result = loss_of(model, vae, batch)
    weights = DiffusionNoise(make_scheduler(NoiseConfig())).weights(result.timesteps, 5.0)
    expected = (weights * result.errors).mean()
    assert torch.allclose(result.loss, expected) and (result.errors > 0).all()


@pytest.mark.parametrize("frames", [1, 3])
def test_null_condition_of_training_is_that_of_sampling(tiny_pipeline, frames):
    """A dropped sample's prediction is the unconditional half of the pipeline's guidance; another's is the rest."""
    animator = tiny_pipeline.animator
    torch.manual_seed(2)
    latents, noisy = torch.randn(2, 4, 8, 8), torch.randn(2, 4, frames, 8, 8)
    images, poses = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, frames, 32, 32)
    timesteps, dropped = torch.tensor([400, 999]), torch.tensor([True, False])
    with torch.no_grad():
        trained = animator.training_prediction(TrainingBatch(noisy, timesteps, latents, images, poses, dropped))
        for number, scale in enumerate([0.0, 1.0]):  # guidance of 0 leaves the unconditional half alone
            shown = SimpleNamespace(pixels=images[[number]], latents=latents[[number]])
            conditioning = animator.encode_reference(shown)
            seen = same_reference(animator.encode_images(shown, 0, conditioning), frames)
            condition = Condition(conditioning, animator.pose_guider(poses[[number]]), seen)
            (sampled,) = guided_predictions(animator, [noisy[[number]]], timesteps[number], [condition], (scale,))
            assert torch.allclose(trained[[number]], sampled, atol=2e-5)
        # And the two differ, so that this test can fail.
        kept = animator.training_prediction(
            TrainingBatch(noisy, timesteps, latents, images, poses, torch.tensor([False, False]))
        )
    assert (kept[0] - trained[0]).abs().max() > 1e-3


def test_null_condition_of_calibrated_training_is_the_same(tiny_pipeline, vae):
    """Dropped samples see neither reference nor calibrated images: nothing of these reaches their loss."""
    model, batch = tiny_pipeline.animator, batch_of(2)
    noise = NoiseConfig(condition_dropout=1.0)
    changed = batch | {"reference": -batch["reference"]}
    with torch.no_grad():
        errors = [loss_of(model, vae, part, noise, ON).errors for part in (batch, changed)]
        plain = loss_of(model, vae, batch, noise, OFF).errors
        kept = [loss_of(model, vae, part, NoiseConfig(condition_dropout=0.0), ON).errors for part in (batch, changed)]
    assert torch.allclose(*errors, rtol=1e-5) and torch.allclose(errors[0], plain, rtol=1e-4)
    assert not torch.allclose(*kept, rtol=1e-3)


MODES = [("image", "full"), ("image", "lora"), ("motion", "motion"), ("motion", "full"), ("motion", "lora")]


@pytest.mark.parametrize(("stage", "trainable"), MODES)
def test_every_trained_parameter_gets_a_gradient_and_checkpointing_changes_none(vae, stage, trainable):
    """With any dropout: one graph, which DDP needs. Recomputed blocks, motion modules included, change no gradient."""
    frames = 1 if stage == "image" else 3
    plain, batch = networks(stage, trainable), batch_of(frames)
    recomputed = copy.deepcopy(plain)
    enable_gradient_checkpointing(recomputed)
    assert any(getattr(module, "gradient_checkpointing", False) for module in recomputed.modules())
    results = []
    for model in (plain, recomputed):
        result = loss_of(model, vae, batch)
        result.loss.backward()
        results.append(result.loss.item())
    assert results[0] == results[1]
    ours, theirs = gradients(plain), gradients(recomputed)
    assert ours and all(gradient is not None for gradient in ours.values())
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-8), name
    # A rank whose samples are all dropped still has a gradient for everything.
    plain.zero_grad(set_to_none=True)
    loss_of(plain, vae, batch, NoiseConfig(condition_dropout=1.0)).loss.backward()
    assert all(gradient is not None for gradient in gradients(plain).values())


def test_checkpointing_keeps_less_for_the_backward_pass_in_motion_modules(vae):
    """Fewer bytes are kept than with diffusers' own checkpointing, which leaves motion modules out."""
    batch = batch_of(3)
    kept = []
    for motion in (True, False):
        model = networks()
        enable_gradient_checkpointing(model)
        if not motion:
            for name, module in model.denoising_unet.named_modules():
                if "motion_modules" in name and hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False
        kept.append(saved_bytes(model, vae, batch))
    assert kept[0] < 0.8 * kept[1]


def test_what_is_frozen_as_unread_has_no_influence(vae):
    """Frozen parameters of the image stage have zero gradients, and changing them changes no prediction."""
    model, batch = networks("image"), batch_of(1)
    unread = [model.reference_net.get_parameter(name) for name in model.reference_net.unused_parameters()]
    for unet in (model.denoising_unet, model.reference_net):
        unread += [unet.get_parameter(name) for name in one_token_parameters(unet)]
    assert unread and not any(parameter.requires_grad for parameter in unread)
    for parameter in unread:
        parameter.requires_grad_(True)
    before = loss_of(model, vae, batch)
    before.loss.backward()
    assert all(parameter.grad is None or parameter.grad.abs().max() < 1e-7 for parameter in unread)
    with torch.no_grad():
        for parameter in unread:
            parameter.normal_()
        assert torch.allclose(loss_of(model, vae, batch).errors, before.errors, rtol=1e-4)
    trained = sum(p.numel() for p in networks("image").parameters() if p.requires_grad)
    assert trained < sum(p.numel() for p in model.parameters())


def test_image_training_takes_motion_modules_of_published_models_out():
    model = networks()
    model.denoising_unet.use_motion_on_single_frames(True)
    trainable = set_trainable(model, TrainConfig(stage="image", output="x", model=TINY))
    assert not model.denoising_unet.config.motion_on_single_frames
    motion = {id(p) for name, p in model.denoising_unet.named_parameters() if "motion_modules" in name}
    assert not any(id(parameter) in motion for parameter in trainable)


def test_frozen_weights_in_half_the_memory_change_little(vae):
    """Frozen layers take two bytes a weight, what is trained keeps four, and bf16 losses stay within its precision."""
    model, batch, vae = networks("motion"), batch_of(2), copy.deepcopy(vae)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = loss_of(model, vae, batch).errors
        shrink_frozen(vae, model, torch.bfloat16)
        after = loss_of(model, vae, batch).errors
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    halved = sum(p.numel() for p in model.parameters() if p.dtype == torch.bfloat16)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert halved > 0.9 * frozen and model.denoising_unet.dtype == torch.float32
    assert torch.allclose(before, after, rtol=0.05)


def test_published_pairs_that_cannot_be_sampled_are_refused():
    with pytest.raises(UserError, match="epsilon"):
        NoiseConfig(prediction_type="epsilon", rescale_betas_zero_snr=True).check()
