"""Every command of the project: how it is started, its `main`, and the configuration that it reads."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import benchmarks.config as benchmarks
import data.config as data
import evaluation.config as evaluation
import models.config as models
import training.config as training
from inference.config import EmbeddingsConfig, InferConfig
from tpc.config import CommandConfig


@dataclass(frozen=True)
class Command:
    module: str  # whose `main(arguments)` it is
    schema: type
    task: tuple[str, ...] = ()  # first arguments

    @property
    def main(self) -> Callable[[list[str]], None]:
        main = import_module(self.module).main
        return lambda arguments: main([*self.task, *arguments])

    def words(self) -> list[str]:
        """Arguments of the interpreter."""
        script = "." not in self.module
        return [*([f"{self.module}.py"] if script else ["-m", self.module.removesuffix(".__main__")]), *self.task]

    def __str__(self) -> str:
        return " ".join(self.words())


COMMANDS = (
    Command("infer", InferConfig),
    Command("inference.embeddings", EmbeddingsConfig),
    Command("train", training.TrainConfig),
    Command("prepare", data.PrepareConfig),
    Command("prepare", data.CheckConfig, ("check",)),
    Command("prepare", data.FeatureConfig, ("latents",)),
    Command("prepare", data.FeatureConfig, ("embeddings",)),
    *(Command("evaluate", schema, (task,)) for task, schema in evaluation.TASKS.items()),
    Command("tpc.__main__", CommandConfig),
    Command("viewer.__main__", import_module("viewer.__main__").ViewerConfig),
    Command("models.checkpoints.__main__", models.VerifyConfig, ("verify",)),
    *(
        Command("models.checkpoints.__main__", schema, ("convert", f"family={family}"))
        for family, schema in models.FAMILIES.items()
    ),
    Command("training.vae", training.VAEConfig),
    Command("training.export", training.ExportConfig),
    Command("training.logs", training.CurvesConfig),
    Command("data.poses.retarget", data.RetargetConfig),
    Command("data.poses.weights", import_module("data.poses.weights").FetchConfig),
    Command("metrics.weights", import_module("metrics.weights").FetchConfig),
    Command("data.people.samples", data.SamplesConfig),
    Command("data.people.bake", data.BakeConfig),
    Command("evaluation.misaligned_clips", evaluation.ManifestConfig),
    Command("benchmarks.attention_kernels", benchmarks.KernelsConfig),
    Command("benchmarks.attention_recording", benchmarks.RecordingConfig),
    Command("benchmarks.calibrated_pictures", benchmarks.PicturesConfig),
    Command("benchmarks.calibration_accuracy", benchmarks.AccuracyConfig),
    Command("benchmarks.calibration_speed", benchmarks.CalibrationSpeedConfig),
    Command("benchmarks.docs", import_module("benchmarks.docs").DocsConfig),
    Command("benchmarks.gpu_check.__main__", benchmarks.GPUCheckConfig),
    Command("benchmarks.inference_cost", benchmarks.CostConfig),
    Command("benchmarks.metrics_memory", benchmarks.MemoryConfig),
    Command("benchmarks.pose_jitter", benchmarks.JitterConfig),
    Command("benchmarks.published_size", benchmarks.PublishedConfig),
    Command("benchmarks.references.scene_filling", benchmarks.FillingConfig),
    Command("benchmarks.references.segments", benchmarks.SegmentsConfig),
    Command("benchmarks.retargeting", benchmarks.RetargetingConfig),
    Command("benchmarks.training_strategies", benchmarks.StrategiesConfig),
    Command("benchmarks.speed.__main__", benchmarks.SpeedConfig),
    Command("benchmarks.speed.peers.compare", benchmarks.CompareConfig),
)
