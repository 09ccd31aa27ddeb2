"""Outfits of the rendered people: skin, hair and garments drawn from a seed, and their shape on the body.

Left and right always differ (logo, sleeves, trouser legs, shoes), so that a model that confuses them is found out.
Texture coordinates of a part: u runs round it, 0.5 in front and 0.75 at the person's left; v runs downwards or
along the limb. Colours are RGB in [0, 255].
"""

import colorsys
from dataclasses import dataclass

import numpy as np

from data.config import PLAIN

PARTS = (
    "head", "hands", "torso", "left_sleeve", "right_sleeve", "left_leg", "right_leg", "left_shoe", "right_shoe",
    "skirt", "hair", "left_eye", "right_eye",
)  # fmt: skip
PATTERNS = ("plain", "rings", "stripes", "checks", "dots", "diagonals", "zigzag", "halves", "patches")
LOGOS = ("disc", "square", "triangle", "star", "cross", "letter")
HAIR_LENGTHS = {"shaved": 0.0, "short": 0.0, "cap": 0.30, "bob": 0.48, "long": 1.0}
PLAIN_TROUSERS = 0.6  # share of trousers' fabrics without a pattern
BOTTOMS = ("trousers", "shorts", "skirt")
# A leg is drawn from a little above the skirt's hem: v on the leg as a line in v on the skirt.
SKIRT_LEG_START, SKIRT_LEG_SHARE = -0.3, 1.1


@dataclass(frozen=True)
class Fabric:
    """A pattern of up to three colours; `grain` is the size of its elements in metres."""

    pattern: str
    colors: np.ndarray
    grain: float
    seed: int


@dataclass(frozen=True)
class Outfit:
    """Skin, hair, garments. Lengths are texture coordinates v of where a garment ends; thickness is in metres."""

    skin: np.ndarray
    eyes: np.ndarray
    lips: np.ndarray
    hair: np.ndarray
    hair_style: str
    beard: bool
    shirt: Fabric
    left_sleeve: Fabric
    right_sleeve: Fabric
    sleeve_length: float
    collar: float
    hem: float
    bottom: str
    left_leg: Fabric
    right_leg: Fabric
    leg_length: float
    skirt: Fabric
    skirt_length: float
    left_shoe: np.ndarray
    right_shoe: np.ndarray
    logo: str
    logo_color: np.ndarray
    logo_side: float
    logo_size: float
    back: str
    back_color: np.ndarray
    thickness: float
    flare: float


def random_outfit(seed: int, plain: float = PLAIN) -> Outfit:
    """Outfit of a seed, with this share of fabrics without a pattern (of trousers at least `PLAIN_TROUSERS`)."""
    rng = np.random.default_rng([seed, 17])
    trousers = max(plain, PLAIN_TROUSERS)
    shirt, left_leg = _random_fabric(rng, plain), _random_fabric(rng, trousers)
    bottom = str(rng.choice(BOTTOMS, p=(0.6, 0.2, 0.2)))
    right_leg = left_leg if rng.random() < 0.35 else _random_fabric(rng, trousers)
    left_sleeve = shirt if rng.random() < 0.5 else _random_fabric(rng, plain)
    # Where the legs cannot tell left from right, the sleeves must: the logo alone is small.
    same_legs = bottom == "skirt" or right_leg is left_leg
    right_sleeve = left_sleeve if not same_legs and rng.random() < 0.4 else _random_fabric(rng, plain)
    left_shoe = _random_color(rng)
    return Outfit(
        skin=_skin_color(rng),
        eyes=np.array(colorsys.hsv_to_rgb(rng.uniform(0.05, 0.65), rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.6)))
        * 255,
        lips=np.array([165.0, 60.0, 65.0]) * rng.uniform(0.7, 1.15),
        hair=_hair_color(rng),
        hair_style=str(rng.choice(list(HAIR_LENGTHS), p=(0.07, 0.33, 0.15, 0.2, 0.25))),
        beard=rng.random() < 0.1,
        shirt=shirt,
        left_sleeve=left_sleeve,
        right_sleeve=right_sleeve,
        sleeve_length=float(rng.choice([0.22, 0.34, 0.5, 0.75, 0.97])),
        collar=float(rng.uniform(0.0, 0.09)),
        hem=float(rng.uniform(0.68, 0.86)),
        bottom=bottom,
        left_leg=left_leg,
        right_leg=right_leg,
        leg_length=float(rng.uniform(0.88, 1.0) if bottom == "trousers" else rng.uniform(0.25, 0.5)),
        skirt=_random_fabric(rng, plain),
        skirt_length=float(rng.uniform(0.45, 1.0)),
        left_shoe=left_shoe,
        right_shoe=left_shoe if rng.random() < 0.4 else _random_color(rng),
        logo=str(rng.choice(LOGOS)),
        logo_color=_contrasting_color(rng, shirt.colors[0]),
        logo_side=float(rng.choice([-1, 1])),
        logo_size=float(rng.uniform(0.035, 0.075)),
        back=str(rng.choice(LOGOS)),
        back_color=_contrasting_color(rng, shirt.colors[0]),
        thickness=float(rng.uniform(0.003, 0.014)),
        flare=float(max(0.0, rng.normal(0.006, 0.014))),
    )


