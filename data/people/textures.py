"""Painting of the rendered people's textures: woven patterns, a logo, a face, hair.

Every painter returns (size, size, 3) float RGB in [0, 255], rows v and columns u as in `data.people.clothes`.
"""

import cv2
import numpy as np

from data.people.clothes import PARTS, Fabric, Outfit

# Rough size of each part in metres, (round, along), so that patterns have the same grain everywhere.
PART_SIZES = {"torso": (0.95, 0.76), "sleeve": (0.30, 0.6), "leg": (0.5, 0.86), "skirt": (1.5, 0.98)}


def paint_texture(outfit: Outfit, face_marks: np.ndarray, size: int) -> np.ndarray:
    """Textures of all parts, (parts, size, size, 3) uint8; `face_marks` as in `data.people.bodies.Topology`."""
    texture = np.empty((len(PARTS), size, size, 3), np.uint8)
    for index, name in enumerate(PARTS):
        texture[index] = np.minimum(_paint_part(name, outfit, face_marks, size), 255)
    return texture


def _paint_part(name: str, outfit: Outfit, face_marks: np.ndarray, size: int) -> np.ndarray:
    part = name.rpartition("_")[2]
    if part == "head":
        return _paint_head(outfit, face_marks, size)
    if part == "torso":
        return _paint_torso(outfit, size)
    if part == "sleeve":
        return _paint_limb(getattr(outfit, name), outfit.sleeve_length, part, outfit.skin, size)
    if part == "leg":
        length = 0.0 if outfit.bottom == "skirt" else outfit.leg_length
        return _paint_limb(getattr(outfit, name), length, part, outfit.skin, size)
    if part == "shoe":
        return _paint_shoe(getattr(outfit, name), size)
    if part == "eye":
        return _paint_eye(outfit.eyes, size)
    if part == "skirt" and outfit.bottom == "skirt":
        return weave(outfit.skirt, *_metres(part, size))
    if part == "hair":
        return _strands(outfit.hair, size)
    return _plain(outfit.skin, size)


def _plain(color: np.ndarray, size: int) -> np.ndarray:
    painted = np.empty((size, size, 3), np.float32)
    painted[:] = color
    return painted


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """u (1, size) and v (size, 1) of the texels' centres."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    return centres[None, :], centres[:, None]


def _metres(part: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    u, v = _grid(size)
    width, length = PART_SIZES[part]
    return (u - 0.5) * width, v * length


def weave(fabric: Fabric, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colours (rows, columns, 3) float32 of a fabric at x (1, columns) and y (rows, 1) metres; x = 0 is in front."""
    a, b = x / fabric.grain, y / fabric.grain
    index = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.uint8)
    index[:] = _pattern(fabric, a, b)
    return fabric.colors.astype(np.float32)[index]


