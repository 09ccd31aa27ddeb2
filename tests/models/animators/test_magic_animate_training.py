"""MagicAnimate in training: its forward, what is trained, and `train.py` from new networks to an animation."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import infer
from core.errors import UserError
from data.video.files import read_video
from models.animators.magic_animate.model import PROMPT_TOKENS, MagicAnimate, MagicAnimatePipeline, control_residuals
from models.animators.registry import load_pipeline
from models.attention.context import ReferenceContext, fused_layers, same_reference
from models.attention.layers import token_levels
from models.attention.probe import AttentionProbe
from models.unets import ClipGroupNorm
from tests.clips import save_rendered_pair
from tests.networks import TINY
from tests.training_runs import TINY_NETWORKS, make_vae, train, weights
from training.build import enable_gradient_checkpointing, set_trainable
from training.config import TrainConfig

CHANNELS, SIZE, LATENTS = 4, 32, (8, 8)
GIVEN = {
    "reference": "reference.png",
    "driving": "driving.mp4",
    "reference_poses": "reference.npz",
    "driving_poses": "driving.npz",
    "reference_mask": "reference_mask.png",
    "driving_masks": "driving_masks",
}


def small_model(stage: str | None = None, trainable: str | None = None) -> MagicAnimate:
    """Tiny networks without a zero anywhere, with what a stage trains chosen; None: as they are made."""
    torch.manual_seed(0)
    model = MagicAnimate.small(TINY, CHANNELS, SIZE // 4).train()
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    if stage is not None:
        set_trainable(model, TrainConfig(stage=stage, output="x", trainable=trainable, model=TINY))
    return model


def inputs(batch: int = 2, frames: int = 1, calibrated: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of `forward`, of other noise levels for every sample."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "noisy_latents": draw(batch, CHANNELS, frames, *LATENTS),
        "timestep": torch.arange(batch) * 300 + 100,
        "reference_latents": draw(batch * (1 + calibrated), CHANNELS, *LATENTS),
        "reference_image": draw(batch, 3, SIZE, SIZE).clamp(-1, 1),
        "poses": draw(batch, 3, frames, SIZE, SIZE).sigmoid(),
        "dropped": torch.zeros(batch, dtype=torch.bool),
    }


def of_sample(arguments: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    return {name: value[[number]] for name, value in arguments.items()}


def test_new_networks_start_without_effect_of_poses_and_read_figures():
    torch.manual_seed(0)
    model = MagicAnimate.small(TINY, CHANNELS, SIZE // 4)
    assert model.pose_kind == "OpenPose" and model.fusion_blocks == "midup"
    assert model.prompt().shape == (1, PROMPT_TOKENS, TINY.context_dim) and model.prompt().std() > 0.5
    assert model.denoising_unet.config.norm_scope == "clip"
    arguments = inputs(frames=2)
    with torch.no_grad():
        posed, unposed = (model(**arguments | {"poses": p}) for p in (arguments["poses"], 0 * arguments["poses"]))
    assert posed.shape == arguments["noisy_latents"].shape and torch.equal(posed, unposed)
    model.check_size(4, (SIZE, SIZE))
    with pytest.raises(UserError, match=r"pose_channels=\[8, 8, 8\] make pose images 4 times smaller"):
        model.check_size(8, (SIZE, SIZE))


def test_forward_is_what_the_denoising_loop_computes():
    """The encoder at each sample's timestep, the ControlNet, middle and upward blocks that see the reference."""
    model, arguments = small_model().eval(), inputs(frames=3)
    with torch.no_grad():
        both = model(**arguments)
        for j in range(2):
            one = of_sample(arguments, j)
            context, time = model.prompt(), one["timestep"]
            tokens = fused_layers(model.reference_net(one["reference_latents"], time, context), "midup")
            poses = one["poses"][0].transpose(0, 1)
            residuals = control_residuals(model.control_net, one["noisy_latents"], time, context, poses)
            seen = same_reference(tokens, 3)
            expected = model.denoising_unet(one["noisy_latents"], time, context, reference=seen, residuals=residuals)
            assert torch.allclose(both[[j]], expected, atol=1e-5)