def kept_faces(outfit: Outfit, parts: np.ndarray, corner_uv: np.ndarray) -> np.ndarray:
    """Triangles this outfit shows, (f,) bool: hair and skirt are cut to length, legs end under a skirt."""
    lowest = corner_uv[..., 1].max(1)
    kept = np.ones(len(parts), bool)
    hair, skirt = parts == PARTS.index("hair"), parts == PARTS.index("skirt")
    kept[hair] = lowest[hair] <= HAIR_LENGTHS[outfit.hair_style]
    kept[skirt] = (lowest[skirt] <= outfit.skirt_length) & (outfit.bottom == "skirt")
    if outfit.bottom == "skirt":
        legs = np.isin(parts, [PARTS.index("left_leg"), PARTS.index("right_leg")])
        kept[legs] = lowest[legs] > SKIRT_LEG_START + SKIRT_LEG_SHARE * outfit.skirt_length
    return kept


def garment_offsets(
    outfit: Outfit, faces: np.ndarray, corner_uv: np.ndarray, parts: np.ndarray, vertex_count: int
) -> np.ndarray:
    """Thickness (v,) in metres that the garments add to each vertex."""
    v = corner_uv[..., 1]
    offsets = np.zeros(v.shape, np.float32)
    for index, name in enumerate(PARTS):
        chosen = parts == index
        along = v[chosen]
        if name == "torso":
            offsets[chosen] = np.where(along > outfit.collar, outfit.thickness, 0)
        elif name.endswith("sleeve"):
            offsets[chosen] = np.where(along < outfit.sleeve_length, outfit.thickness, 0)
        elif name.endswith("leg") and outfit.bottom != "skirt":
            width = 0.6 * outfit.thickness + outfit.flare * along / outfit.leg_length
            offsets[chosen] = np.where(along < outfit.leg_length, width, 0)
        elif name.endswith("shoe"):
            offsets[chosen] = 0.009
        elif name == "skirt":
            offsets[chosen] = 0.004 + 2 * outfit.flare * along
        elif name == "hair":
            offsets[chosen] = 0.004
    index = faces.reshape(-1)
    total = np.bincount(index, offsets.reshape(-1), vertex_count)
    return (total / np.maximum(np.bincount(index, minlength=vertex_count), 1)).astype(np.float32)


def _random_fabric(rng: np.random.Generator, plain: float) -> Fabric:
    pattern = "plain" if rng.random() < plain else str(rng.choice(PATTERNS[1:]))
    first = _random_color(rng)
    colors = np.stack([first, _contrasting_color(rng, first), _random_color(rng)])
    return Fabric(pattern, colors, float(rng.uniform(0.05, 0.13)), int(rng.integers(2**31)))


def _random_color(rng: np.random.Generator) -> np.ndarray:
    """(3,) any hue, from pale to strong and from nearly black to bright."""
    saturation = rng.choice([0.0, 1.0], p=(0.15, 0.85)) * rng.uniform(0.25, 1.0)
    return np.array(colorsys.hsv_to_rgb(rng.random(), saturation, rng.uniform(0.15, 1.0))) * 255


def _contrasting_color(rng: np.random.Generator, other: np.ndarray) -> np.ndarray:
    """The candidate farthest from `other`; garments whose colours are alike would show no pattern."""
    candidates = np.stack([_random_color(rng) for _ in range(4)])
    return candidates[np.abs(candidates - other).sum(1).argmax()]


def _skin_color(rng: np.random.Generator) -> np.ndarray:
    dark, light = np.array([82.0, 52.0, 38.0]), np.array([244.0, 206.0, 178.0])
    tone = dark + (light - dark) * rng.random()
    return np.clip(tone * (1 + rng.normal(0, 0.03, 3)), 0, 255)


def _hair_color(rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.12:
        return _random_color(rng)
    natural = np.array(
        [[28, 22, 20], [62, 40, 26], [112, 72, 40], [176, 132, 76], [150, 62, 30], [170, 168, 165]], float
    )
    return np.clip(natural[rng.integers(len(natural))] * rng.uniform(0.8, 1.2), 0, 255)
