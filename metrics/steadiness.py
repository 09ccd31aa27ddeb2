"""How steady a single clip is, from one feature vector a frame.

The formulas are those of VBench (Huang et al., CVPR 2024) with other means. Its subject consistency compares DINO
features; its motion smoothness lets a network (AMT) draw every second frame from its neighbours and compares pixels.
Here both work on whatever features are given, so the numbers are not VBench's.
"""

import numpy as np


def consistency(features: np.ndarray) -> np.ndarray:
    """(frames - 1,): mean of the cosines with the first frame and with the one before, neither below 0; 1 is the best.

    `features` (frames, dimension), not zero.
    """
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    first, before = unit[1:] @ unit[0], (unit[1:] * unit[:-1]).sum(axis=1)
    return (np.maximum(first, 0) + np.maximum(before, 0)) / 2


def smoothness(features: np.ndarray) -> np.ndarray:
    """(frames - 2,): 1 minus each inner frame's relative distance from the middle of its neighbours; 1 is the best.

    Features (frames, dimension) that stand still or move in a straight line at one speed have 1.
    """
    middle = (features[:-2] + features[2:]) / 2
    apart = np.linalg.norm(features[1:-1] - middle, axis=1)
    return 1 - apart / np.linalg.norm(features[1:-1], axis=1)


MEASURES = {"vgg_consistency": consistency, "vgg_smoothness": smoothness}
