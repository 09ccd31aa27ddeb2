"""DisCo in training: predictions, which parameters are trained, new small networks."""

from copy import deepcopy

import pytest
import torch

from core.errors import UserError
from models.animators.base import CalibratedImages
from models.animators.disco.model import DisCo
from models.attention.context import ReferenceContext
from tests.disco_parts import FIXTURES, HEIGHT, LATENTS, WIDTH, randn
from tests.networks import TINY

pipeline, temporal_pipeline, model = FIXTURES


def batch(clips: int = 2, frames: int = 2) -> dict[str, torch.Tensor]:
    mask = torch.zeros(clips, 1, HEIGHT, WIDTH)
    mask[..., 6:20, 8:22] = 1
    return {
        "noisy_latents": randn(clips, 4, frames, *LATENTS),
        "timestep": torch.tensor([11, 700])[:clips],
        "reference_latents": randn(clips, 4, *LATENTS, seed=3),
        "reference_image": randn(clips, 3, HEIGHT, WIDTH, seed=4).clamp(-1, 1),
        "poses": torch.rand(clips, 3, frames, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5)),
        "dropped": torch.zeros(clips, dtype=torch.long),
        "reference_mask": mask,
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pipeline", "temporal_pipeline"])
def test_a_batch_of_two_is_two_batches_of_one(kind, request):
    model, both = request.getfixturevalue(kind).animator, batch()
    together = model(**both)
    assert together.shape == both["noisy_latents"].shape
    for j in range(2):
        assert torch.allclose(together[[j]], model(**{name: part[[j]] for name, part in both.items()}), atol=1e-5)


@torch.no_grad()
def test_training_predicts_what_inference_does(model):
    """Both halves of guidance: kept samples see the reference's tokens, dropped ones the null tokens."""
    both = batch() | {"dropped": torch.tensor([0, 1])}
    predicted = model(**both)
    tokens = model.encode_foreground(both["reference_image"], both["reference_mask"])
    for j, context in enumerate((tokens[[0]], model.encode_null())):
        latents, poses = both["noisy_latents"][j].transpose(0, 1), both["poses"][j].transpose(0, 1)
        expected = model.predict_frames(
            latents, both["timestep"][j], context, poses, both["reference_latents"][[j]], None
        )
        assert torch.allclose(predicted[j].transpose(0, 1), expected, atol=1e-5)


@torch.no_grad()
def test_training_with_calibrated_images_shows_them_where_the_index_says(model):
    both = batch()
    calibrated = CalibratedImages(randn(2, 3, HEIGHT, WIDTH, seed=8).clamp(-1, 1), both["reference_mask"])
    index = torch.tensor([[0, 0], [0, 2], [1, 1], [1, 1]])  # only the second frame of the first clip sees one
    seen = ReferenceContext({}, index)
    plain, shown = model(**both), model(**both, reference=seen, calibrated=calibrated)
    changed = (plain - shown).abs().amax(dim=(1, 3, 4)) > 1e-4
    assert changed.tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize(
    ("kind", "stage"), [("pipeline", "image"), ("temporal_pipeline", "motion")], ids=["image", "motion"]
)
def test_every_trained_parameter_gets_a_gradient_and_no_other(kind, stage, request):
    pipeline = request.getfixturevalue(kind)
    for choice in pipeline.animator.trainable_choices(stage):
        for image_encoder in (False, True):
            model = deepcopy(pipeline.animator)
            trained = model.trained_parameters(choice, stage, image_encoder)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trained)
            model(**batch(frames=2)).square().mean().backward()
            with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
            assert trained and with_gradient == trained
            parts = {name.split(".")[0] for name in trained}
            assert ("image_encoder" in parts) == (choice == "full" and image_encoder)
            expected = {"person": {"unet", "background_control_net"}, "temporal": set(model.adapted_networks)}
            assert parts == expected.get(choice, parts)


def test_checkpointing_changes_no_gradient(temporal_pipeline):
    gradients = []
    for checkpointing in (False, True):
        model = deepcopy(temporal_pipeline.animator).train()
        for network in (model.unet, model.pose_control_net, model.background_control_net):
            if checkpointing:
                network.enable_gradient_checkpointing()
        model(**batch(1)).square().mean().backward()
        gradients.append(
            model.background_control_net.mid_block.attentions[0].transformer_blocks[0].tem_attn.to_q.weight.grad
        )
    assert gradients[0].abs().max() > 0 and torch.allclose(*gradients, atol=1e-7)


def test_new_small_networks_predict_and_start_without_effect_of_conditions():
    """What `train.py model.animator=disco` starts with: ControlNets whose outputs are zero."""
    model = DisCo.small(TINY, 4, 8)
    both = batch()
    with torch.no_grad():
        predicted = model(**both)
        assert predicted.shape == both["noisy_latents"].shape
        for name in ("poses", "reference_latents"):
            assert torch.equal(predicted, model(**both | {name: 0 * both[name]}))
        assert not torch.allclose(predicted, model(**both | {"reference_image": -both["reference_image"]}), atol=1e-5)
    assert torch.equal(model.token_projection.linear.weight, model.image_encoder.visual_projection.weight)
    model.check_size(4, (32, 24))
    with pytest.raises(UserError, match=r"pose_channels=\[8, 8, 8\] make pose images 4 times smaller"):
        model.check_size(8, (32, 24))
