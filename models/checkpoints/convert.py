"""From published files to a pipeline folder that `infer.py model=` and `train.py model.init=` take."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from omegaconf import MISSING
from torch import Tensor
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from core.errors import UserError
from core.files import complete_folder
from models.checkpoints.files import read_tensors
from models.checkpoints.folders import load_folder
from models.checkpoints.kinds import OTHER_KINDS, SINGLE_FILE
from models.checkpoints.networks import (
    load_control_net,
    load_denoising_unet,
    load_image_unet,
    load_pose_guider,
    load_reference_net,
    pose_guider_from_control_net,
    with_motion,
)
from models.magic_animate import MagicAnimatePipeline, PromptEmbedding
from models.pipeline import AnimationPipeline
from models.schedules import published_scheduler
from models.unets import DenoisingUNet, PoseGuider, ReferenceNet

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Frames that the published models were trained on at a time.
WINDOWS = {"animate_anyone": 24, "musepose": 48, "stable_diffusion": None, "magic_animate": 16}
# Length of the position tables that MusePose computes, whatever lies in its file.
MUSEPOSE_LENGTH = 128


@dataclass
class ConvertConfig:
    """`convert`: files of one family -> a pipeline folder.

    family: "animate_anyone", "musepose", "magic_animate", or "stable_diffusion", from which to train an AnimateAnyone.
    output: the folder to write.
    dtype: of the weights written: float32, float16 or bfloat16.
    weights: folder that holds the files under their published names; each can also be given by itself:
        animate_anyone, musepose: denoising_unet, motion_module, reference_unet, pose_guider, image_encoder, vae;
            controlnet instead of pose_guider starts a new one
        magic_animate: appearance_encoder, densepose_controlnet, temporal_attention, text_encoder, vae
        stable_diffusion: unet, controlnet, image_encoder, vae, and optionally motion_module
    """

    family: str = MISSING
    output: str = MISSING
    dtype: str = "float32"
    weights: str | None = None
    denoising_unet: str | None = None
    motion_module: str | None = None
    reference_unet: str | None = None
    pose_guider: str | None = None
    appearance_encoder: str | None = None
    densepose_controlnet: str | None = None
    temporal_attention: str | None = None
    unet: str | None = None
    controlnet: str | None = None
    image_encoder: str | None = None
    text_encoder: str | None = None
    vae: str | None = None


# Where the files lie in the folders that the publishers' instructions lead to; the first that exists is taken.
PLACES = {
    "denoising_unet": ("denoising_unet.pth",),
    "motion_module": ("motion_module.pth", "mm_sd_v15_v2.ckpt"),
    "reference_unet": ("reference_unet.pth",),
    "pose_guider": ("pose_guider.pth",),
    "appearance_encoder": ("appearance_encoder", "MagicAnimate/appearance_encoder"),
    "densepose_controlnet": ("densepose_controlnet", "MagicAnimate/densepose_controlnet"),
    "temporal_attention": (
        "temporal_attention/temporal_attention.ckpt",
        "MagicAnimate/temporal_attention/temporal_attention.ckpt",
        "temporal_attention.ckpt",
    ),
    "unet": ("unet", "stable-diffusion-v1-5/unet"),
    "controlnet": ("control_v11p_sd15_openpose", "controlnet"),
    "image_encoder": ("image_encoder",),
    "text_encoder": ("text_encoder", "stable-diffusion-v1-5/text_encoder"),
    "vae": ("sd-vae-ft-mse", "vae"),
}


def convert(config: ConvertConfig) -> list[str]:
    """Load everything strictly, then write the folder, which appears when it is complete.

    Returns:
        What the user should know about the result, in sentences; often none.

    Raises:
        UserError: an unknown family or dtype, a missing file, one that does not fit, or an output folder that holds
            something else than an earlier result.
    """
    if config.family not in BUILDERS:
        raise UserError(f"family={config.family} is not one of {', '.join(BUILDERS)}")
    if config.dtype not in DTYPES:
        raise UserError(f"dtype={config.dtype} is not one of {', '.join(DTYPES)}")
    check_output(Path(config.output))
    sources = Sources(config)
    pipeline = BUILDERS[config.family](sources)
    with complete_folder(config.output) as folder:
        pipeline.save_pretrained(folder)
    return sources.notes


def check_output(output: Path) -> None:
    """Refuse a folder that would be replaced although it is no pipeline of ours, such as that of the weights."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        index = json.loads((output / "model_index.json").read_text(encoding="utf-8"))
        ours = index["_class_name"] in (AnimationPipeline.__name__, MagicAnimatePipeline.__name__)
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"output={output} exists and is no pipeline folder of this project; give a new folder")


