"""Known answers of MagicAnimate."""

from collections.abc import Iterator

from torch import Tensor

from models.animators.magic_animate.networks import control_residuals
from models.attention.context import fused_layers, same_reference
from models.checkpoints.fixture import Fixture
from models.checkpoints.networks import load_control_net, load_denoising_unet, load_reference_net

FILES = frozenset({"appearance_encoder", "densepose_controlnet", "temporal_attention"})


def outputs(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Pairs of output name and result."""
    sizes = fixture.unet_sizes()
    encoder = load_reference_net(fixture.checkpoint("appearance_encoder"), "appearance_encoder", sizes)
    control_net = load_control_net(fixture.checkpoint("densepose_controlnet"), "densepose_controlnet", sizes)
    unet = load_denoising_unet(
        fixture.checkpoint("temporal_attention"),
        "temporal_attention",
        fixture.norm_scope(),
        sizes,
        fixture.motion_sizes(),
    )

    inputs = fixture.inputs
    latents, timestep = inputs["noisy_latents"], inputs["timestep"]
    clips, _, num_frames = latents.shape[:3]
    context = repeated(inputs["text_embeds"], clips)
    poses = repeated(inputs["pose_images"], clips * num_frames)
    residuals = control_residuals(control_net, latents, timestep, context, poses)
    for number, residual in enumerate(residuals):
        yield f"control_residual_{number:02d}", residual
    yield "prediction_plain", unet(latents, timestep, context)
    yield "prediction_pose", unet(latents, timestep, context, residuals=residuals)

    own = fixture.config["reference_timestep"]
    # One reference may serve several clips, each of which has its own timestep.
    references = repeated(inputs["ref_latents"], max(len(inputs["ref_latents"]), timestep.numel()))
    tokens = encoder(references, own if isinstance(own, int) else timestep, context[: len(references)])
    for name, layer in fixture.reference_layers().items():
        if layer in tokens:
            yield name, tokens[layer]
    tokens = {layer: repeated(value, clips) for layer, value in tokens.items()}
    predictions = {}
    for blocks in ("midup", "full"):
        seen = same_reference(fused_layers(tokens, blocks), num_frames)
        predictions[blocks] = unet(latents, timestep, context, reference=seen, residuals=residuals)
        yield f"prediction_reference_{blocks}", predictions[blocks]
    yield "guidance_uncond", unet(latents, timestep, context, residuals=residuals)
    yield "guidance_cond", predictions[fixture.config["fusion_blocks"]]


def repeated(shared: Tensor, count: int) -> Tensor:
    """Rows that all clips share, once for each."""
    return shared.repeat(count // len(shared), *[1] * (shared.ndim - 1))
