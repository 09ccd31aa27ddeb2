"""From published files to a pipeline folder that `infer.py model=` and `train.py model.init=` take."""

from collections.abc import Callable
from pathlib import Path

from core.errors import UserError
from core.files import complete_folder
from models.animators.registry import PIPELINES, read_index
from models.checkpoints.convert_animate_anyone import animate_anyone, stable_diffusion
from models.checkpoints.convert_disco import disco
from models.checkpoints.convert_dream_pose import dream_pose
from models.checkpoints.convert_magic_animate import magic_animate
from models.checkpoints.sources import DTYPES, ConvertConfig, Sources
from models.pipeline import AnimationPipeline

# Family -> what makes a pipeline of its files. A new family adds a line here, its files to `sources.ConvertConfig` and
# `sources.PLACES`, and its schedule to `models.schedules`.
BUILDERS: dict[str, Callable[[Sources], AnimationPipeline]] = {
    "animate_anyone": animate_anyone,
    "musepose": animate_anyone,
    "magic_animate": magic_animate,
    "dreampose": dream_pose,
    "disco": disco,
    "stable_diffusion": stable_diffusion,
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
        ours = read_index(output).get("_class_name") in PIPELINES
    except UserError:
        ours = False
    if not ours:
        raise UserError(f"output={output} exists and is no pipeline folder of this project; give a new folder")