def test_dropped_samples_see_no_reference_and_keep_the_pose():
    model, arguments = small_model("image"), inputs()
    with torch.no_grad():
        arguments["dropped"][1] = True
        result = model(**arguments)
        other = arguments | {"reference_latents": -arguments["reference_latents"]}
        changed = (model(**other) - result).abs().amax(dim=(1, 2, 3, 4))
        assert changed[0] > 1e-4 and changed[1] < 1e-5
        other = arguments | {"poses": 1 - arguments["poses"]}
        assert ((model(**other) - result).abs().amax(dim=(1, 2, 3, 4)) > 1e-4).all()
        alone = model.denoising_unet(
            arguments["noisy_latents"][[1]],
            arguments["timestep"][[1]],
            model.prompt(),
            residuals=control_residuals(
                model.control_net,
                arguments["noisy_latents"][[1]],
                arguments["timestep"][[1]],
                model.prompt(),
                arguments["poses"][1].transpose(0, 1),
            ),
        )
        assert torch.allclose(result[[1]], alone, atol=1e-5)


def test_calibrated_images_are_seen_and_belong_to_their_clip():
    model, arguments = small_model("image"), inputs(calibrated=1)
    index = torch.tensor([[0, 2], [1, 3]])
    both = ReferenceContext({}, index)
    with torch.no_grad():
        result = model(**arguments, reference=both)
        without = model(**arguments, reference=replace(both, index=index[:, :1]))
        assert ((result - without).abs().amax(dim=(1, 2, 3, 4)) > 1e-4).all()
        for j in range(2):
            one = of_sample(arguments, j) | {"reference_latents": arguments["reference_latents"][[j, 2 + j]]}
            alone = model(**one, reference=replace(both, index=torch.tensor([[0, 1]])))
            assert torch.allclose(result[[j]], alone, atol=1e-5)


def test_single_frames_pass_at_once_and_as_if_each_alone():
    """Norms over clips are norms over frames here; in evaluation a batch passes clip by clip."""
    model, arguments = small_model("image"), inputs(batch=3)
    rows = []
    norm = model.denoising_unet.conv_norm_out
    hook = norm.register_forward_hook(lambda module, given, result: rows.append(len(result)))
    with torch.no_grad():
        at_once = model(**arguments)
        assert isinstance(norm, ClipGroupNorm) and rows == [3]
        one_by_one = model.eval()(**arguments)
        assert rows == [3, 1, 1, 1] and torch.allclose(at_once, one_by_one, atol=1e-5)
        several = inputs(batch=1, frames=3)
        model(**several)
        assert rows[-1] == 3 and model.denoising_unet.config.norm_scope == "clip"
        with pytest.raises(ValueError, match="clips must have one frame after train_on_single_frames"):
            model.train()(**inputs(batch=1, frames=2))
        model.prepare_stage("motion")
        assert torch.allclose(model(**several), model.eval()(**several), atol=1e-5)
    hook.remove()


@pytest.mark.parametrize(
    ("stage", "trainable"),
    [("image", "full"), ("motion", "motion"), ("motion", "full"), ("image", "lora"), ("motion", "lora")],
)
def test_every_trained_parameter_gets_a_gradient_and_no_other(stage, trainable):
    model = small_model(stage, trainable)
    if trainable == "lora":
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    arguments = inputs(frames=1 if stage == "image" else 2)
    arguments["dropped"][1] = True
    model(**arguments).square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained == moved != set()
    parts = {name.split(".")[0] for name in trained}
    assert parts == ({"denoising_unet"} if trainable == "motion" else parts)
    assert ("prompt" in parts) == (trainable == "full") and ("control_net" in parts) == (trainable != "motion")
    assert any("motion_modules" in name for name in trained) == (stage == "motion")


