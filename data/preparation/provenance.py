"""Settings of preparation, and what a clip's record says about where its poses and masks come from.

A record stays valid as long as the video, what is given with it and the settings are what they were.
"""

import hashlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from core.config import config_dict
from core.errors import UserError
from data.poses.poses import PoseConfig
from data.preparation.fingerprint import Fingerprint
from data.preparation.layouts import SourceClip
from data.preparation.manifest import stored_path

_ESTIMATED = "estimated: "
_CHOICES = {"poses": ("auto", "estimate"), "masks": ("auto", "estimate", "none")}


@dataclass
class PrepareConfig:
    """`prepare.py`: poses and masks of the clips of a data set.

    source: folder of the data set, or its list of clips (`*_meta.json`).
    output: folder for poses, masks, records and manifest; may be the source itself.
    layout: moore, musepose, tiktok, ted, ubc, splits, stableanimator, frames, videos; auto looks at what is there.
    poses: auto takes keypoints that come with the data set and estimates the others; estimate ignores given ones.
    masks: auto takes given masks, and estimates them where poses are estimated; estimate; none.
    frame_fps: frames per second of folders of frames, which do not say so themselves.
    heldout: share of the clips of a data set without parts of its own that is kept for validation, chosen by name.
    origin: words that every record carries: whose data these are, and their licence.
    shard, num_shards: this run takes every num_shards-th clip from number `shard` on, to spread work over machines;
        processes of `accelerate launch` share it further.
    """

    source: str = MISSING
    output: str = MISSING
    layout: str = "auto"
    poses: str = "auto"
    masks: str = "auto"
    frame_fps: float = 30.0
    heldout: float = 0.0
    origin: str | None = None
    shard: int = 0
    num_shards: int = 1
    pose: PoseConfig = field(default_factory=PoseConfig)

    def check(self) -> None:
        """Refuse values that cannot work, naming them."""
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)} is not one of {', '.join(allowed)}")
        if not self.frame_fps > 0:
            raise UserError(f"frame_fps={self.frame_fps} must be above 0")
        if not 0 <= self.heldout < 1:
            raise UserError(f"heldout={self.heldout} must be at least 0 and below 1")


def hold_out(clips: list[SourceClip], share: float) -> list[SourceClip]:
    """The clips with a part of those that have none marked as held out, the same ones whatever else is there."""
    if not share:
        return clips
    return [clip if clip.split else replace(clip, split=_drawn_split(clip.name, share)) for clip in clips]


def poses_path(output: Path, name: str) -> Path:
    """Where a clip's poses go."""
    return output / f"{name}.npz"


def masks_path(output: Path, name: str) -> Path:
    """Where a clip's masks go."""
    return output / f"{name}_masks"


def wanted_inputs(clip: SourceClip, output: Path, config: PrepareConfig, record: dict[str, Any] | None) -> SourceClip:
    """The clip with the given poses and masks that are to be used.

    What an earlier run of this command put beside the video is not given by anybody.

    Raises:
        UserError: files that somebody else made would be overwritten.
    """
    poses = None if config.poses == "estimate" else clip.poses
    masks = clip.masks if config.masks == "auto" else None
    if record is None:
        targets = [(poses, poses_path(output, clip.name))]
        targets += [(masks, masks_path(output, clip.name))] if config.masks != "none" else []
        for given, target in targets:
            if target.exists() and given != target:
                raise UserError(f"{target} was not made by prepare.py and would be overwritten; give another output=")
        return replace(clip, poses=poses, masks=masks)
    own_poses = poses == poses_path(output, clip.name) and record.get("keypoints") != stored_path(poses, output)
    own_masks = masks == masks_path(output, clip.name) and record.get("given_masks") is None
    return replace(clip, poses=None if own_poses else poses, masks=None if own_masks else masks)


def provenance(clip: SourceClip, output: Path, config: PrepareConfig) -> dict[str, Any]:
    """What a record says before anything is made."""
    return {
        "name": clip.name,
        "video": stored_path(clip.video, output),
        "layout": clip.layout,
        "origin": config.origin,
        "split": clip.split,
        "keypoints": stored_path(clip.poses, output) if clip.poses else _estimator_name(config.pose),
        "given_masks": stored_path(clip.masks, output) if clip.masks else None,
        "settings": _settings(config),
    }


def input_fingerprints(clip: SourceClip) -> dict[str, dict[str, str]]:
    """Fingerprints of the video and of what is given with it."""
    return {name: asdict(Fingerprint.of(path)) for name, path in _input_paths(clip).items()}


def is_current(record: dict[str, Any], clip: SourceClip, output: Path, config: PrepareConfig) -> bool:
    """Whether a record is finished and what its files were made from has the content that it had, wherever it is."""
    if record.get("state") != "done" or record.get("settings") != _settings(config):
        return False
    prints, paths = record.get("inputs"), _input_paths(clip)
    if prints is None:  # the video could not be read at all
        return not clip.video.exists()
    if record["keypoints"].startswith(_ESTIMATED) != (clip.poses is None) or prints.keys() != paths.keys():
        return False
    if not all(Fingerprint(**prints[name]).matches(path) for name, path in paths.items()):
        return False
    return "left_out" in record or (output / record["poses"]).is_file()


def refresh(record: dict[str, Any], clip: SourceClip, output: Path, config: PrepareConfig) -> bool:
    """Bring a current record up to date where only words, places or times of change differ.

    Returns:
        Whether the record has changed.
    """
    before = dict(record)
    record |= provenance(clip, output, config)
    prints = record.get("inputs", {})
    if not all(Fingerprint(**stored).is_fresh(_input_paths(clip)[name]) for name, stored in prints.items()):
        record["inputs"] = input_fingerprints(clip)
    return record != before


def _input_paths(clip: SourceClip) -> dict[str, Path]:
    paths = {"video": clip.video, "poses": clip.poses, "masks": clip.masks}
    return {name: path for name, path in paths.items() if path is not None}


def _drawn_split(name: str, share: float) -> str:
    value = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8
    return "heldout" if value < share else "train"


def _settings(config: PrepareConfig) -> dict[str, Any]:
    settings = config_dict(config)
    pose = {name: value for name, value in settings["pose"].items() if name != "threads"}
    return {"pose": pose, "masks": settings["masks"], "frame_fps": settings["frame_fps"]}


def _estimator_name(config: PoseConfig) -> str:
    return f"{_ESTIMATED}{config.backend}{' heavy' if config.heavy else ''}"
