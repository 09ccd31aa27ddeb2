"""The benchmark's clips as `evaluation` takes them."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from core.errors import UserError
from data.inputs import Driving, Reference
from data.people.renderer import RenderedGroup
from data.poses.poses import Poses
from evaluation.clips import RENDERED_FPS, EvaluationClip
from evaluation.misaligned_clips import KINDS, Manifest, draw, fitting, read_manifest


class BenchmarkClips:
    """Clips of some kinds by name; a `evaluation.clips.ClipSet`.

    Args:
        kinds: of `KINDS`.
        count: clips of each kind, the first ones; 0: all.

    Attributes:
        names: of the clips of the manifests.
        kind_of: kind of each.
        fitting: for each the clips that it would be without misalignment, which can be rendered like the others; the
            clip itself where nothing is misaligned.
    """

    def __init__(self, kinds: Sequence[str] = KINDS, count: int = 0):
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise UserError(f"kinds={list(kinds)} must be some of {', '.join(KINDS)}")
        self._found = {}
        self.kind_of: dict[str, str] = {}
        self.fitting: dict[str, list[str]] = {}
        for kind in kinds:
            manifest = read_manifest(kind)
            if not 0 <= count <= len(manifest.clips):
                raise UserError(f"clips={count} must be 0 (all) to {len(manifest.clips)}, the clips of kind {kind}")
            for clip in manifest.clips[: count or None]:
                self._found[clip.name] = manifest, clip
                self.kind_of[clip.name] = kind
                counterparts = fitting(clip)
                self._found |= {spec.name: (manifest, spec) for spec in counterparts}
                self.fitting[clip.name] = [spec.name for spec in counterparts] or [clip.name]
        self.names = list(self.kind_of)

    def manifest(self, name: str) -> Manifest:
        """The manifest that a clip is in."""
        return self._found[name][0]

    def poses(self, name: str) -> tuple[Poses, Poses]:
        clip = self.clip(name)
        return clip.reference.poses, clip.driving.poses

    def clip(self, name: str) -> EvaluationClip:
        """Render a clip.

        Raises:
            UserError: people no longer look or move as when the manifest was made.
        """
        manifest, spec = self._found[name]
        drawn = draw(manifest, spec)
        if spec.digest and drawn.digest() != spec.digest:
            raise UserError(
                f"clip {name} is not what its manifest was made from: the code that draws people has changed. "
                "`python -m evaluation.misaligned_clips` makes new manifests, whose numbers are new as well"
            )
        return EvaluationClip(
            name,
            Reference(drawn.reference.image, _poses([drawn.reference], manifest.size), drawn.reference.masks),
            Driving(
                np.stack([frame.image for frame in drawn.frames]),
                _poses(drawn.frames, manifest.size),
                np.stack([frame.masks for frame in drawn.frames]),
            ),
        )

    def stamps(self, name: str) -> list:
        return [asdict(self._found[name][1])]


def _poses(images: Sequence[RenderedGroup], size: tuple[int, int]) -> Poses:
    keypoints, scores = (np.stack([getattr(p, part) for p in images]) for part in ("keypoints", "scores"))
    return Poses(keypoints, scores, size, RENDERED_FPS)