def _pattern(fabric: Fabric, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Index of the colour, 0 to 2, at coordinates in grains; broadcasts to (rows, columns)."""
    if fabric.pattern == "rings":
        return b % 2 < 1
    if fabric.pattern == "stripes":
        return a % 2 < 1
    if fabric.pattern == "checks":
        return (a % 2 < 1) != (b % 2 < 1)
    if fabric.pattern == "dots":
        return ((a % 1.4) - 0.7) ** 2 + ((b % 1.4) - 0.7) ** 2 < 0.2
    if fabric.pattern == "diagonals":
        return (a + b) % 3 < 1.5
    if fabric.pattern == "zigzag":
        return (b + np.abs((a % 2) - 1)) % 2 < 1
    if fabric.pattern == "halves":
        return np.where(a > 0, 0, 1 + (b % 4 < 2))
    if fabric.pattern == "patches":
        cells = np.random.default_rng(fabric.seed).integers(0, 3, (32, 32))
        return cells[(b / 1.3 % 32).astype(int), (a / 1.3 % 32).astype(int)]
    return np.zeros((1, 1), np.uint8)


def _paint_torso(outfit: Outfit, size: int) -> np.ndarray:
    u, v = _grid(size)
    x, y = _metres("torso", size)
    painted = weave(outfit.shirt, x, y)
    _stamp(painted, outfit.logo, outfit.logo_color, 0.5 + 0.085 * outfit.logo_side, 0.40, outfit.logo_size)
    _stamp(painted, outfit.back, outfit.back_color, 0.0, 0.42, 1.8 * outfit.logo_size)
    below = round(outfit.hem * size)
    if outfit.bottom == "skirt":
        painted[below:] = weave(outfit.skirt, x, y[below:])
    else:
        half = size // 2
        painted[below:, half:] = weave(outfit.left_leg, x[:, half:], y[below:])
        painted[below:, :half] = weave(outfit.right_leg, x[:, :half], y[below:])
    # A round neckline, lower in front than behind.
    painted[v < outfit.collar * (1 + 0.8 * np.cos(2 * np.pi * (u - 0.5)))] = outfit.skin
    return painted


def _paint_limb(fabric: Fabric, length: float, part: str, skin: np.ndarray, size: int) -> np.ndarray:
    painted = _plain(skin, size)
    x, y = _metres(part, size)
    end = round(length * size)
    painted[:end] = weave(fabric, x, y[:end])
    return painted


def _paint_shoe(color: np.ndarray, size: int) -> np.ndarray:
    painted = _plain(color, size)
    u, v = _grid(size)
    painted[(v > 0.5) & (v < 0.62) & (np.abs(u - 0.5) < 0.3)] = 255 - 0.7 * color
    return painted


def _stamp(painted: np.ndarray, logo: str, color: np.ndarray, u: float, v: float, metres: float) -> None:
    """Draw a logo of the given width on the torso, centred at (u, v); it may lie across the seam at the back."""
    size = len(painted)
    side = 64
    shape = np.zeros((side, side), np.uint8)
    _draw_logo(shape, logo)
    width = max(3, round(metres / PART_SIZES["torso"][0] * size))
    height = max(3, round(metres / PART_SIZES["torso"][1] * size))
    weight = cv2.resize(shape, (width, height), interpolation=cv2.INTER_AREA)[..., None] / 255
    rows = np.arange(height) + round(v * size - height / 2)
    columns = (np.arange(width) + round(u * size - width / 2)) % size
    area = np.ix_(rows, columns)
    painted[area] = painted[area] * (1 - weight) + color * weight


def _draw_logo(shape: np.ndarray, logo: str) -> None:
    side = len(shape)
    half = side // 2
    if logo == "disc":
        cv2.circle(shape, (half, half), half - 1, 255, -1)
    elif logo == "square":
        cv2.rectangle(shape, (2, 2), (side - 3, side - 3), 255, side // 5)
    elif logo == "triangle":
        cv2.fillPoly(shape, [np.array([[2, side - 3], [side - 3, side - 3], [half // 2, 2]])], 255)
    elif logo == "star":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, half - 1, 0.42 * half)
        points = half + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
        cv2.fillPoly(shape, [np.rint(points).astype(np.int32)], 255)
    elif logo == "cross":
        cv2.line(shape, (4, 4), (side - 5, side - 5), 255, side // 5)
        cv2.line(shape, (4, side - 5), (side - 5, 4), 255, side // 5)
    else:
        cv2.putText(shape, "R", (8, side - 8), cv2.FONT_HERSHEY_SIMPLEX, 2.1, 255, 10)


def _paint_head(outfit: Outfit, marks: np.ndarray, size: int) -> np.ndarray:
    u, v = _grid(size)
    nose, left_eye, right_eye, _, _, mouth = marks
    painted = _plain(outfit.skin, size)
    across = np.abs(u - 0.5)
    if outfit.beard:
        # From before the ears along the jaw to the chin, and a moustache.
        top = np.interp(across, [0, 0.05, 0.08, 0.17], [mouth[1] + 0.02, mouth[1], mouth[1] - 0.03, nose[1]])
        jaw = (v > top) & (v < mouth[1] + 0.15) & (across < 0.19)
        moustache = (np.abs(v - mouth[1] + 0.035) < 0.012) & (across < 0.05)
        painted[jaw | moustache] = 0.7 * outfit.hair + 0.3 * outfit.skin
    for eye in (left_eye, right_eye):
        brow = (np.abs(v - eye[1] + 0.055 + 0.6 * (u - eye[0]) ** 2) < 0.011) & (np.abs(u - eye[0]) < 0.042)
        painted[brow] = 0.75 * outfit.hair
        painted[((u - eye[0]) / 0.038) ** 2 + ((v - eye[1]) / 0.024) ** 2 < 1] = 0.6 * outfit.skin
    painted[(across / 0.042) ** 2 + ((v - mouth[1]) / 0.021) ** 2 < 1] = outfit.lips
    if outfit.hair_style != "shaved":
        # The hairline: over the forehead in front, before and behind the ears, down to the nape.
        drop = np.interp(across, [0, 0.1, 0.16, 0.2, 0.25, 0.3, 0.5], [0, 0.01, 0.06, 0.2, 0.18, 0.3, 0.33])
        scalp = v < left_eye[1] - 0.17 + drop
        painted[scalp] = _strands(outfit.hair, size)[scalp]
    return painted


def _strands(color: np.ndarray, size: int) -> np.ndarray:
    u, v = _grid(size)
    streaks = 1 + 0.16 * np.sin(2 * np.pi * (23 * u + 0.4 * np.sin(9 * v))) + 0.08 * np.sin(2 * np.pi * 61 * u)
    return (streaks * (1.08 - 0.2 * v))[..., None] * color.astype(np.float32)


def _paint_eye(iris: np.ndarray, size: int) -> np.ndarray:
    u, v = _grid(size)
    radius = np.hypot(u - 0.5, v - 0.5)
    painted = _plain(np.full(3, 240.0), size)
    painted[radius < 0.24] = iris
    painted[radius < 0.11] = 12.0
    return painted
