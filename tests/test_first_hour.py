"""The commands and Python of README.md and docs/ as a reader types them.

A fenced block without a language is typed into a shell, a `python` block into Python; `text` and `bibtex` are neither.
The quick tests read all of them: arguments are those of the commands' configurations, names can be imported. The
`first_hour` test types them one after the other in one folder, smaller by `SMALLER`, all but `NOT_TYPED`:

    python -m pytest -m first_hour
"""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from data.clips.rendered import RenderedPeople
from data.poses.poses import Poses
from data.video.files import read_video, write_video

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TRAINED = "max_steps=1 batch_size=1 gradient_accumulation=1 total_batch_size=null log_steps=1 validation.steps=0"
TRAINED += " optimizer.name=adamw data.workers=0 data.size=[64,64] data.cache_clips=2"
MEASURED = "seeds=[0] sampling.steps=1"

# Command -> arguments that make it small; of two for one key the later wins.
SMALLER = {
    r"infer\.py.*model=weights": "steps=1 num_frames=2 size=[64,64] tpc.min_iou=0",
    r"infer\.py": "steps=1 num_frames=2",
    r"-m tpc .*heavy": "max_frames=2 pose.heavy=false",
    r"-m tpc ": "max_frames=2",
    r"train\.py.*--dry-run": "model.init=assets/tiny_model data.size=[64,64] total_batch_size=1 batch_size=1",
    r"train\.py.*(stage2|dreampose|lora)": f"{TRAINED} data.num_frames=2 data.stride=1",
    r"train\.py": TRAINED,
    r"-m training\.vae": "max_steps=1 batch_size=1 data.workers=0 data.cache_clips=2 data.size=[64,64] width=8",
    r"prepare\.py check": "size=[64,64] num_frames=2 stride=1",
    r"prepare\.py latents": "size=[64,64]",
    r"evaluate\.py metrics": "measures=[psnr,ssim]",  # networks take a minute
    r"evaluate\.py sweep": f"{MEASURED} clips=1 frames=1 angles=1 scales=[1.0]",
    r"evaluate\.py ablation": f"{MEASURED} clips=1 frames=2 transforms=[procrustes] propagations=[off] "
    "measures=[psnr]",
    r"evaluate\.py table": f"{MEASURED} clips=2 frames=2 measures=[psnr]",
    r"evaluate\.py attention": f"{MEASURED} clips=2 frames=1 columns=1",
    r"evaluate\.py misalignment .*variants": f"{MEASURED} clips=1 kinds=[scale] 'variants=[\"smoothing=0\"]'",
    r"evaluate\.py misalignment": f"{MEASURED} clips=1 kinds=[scale] presets=[best]",
    r"evaluate\.py animators": f"{MEASURED} clips=1 kinds=[aligned,scale]",
    r"-m benchmarks\.calibration_accuracy": "pairs=2 clips=1",
    r"-m benchmarks\.calibrated_pictures": "clips=1",
    r"-m benchmarks\.calibration_speed": "pairs=1 frames=2 long_frames=2 video_seconds=0",
    r"-m benchmarks\.pose_jitter": "clips=1 frames=12",
    r"-m benchmarks\.references\.scene_filling": "side=64",
    r"-m benchmarks\.references\.segments": "clips=1 frames=4 length=2",
    r"-m benchmarks\.gpu_check": "size=tiny device=cpu parts=[attention]",
    r"-m benchmarks\.speed ": "parts=[loading] loading_steps=1 repeats=1 batch_size=1 workers=[0]",
    r"-m benchmarks\.training_strategies": "steps=2 strategies=[cpu]",
}
# Part of a command -> why it cannot be typed here; its arguments are read all the same.
NOT_TYPED = {
    "make test": "these tests",
    "make gpu-check": "a GPU",
    "checkpoints inspect": "published weights; tests/models/checkpoints has files of their layout",
    "checkpoints convert": "published weights; tests/models/checkpoints has files of their layout",
    "checkpoints verify": "fixtures lie outside the repository; tests/models/checkpoints/test_parity.py makes one",
    "inference.embeddings": "published encoders; tests/models/animators/test_wan_animate_commands.py has small ones",
    "embeddings=words": "follows it",
    "vae_dreampose.yaml": "a published autoencoder; tests/training/test_vae_training.py trains a small one",
    "cp runs/subject_vae": "follows it",
    "num_processes 8": "eight GPUs",
    "num_processes 4": "four GPUs",
    "peers.compare": "a peer's code and environment",
    "requirements-viewer.txt": "an installation from the package index",
    "poses.weights heavy": "a package of npm; pose.heavy=true is left out of what follows",
    "python -m viewer": "a server, which runs until it is stopped; tests/inference/test_viewer_page.py starts it",
}
# Part of a Python block -> why it cannot be typed here.
NOT_TYPED_PYTHON = {
    "recording.begin": "lines of a training loop; tests/models/test_attention_recording.py has one",
    'ANIMATORS["tokens"]': "the module that the page tells to write",
    'pipeline = load_pipeline("weights/magic_animate")': "published weights",
    'torch.load("mp_rank_00_model_states.pt"': "a published file",
}
# Of libraries, and of what would be a mistake.
UNWANTED = ("Traceback", "FutureWarning", "DeprecationWarning", "RuntimeWarning", "XNNPACK", "AutoencoderTiny")
UNWANTED += ("Loading weights", "Setting accelerator", "defaults used")


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    place: str  # file:line
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    """Those of all pages in the order of reading, of some languages or all."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        page = path.read_text(encoding="utf-8")
        assert page.count("```") == 2 * len(FENCE.findall(page)), f"{path.name} has a fence within a line"
        for match in FENCE.finditer(page):
            place = f"{path.relative_to(ROOT)}:{page.count(chr(10), 0, match.start()) + 1}"
            found.append(Block(place, match[1], match[2]))
    return [block for block in found if not languages or block.language in languages]


def lines(block: Block) -> list[str]:
    """Lines as a shell reads them, those that end with a backslash joined."""
    return block.text.replace("\\\n", " ").splitlines()


def smaller(line: str) -> str:
    """A line with the arguments of `SMALLER` at the end, in place of its comment."""
    for command, arguments in SMALLER.items():
        if re.search(rf"(python|accelerate) .*{command}", line):
            return f"{re.split(r' +#', line)[0].rstrip()} {arguments}"
    return line


def typed_lines(block: Block) -> list[str]:
    """Lines of a shell that are typed here, made small."""
    return [smaller(line) for line in lines(block) if not any(part in line for part in NOT_TYPED)]


# Arguments and imports


@pytest.fixture(scope="module")
def typed(tmp_path_factory) -> list[tuple[str, list[str]]]:
    """(place, words) of every command, as a shell reads the blocks; loops are gone through."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    script = [r"""typed() { printf '%s\001' "$@"; printf '\002'; }"""]
    script += [f'{name}() {{ typed {name} "$@"; }}' for name in ("python", "accelerate", "make", "pip", "cp")]
    for block in blocks(""):
        script += [f"typed place {block.place}", block.text]
    done = subprocess.run(["bash", "-c", "\n".join(script)], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    place, commands = "", []
    for words in done.stdout.split("\2")[:-1]:
        name, *rest = words.split("\1")[:-1]
        if name == "place":
            place = rest[0]
        else:
            commands.append((place, [name, *rest]))
    return commands


def main_of(command: list[str]) -> tuple[str, list[str]]:
    """Module and arguments of `python ...` or `accelerate launch ...`."""
    if command[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        given = launch_command_parser().parse_args(command[2:])
        return given.training_script.removesuffix(".py"), given.training_script_args
    if command[1] != "-m":
        return command[1].removesuffix(".py"), command[2:]
    package = find_spec(command[2]).submodule_search_locations is not None
    return command[2] + ".__main__" * package, command[3:]


def test_every_command_is_there_with_its_arguments(typed, capsys):
    assert len(typed) > 60
    for place, command in typed:
        if command[0] not in ("python", "accelerate"):
            continue
        module, arguments = main_of(command)
        if arguments[:1] == ["inspect"]:
            continue  # takes names of files
        main = importlib.import_module(module).main
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--print-config"])
        assert ended.value.code == 0, f"{place}: {shlex.join(command)}"


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.place)
def test_python_can_be_read_and_its_imports_are_there(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def test_blocks_are_of_a_known_kind_and_the_tables_of_use():
    assert not [block.place for block in blocks() if block.language not in ("", "python", "text", "bibtex")]
    text = "\n".join(line for block in blocks("") for line in lines(block))
    assert not [part for part in NOT_TYPED if part not in text]
    assert not [command for command in SMALLER if not re.search(command, text)]
    text = "\n".join(block.text for block in blocks("python"))
    assert not [part for part in NOT_TYPED_PYTHON if part not in text]


# The hour


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the repository with an environment, and the files that a reader is told to have."""
    folder = tmp_path_factory.mktemp("hour") / "checkout"
    hidden = shutil.ignore_patterns(".*", "outputs", "runs", "__pycache__", "shared")
    shutil.copytree(ROOT, folder, ignore=hidden)
    makefile = folder / "Makefile"
    makefile.write_text(makefile.read_text().replace("infer.py steps=4", "infer.py steps=1 num_frames=2"))
    (folder / ".venv").mkdir()
    for name in ("bin", "lib", "lib64", "include", "pyvenv.cfg"):
        if (part := Path(sys.prefix) / name).exists():
            (folder / ".venv" / name).symlink_to(part)
    for done in (".runtime", ".development"):  # of `make`, which then installs nothing
        (folder / ".venv" / done).touch()

    samples = folder / "assets" / "samples"
    for name in ("photo.png", "sitting.png"):
        Image.open(samples / "photo.jpg").save(folder / name)
    for name in ("dance.mp4", "walking.mp4", "densepose.mp4"):
        shutil.copy(samples / "dance.mp4", folder / name)
    for name in ("videos", "densepose", "outputs/many", "path/to", "weights"):
        (folder / name).mkdir(parents=True)
    for number, name in enumerate(("first", "second")):
        item = RenderedPeople(size=(128, 128), num_frames=18, stride=1, seed=number, length=1)[0]
        frames = ((item["frames"].movedim(0, -1) + 1) * 127.5).round().byte().numpy()
        points = item["keypoints"].numpy()[:, None]
        write_video(folder / "videos" / f"{name}.mp4", frames, 24.0)
        Poses(points[..., :2], points[..., 2], (128, 128), 24.0).save(folder / "videos" / f"{name}.npz")
        for copied in ("outputs/many", "densepose"):
            shutil.copy(folder / "videos" / f"{name}.mp4", folder / copied)
    for number, frame in enumerate(read_video(samples / "dance.mp4").frames):
        Image.fromarray(frame).save(folder / "densepose" / f"{number:06d}.png")
    shutil.copytree(folder / "assets" / "tiny_model", folder / "BASE")
    for name, place in (("pipeline", "assets/tiny_model"), ("videos", "videos")):
        (folder / "path" / "to" / name).symlink_to(folder / place)
    for name in ("animate_anyone", "magic_animate", "disco", "dream_pose"):
        (folder / "weights" / name.replace("_p", "p")).symlink_to(folder / "assets" / "small_animators" / name)
    return folder


