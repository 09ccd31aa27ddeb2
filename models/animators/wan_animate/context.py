"""What the tokens of a segment see of reference and calibrated images, all of them in one sequence, and its recording.

Shapes use f = frames, t = latent frames of the clip, n = tokens of one of them or of an image, p = persons,
i = calibrated images that a segment sees, g = flag channels, d = channels of a head. The sequence has (1 + i + t) n
tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.processes import to_device
from models.attention.context import ReferenceContext
from models.attention.probe import WindowProbe
from models.segments import latent_spans, middle


@dataclass(frozen=True)
class Sight:
    """Tokens of a sequence that see the same ones, and nothing else."""

    queries: Tensor  # (q,) long, their places in the sequence
    keys: Tensor  # (k,) long
    flags: tuple[Tensor, Tensor] | None = None  # of these, (1, q, g) and (1, k, g): a common one hides; None: nothing
    latents: tuple[int, ...] = ()  # whose tokens these are, and all of the clip's are the last of the keys
    images: tuple[int, ...] = ()  # which of a frame's 1 + p images the other keys are of


@dataclass(frozen=True)
class LatentProbe:
    """Shows latents to a probe as the frames of a batch: their queries, and keys [clip | image | image ...]."""

    parts: tuple[tuple[Sight, WindowProbe], ...]  # latents that attend to the same images, and the probe of these rows

    def record(self, layer: str, query: Tensor, key: Tensor) -> None:
        """Record queries and keys of a whole sequence, (1, heads, (1 + i + t) n, d) each."""
        for sight, probe in self.parts:
            rows = len(sight.latents)
            n = len(sight.queries) // rows
            first = len(sight.images) * n  # keys of the clip, which the probe wants before those of images
            keys = key[:, :, sight.keys.roll(-first)].expand(rows, -1, -1, -1)
            queries = query[0][:, sight.queries].unflatten(1, (rows, n)).transpose(0, 1)  # (rows, heads, n, d)
            flags = None
            if sight.flags is not None:
                of_keys = sight.flags[1].roll(-first, dims=1)
                flags = sight.flags[0][0].unflatten(0, (rows, n)), of_keys.expand(rows, -1, -1)
            probe.record(layer, queries, keys, flags, query.shape[-1] ** -0.5)


@dataclass(frozen=True)
class JointContext(ReferenceContext):
    """The context of a segment: index (1, 1 + i), and who sees what; None: everybody everything."""

    sights: tuple[Sight, ...] | None = None


def latent_probe(context: ReferenceContext, t: int, n: int) -> LatentProbe | None:
    """The probe of a segment whose context has one of its frames; None: nothing is recorded."""
    if context.probe is None:
        return None
    sights = context.sights if isinstance(context, JointContext) else None
    if sights is None:  # everybody sees everything
        places = torch.arange((1 + t) * n, device=context.index.device)
        sights = (Sight(places[n:], places, latents=tuple(range(t)), images=(0,)),)
    parts = [(sight, context.probe.of_rows(sight.latents, sight.images)) for sight in sights if sight.latents]
    return LatentProbe(tuple((sight, probe) for sight, probe in parts if probe is not None))


def joint_context(
    context: ReferenceContext, n: int, frames_per_latent: int, index: list[list[int]] | None = None
) -> JointContext:
    """The context of a segment, of the contexts of its frames, index (f, 1 + p); None: the context's.

    A latent attends to the images of its middle frame, and a query sees what it sees in any of the frames of its
    latent. The reference sees itself and the clip, as without calibration; a calibrated image sees the reference and
    itself.
    """
    device = context.index.device
    index = context.index.tolist() if index is None else index  # 0 where a person is not calibrated
    images = sorted({image for row in index for image in row[1:]} - {0})
    joint = JointContext(context.tokens, to_device(torch.tensor([[0, *images]]), device))
    if not images:
        return joint
    latents = latent_spans(len(index), frames_per_latent)
    groups: dict[tuple[int, ...], list[int]] = {}  # images that latents attend to -> these latents
    for t, frames in enumerate(latents):
        groups.setdefault(tuple(index[middle(frames)]), []).append(t)

    clip = [1 + len(images) + t for t in range(len(latents))]

    def places(numbers: list[int]) -> Tensor:
        """(m n,) long: places in the sequence of the tokens of images and latents, by their number in it."""
        return to_device((torch.tensor(numbers)[:, None] * n + torch.arange(n)).flatten(), device)

    sights = [Sight(places([0]), places([0, *clip]))]
    sights += [Sight(places([1 + number]), places([0, 1 + number])) for number in range(len(images))]
    for row, members in groups.items():
        slots = [slot for slot, image in enumerate(row) if slot == 0 or image]
        keys = places([0, *(1 + images.index(row[slot]) for slot in slots[1:]), *clip])
        if (flags := context.flags(n)) is not None:
            query = torch.cat([flags[0][latents[t].start : latents[t].stop].amin(dim=0) for t in members])
            frames = [frame for frame, images_of_frame in enumerate(index) if tuple(images_of_frame) == row]
            # [the frame's own | reference | image of each person], of which the clip's tokens are all there.
            shown = torch.stack([flags[1][frame] for frame in frames]).amin(dim=0).unflatten(0, (-1, n))
            shown = torch.cat([shown[1 + slot] for slot in slots])
            flags = query[None], torch.cat([shown, shown.new_zeros(len(clip) * n, shown.shape[1])])[None]
        sights.append(Sight(places([clip[t] for t in members]), keys, flags, tuple(members), tuple(slots)))
    return replace(joint, sights=tuple(sights))