def test_published_prompts_stay_and_other_choices_are_refused():
    model = small_model()
    for stage in ("image", "motion"):
        assert "prompt.embedding" not in model.trained_parameters("full", stage, image_encoder=False)
    with pytest.raises(UserError, match="trainable=motion is not one of full, lora"):
        small_model("image", "motion")


@pytest.mark.parametrize("stage", ["image", "motion"])
def test_checkpointing_changes_no_gradient(stage):
    found = []
    for checkpointing in (False, True):
        model = small_model(stage, "full")
        if checkpointing:
            enable_gradient_checkpointing(model)
        model(**inputs(frames=1 if stage == "image" else 2)).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert found[0].abs().max() > 0 and torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("stage", ["image", "motion"])
def test_a_probe_sees_the_middle_and_upward_blocks_of_all_clips(stage):
    """Clips that pass one after another are noted like those that pass at once, with gradients."""
    frames = 1 if stage == "image" else 2
    model, arguments = small_model(stage, "full"), inputs(frames=frames)
    layers = model.attention_layers(LATENTS)
    levels = token_levels(layers)
    queries = {level.tokens: torch.randint(level.tokens, (2 * frames, 3)) for level in levels}
    probe = AttentionProbe(queries)
    model(**arguments, probe=probe)
    assert set(probe.maps) == set(layers) and not any(name.startswith("down_blocks.") for name in layers)
    for layer, maps in probe.maps.items():
        assert maps.shape == (2 * frames, layers[layer].heads, 3, 2 * layers[layer].tokens)
        assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5)
    for j in range(2):
        rows = slice(j * frames, (j + 1) * frames)
        alone = AttentionProbe({tokens: chosen[rows] for tokens, chosen in queries.items()})
        model(**of_sample(arguments, j), probe=alone)
        assert all(torch.allclose(maps, probe.maps[layer][rows], atol=1e-5) for layer, maps in alone.maps.items())
    sum(maps[..., 0].sum() for maps in probe.maps.values()).backward()
    assert model.reference_net.conv_in.weight.grad.abs().max() > 0


def test_train_writes_a_pipeline_that_animates_with_tpc(tmp_path):
    """New networks by `model.animator`, then the motion stage from what they became, then `infer.py` with these."""
    quick = ["max_steps=1", "batch_size=2", "mixed_precision=no", "data.size=[32,32]", "data.workers=0"]
    first = [f"output={tmp_path / 'image'}", "stage=image", "model.animator=magic_animate", *TINY_NETWORKS]
    first += [f"model.vae={make_vae(tmp_path / 'vae')}", "model.train_image_encoder=true", "attention.weight=0.1"]
    first += ["augmentation.calibrated.probability=0.5", "export_dtype=float16"]
    train(tmp_path / "image.log", *first, *quick)
    images = tmp_path / "image" / "pipeline"
    loaded = load_pipeline(images)
    assert type(loaded) is MagicAnimatePipeline and loaded.pose_kind == "OpenPose"
    assert loaded.denoising_unet.config.norm_scope == "clip"

    second = [f"output={tmp_path / 'motion'}", "stage=motion", f"model.init={images}", "data.num_frames=2"]
    train(tmp_path / "motion.log", *second, *quick)
    clips = tmp_path / "motion" / "pipeline"
    before, after = weights(images), weights(clips)
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed and all("motion_modules" in name for name in changed)

    (tmp_path / "inputs").mkdir()
    save_rendered_pair(tmp_path / "inputs")
    given = [f"{name}={tmp_path / 'inputs' / file}" for name, file in GIVEN.items()]
    infer.main([*given, f"model={clips}", f"output={tmp_path / 'result'}", "steps=1", "num_frames=2"])
    written = json.loads((tmp_path / "result" / "result.json").read_text(encoding="utf-8"))
    assert written["calibration"]["calibrated"] == 2
    assert read_video(tmp_path / "result" / "animation.mp4").frames.shape == (2, 32, 32, 3)
