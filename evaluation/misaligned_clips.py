"""Frozen clips of the misalignment benchmark.

    python -m evaluation.misaligned_clips [test.seed=20] [development.clips=10]      # writes the manifests anew

`assets/misalignment/SPLIT/KIND.json` names, for every clip, the scenes it is made of and how its persons are placed in
the reference and in the frames. Numbers are reported on the split "test"; every choice between settings is made on
"development", which has other people, clothes, motions and backgrounds. Scenes are functions of a seed; a digest of
each clip's keypoints and colours tells when the code that draws them has changed, for then numbers no longer compare.

Kinds, after Sec. 3 of the TPC paper, and the harder case of several persons:

    aligned             the reference is the clip's first image
    scale               the person of the reference is smaller or larger throughout
    rotation            the person of the reference is turned throughout, by 45 degrees up to upside down
    temporal_scale      the person comes nearer or goes away while the clip lasts
    temporal_rotation   the person tips over while the clip lasts
    two_persons         two persons, each placed otherwise in the reference

Kinds that another body drives, whose poses and masks the animator is given; the truth is the reference's person in the
same motion, for motions are rotations of joints, which belong to no body:

    identity            another held-out person drives
    proportions         as identity, and one of both is a child, long-legged, large-headed or broad-shouldered
    proportions_scale, proportions_rotation     as proportions, the reference framed as of scale and rotation

Cameras count in standing heights: driver and truth stand equally tall in the image, with the soles on one line and
the pelvis above one place, however the reference is framed. The way that they go, across, away and up in a jump, is
as many lengths of their own legs, or feet would slide.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from core.config import load_config
from core.errors import UserError, run_command
from core.files import write_json
from data.config import PeopleConfig
from data.inputs import Driving, Reference
from data.people.bodies import Person, Pose, build_person, load_people
from data.people.proportions import PROPORTIONS, in_own_steps, rescaled
from data.people.renderer import Figure, RenderedGroup, render_people
from data.people.scenes import Scene, reframed
from data.poses.poses import Poses
from evaluation.config import DRIVEN_KINDS, KINDS, MANIFESTS, MISALIGNED_SPLITS, RENDERED_FPS, ManifestConfig

if TYPE_CHECKING:
    from data.clips.rendered import RenderedPeople
    from evaluation.clips import EvaluationClip

# The world of the shipped model, but for cameras that are not upright: rotations are what is measured.
PEOPLE = PeopleConfig(height=[0.8, 1.0], close_ups=0.0, tilted=0.0, plain=0.7)
ALL_KINDS = (*KINDS, *DRIVEN_KINDS)
OWN = "own"  # key of `PROPORTIONS`
_library = cache(load_people)


@dataclass(frozen=True)
class Placement:
    """Size, turn and shift of a person against the camera of the scene."""

    scale: float = 1.0  # factor on the person's size
    rotation_deg: float = 0.0  # turn added in the image plane, clockwise as seen
    shift: tuple[float, float] = (0.0, 0.0)  # as shares of the image's width and height

    def towards(self, other: Placement, part: float) -> Placement:
        """The placement `part` of the way to another one; scales in their logarithm."""
        return Placement(
            float(self.scale ** (1 - part) * other.scale**part),
            self.rotation_deg + part * (other.rotation_deg - self.rotation_deg),
            tuple((1 - part) * a + part * b for a, b in zip(self.shift, other.shift, strict=True)),
        )

    def figure(self, scene: Scene, pose: Pose) -> Figure:
        """The scene's person in `pose`, placed so."""
        camera = reframed(scene.camera, self.scale, float(np.radians(self.rotation_deg)), self.shift)
        return Figure(scene.person, pose, camera, scene.light)


@dataclass(frozen=True)
class Driver:
    """The body that drives in a person's place."""

    scene: int  # that the body and its clothes are taken from, and nothing else
    proportions: str = OWN  # key of `PROPORTIONS`


@dataclass(frozen=True)
class PersonSpec:
    """One person of a clip."""

    scene: int  # index of the scene that the person, the motion and the light are taken from
    reference: Placement
    start: Placement  # in the first frame
    end: Placement  # in the last frame
    proportions: str = OWN  # key of `PROPORTIONS`
    driver: Driver | None = None  # None: drives itself


