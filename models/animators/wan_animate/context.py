"""What the tokens of a segment see of reference and calibrated images, all of them in one sequence.

Shapes use f = frames, t = latent frames of the clip, n = tokens of one of them or of an image, p = persons,
i = calibrated images that a segment sees, g = flag channels, N = (1 + i + t) n tokens of the sequence.
"""

from dataclasses import replace

import torch

from models.attention.context import ReferenceContext
from models.attention.masking import Visibility


def joint_context(context: ReferenceContext, n: int, frames_per_latent: int) -> ReferenceContext:
    """The context of a segment, of the contexts of its frames: index (1, 1 + i), flags of all N tokens.

    A latent attends to the images of its middle frame, and a query sees what it sees in any of the frames of its
    latent. The reference sees itself and the clip, as without calibration; a calibrated image sees the reference and
    itself.
    """
    index = context.index.cpu()  # (f, 1 + p), 0 where a person is not calibrated
    images = sorted(set(index[:, 1:].flatten().tolist()) - {0})
    attended = torch.tensor([[0, *images]], device=context.index.device)
    if not images:
        return replace(context, index=attended, visibility=None)
    frames = [0, *(1 + (frame - 1) // frames_per_latent for frame in range(1, len(index)))]
    latents = [[frame for frame, latent in enumerate(frames) if latent == t] for t in range(frames[-1] + 1)]
    groups = list(dict.fromkeys(map(tuple, index.tolist())))  # different images that frames attend to
    group = [groups.index(tuple(index[members[len(members) // 2]].tolist())) for members in latents]

    query, key = (torch.zeros(len(index), size, 0) for size in (n, n * (1 + index.shape[1])))
    if (flags := context.flags(n)) is not None:
        query, key = (values.float().cpu() for values in flags)
    channels = query.shape[-1]
    # Channels are [masks of each group | blind to each image | blind to the clip].
    blind, clip = len(groups) * channels, len(groups) * channels + len(images)
    queries, keys = (torch.zeros(1 + len(images) + len(latents), n, clip + 1) for _ in range(2))
    queries[: 1 + len(images), :, blind:clip] = 1
    queries[1 : 1 + len(images), :, clip] = keys[1 + len(images) :, :, clip] = 1
    for number in range(len(images)):
        queries[1 + number, :, blind + number] = 0
        keys[1 + number, :, blind + number] = 1
    for t, members in enumerate(latents):
        masks = slice(group[t] * channels, (group[t] + 1) * channels)
        row = queries[1 + len(images) + t]
        row[:, masks] = query[members].amin(dim=0)
        row[:, blind:clip] = torch.tensor([float(image not in groups[group[t]]) for image in images])
    for number, row in enumerate(groups):
        masks = slice(number * channels, (number + 1) * channels)
        members = [frame for frame in range(len(index)) if tuple(index[frame].tolist()) == row]
        shown = key[members].amin(dim=0).unflatten(0, (-1, n))[1:]  # (1 + p, n, g), without the frame's own tokens
        for slot, image in enumerate(row):
            if slot == 0 or image:
                keys[attended[0].tolist().index(image), :, masks] = shown[slot]
    tokens = len(queries) * n
    flags = Visibility({tokens: queries.reshape(1, tokens, -1)}, {tokens: keys.reshape(1, tokens, -1)})
    return replace(context, index=attended, visibility=flags.to(attended.device))