class Sources:
    """The files that a conversion names."""

    def __init__(self, config: ConvertConfig):
        self.config = config
        self.dtype = DTYPES[config.dtype]
        self.notes: list[str] = []

    def path(self, name: str, required: bool = True) -> Path | None:
        """The file or folder given as `name=`, or found in `weights=`."""
        if (given := getattr(self.config, name)) is not None:
            return Path(given)
        if self.config.weights is not None:
            folder, places = Path(self.config.weights), PLACES[name]
            if self.config.family == "musepose":  # beside AnimateAnyone's, its files lie in a folder of their own
                places = (*(f"MusePose/{place}" for place in places), *places)
            for place in places:
                if (folder / place).exists():
                    return folder / place
        if required:
            where = f" and not in weights={self.config.weights}" if self.config.weights else ""
            raise UserError(f"{name}= is required for family={self.config.family}{where}")
        return None

    def tensors(self, name: str) -> tuple[dict[str, Tensor], str]:
        """Tensors of a file, and the file's name for errors."""
        path = self.path(name)
        tensors = read_tensors(path, name)
        if any(key.startswith(SINGLE_FILE) for key in tensors):
            raise UserError(f"{name}={path} is {OTHER_KINDS[SINGLE_FILE]}")
        return tensors, f"{name}={path}"

    def load(self, name: str, build: Callable[..., torch.nn.Module], **arguments: object) -> torch.nn.Module:
        """The network that `build` makes of a file."""
        tensors, what = self.tensors(name)
        return build(tensors, what, dtype=self.dtype, **arguments)

    def folder(self, name: str, kind: type, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """A network from a folder of diffusers or transformers."""
        path = self.path(name)
        return load_folder(kind, path, f"{name}={path}", dtype or self.dtype)

    def new_pose_guider(self) -> PoseGuider:
        """The pose guider that training starts with."""
        self.notes.append("the pose guider is new: until it is trained, poses have no effect")
        return self.load("controlnet", pose_guider_from_control_net)


def animate_anyone(sources: Sources) -> AnimationPipeline:
    """AnimateAnyone as Moore Threads published it, and MusePose, which has the same files."""
    unet, unet_name = sources.tensors("denoising_unet")
    motion, motion_name = sources.tensors("motion_module")
    if not any(".motion_modules." in name for name in motion):
        raise UserError(f"{motion_name} holds no motion modules")
    denoising_unet = load_denoising_unet(
        with_motion(unet, motion),
        f"{unet_name} with {motion_name}",
        "frame",
        dtype=sources.dtype,
        length=MUSEPOSE_LENGTH if sources.config.family == "musepose" else None,
    )
    reference_net = sources.load("reference_unet", load_reference_net)
    if sources.path("pose_guider", required=sources.config.controlnet is None) is None:
        pose_guider = sources.new_pose_guider()
    else:
        pose_guider = sources.load("pose_guider", load_pose_guider)
    return animate_anyone_pipeline(sources, reference_net, denoising_unet, pose_guider)


def stable_diffusion(sources: Sources) -> AnimationPipeline:
    """Base weights for training: both UNets from Stable Diffusion, the pose guider from a ControlNet.

    Without `motion_module=` the motion modules are new.
    """
    unet, what = sources.tensors("unet")
    if sources.path("motion_module", required=False) is None:
        sources.notes.append("the motion modules are new: until they are trained, frames know nothing of each other")
        denoising_unet = load_image_unet(unet, what, sources.dtype)
    else:
        motion, motion_name = sources.tensors("motion_module")
        denoising_unet = load_denoising_unet(
            with_motion(unet, motion), f"{what} with {motion_name}", "frame", dtype=sources.dtype
        )
    denoising_unet.use_motion_on_single_frames(False)
    reference_net = load_reference_net(unet, what, dtype=sources.dtype)
    return animate_anyone_pipeline(sources, reference_net, denoising_unet, sources.new_pose_guider())


def animate_anyone_pipeline(
    sources: Sources, reference_net: ReferenceNet, denoising_unet: DenoisingUNet, pose_guider: PoseGuider
) -> AnimationPipeline:
    """The networks with image encoder, VAE and schedule."""
    family = sources.config.family
    image_encoder = sources.folder("image_encoder", CLIPVisionModelWithProjection)
    vae = sources.folder("vae", AutoencoderKL)
    width, context = denoising_unet.config.block_out_channels[0], denoising_unet.config.cross_attention_dim
    check_fit(reference_net, denoising_unet, vae)
    if pose_guider.config.conditioning_embedding_channels != width:
        channels = pose_guider.config.conditioning_embedding_channels
        raise UserError(f"the pose guider gives {channels} channels, the denoising UNet takes {width}")
    if image_encoder.config.projection_dim != context:
        dimension = image_encoder.config.projection_dim
        raise UserError(f"image_encoder= gives {dimension} channels, the UNets' cross-attention takes {context}")
    return AnimationPipeline(
        vae=vae,
        image_encoder=image_encoder,
        reference_net=reference_net,
        denoising_unet=denoising_unet,
        pose_guider=pose_guider,
        scheduler=published_scheduler(family),
        window_size=WINDOWS[family],
    )


def magic_animate(sources: Sources) -> MagicAnimatePipeline:
    """MagicAnimate as published."""
    reference_net = sources.load("appearance_encoder", load_reference_net)
    denoising_unet = sources.load("temporal_attention", load_denoising_unet, norm_scope="clip")
    vae = sources.folder("vae", AutoencoderKL)
    check_fit(reference_net, denoising_unet, vae)
    return MagicAnimatePipeline(
        vae=vae,
        reference_net=reference_net,
        denoising_unet=denoising_unet,
        control_net=sources.load("densepose_controlnet", load_control_net),
        prompt=empty_prompt(sources.folder("text_encoder", CLIPTextModel, torch.float32)).to(sources.dtype),
        scheduler=published_scheduler("magic_animate"),
        window_size=WINDOWS["magic_animate"],
    )


@torch.no_grad()
def empty_prompt(text_encoder: CLIPTextModel) -> PromptEmbedding:
    """The tokens of a prompt without words: its start, then ends up to the encoder's full length.

    The last two entries of CLIP's vocabulary are start and end; the numbers in published configurations are wrong.
    """
    config = text_encoder.config
    tokens = torch.full((1, config.max_position_embeddings), config.vocab_size - 1)
    tokens[:, 0] = config.vocab_size - 2
    prompt = PromptEmbedding(config.max_position_embeddings, config.hidden_size)
    prompt.embedding.data = text_encoder(tokens).last_hidden_state
    return prompt.eval()


def check_fit(reference_net: ReferenceNet, denoising_unet: DenoisingUNet, vae: AutoencoderKL) -> None:
    """Refuse networks that do not belong together."""
    ours, theirs = denoising_unet.config, reference_net.config
    for name in ("block_out_channels", "layers_per_block", "in_channels", "cross_attention_dim"):
        if ours[name] != theirs[name]:
            raise UserError(f"{name} is {theirs[name]} in the reference net and {ours[name]} in the denoising UNet")
    if vae.config.latent_channels != ours.in_channels:
        raise UserError(f"vae= has {vae.config.latent_channels} latent channels, the UNets take {ours.in_channels}")


BUILDERS: dict[str, Callable[[Sources], AnimationPipeline]] = {
    "animate_anyone": animate_anyone,
    "musepose": animate_anyone,
    "magic_animate": magic_animate,
    "stable_diffusion": stable_diffusion,
}