@dataclass(frozen=True)
class ClipSpec:
    """One clip; the first person's scene gives the background."""

    name: str
    persons: tuple[PersonSpec, ...]  # the one farthest back first
    digest: str = ""  # of what is drawn, see `digest_of`; empty for clips that are not in a manifest


@dataclass(frozen=True)
class ClipManifest:
    """The clips of one kind."""

    kind: str
    split: str  # one of `MISALIGNED_SPLITS`
    seed: int  # of the scenes
    frames: int  # of every clip, at 24 frames a second
    stride: int
    size: tuple[int, int]  # (width, height) in pixels
    clips: tuple[ClipSpec, ...]

    def scenes(self) -> RenderedPeople:
        """The people that `PersonSpec.scene` counts."""
        # Networks take seconds to import, which the command's wrong arguments need not wait for.
        from data.clips.rendered import RenderedPeople

        return RenderedPeople(
            self.size,
            self.frames,
            RENDERED_FPS,
            self.stride,
            split=MISALIGNED_SPLITS[self.split],
            seed=self.seed,
            length=10**6,
            people=PEOPLE,
            library=_library(),
        )


def draw(manifest: ClipManifest, clip: ClipSpec) -> EvaluationClip:
    """Render a clip. The reference shows everybody in the pose of the first frame."""
    people = manifest.scenes()
    shown, drivers = [], []  # scenes with whom the reference shows and with whoever drives, in the same motion
    for spec in clip.persons:
        scene = people.scene(spec.scene)
        scene = replace(scene, person=_person(scene.person, spec.proportions))
        shown.append(scene)
        if spec.driver is not None:
            person = _person(people.scene(spec.driver.scene).person, spec.driver.proportions)
            poses = [in_own_steps(pose, scene.person.body, person.body) for pose in scene.poses]
            scene = replace(scene, person=person, poses=poses)
        drivers.append(scene)
    background = shown[0].background

    def image(placements: Iterable[Placement], scenes: Sequence[Scene], frame: int) -> RenderedGroup:
        figures = [p.figure(scene, scene.poses[frame]) for p, scene in zip(placements, scenes, strict=True)]
        return render_people(figures, manifest.size, background)

    def poses_of(images: Sequence[RenderedGroup]) -> Poses:
        keypoints, scores = (np.stack([getattr(image, part) for image in images]) for part in ("keypoints", "scores"))
        return Poses(keypoints, scores, manifest.size, RENDERED_FPS)

    def driving(scenes: Sequence[Scene]) -> Driving:
        parts = [frame / max(manifest.frames - 1, 1) for frame in range(manifest.frames)]
        frames = [
            image((person.start.towards(person.end, part) for person in clip.persons), scenes, frame)
            for frame, part in enumerate(parts)
        ]
        images, masks = (np.stack([getattr(frame, part) for frame in frames]) for part in ("image", "masks"))
        return Driving(images, poses_of(frames), masks)

    reference = image((person.reference for person in clip.persons), shown, 0)
    driven = any(person.driver for person in clip.persons)
    from evaluation.clips import EvaluationClip

    return EvaluationClip(
        clip.name,
        Reference(reference.image, poses_of([reference]), reference.masks),
        driving(drivers),
        driving(shown) if driven else None,
    )


def _person(person: Person, proportions: str) -> Person:
    """The person with these of `PROPORTIONS`, in the same clothes."""
    if proportions == OWN:
        return person
    library, identity = _library(), person.identity
    body = rescaled(person.body, library.topology, PROPORTIONS[proportions])
    return build_person(identity, replace(library, bodies={identity.body: body}), person.texture.shape[1])


def digest_of(clip: EvaluationClip) -> str:
    """Sixteen characters that stay as long as people look and move the same, up to rounding."""
    digest = hashlib.sha256()
    moving = [clip.driving] if clip.target is None else [clip.driving, clip.target]
    images = [clip.reference.image, *(frame for part in moving for frame in part.frames)]
    keypoints = [*clip.reference.poses.keypoints, *(points for part in moving for points in part.poses.keypoints)]
    for image, points in zip(images, keypoints, strict=True):
        digest.update((np.round(points) + 0.0).astype(np.int32).tobytes())
        digest.update(np.round(image.mean(axis=(0, 1)) / 2).astype(np.int32).tobytes())
    return digest.hexdigest()[:16]


