"""Quality of a model on held-out rendered people, aligned and misaligned, without and with TPC.

    python -m benchmarks.shipped_model [clips=12] [model=assets/tiny_model] [output=outputs/shipped_model]

The same clips are animated from three references: one that shares the camera with its target, one at half the size,
one turned by 90 to 180 degrees. Poses and masks are exact. Writes results.json, table.md and comparison.png.
"""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from analysis.animation import Animation, SamplingConfig, animate
from analysis.figures import labelled_row
from core.config import config_dict, load_config
from core.errors import run_command
from core.files import complete_file, output_folder, write_json
from data.render import Rendered
from data.scenes import Scene, misaligned_reference
from evaluation.clips import ClipsConfig, rendered_clip, rendered_people
from metrics.image import psnr
from models.pipeline import AnimationPipeline
from models.pipeline_folder import load_pipeline
from tpc import CalibrationConfig

KINDS = ("aligned", "half size", "turned")


@dataclass
class BenchmarkConfig:
    """clips: held-out clips of each kind; frames, stride: of every clip; source: pixels of the original pictures."""

    model: str = "assets/tiny_model"
    output: str = "outputs/shipped_model"
    clips: int = 12
    frames: int = 4
    stride: int = 6
    source: int = 384
    seed: int = 100
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(guidance_scale=1.0))
    tpc: CalibrationConfig = field(default_factory=CalibrationConfig)


def reference_of(scene: Scene, kind: str, rng: np.random.Generator) -> Rendered:
    """The reference picture of one kind; all three show the same person and pose."""
    if kind == "half size":
        return misaligned_reference(scene, scale=0.5)
    if kind == "turned":
        return misaligned_reference(scene, rotation=float(rng.choice([-1, 1]) * rng.uniform(np.pi / 2, np.pi)))
    return misaligned_reference(scene)


def measure(
    pipeline: AnimationPipeline, scene: Scene, kind: str, config: BenchmarkConfig, rng: np.random.Generator
) -> tuple[dict[str, float], Animation, np.ndarray]:
    """Person and background PSNR in dB of one clip without and with TPC, the animation, and the true frames."""
    clip = rendered_clip(scene, reference_of(scene, kind, rng), kind)
    animation = animate(pipeline, clip.reference, clip.driving, config.sampling, config.tpc)
    truth, person = clip.truth(animation.result.shape[2:0:-1])
    values = {}
    for name, result in (("without", animation.plain), ("with", animation.calibrated)):
        values[f"person {name} TPC"] = psnr(result, truth, person)
        values[f"background {name} TPC"] = psnr(result, truth, ~person)
    return values, animation, truth


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Means and standard errors as Markdown."""
    names = list(next(iter(results.values())))
    lines = ["| reference | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for kind, values in results.items():
        cells = [f"{values[name]['mean']:.1f} ± {values[name]['standard_error']:.1f}" for name in names]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    config = load_config(BenchmarkConfig, arguments)
    config.sampling.check()
    output = output_folder(config.output)
    pipeline = load_pipeline(config.model)
    pipeline.set_progress_bar_config(disable=True)
    people = rendered_people(
        ClipsConfig(
            clips=config.clips,
            frames=config.frames,
            stride=config.stride,
            source=config.source,
            clip_seed=config.seed,
        )
    )
    results, rows = {}, []
    for kind in KINDS:
        rng = np.random.default_rng(config.seed)
        measured = []
        for clip in range(config.clips):
            values, animation, truth = measure(pipeline, people.scene(clip), kind, config, rng)
            measured.append(values)
            if clip < 3:
                columns = animation.columns() | {"truth": truth}
                pictures = [frames[-1] for frames in columns.values()]
                rows.append(labelled_row(pictures, [f"{kind}: {name}" for name in columns], 192))
        results[kind] = {
            name: {
                "mean": float(np.mean([m[name] for m in measured])),
                "standard_error": float(np.std([m[name] for m in measured], ddof=1) / len(measured) ** 0.5),
            }
            for name in measured[0]
        }
    text = table(results)
    write_json(output / "results.json", {"configuration": config_dict(config), "psnr_db": results})
    with complete_file(output / "table.md") as path:
        path.write_text(text, encoding="utf-8")
    with complete_file(output / "comparison.png") as path:
        Image.fromarray(np.concatenate(rows)).save(path)
    print(text)


if __name__ == "__main__":
    run_command(main)
