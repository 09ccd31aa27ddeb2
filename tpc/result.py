"""The result of a calibration: calibrated images, their masks, and which frame uses which at every denoising step."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import cv2
import numpy as np

from core.errors import UserError
from core.files import complete_folder
from data.poses.person import PackedMasks
from data.video.lazy import LazyImages
from tpc.config import CalibrationConfig, resolve
from tpc.segments import continued_image, segment_frame
from tpc.trajectory import Schedule

if TYPE_CHECKING:
    from models.attention.layers import TokenLevel
    from models.attention.masking import Visibility

STATUSES = ("calibrated", "interpolated", "uncalibrated")
NOTABLE_SCALE_RATIO = 1.2
REPORT_FILE, ARRAYS_FILE, IMAGES_FOLDER = "calibration.json", "calibration.npz", "calibrated"
PACKED = ("masks", "target_masks", "other_masks")  # attributes that are stored compressed


# IoU of the silhouettes, calibrated and driving, below which a frame lacks too much of a person to begin as its
# calibrated image, legs for instance; a few steps cannot paint them.
SHOWN = 0.7


@dataclass(frozen=True)
class PersonFrame:
    """One person of the reference in one driving frame; the fields of `calibration.json`.

    `matrix` is [[a, -b, tx], [b, a, ty], [0, 0, 1]], original reference pixels to original driving pixels.
    """

    person: int
    status: str  # calibrated, interpolated (from frames before and after), uncalibrated (plain reference attention)
    reason: str | None = None  # why it is not calibrated, or something to know about how it is
    matrix: list[list[float]] | None = None
    scale: float | None = None
    rotation_deg: float | None = None
    keypoints: tuple[int, ...] = ()  # indices of the COCO keypoints that served
    residual_px: float | None = None  # their RMS distance after the transform, driving pixels
    mask_iou: float | None = None  # of the calibrated and the driving person's mask in the model's frame
    relative_angle_deg: float | None = None  # [-180, 180], from the reference's pelvis-to-nose line to the driver's
    box_iou: float | None = None  # of the boxes of their keypoints, before calibration, in the model's frame
    torso_scale: float | None = None  # the scale that shoulders and hips alone would give
    slot: int | None = None  # index of the person in the driving poses, None when absent
    common: tuple[int, ...] = ()  # indices of the keypoints that are visible in both images
    mirrored: bool = False  # left and right of the reference were exchanged, one of the two being seen from behind

    # Articulated: the map of each part, like `matrix`, and the parts that follow their parent, having no keypoints of
    # their own that are seen in both images; None where the person moves as a whole.
    parts: dict[str, list[list[float]]] | None = None
    following: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """Only dicts, lists and scalars, as in JSON; parts only where there are some."""
        plain = {**asdict(self), **{name: list(getattr(self, name)) for name in ("keypoints", "common", "following")}}
        return plain if self.parts else {name: plain[name] for name in plain if name not in ("parts", "following")}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> PersonFrame:
        """The inverse of `plain`."""
        lists = {name: tuple(plain.get(name, ())) for name in ("keypoints", "common", "following")}
        return cls(**plain | lists)


@dataclass(frozen=True)
class Calibration:
    """A reference calibrated to a driving clip; made by `tpc.calibrate`, a plain value without hidden state.

    Sizes are (width, height); "the model's frame" is the image the animator works on; masks are (h, w) bool of it.
    """

    config: CalibrationConfig  # resolved
    size: tuple[int, int]  # of the model's frame
    reference_size: tuple[int, int]  # of the original images
    driving_size: tuple[int, int]
    frame_map: np.ndarray  # (3, 3) original driving pixels to the model's frame
    fps: float  # of the driving clip
    images: LazyImages  # (n, h, w, 3) uint8, the distinct calibrated images, made on demand
    masks: PackedMasks  # (n, h, w), the calibrated person in each
    member: np.ndarray  # (frames, persons) int, the calibrated image made from each frame, -1 = uncalibrated
    matrices: np.ndarray  # (frames, persons, 3, 3) original reference to driving pixels, identity where uncalibrated
    records: tuple[tuple[PersonFrame, ...], ...]  # [frame][person], as in `calibration.json`
    target_masks: PackedMasks  # (frames, persons, h, w), where each person of the reference is in the driving frames
    other_masks: PackedMasks  # (frames, h, w), persons of the clip whom nobody in the reference corresponds to
    reference_masks: np.ndarray  # (persons, h, w), the persons in the model's reference image
    seconds: float = 0.0  # that making it took
    cuts: tuple[int, ...] = ()  # first frames of the clip's shots after the first
    # (frames, persons) int, the image each frame attends to at every step, in place of the schedule's; not saved
    attended: np.ndarray | None = None

    @property
    def frames(self) -> int:
        return self.member.shape[0]

    @property
    def persons(self) -> int:
        return self.member.shape[1]

    @property
    def status(self) -> np.ndarray:
        """(frames, persons) str."""
        return self._gather("status")

    @property
    def reason(self) -> np.ndarray:
        """(frames, persons) str or None."""
        return self._gather("reason")

    def index(self, step: int) -> np.ndarray:
        """(frames, persons) int: the image of `images` each frame attends to at a denoising step, -1 = none."""
        if self.attended is not None:
            return self.attended
        schedule = Schedule(self.member >= 0, self.config.groups, self.config.propagation, self.config.seed, self.cuts)
        source = schedule.source_frame(step)
        return np.where(source >= 0, np.take_along_axis(self.member, np.maximum(source, 0), axis=0), -1)

    def frame_image(self, frame: int) -> np.ndarray:
        """(H, W, 3): a frame's calibrated images, persons laid over each other; grey where there is none.

        Its own, or those that it was told to attend to.
        """
        index = self.member if self.attended is None else self.attended
        images = [image for image in index[frame] if image >= 0]
        if not images:
            return np.full((self.size[1], self.size[0], 3), 128, np.uint8)
        shown = self.images[images[0]]
        for image in images[1:]:
            shown = np.where(self.masks[image][..., None], self.images[image], shown)
        return shown

    def held(self, frames: range, groups: int) -> Self:
        """These frames alone calibrated, each of so many groups of them to the frame that fits it best, at every step.

        Groups are as equal as can be.
        """
        index = np.full_like(self.member, -1)
        for group in np.array_split(np.asarray(frames), min(groups, len(frames))):
            frame = segment_frame(self, range(group[0], group[-1] + 1))
            if frame is not None:
                index[group] = self.member[frame]
        return self.attending(index)

    def attending(self, index: np.ndarray) -> Self:
        """The same, its frames attending to these images, (frames, persons), -1 = none, at every step."""
        return replace(self, attended=index)

    def segment_image(self, frames: range) -> np.ndarray | None:
        """(H, W, 3): the calibrated image that stands for all of these frames; None where nobody is calibrated."""
        frame = segment_frame(self, frames)
        return None if frame is None else continued_image(self, frame)

    @property
    def start_timestep(self) -> int | None:
        """Timestep at which frames that `shows_everybody` begin, from `frame_image`; None: all begin from noise."""
        return None if self.config.start < 0 else self.config.start

    @cached_property
    def shows_everybody(self) -> np.ndarray:
        """(frames,) bool: frames with calibrated images, of everybody who is in them, of nobody less than `SHOWN`."""
        present = np.array([[record.slot is not None for record in row] for row in self.records], bool)
        cut = [[record.mask_iou is not None and record.mask_iou < SHOWN for record in row] for row in self.records]
        hidden = (self.member < 0) | np.array(cut, bool).reshape(self.member.shape)
        missing = present.reshape(self.member.shape) & hidden
        strangers = np.array([self.other_masks[frame].any() for frame in range(self.frames)], bool)
        return (self.member >= 0).any(1) & ~missing.any(1) & ~strangers

    @property
    def replaces_reference(self) -> bool:
        """True where a calibrated image takes the reference's place in its frames, instead of standing beside it."""
        return self.config.attach == "replace"

    def flags(self, frames: range, step: int, levels: Sequence[TokenLevel]) -> Visibility | None:
        """Flags that hide tokens from consecutive frames at a denoising step; None where nothing is hidden."""
        # The only import inside a function: geometry loads neither torch nor diffusers.
        from tpc.attach import calibration_flags

        return calibration_flags(self, frames, step, levels)

    def used(self, num_steps: int) -> np.ndarray:
        """(k,) int, ascending: the images that steps 0 ... num_steps - 1 draw. Only these need encoding."""
        drawn = [self.index(step) for step in range(num_steps)]
        drawn = np.unique(np.concatenate([d.reshape(-1) for d in drawn])) if drawn else np.zeros(0, int)
        return drawn[drawn >= 0]

    def report(self) -> dict[str, Any]:
        """The contents of `calibration.json`."""
        return {
            "reference": {"size": list(self.reference_size), "persons": self.persons},
            "driving": {"size": list(self.driving_size), "frames": self.frames, "fps": self.fps},
            "size": list(self.size),
            "cuts": list(self.cuts),
            "config": asdict(self.config),
            "frames": [
                {"frame": frame, "persons": [record.plain() for record in records]}
                for frame, records in enumerate(self.records)
            ],
            "summary": self.summary(),
        }

    def summary(self) -> dict[str, Any]:
        """Counts of the three statuses over frames and persons, their reasons, the mean IoU, notes, and the time."""
        records = [record for row in self.records for record in row]
        ious = [record.mask_iou for record in records if record.mask_iou is not None]
        return {
            **{status: sum(record.status == status for record in records) for status in STATUSES},
            "reasons": dict(Counter(record.reason for record in records if record.reason).most_common()),
            "mean_mask_iou": round(float(np.mean(ious)), 4) if ious else None,
            "images": len(self.images),
            "notes": self.notes(),
            "seconds": round(self.seconds, 3),
        }

    def outcome(self) -> str:
        """How many frames, of several persons each, are calibrated, interpolated and not, and why not, in one line."""
        records = [record for row in self.records for record in row]
        counts = [f"{sum(record.status == status for record in records)} {status}" for status in STATUSES]
        reasons = Counter(r.reason for r in records if r.status != STATUSES[0] and r.reason).most_common()
        why = "; ".join(f"{reason}: {number}" for reason, number in reasons)
        cuts = f"; cuts before frames {', '.join(map(str, self.cuts))}" if self.cuts else ""
        return ", ".join(counts) + (f" ({why})" if why else "") + cuts

    def notes(self) -> list[str]:
        """Sentences to read before the numbers are trusted; often none."""
        notes, groups = [], self.config.groups
        if self.config.propagation != "off" and groups >= self.frames > 1:
            notes.append(
                f"tpc.groups={groups} gives each of the {self.frames} frames a group of its own, so that propagation "
                "changes nothing; tpc.groups=0 makes groups of four frames"
            )
        late = self.frames - np.count_nonzero(self.shows_everybody) if self.config.start >= 0 else 0
        if late:
            further = "; the clip takes more steps for them" if late < self.frames else ""
            notes.append(
                f"{late} of {self.frames} frames begin from noise in spite of tpc.start={self.config.start}, as "
                f"somebody in them is not calibrated, or in large parts not shown{further}"
            )
        for person in range(self.persons):
            known = [row[person] for row in self.records if row[person].scale and row[person].torso_scale]
            ratios = [record.scale / record.torso_scale for record in known]
            ratio = float(np.median(ratios)) if ratios else 1.0
            if not 1 / NOTABLE_SCALE_RATIO <= ratio <= NOTABLE_SCALE_RATIO:
                notes.append(
                    f"person {person} is {ratio:.2f} times as large as shoulders and hips alone say: where the poses "
                    "differ, the best silhouette IoU may come from filling the silhouette"
                )
            following = Counter(part for row in self.records for part in row[person].following)
            if following:
                counts = ", ".join(f"{part} in {count}" for part, count in following.most_common())
                notes.append(
                    f"parts of person {person} that follow their parent, unseen in an image or of a leg folded in the "
                    f"reference, and in how many frames: {counts}"
                )
        return notes

    def save(self, folder: str | Path) -> None:
        """Write `calibration.json`, `calibration.npz` and `calibrated/` with an image and a mask a frame and person.

        An earlier calibration in the folder is replaced; a folder with anything else in it is refused.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / REPORT_FILE).exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and does not hold a calibration; give a new folder")
        with complete_folder(folder) as temporary:
            self.write(temporary)

    def write(self, folder: Path) -> None:
        """Write the files of `save` into an existing folder."""
        images = folder / IMAGES_FOLDER
        images.mkdir(exist_ok=True)
        for number in range(len(self.images)):
            pixels = self.images[number][..., ::-1], self.masks[number].astype(np.uint8) * 255
            image, mask = (cv2.imencode(".png", np.ascontiguousarray(each))[1].tobytes() for each in pixels)
            for frame, person in zip(*np.nonzero(self.member == number), strict=True):
                (images / f"{image_name(frame, person)}.png").write_bytes(image)
                (images / f"{image_name(frame, person)}_mask.png").write_bytes(mask)
        arrays = {"member": self.member, "matrices": self.matrices, "frame_map": self.frame_map}
        for name in PACKED:
            arrays[name], arrays[f"{name}_lengths"] = getattr(self, name).to_arrays()
        np.savez_compressed(folder / ARRAYS_FILE, reference_masks=self.reference_masks, **arrays)
        text = json.dumps(self.report(), indent=1, allow_nan=False)
        (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Calibration:
        """Read what `save` wrote; the images are read when they are used. UserError when it is something else."""
        folder = Path(folder)
        try:
            report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
            with np.load(folder / ARRAYS_FILE, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            records = tuple(
                tuple(PersonFrame.from_plain(record) for record in frame["persons"]) for frame in report["frames"]
            )
            size, member = tuple(report["size"]), arrays["member"]
            packed = {name: PackedMasks.from_arrays(arrays[name], arrays[f"{name}_lengths"], size) for name in PACKED}
            return cls(
                config=resolve(CalibrationConfig(**report["config"])),
                size=size,
                reference_size=tuple(report["reference"]["size"]),
                driving_size=tuple(report["driving"]["size"]),
                frame_map=arrays["frame_map"],
                fps=report["driving"]["fps"],
                images=_stored_images(folder / IMAGES_FOLDER, member, len(packed["masks"]), size),
                **packed,
                member=member,
                matrices=arrays["matrices"],
                records=records,
                reference_masks=arrays["reference_masks"],
                seconds=report["summary"]["seconds"],
                cuts=tuple(report.get("cuts", ())),
            )
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(f"{folder} does not hold a calibration: {error}") from None

    def _gather(self, name: str) -> np.ndarray:
        values = [[getattr(record, name) for record in row] for row in self.records]
        return np.array(values, dtype=object).reshape(self.member.shape)


def image_name(frame: int, person: int) -> str:
    """File name without suffix of a calibrated image: 000000_p0."""
    return f"{frame:06d}_p{person}"


def _stored_images(folder: Path, member: np.ndarray, count: int, size: tuple[int, int]) -> LazyImages:
    paths = {}
    for frame, person in zip(*np.nonzero(member >= 0), strict=True):
        paths.setdefault(int(member[frame, person]), folder / f"{image_name(frame, person)}.png")

    def read(number: int) -> np.ndarray:
        image = cv2.imread(str(paths[number]), cv2.IMREAD_COLOR)
        if image is None:
            raise UserError(f"{paths[number]} is missing or not an image")
        return image[..., ::-1].copy()

    return LazyImages(count, size, read)