def typed_into(checkout: Path, *command: str) -> str:
    """What a shell or Python prints; fails for what ends badly, and for what a reader should not see."""
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, f"ended with {done.returncode}; what was printed is above"
    assert not [words for words in UNWANTED if words in done.stdout]
    return done.stdout


@pytest.mark.slow
@pytest.mark.first_hour
@pytest.mark.parametrize("block", [b for b in blocks("") if typed_lines(b)], ids=lambda block: block.place)
def test_commands_do_what_they_say(block, checkout):
    script = typed_lines(block)
    activated = [] if any("activate" in line for line in script) else [". .venv/bin/activate"]
    printed = typed_into(checkout, "bash", "-ec", "\n".join([*activated, *script]))
    if "make demo" in script[0]:
        following = re.search("^next: (.*)$", printed, re.MULTILINE)[1]
        typed_into(checkout, "bash", "-ec", smaller(following))


@pytest.mark.slow
@pytest.mark.first_hour
def test_python_does_what_it_says(checkout):
    written = [block.text for block in blocks("python") if not any(part in block.text for part in NOT_TYPED_PYTHON)]
    text = re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", "\n".join(written))
    text = text.replace("steps=[0, 7, 14]", "steps=[0, 1]").replace("step=14", "step=1")
    typed_into(checkout, str(checkout / ".venv" / "bin" / "python"), "-c", text)
