"""Frozen clips of the misalignment benchmark.

    python -m evaluation.misaligned_clips [clips=20] [seed=20]      # writes the manifests anew

`manifests/KIND.json` names, for every clip, the scenes it is made of and how its persons are framed in the reference
and in the frames. Scenes are functions of a seed; a digest of each clip's keypoints and colours tells when the code
that draws them has changed, for then numbers no longer compare.

Kinds, after Sec. 3 of the TPC paper, and the harder case of several persons:

    aligned             the reference is the clip's first image
    scale               the person of the reference is smaller or larger throughout
    rotation            the person of the reference is turned throughout, by 45 degrees up to upside down
    temporal_scale      the person comes nearer or goes away while the clip lasts
    temporal_rotation   the person tips over while the clip lasts
    two_persons         two persons, each framed otherwise in the reference
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from core.config import load_config
from core.errors import UserError, run_command
from core.files import write_json
from data.clips.rendered import PeopleConfig, RenderedPeople
from data.people.bodies import PeopleLibrary, load_people
from data.people.renderer import Figure, RenderedGroup, render_people
from data.people.scenes import Scene, reframed
from data.people.skeleton import Pose
from evaluation.clips import RENDERED_FPS

FOLDER = Path(__file__).parents[1] / "assets" / "misalignment"
KINDS = ("aligned", "scale", "rotation", "temporal_scale", "temporal_rotation", "two_persons")
# The world of the shipped model, but for cameras that are not upright: turns are what is measured.
PEOPLE = PeopleConfig(height=[0.8, 1.0], close_ups=0.0, tilted=0.0, plain=0.7)


@dataclass(frozen=True)
class Framing:
    """How a person is framed, against the camera of the scene.

    Attributes:
        scale: factor on the person's size.
        rotation_deg: turn added in the image plane, clockwise as seen.
        shift: added to the person's place, as shares of the image's width and height.
    """

    scale: float = 1.0
    rotation_deg: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)

    def towards(self, other: "Framing", part: float) -> "Framing":
        """The framing `part` of the way to another one; scales in their logarithm."""
        return Framing(
            float(self.scale ** (1 - part) * other.scale**part),
            self.rotation_deg + part * (other.rotation_deg - self.rotation_deg),
            tuple((1 - part) * a + part * b for a, b in zip(self.shift, other.shift, strict=True)),
        )

    def figure(self, scene: Scene, pose: Pose) -> Figure:
        """The scene's person in `pose`, framed so."""
        camera = reframed(scene.camera, self.scale, float(np.radians(self.rotation_deg)), self.shift)
        return Figure(scene.person, pose, camera, scene.light)


@dataclass(frozen=True)
class PersonSpec:
    """One person of a clip.

    Attributes:
        scene: number of the scene that the person, the motion and the light are taken from.
        reference: framing in the reference.
        start, end: framing in the first and in the last frame.
    """

    scene: int
    reference: Framing
    start: Framing
    end: Framing


@dataclass(frozen=True)
class ClipSpec:
    """One clip; the first person's scene gives the background.

    Attributes:
        persons: the one farthest back first.
        digest: of what is drawn, see `DrawnClip.digest`; empty for clips that are not in a manifest.
    """

    name: str
    persons: tuple[PersonSpec, ...]
    digest: str = ""


@dataclass(frozen=True)
class Manifest:
    """The clips of one kind.

    Attributes:
        seed: of the scenes.
        frames, stride: of every clip, at 24 frames a second.
        size: (width, height) in pixels.
    """

    kind: str
    seed: int
    frames: int
    stride: int
    size: tuple[int, int]
    clips: tuple[ClipSpec, ...]

    def scenes(self) -> RenderedPeople:
        """The held-out people that the clips' numbers count."""
        return RenderedPeople(
            self.size,
            self.frames,
            RENDERED_FPS,
            self.stride,
            split="heldout",
            seed=self.seed,
            length=10**6,
            people=PEOPLE,
            library=_library(),
        )


@dataclass(frozen=True)
class DrawnClip:
    """The images of a clip: the reference, and the frames."""

    reference: RenderedGroup
    frames: tuple[RenderedGroup, ...]

    def digest(self) -> str:
        """Sixteen characters that stay as long as people look and move the same, up to rounding."""
        seen = hashlib.sha256()
        for image in (self.reference, *self.frames):
            seen.update((np.round(image.keypoints) + 0.0).astype(np.int32).tobytes())
            seen.update(np.round(image.image.mean(axis=(0, 1)) / 2).astype(np.int32).tobytes())
        return seen.hexdigest()[:16]


def fitting(clip: ClipSpec) -> list[ClipSpec]:
    """The clip as it would be without misalignment: everybody framed as at its start in reference and frames, and as
    at its end where that is otherwise. What misalignment costs is measured against these."""
    found = {}
    for place in ("start", "end"):
        framings = [getattr(person, place) for person in clip.persons]
        persons = tuple(replace(p, reference=f, start=f, end=f) for p, f in zip(clip.persons, framings, strict=True))
        found.setdefault(persons, ClipSpec(f"{clip.name}-{place}", persons))
    return [] if clip.persons in found else list(found.values())


