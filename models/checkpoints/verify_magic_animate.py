"""Known answers of MagicAnimate."""

from collections.abc import Iterator

from torch import Tensor

from models.checkpoints.fixture import Fixture
from models.checkpoints.networks import load_control_net, load_denoising_unet, load_reference_net
from models.magic_animate import control_residuals
from models.reference_attention import fused_layers, same_reference

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
    context, latents, timestep = inputs["text_embeds"], inputs["noisy_latents"], inputs["timestep"]
    residuals = control_residuals(control_net, latents, timestep, context, inputs["pose_images"])
    for number, residual in enumerate(residuals):
        yield f"control_residual_{number:02d}", residual
    yield "prediction_plain", unet(latents, timestep, context)
    yield "prediction_pose", unet(latents, timestep, context, residuals=residuals)

    own = fixture.config["reference_timestep"]
    tokens = encoder(inputs["ref_latents"], own if isinstance(own, int) else timestep, context)
    for name, layer in fixture.reference_layers().items():
        if layer in tokens:
            yield name, tokens[layer]
    predictions = {}
    for blocks in ("midup", "full"):
        seen = same_reference(fused_layers(tokens, blocks), latents.shape[2])
        predictions[blocks] = unet(latents, timestep, context, reference=seen, residuals=residuals)
        yield f"prediction_reference_{blocks}", predictions[blocks]
    yield "guidance_uncond", unet(latents, timestep, context, residuals=residuals)
    yield "guidance_cond", predictions[fixture.config["fusion_blocks"]]
