"""Validation and logs: what is shown and measured, and that training does not notice."""

import math
import random
from io import BytesIO

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from data.video.files import read_video, video_metadata
from tests.training_runs import ARGUMENTS, difference, logged, make_vae, train
from training.config import DataConfig, ValidationConfig
from training.objective import StepLoss
from training.run import StepLog, loss_by_timestep
from training.validate import ValidationClip, add_clip, mean_metrics, sample_clips, undisturbed

COLUMNS = ["reference", "pose", "truth", "without TPC", "with TPC"]


@pytest.fixture(scope="module")
def clips(tiny_pipeline) -> list[ValidationClip]:
    config = ValidationConfig(clips=2, num_frames=3, misaligned=0.5, num_inference_steps=2)
    return sample_clips(tiny_pipeline, DataConfig(size=[32, 32], num_frames=3), config, {})


def test_clips_are_shown_with_and_without_tpc(clips):
    for clip in clips:
        assert list(clip.columns) == COLUMNS
        assert [len(frames) for frames in clip.columns.values()] == [1, 3, 3, 3, 3]
        assert all(f.dtype == np.uint8 and f.shape[1:] == (32, 32, 3) for f in clip.columns.values())
        assert clip.masks.shape == (3, 32, 32) and 0 < clip.masks.mean() < 0.9
    assert [clip.misaligned for clip in clips] == [True, False]
    # TPC changes something where the reference lies elsewhere.
    assert not np.array_equal(clips[0].columns["without TPC"], clips[0].columns["with TPC"])


def test_clips_are_the_same_every_time_and_held_out(tiny_pipeline, clips):
    config = ValidationConfig(clips=1, num_frames=3, misaligned=1.0, num_inference_steps=2, tpc=False)
    torch.manual_seed(5)
    (again,) = sample_clips(tiny_pipeline, DataConfig(size=[32, 32], num_frames=3), config, {})
    assert list(again.columns) == COLUMNS[:4]
    assert all(np.array_equal(again.columns[name], clips[0].columns[name]) for name in COLUMNS[:4])


def image(value: int) -> np.ndarray:
    return np.full((2, 16, 16, 3), value, np.uint8)


def test_metrics_are_those_of_the_result_against_the_truth():
    """10 grey levels off everywhere: 28.13 dB; off by 20 in the person only, a quarter of the image: 22.11 there."""
    masks = np.zeros((2, 16, 16), bool)
    masks[:, :8, :8] = True
    wrong = image(100)
    wrong[masks] = 120
    columns = {"truth": image(100), "without TPC": image(110), "with TPC": wrong}
    values = ValidationClip(columns, masks, misaligned=False).metrics()
    decibel = {grey: 20 * math.log10(255 / grey) for grey in (10, 20)}
    assert values["psnr/without_tpc"] == pytest.approx(decibel[10])
    assert values["person_psnr/without_tpc"] == pytest.approx(decibel[10])
    assert values["person_psnr/with_tpc"] == pytest.approx(decibel[20])
    assert values["psnr/with_tpc"] == pytest.approx(decibel[20] + 10 * math.log10(4))
    assert values["person_ssim/with_tpc"] < values["ssim/with_tpc"] < 1
    same = ValidationClip({**columns, "with TPC": image(100)}, masks, misaligned=True)
    assert same.metrics()["ssim/with_tpc"] == pytest.approx(1)
    both = mean_metrics([ValidationClip(columns, masks, misaligned=False), same])
    assert both["aligned/psnr/without_tpc"] == both["misaligned/psnr/without_tpc"] == pytest.approx(decibel[10])
    assert both["misaligned/psnr/with_tpc"] == 100


def test_nothing_is_left_behind():
    """Random states and every module's own mode, also when sampling fails."""
    network = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    network[1].eval()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with pytest.raises(RuntimeError), undisturbed(network):
        assert not network.training and not network[0].training
        torch.rand(3), np.random.rand(3), random.random()
        raise RuntimeError
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1], before[2]) == (np.random.get_state()[1].tolist(), random.getstate())
    assert (network.training, network[0].training, network[1].training) == (True, True, False)


def test_losses_are_told_apart_by_timestep():
    timesteps, errors = torch.tensor([0, 99, 100, 999]), torch.tensor([1.0, 3.0, 5.0, 7.0])
    assert loss_by_timestep(timesteps, errors, 1000) == {
        "loss_by_timestep/000-099": 2.0,
        "loss_by_timestep/100-199": 5.0,
        "loss_by_timestep/900-999": 7.0,
    }


def test_a_line_of_the_log_has_everything(tmp_path):
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("logs")
    keypoints = torch.zeros(1, 17, 3)
    keypoints[..., 2] = 1
    keypoints[:, 0], keypoints[:, 11:13] = torch.tensor([5.0, 0, 1]), torch.tensor([5.0, 9, 1])
    keypoints[:, 5] = torch.tensor([9.0, 4, 1])
    batch = {"reference_keypoints": keypoints, "keypoints": keypoints[:, None]}
    log = StepLog(1000)
    for value in (1.0, 3.0):
        log.add(StepLoss(torch.tensor(value), torch.tensor([value]), torch.tensor([20])), batch)
        log.norms.append(value)
    log.stop_clock()
    assert log.write(accelerator, 7, clips=2, values={"learning_rate": 0.5, "skipped_steps": 1}) == 2.0
    assert log.losses == log.samples == log.norms == [] and log.seconds == 0
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    values = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert values["loss"] == values["grad_norm"] == values["loss_by_timestep/000-099"] == 2.0
    assert values["learning_rate"] == 0.5 and values["skipped_steps"] == 1
    assert values["samples_per_second"] > 0 and values["peak_memory_gib"] > 0
    assert values["reference/relative_angle_deg"] == 0 and values["reference/box_iou"] == 1
    kinds = {"reference/relative_angle_deg_distribution", "reference/box_iou_distribution"}
    assert set(events.Tags()["histograms"]) == kinds


def test_clips_move_in_tensorboard(tmp_path):
    frames = [np.full((8, 12, 3), value, np.uint8) for value in (0, 128, 255)]
    with SummaryWriter(str(tmp_path)) as writer:
        add_clip(writer, "clip", frames, 10.0, 4)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Images("clip")
    shown = Image.open(BytesIO(event.encoded_image_string))
    assert event.step == 4 and shown.n_frames == 3 and shown.size == (12, 8) and shown.info["duration"] == 100


def test_validation_on_and_off_train_the_same_weights(tmp_path):
    """Bit for bit, with the moving average swapped in and out; the clips are written and marked as generated."""
    vae = make_vae(tmp_path / "vae")
    runs = []
    for steps in (0, 1):
        runs.append(tmp_path / f"run{steps}")
        train(
            tmp_path / f"{steps}.log",
            *ARGUMENTS,
            "stage=motion",
            "data.num_frames=2",
            "max_steps=3",
            f"output={runs[-1]}",
            f"model.vae={vae}",
            f"validation.steps={steps}",
            "validation.clips=1",
            "validation.misaligned=1",
            "validation.num_frames=2",
            "validation.num_inference_steps=1",
        )
    assert difference(*(run / "pipeline" for run in runs)) == 0
    assert logged(runs[0]) == logged(runs[1])
    samples = runs[1] / "samples"
    assert sorted(file.name for file in samples.glob("*2*")) == ["0000002.png", "0000002_clip0.mp4"]
    assert len(read_video(samples / "0000002_clip0.mp4").frames) == 2
    assert video_metadata(samples / "0000002_clip0.mp4")["generated"] is True
    assert len(logged(runs[1], "validation/misaligned/person_psnr/with_tpc")) == 3