@cache
def _library() -> PeopleLibrary:
    return load_people()


def draw(manifest: Manifest, clip: ClipSpec) -> DrawnClip:
    """Render a clip. The reference shows everybody in the pose of the first frame."""
    people = manifest.scenes()
    scenes = [people.scene(person.scene) for person in clip.persons]
    background = scenes[0].background

    def image(framings: Sequence[Framing], frame: int) -> RenderedGroup:
        figures = [f.figure(scene, scene.poses[frame]) for f, scene in zip(framings, scenes, strict=True)]
        return render_people(figures, manifest.size, background)

    last = max(manifest.frames - 1, 1)
    frames = tuple(
        image([person.start.towards(person.end, frame / last) for person in clip.persons], frame)
        for frame in range(manifest.frames)
    )
    return DrawnClip(image([person.reference for person in clip.persons], 0), frames)


def read_manifest(kind: str, folder: Path = FOLDER) -> Manifest:
    """The frozen clips of a kind."""
    path = folder / f"{kind}.json"
    if not path.is_file():
        raise UserError(f"kind={kind} has no manifest {path}; the kinds are {', '.join(KINDS)}")
    content = json.loads(path.read_text(encoding="utf-8"))

    def framing(entry: dict) -> Framing:
        return Framing(entry["scale"], entry["rotation_deg"], tuple(entry["shift"]))

    clips = []
    for entry in content["clips"]:
        persons = tuple(
            PersonSpec(person["scene"], *(framing(person[place]) for place in ("reference", "start", "end")))
            for person in entry["persons"]
        )
        clips.append(ClipSpec(entry["name"], persons, entry["digest"]))
    return Manifest(kind, content["seed"], content["frames"], content["stride"], tuple(content["size"]), tuple(clips))


def choose_framings(kind: str, rng: np.random.Generator, number: int) -> list[tuple[Framing, Framing, Framing]]:
    """Reference, start and end of every person of clip `number` of a kind."""
    plain, sign = Framing(), float(rng.choice([-1, 1]))
    if kind == "aligned":
        return [(plain, plain, plain)]
    if kind == "scale":
        # A larger reference must still show the whole person, so there it is the clip's person who is small.
        small = Framing(round(float(rng.uniform(0.4, 0.6) if number % 2 == 0 else rng.uniform(0.5, 0.6)), 3))
        return [(small, plain, plain)] if number % 2 == 0 else [(plain, small, small)]
    if kind == "rotation":
        turn = 180.0 if number % 5 == 0 else sign * float(rng.uniform(45, 180))
        return [(Framing(rotation_deg=round(turn, 1)), plain, plain)]
    if kind == "temporal_scale":
        far = Framing(round(float(rng.uniform(0.5, 0.55)), 3))
        return [(plain, plain, far)] if number % 2 == 0 else [(far, far, plain)]
    if kind == "temporal_rotation":
        return [(plain, plain, Framing(rotation_deg=round(sign * float(rng.uniform(60, 90)), 1)))]
    found = []
    for side in (-1, 1):
        place = Framing(0.62, 0.0, (0.23 * side, 0.12))
        turned = bool(rng.random() < 0.5)
        reference = Framing(
            0.62 if turned else round(float(rng.uniform(0.3, 0.4)), 3),
            round(float(rng.choice([-1, 1]) * rng.uniform(60, 180)), 1) if turned else 0.0,
            (0.23 * side, 0.0),
        )
        found.append((reference, place, place))
    return found


def make_manifest(kind: str, clips: int, seed: int, frames: int = 8, stride: int = 3, size: int = 256) -> Manifest:
    """Draw the clips of a kind; kinds share no scene."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    first = 1000 * KINDS.index(kind)
    empty = Manifest(kind, seed, frames, stride, (size, size), ())
    specs = []
    for number in range(clips):
        framings = choose_framings(kind, rng, number)
        persons = tuple(
            PersonSpec(first + len(framings) * number + place, *chosen) for place, chosen in enumerate(framings)
        )
        spec = ClipSpec(f"{kind}-{number:02d}", persons)
        specs.append(replace(spec, digest=draw(empty, spec).digest()))
    return replace(empty, clips=tuple(specs))


@dataclass
class ManifestConfig:
    """clips: of each kind; seed: other seeds are other clips; output: folder."""

    clips: int = 20
    seed: int = 20
    output: str = str(FOLDER)


def main(arguments: list[str]) -> None:
    config = load_config(ManifestConfig, arguments)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        manifest = make_manifest(kind, config.clips, config.seed)
        write_json(folder / f"{kind}.json", asdict(manifest))
        print(f"{folder / kind}.json: {len(manifest.clips)} clips")


if __name__ == "__main__":
    run_command(main)
