"""Wrong arguments of every command: one line that names the key, before anything is loaded, exit code 2."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from core.errors import EXIT_CODE, UserError
from tests.commands import COMMANDS

ROOT = Path(__file__).parents[1]
BY_NAME = {str(command): command for command in COMMANDS}
TRAIN = "stage=image output=runs/x model.vae=assets/tiny_model/vae"
# Which import networks or a package that is not needed else; their arguments are checked before.
SCRIPTS = ("benchmarks.", "data.people.")
SAMPLING = (
    "guidance_scale=nan", "guidance_scale=inf", "guidance_scale=-1", "guidance_scale=high",
    "guidance_scales=3", "guidance_scales=[nan]", "guidance_scales=[]", "lora_scale=nan", "lora_scale=1e9",
    "seed=99999999999999999999", "seed=-1", "seed=1.5", "seed=true", "steps=0", "steps=1001", "steps=ten",
    "steps=[20]", "num_frames=0", "num_frames=-3", "stride=0", "stride=1e12", "size=[100000,128]",
    "size=128", "size=[128]", "size=[128,128,128]", "size=[130,128]", "size=[0,128]", "size=[a,b]",
    "size=[[1,2],3]", "size={w: 1}",
    "window_size=0", "window_size=100", "window_size=4 window_overlap=4", "window_overlap=-1", "solver=euler",
    "guidance_interval=[0.5]", "guidance_interval=[0.9,0.1]", "guidance_interval=[0,2]", "reference_fit=stretch",
    "compare=maybe", "upscale=4k", "device=tpu", "device=cuda:x", "dtype=float8", "cuts=[-1]", "cuts=3", "output=",
    "pose.max_persons=1000", "pose.max_persons=0", "pose.smoothing=-1", "pose.smoothing=nan", "pose.backend=openpose",
    "pose.weights=a,b", "pose.threads=0", "pose=5", "pose.retarget=bone", "pose.height_ratio=2",
    "pose.retarget=bones pose_images=assets", "tpc.preset=papr", "tpc.min_iou=2", "tpc.max_rotation=nan",
    "tpc.min_keypoints=1", "tpc.groups=-1", "tpc.start=-2", "tpc.seed=-1", "tpc.fill=white",
    "tpc.min_scale=5 tpc.max_scale=2",
    "tpc.enabled=perhaps", "tpc={}x", "reference=none.png driving=none.mp4", "pairs=none.jsonl", "model=none",
    "reference=none.png", "output=${x}",
)  # fmt: skip
TRAINING = (
    "optimizer.learning_rate=-1", "optimizer.learning_rate=nan", "optimizer.schedule=zigzag", "optimizer.name=sgd",
    "optimizer.beta1=1", "optimizer.warmup_steps=-1", "optimizer.max_grad_norm=0", "optimizer.max_grad_norm=nan",
    "optimizer.epsilon=-1", "optimizer.weight_decay=-1", "data.size=[128]", "data.size=[7,7]", "data.size=big",
    "data.stride=0", "data.num_frames=0", "data.workers=-1", "data.crop=left", "data.split=development",
    "data.source=web", "data.cache_clips=0", "data.sample_margin=-1", "data.people.tilted=2", "data.seed=-1",
    "data.people.height=[1]", "data.people.height=[1,0.5]", "data.root=none", "noise.num_train_timesteps=0",
    "noise.beta_start=2", "noise.beta_start=0.5 noise.beta_end=0.1", "noise.beta_end=1", "noise.snr_gamma=-1",
    "noise.beta_schedule=cubic", "noise.prediction_type=image", "noise.timestep_spacing=random",
    "noise.condition_dropout=1.5", "noise.person_weight=0", "noise.timestep_shift=0", "noise.noise_offset=-1",
    "model.norm_num_groups=7", "model.norm_num_groups=0", "model.attention_heads=[7]", "model.attention_heads=[4,4,4]",
    "model.block_out_channels=[]", "model.block_out_channels=[0]", "model.attention=[up]", "model.attention=[a,b]",
    "model.animator=animate_nobody", "model.pose_channels=[16]", "model.init=none", "model.image_encoder_patch=100",
    "model.layers_per_block=0", "lora.rank=0", "lora.alpha=0", "lora.export=both", "validation.preset=worst",
    "validation.clips=0", "validation.misaligned=2", "validation.num_inference_steps=0", "attention.weight=-1",
    "attention.radius=0", "augmentation.composition.probability=2", "augmentation.composition.min_scale=9",
    "augmentation.calibrated.keypoints=nose", "batch_size=0", "gradient_accumulation=0", "total_batch_size=0",
    "max_steps=0", "checkpoint_steps=0", "keep_checkpoints=0", "log_steps=0", "ema_decay=1", "max_skipped_steps=0",
    "mixed_precision=fp8", "frozen_dtype=int8", "export_dtype=bf16", "stage=video", "seed=4294967296", "vae_chunk=0",
    "dry_run=soon", "trainable=lora",
)  # fmt: skip
# Command -> (arguments that are right, wrong ones, each in a run of its own).
WRONG = {
    "infer.py": ("", SAMPLING),
    "-m inference.embeddings": ("model=assets/tiny_model output=x.safetensors", (
        "model=none", "output=x.pth", "reference=none.png size=[32,32]", "reference=assets/samples/photo.jpg",
        "size=[32]", "dtype=int8", "device=gpu", "reference_fit=stretch", "prompts=x", "model=assets/tiny_model",
    )),
    "train.py": (TRAIN, TRAINING),
    "-m training.vae": ("output=runs/x", (
        "loss=cubes", "crop=1", "blocks=[]", "blocks=[-1]", "width=0", "latent_channels=0", "latent_noise=nan",
        "init=none", "seed=-1", "mixed_precision=half", "data.size=[1,1]", "data.latents=x",
    )),
    "-m training.export": ("output=x", ("checkpoint=none", "checkpoint=x dtype=bf16", "checkpoint=x average=some")),
    "-m training.logs": ("", ("runs=x", "smoothing=0", "runs=[none]", "runs=[]")),
    "-m tpc": ("reference=assets/samples/photo.jpg output=outputs/x", (
        "driving=none.mp4", "max_side=-1", "stride=0", "max_frames=0", "tpc.transform=bend", "cuts=[x]",
        "pose.heavy=2",
    )),
    "prepare.py": ("source=none output=x", (
        "layout=tiktak", "frame_fps=0", "frame_fps=inf", "heldout=1", "shard=1", "num_shards=0", "poses=none",
        "masks=some", "stride=1", "source=nowhere",
    )),
    "prepare.py check": ("dataset=none", (
        "size=[512]", "crop=top", "workers=0", "stride=0", "num_frames=0", "decode=2", "dataset=nowhere",
    )),
    "prepare.py latents": ("dataset=none", ("size=[1,1]", "batch_size=0", "dtype=int8", "device=gpu", "shard=-1")),
    "-m viewer": ("", ("port=0", "port=99999", "memory_mib=0", "lora_scale=nan", "device=gpu", "pose.heavy=much")),
    "-m models.checkpoints verify": ("", ("fixture=", "fixtures=x")),
    "-m models.checkpoints convert family=animate_anyone": ("output=x", ("dtype=int8", "unet=x", "wieghts=x")),
    "-m models.checkpoints convert family=disco": ("output=x", ("null_tokens=none",)),
    "evaluate.py metrics": ("generated=none truth=none", (
        "protocol=x", "features=all", "measures=[psnrr]", "measures=[]", "batch_size=0", "device=gpu", "truth_poses=x",
        "generated_features=x",
    )),
    "evaluate.py split": ("dataset=none", ("thresholds.angle=9", "thresholds.share=-1", "clips=-1", "split=train")),
    "evaluate.py sweep": ("", (
        "angles=-1", "scales=[0]", "scales=[1,1]", "seeds=[]", "seeds=[1,1]", "frames=0", "clips=0", "source=9",
    )),
    "evaluate.py ablation": ("", ("transforms=[bend]", "propagations=[x]", "subsets=[]", "attachments=[mix]")),
    "evaluate.py table": ("", ("models=[]", "pose_noise=-1", "poses=drawn", "masks=none", "sampling.steps=0")),
    "evaluate.py attention": (
        "",
        ("radius=0", "radii=[]", "keypoints=[tail]", "columns=0", "layers=[]", "tpc.attach=replace"),
    ),
    "evaluate.py misalignment": ("", ("kinds=[up]", "presets=[worst]", "split=heldout", "strips=-1", "clips=-1")),
    "evaluate.py animators": ("", ("attachments=[mix]", "models=[]", "kinds=[]", "strips=few")),
    "-m data.poses.retarget": ("reference_poses=assets/samples/photo.jpg driving_poses=none.npz output=x.npz", (
        "mode=off", "height_ratio=0", "fps=0", "driving_size=[1]", "driving_poses=nowhere.npz",
    )),
    "-m data.poses.weights": ("", ("heavy=very", "light=true")),
    "-m data.people.samples": ("", ("seed=-1", "scale=0", "rotation=nan")),
    "-m evaluation.misaligned_clips": ("", ("test.seed=-1", "test.clips=x", "development=3")),
}  # fmt: skip
FORMS = {
    "--reference x": "write reference=x", "--reference=x": "write reference=x", "--refrence x": "write reference=x",
    "-steps 5": "write steps=5", "photo.png": "is not of the form key=value", "steps": "write steps=...",
    "refrence=x": "the nearest known one is 'reference'", "tpc.preste=paper": "'tpc.preset'", "=5": "key=value",
    "--verbose": "there is no option '--verbose'", "--help nothing": "no key or group is called 'nothing'",
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_named(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    right, wrong = WRONG[name]
    main = BY_NAME[name].main
    for arguments in wrong:
        with pytest.raises(UserError) as caught:
            main([*right.split(), *arguments.split(" ")])
        keys = [argument.partition("=")[0].split(".")[-1] for argument in arguments.split(" ")]
        assert any(key in str(caught.value) for key in keys), f"{arguments}: {caught.value}"
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("arguments", "said"), FORMS.items())
def test_other_forms_are_told_how_to_be_written(arguments, said):
    with pytest.raises(UserError) as caught:
        BY_NAME["infer.py"].main(arguments.split(" "))
    assert said in str(caught.value)


@pytest.mark.parametrize("arguments", [[], ["metrik"], ["chek"], ["convrt"]])
@pytest.mark.parametrize("module", ["evaluate", "prepare", "models.checkpoints.__main__"])
def test_unknown_tasks_list_the_known_ones(module, arguments):
    if module == "prepare" and not arguments:
        return  # which has a task without a name
    with pytest.raises(UserError, match="the first argument must be one of .*, got '"):
        import_module(module).main(arguments)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_help_of_every_command(command, capsys):
    if command.module.startswith(SCRIPTS):
        shown = run([*command.words(), "--help"])
        assert (shown.returncode, shown.stderr) == (0, "") and "Keys, as key=value" in shown.stdout
        return
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0 and capsys.readouterr().out


def test_a_process_ends_with_one_line_and_code_2():
    done = run(["infer.py", "window_size=0"])
    assert (done.returncode, done.stdout) == (EXIT_CODE, "")
    assert done.stderr == "error: window_size=0 must be an integer, 1 or more, or null\n"


def run(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