def fitting(clip: ClipSpec) -> list[ClipSpec]:
    """The clip without misalignment: placed throughout as at its start, and as at its end where that differs.

    Everybody drives themselves.
    """
    found = {}
    for moment in ("start", "end"):
        placed = [(person, getattr(person, moment)) for person in clip.persons]
        persons = tuple(replace(person, reference=at, start=at, end=at, driver=None) for person, at in placed)
        found.setdefault(persons, ClipSpec(f"{clip.name}-{moment}", persons))
    return [] if clip.persons in found else list(found.values())


class MisalignedClips:
    """The first `count` clips of some of `ALL_KINDS` by name, 0: all; an `evaluation.clips.PosedClipSet`."""

    def __init__(self, kinds: Sequence[str] = KINDS, count: int = 0, split: str = "test"):
        if not kinds or not set(kinds) <= set(ALL_KINDS):
            raise UserError(f"kinds={list(kinds)} must be some of {', '.join(ALL_KINDS)}")
        self._found: dict[str, tuple[ClipManifest, ClipSpec]] = {}
        self.by_kind: dict[str, list[str]] = {}  # kind -> names
        # name -> clips that it would be without misalignment, rendered like the others; itself where it is aligned
        self.fitting: dict[str, list[str]] = {}
        for kind in kinds:
            manifest = read_manifest(kind, split)
            if not 0 <= count <= len(manifest.clips):
                raise UserError(f"clips={count} must be 0 (all) to {len(manifest.clips)}, the clips of kind {kind}")
            clips = manifest.clips[: count or None]
            self.by_kind[kind] = [clip.name for clip in clips]
            for clip in clips:
                counterparts = fitting(clip)
                self._found |= {spec.name: (manifest, spec) for spec in (clip, *counterparts)}
                self.fitting[clip.name] = [spec.name for spec in counterparts] or [clip.name]
        self.names = list(self.fitting)

    def poses(self, name: str) -> tuple[Poses, Poses]:
        clip = self.clip(name)
        return clip.reference.poses, clip.driving.poses

    def clip(self, name: str) -> EvaluationClip:
        manifest, spec = self._found[name]
        drawn = draw(manifest, spec)
        if spec.digest and digest_of(drawn) != spec.digest:
            raise UserError(
                f"clip {name} is not what its manifest was made from: the code that draws people has changed. "
                "`python -m evaluation.misaligned_clips` makes new manifests, whose numbers are new as well"
            )
        return drawn

    def stamps(self, name: str) -> list:
        return [_plain(self._found[name][1])]


def read_manifest(kind: str, split: str = "test", folder: Path = MANIFESTS) -> ClipManifest:
    """The frozen clips of a kind."""
    path = folder / split / f"{kind}.json"
    if not path.is_file():
        raise UserError(f"kind={kind} has no manifest {path}; the kinds are {', '.join(ALL_KINDS)}")
    content = json.loads(path.read_text(encoding="utf-8"))

    def placement(entry: dict) -> Placement:
        return Placement(entry["scale"], entry["rotation_deg"], tuple(entry["shift"]))

    clips = []
    for entry in content["clips"]:
        persons = tuple(
            PersonSpec(
                person["scene"],
                *(placement(person[image]) for image in ("reference", "start", "end")),
                person.get("proportions", OWN),
                Driver(**person["driver"]) if "driver" in person else None,
            )
            for person in entry["persons"]
        )
        clips.append(ClipSpec(entry["name"], persons, entry["digest"]))
    return ClipManifest(**content | {"size": tuple(content["size"]), "clips": tuple(clips)})


def _plain(clip: ClipSpec) -> dict:
    """As in JSON; what only clips with other drivers have is left out of the others."""
    plain = asdict(clip)
    for person in plain["persons"]:
        if person["driver"] is None:
            del person["proportions"], person["driver"]
    return plain


