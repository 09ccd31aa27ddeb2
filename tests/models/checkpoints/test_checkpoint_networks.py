"""Networks from checkpoint files: strict loading, half precision, position tables, starts for training."""

import pytest
import torch

from core.errors import UserError
from models.animators.animate_anyone.checkpoint import (
    load_image_unet,
    load_pose_guider,
    pose_guider_from_control_net,
    with_motion,
)
from models.checkpoints.loading import module_names, position_length
from models.checkpoints.networks import UNetSizes, load_control_net, load_denoising_unet, load_reference_net
from models.checkpoints.verify import synthetic_tensors
from tests.published import (
    GUIDER_CHANNELS,
    MANIFESTS,
    published_tensors,
)

SD15 = UNetSizes()

LOADERS = {
    "reference_unet": lambda t: load_reference_net(t, "file"),
    "appearance_encoder": lambda t: load_reference_net(t, "file"),
    "pose_guider": lambda t: load_pose_guider(t, "file"),
    "densepose_controlnet": lambda t: load_control_net(t, "file"),
    "temporal_attention": lambda t: load_denoising_unet(t, "file", "clip"),
}


@pytest.mark.parametrize("file", LOADERS)
def test_every_tensor_arrives(file):
    tensors = published_tensors(file)
    network = LOADERS[file](tensors)
    state = network.state_dict()
    renamed = module_names(tensors)
    assert all(torch.equal(state[name], tensor) for name, tensor in renamed.items())
    others = [value for name, value in state.items() if name not in renamed]
    assert all(not value.is_meta for value in state.values())
    if file == "appearance_encoder":
        assert len(others) == 20 and all(not value.any() for value in others)
    assert not network.training


@pytest.mark.parametrize("file", LOADERS)
def test_wrong_tensors_are_named_and_counted(file):
    tensors = published_tensors(file)
    norms = [name for name in tensors if name.endswith(("norm1.bias", "conv_out.bias", "blocks.1.bias"))]
    missing = dict(tensors)
    del missing[norms[0]]
    with pytest.raises(UserError, match="missing 1: "):
        LOADERS[file](missing)
    extra = tensors | {f"extra_{number}.weight": torch.ones(1) for number in range(8)}
    with pytest.raises(UserError, match=r"unexpected 8: extra_0.weight, .*extra_4.weight, \.\.\."):
        LOADERS[file](extra)
    misshapen = tensors | {norms[0]: torch.ones(3)}
    with pytest.raises(UserError, match=r"misshapen 1: .*\[3\] instead of"):
        LOADERS[file](misshapen)
    integers = tensors | {norms[0]: tensors[norms[0]].int()}
    with pytest.raises(UserError, match="not floating point"):
        LOADERS[file](integers)


def test_files_of_another_family_are_refused():
    with pytest.raises(UserError, match="does not fit DenoisingUNet|position tables"):
        load_denoising_unet(published_tensors("denoising_unet"), "file", "frame")
    with pytest.raises(UserError, match="does not fit PoseGuider"):
        load_pose_guider(published_tensors("reference_unet"), "file")
    with pytest.raises(UserError, match="does not fit ReferenceNet"):
        load_reference_net(published_tensors("pose_guider"), "file")
    with pytest.raises(UserError, match="does not fit ControlNetModel"):
        load_control_net(published_tensors("denoising_unet"), "file")


def test_missing_motion_modules_are_an_error():
    base, motion = published_tensors("denoising_unet"), published_tensors("motion_module")
    with pytest.raises(UserError, match="motion modules are missing"):
        load_denoising_unet(base, "file", "frame")
    partial = {name: tensor for name, tensor in motion.items() if not name.startswith("up_blocks.1.")}
    with pytest.raises(UserError, match=r"missing \d+: up_blocks.1.motion_modules"):
        load_denoising_unet(with_motion(base, partial), "file", "frame")


def test_half_precision_is_converted():
    half = {name: tensor.half() for name, tensor in published_tensors("temporal_attention").items()}
    network = load_denoising_unet({f"module.unet.{name}": tensor for name, tensor in half.items()}, "file", "clip")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    network = load_denoising_unet(half, "file", "clip", dtype=torch.float16)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float16}


def test_position_tables_are_checked_not_trusted():
    motion = published_tensors("motion_module")
    assert position_length(motion, "file") == 32
    name = next(name for name in motion if name.endswith("pos_encoder.pe"))
    with pytest.raises(UserError, match="not the sinusoidal table"):
        position_length(motion | {name: motion[name] + 0.1}, "file")
    with pytest.raises(UserError, match="different lengths"):
        position_length(motion | {name: motion[name][:, :24]}, "file")


def test_complete_unets_serve_as_reference_nets():
    """A Stable Diffusion UNet has output layers, which a reference net leaves out."""
    full = synthetic_tensors(MANIFESTS["denoising_unet"](), seed=1)
    network = load_reference_net(full, "file")
    assert all(torch.equal(value, full[name]) for name, value in network.state_dict().items())


def test_new_motion_modules_change_nothing():
    unet = load_image_unet(published_tensors("denoising_unet"), "file")
    latents, context = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 1, 16)
    with torch.no_grad():
        clip = unet(latents, 3, context)
        frames = torch.cat([unet(latents[:, :, [frame]], 3, context) for frame in range(3)], dim=2)
    assert torch.allclose(clip, frames, atol=1e-5)
    assert all(not parameter.is_meta for parameter in unet.parameters())
    assert sum(p.abs().sum() > 0 for name, p in unet.named_parameters() if "motion_modules" in name) > 10


def test_pose_guider_starts_from_a_control_net():
    tensors = published_tensors("densepose_controlnet")
    guider = pose_guider_from_control_net(tensors, "file")
    assert guider.config.block_out_channels == GUIDER_CHANNELS
    for name, value in guider.state_dict().items():
        expected = tensors[f"controlnet_cond_embedding.{name}"]
        assert torch.equal(value, torch.zeros_like(expected) if name.startswith("conv_out.") else expected)