def choose_placements(kind: str, rng: np.random.Generator, index: int) -> list[tuple[Placement, Placement, Placement]]:
    """Reference, start and end of every person of a clip, whose index within its kind is given."""
    kind = kind.removeprefix("proportions_")
    plain, sign, even = Placement(), float(rng.choice([-1, 1])), index % 2 == 0
    if kind in ("aligned", "identity", "proportions"):
        return [(plain, plain, plain)]
    if kind == "scale":
        # A larger reference must still show the whole person, so there it is the clip's person who is small.
        small = Placement(round(float(rng.uniform(0.4, 0.6) if even else rng.uniform(0.5, 0.6)), 3))
        return [(small, plain, plain)] if even else [(plain, small, small)]
    if kind == "rotation":
        turn = 180.0 if index % 5 == 0 else sign * float(rng.uniform(45, 180))
        return [(Placement(rotation_deg=round(turn, 1)), plain, plain)]
    if kind == "temporal_scale":
        far = Placement(round(float(rng.uniform(0.5, 0.55)), 3))
        return [(plain, plain, far)] if even else [(far, far, plain)]
    if kind == "temporal_rotation":
        return [(plain, plain, Placement(rotation_deg=round(sign * float(rng.uniform(60, 90)), 1)))]
    found = []
    for side in (-1, 1):  # two persons, side by side
        driving = Placement(0.62, 0.0, (0.23 * side, 0.12))
        turned = bool(rng.random() < 0.5)
        reference = Placement(
            0.62 if turned else round(float(rng.uniform(0.3, 0.4)), 3),
            round(float(rng.choice([-1, 1]) * rng.uniform(60, 180)), 1) if turned else 0.0,
            (0.23 * side, 0.0),
        )
        found.append((reference, driving, driving))
    return found


def choose_bodies(kind: str, index: int) -> tuple[str, str]:
    """Proportions of the reference's person and of the driver: one of both has each of the others in turn."""
    if kind == "identity":
        return OWN, OWN
    others = [name for name in PROPORTIONS if name != OWN]
    chosen = others[index % len(others)], OWN
    return chosen if (index + index // len(others)) % 2 == 0 else chosen[::-1]


def make_manifest(
    kind: str, clips: int, seed: int, split: str = "test", frames: int = 8, stride: int = 3, size: int = 256
) -> ClipManifest:
    """Draw the clips of a kind; kinds share no scene, splits no name."""
    rng = np.random.default_rng([seed, ALL_KINDS.index(kind)])
    first_scene = 1000 * ALL_KINDS.index(kind)
    drivers = iter(range(first_scene + 500, first_scene + 1000))  # scenes that they are taken from
    prefix = kind if split == "test" else f"{kind}-dev"
    empty = ClipManifest(kind, split, seed, frames, stride, (size, size), ())
    people, specs = empty.scenes(), []
    for index in range(clips):
        placements = choose_placements(kind, rng, index)
        scene = first_scene + len(placements) * index
        persons = [PersonSpec(scene + person, *chosen) for person, chosen in enumerate(placements)]
        if kind in DRIVEN_KINDS:
            own, driving = choose_bodies(kind, index)
            body = people.scene(scene).person.identity.body
            other = next(number for number in drivers if people.scene(number).person.identity.body != body)
            persons = [replace(persons[0], proportions=own, driver=Driver(other, driving))]
        spec = ClipSpec(f"{prefix}-{index:02d}", tuple(persons))
        specs.append(replace(spec, digest=digest_of(draw(empty, spec))))
    return replace(empty, clips=tuple(specs))


def main(arguments: list[str]) -> None:
    config = load_config(ManifestConfig, arguments, about=__doc__)
    for split in MISALIGNED_SPLITS:
        wanted = getattr(config, split)
        for kind in ALL_KINDS:
            manifest = make_manifest(kind, wanted.clips, wanted.seed, split)
            path = Path(config.output) / split / f"{kind}.json"
            write_json(path, asdict(manifest) | {"clips": [_plain(clip) for clip in manifest.clips]})
            print(f"{path}: {len(manifest.clips)} clips")


if __name__ == "__main__":
    run_command(main)
