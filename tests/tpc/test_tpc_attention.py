"""Visibility of calibrated tokens: the rules token by token, flags against dense masks, pooling."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention.layers import KeyLayout, TokenLevel, block_pitch, pool_masks, self_attention_level, stage_grids
from models.attention.masking import Visibility, append_flags, dense_mask, masked_attention
from tests.tpc_bodies import body, place, poses
from tpc import CalibrationConfig, calibrate
from tpc.attach import frame_visibility, visibility_flags

PRESETS = ("paper", "release", "exclusive", "scene")
# One row of tokens: person 0 | outline of person 0 | both persons | person 1 | background | stranger.
TARGET = torch.tensor([[[1.0, 0.4, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]]])
OTHER = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
REFERENCE = torch.tensor([[[1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]])
CALIBRATED = torch.tensor([[[0.0, 0.0, 1.0, 0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]])
N = 6


def levels(count: int) -> list[TokenLevel]:
    """Reference attention on 12 x 18 tokens and grids of half the sides."""
    return [self_attention_level(grid) for grid in ((12, 18), (6, 9), (3, 5))[:count]]


def visible(preset: str, present=(True, True)) -> np.ndarray:
    """(queries, keys) as text of 0 and 1: own | reference | person 0 | person 1."""
    flags = visibility_flags(TARGET, OTHER, REFERENCE, CALIBRATED, torch.tensor([present]), preset=preset)
    mask = dense_mask(Visibility({N: flags[0]}, {N: flags[1]}), N)[0].int()
    assert mask[:, :N].all()
    return np.array([" ".join("".join(map(str, part)) for part in np.split(row[N:], 3)) for row in mask.numpy()])


ALL, NONE, BODIES_OUT, LEFT = "111111", "000000", "001111", "110000"
ONE, TWO = "001100", "000001"


@pytest.mark.parametrize(
    ("preset", "rows"),
    [
        (
            "paper",
            [
                (ALL, ONE, NONE),
                (ALL, ONE, NONE),
                (ALL, ONE, TWO),
                (ALL, NONE, TWO),
                (ALL, ONE, TWO),
                (ALL, NONE, NONE),
            ],
        ),
        (
            "release",
            [
                (NONE, ONE, NONE),
                (NONE, ONE, NONE),
                (NONE, ONE, TWO),
                (NONE, NONE, TWO),
                (BODIES_OUT, NONE, NONE),
                (ALL, NONE, NONE),
            ],
        ),
        (
            "exclusive",
            [
                (NONE, ONE, NONE),
                (BODIES_OUT, ONE, NONE),
                (NONE, ONE, TWO),
                (NONE, NONE, TWO),
                (ALL, NONE, NONE),
                (ALL, NONE, NONE),
            ],
        ),
        (
            "scene",
            [
                (NONE, ONE, NONE),
                (BODIES_OUT, "111100", LEFT),
                (NONE, ONE, TWO),
                (NONE, NONE, TWO),
                (BODIES_OUT, LEFT, LEFT),
                (ALL, NONE, NONE),
            ],
        ),
    ],
)
def test_every_kind_of_token_sees_what_the_rule_says(preset, rows):
    np.testing.assert_array_equal(visible(preset), [" ".join(row) for row in rows])


@pytest.mark.parametrize("preset", PRESETS)
def test_an_uncalibrated_person_sees_the_plain_reference_and_nobody_its_calibrated_tokens(preset):
    rows = visible(preset, (True, False))
    assert all(row.endswith(NONE) for row in rows)
    assert rows[3] == f"{ALL} {NONE} {NONE}"
    assert rows[2].startswith(ALL)  # where both are, the uncalibrated one needs the reference
    # The background loses only the bodies of persons who are shown elsewhere.
    assert rows[4].startswith({"paper": ALL, "release": "011111", "exclusive": ALL, "scene": "011111"}[preset])
    assert set(visible(preset, (False, False))) == {f"{ALL} {NONE} {NONE}"}


def test_threshold_decides_when_a_token_is_a_person():
    low, high = (
        visibility_flags(
            TARGET, OTHER, REFERENCE, CALIBRATED, torch.tensor([[True, True]]), preset="release", threshold=t
        )
        for t in (0.1, 0.5)
    )
    assert not torch.equal(low[0], high[0]) and not torch.equal(low[1], high[1])
    with pytest.raises(ValueError, match="preset"):
        visibility_flags(TARGET, OTHER, REFERENCE, CALIBRATED, torch.tensor([[True, True]]), preset="papr")


def visible_pair(preset: str, query: dict, key: dict) -> bool:
    """The rules for one query and one key; `persons` are the calibrated persons that a token is on."""
    plain = query["uncalibrated"]
    background = not query["persons"] and not plain
    outline = bool(query["persons"]) and not plain and not query["covered"]
    whole_reference, no_bodies = plain or preset == "paper", preset in ("release", "scene") and background
    if key["image"] == "own":
        return True
    if key["image"] == "reference":
        if whole_reference or key["whole"] or (preset == "exclusive" and background):
            return True
        no_bodies = no_bodies or (preset in ("exclusive", "scene") and outline)
        return no_bodies and not key["body"]
    if not key["present"]:
        return False
    if key["whole"] or key["on_mask"]:
        return key["image"] in query["persons"] or (preset == "paper" and background)
    return preset == "scene" and key["body"] and (background or outline)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(PRESETS), st.integers(1, 3), st.booleans(), st.sampled_from([0, 1]), st.integers(0, 2**20))
def test_the_table_says_what_the_rules_say(preset, persons, own, whole, seed):
    """Token by token, with uncalibrated persons, strangers, outlines, and tokens of whole images."""
    generator, n, r = torch.Generator().manual_seed(seed), 7, 5
    level = torch.tensor([0.0, 0.0, 0.3, 1.0])
    target, other, reference, calibrated = (
        level[torch.randint(4, (1, *shape), generator=generator)]
        for shape in ((persons, n), (n,), (persons, r), (persons, r))
    )
    other = other * (torch.rand(1, n, generator=generator) < 0.3)
    present = torch.rand(1, persons, generator=generator) < 0.7
    flags = visibility_flags(
        target, other, reference, calibrated, present, preset=preset, layout=KeyLayout((1, r), whole, own)
    )
    mask = dense_mask(Visibility({n: flags[0]}, {n: flags[1]}), n)[0]
    there = [person for person in range(persons) if present[0, person]]
    queries = [
        {
            "persons": [person for person in there if target[0, person, j] > 0],
            "uncalibrated": bool(((target[0, :, j] > 0) & ~present[0]).any() or other[0, j] > 0),
            "covered": bool((target[0, :, j] * present[0]).sum() >= 1 - 1e-6),
        }
        for j in range(n)
    ]
    body = [any(reference[0, person, j] > 0 for person in there) for j in range(r)]
    keys = [{"image": "own"}] * (n * own)
    for image in ("reference", *range(persons)):
        facts = {"image": image, "present": image in there}
        keys += [{**facts, "whole": True}] * whole
        for j in range(r):
            on_mask = image != "reference" and bool(calibrated[0, image, j] > 0)
            keys.append({**facts, "whole": False, "body": body[j], "on_mask": on_mask})
    expected = [[visible_pair(preset, query, key) for key in keys] for query in queries]
    assert mask.tolist() == expected


def random_flags(persons: int, n: int, preset: str, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    share = lambda *shape: (torch.rand(*shape, generator=g) - 0.5).clamp(min=0)  # noqa: E731
    present = torch.rand(3, persons, generator=g) < 0.7
    return visibility_flags(
        share(3, persons, n), share(3, n), share(3, persons, n), share(3, persons, n), present, preset=preset
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("persons", [1, 2, 3])
@pytest.mark.parametrize("logits", [1.0, 12.0])
def test_flags_equal_the_dense_mask(preset, persons, logits):
    n, heads, d = 48, 2, 40
    query_flags, key_flags = random_flags(persons, n, preset)
    keys = n * (2 + persons)
    g = torch.Generator().manual_seed(1)
    query = logits * torch.randn(3, heads, n, d, generator=g)
    key, value = torch.randn(2, 3, heads, keys, d, generator=g)
    mask = dense_mask(Visibility({n: query_flags}, {n: key_flags}), n)
    assert 0.1 < mask.float().mean() < 0.9
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None])
    result = masked_attention(query, key, value, query_flags, key_flags)
    assert (result - expected).abs().max() < 1e-5
    for dtype in (torch.bfloat16, torch.float16):
        half = masked_attention(query.to(dtype), key.to(dtype), value.to(dtype), query_flags, key_flags)
        reference = F.scaled_dot_product_attention(
            *(t.to(dtype) for t in (query, key, value)), attn_mask=mask[:, None]
        )
        assert torch.isfinite(half).all() and (half - reference).abs().max() < 0.03


def test_hidden_values_never_leak_however_large():
    query_flags, key_flags = random_flags(2, 16, "release")
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, m, 8, generator=g) for m in (16, 64, 64))
    mask = dense_mask(Visibility({16: query_flags}, {16: key_flags}), 16)
    plain = masked_attention(query, key, value, query_flags, key_flags)
    row = 5
    spoilt = torch.where(mask[:, row, :][:, None, :, None], value, 1e6 * torch.ones_like(value))
    assert torch.allclose(
        masked_attention(query, key, spoilt, query_flags, key_flags)[:, :, row], plain[:, :, row], atol=1e-5
    )


def test_appended_channels_fit_fused_kernels():
    query_flags, key_flags = random_flags(2, 16, "exclusive")
    query, key = append_flags(torch.randn(3, 2, 16, 40), torch.randn(3, 2, 64, 40), query_flags, key_flags, 40**-0.5)
    assert query.shape[-1] == key.shape[-1] == 48
    assert torch.isfinite(query.half()).all()


def test_gradients_flow_through_visible_tokens_only():
    query_flags, key_flags = random_flags(1, 16, "release")
    value = torch.randn(3, 1, 48, 8, requires_grad=True)
    masked_attention(
        torch.randn(3, 1, 16, 8), torch.randn(3, 1, 48, 8), value, query_flags, key_flags
    ).sum().backward()
    seen = dense_mask(Visibility({16: query_flags}, {16: key_flags}), 16).any(1)
    assert (value.grad[:, 0].abs().sum(-1) > 0).equal(seen)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((64, 64), (8, 8)), ((96, 64), (12, 4)), ((784, 512), (98, 64)), ((784, 512), (25, 16)), ((40, 24), (3, 2))],
)
def test_pooling_gives_the_covered_part_of_every_token(size, grid):
    mask = torch.rand(2, *size) < 0.3
    pooled = pool_masks(mask, grid).reshape(2, *grid)
    pitch = [2 ** int(np.ceil(np.log2(s / g))) if s % g else s // g for s, g in zip(size, grid, strict=True)]
    for row, column in ((0, 0), (grid[0] - 1, grid[1] - 1), (grid[0] // 2, grid[1] // 2)):
        block = mask[:, row * pitch[0] : (row + 1) * pitch[0], column * pitch[1] : (column + 1) * pitch[1]]
        torch.testing.assert_close(pooled[:, row, column], block.float().mean((1, 2)))


def test_one_pixel_makes_a_person_token_at_every_level():
    mask = torch.zeros(1, 512, 512, dtype=torch.bool)
    mask[0, 300, 200] = True
    grids = [(64, 64), (32, 32), (16, 16), (8, 8)]
    for grid in grids:
        assert (pool_masks(mask, grid) > 0).sum() == 1
    assert [int((pool_masks(mask, grid) > 0.001).sum()) for grid in grids] == [
        1,
        1,
        0,
        0,
    ]  # as released


def test_grids_halve_and_round_up():
    stage, last = SimpleNamespace(downsamplers=[1]), SimpleNamespace(downsamplers=None)
    *grids, middle = stage_grids(SimpleNamespace(down_blocks=[stage] * 3 + [last]), 98, 64)
    assert grids == [(98, 64), (49, 32), (25, 16), (13, 8)] and middle == grids[-1]
    assert [block_pitch(784, t) for t in (98, 49, 25, 13)] == [8, 16, 32, 64]
    assert block_pitch(100, 30) == 4 - 4 and pool_masks(torch.ones(1, 100, 100), (30, 30)).min() == 1


@pytest.fixture(scope="module")
def calibration():
    rng = np.random.default_rng(0)
    people = np.stack([place(body(rng), 70, 0, (40, 48)), place(body(rng), 70, 0, (100, 48))])
    driving = np.stack([people + [f, 0] for f in range(10)])
    scores = np.ones((10, 2, 17))
    scores[6:, 1] = 0
    image = rng.integers(0, 256, (96, 144, 3), np.uint8)
    config = CalibrationConfig(keypoints="trunk", max_gap=0, propagation="iterative")
    return calibrate(image, poses(people[None], (144, 96)), poses(driving, (144, 96), scores), (144, 96), config)


@pytest.mark.parametrize("preset", PRESETS)
def test_frames_of_a_clip(calibration, preset):
    frames = np.array([4, 5, 6, 7])
    member = calibration.index(3)[frames]
    found = frame_visibility(calibration, frames, member, levels(3), preset)
    assert list(found.query) == [216, 54, 15]
    for n, query in found.query.items():
        assert query.shape[:2] == (4, n) and found.key[n].shape == (4, 4 * n, query.shape[-1])
        for flags in (query, found.key[n]):
            assert set(flags.unique().tolist()) <= {0.0, 1.0}
    mask = dense_mask(found, 216)
    centre = calibration.masks[member[0, 1]].reshape(12, 8, 18, 8).any((1, 3)).reshape(-1)
    queries = calibration.target_masks[4, 1].reshape(12, 8, 18, 8).all((1, 3)).reshape(-1)
    assert queries.any()
    seen = mask[0][queries][:, 3 * 216 :]
    np.testing.assert_array_equal(seen.numpy(), np.tile(centre, (queries.sum(), 1)))
    assert not mask[2:, :, 3 * 216 :].any()  # person 1 has left
    assert not mask[0][queries][:, 2 * 216 : 3 * 216].any()  # and nobody sees the calibrated tokens of another


def test_masks_move_with_features_and_windows_agree(calibration):
    whole = frame_visibility(calibration, np.arange(10), calibration.index(2), levels(2))
    window = frame_visibility(calibration, np.arange(3, 7), calibration.index(2)[3:7], levels(2))
    for n in whole.key:
        assert torch.equal(whole.key[n][3:7], window.key[n]) and torch.equal(whole.query[n][3:7], window.query[n])
    group = calibration.index(2)[:4]
    assert (group == group[0]).all()
    assert torch.equal(whole.key[216][0, 432:], whole.key[216][3, 432:])


def test_reference_tokens_may_have_another_grid(calibration):
    found = frame_visibility(calibration, [0, 1], calibration.index(0)[:2], [self_attention_level((12, 18), (16, 16))])
    assert found.key[216].shape == (2, 216 + 3 * 256, found.query[216].shape[-1])


def test_all_frames_uncalibrated_sees_the_whole_reference(calibration):
    found = frame_visibility(calibration, [0, 1], np.full((2, 2), -1), levels(2))
    for n in found.query:
        mask = dense_mask(found, n)
        assert mask[..., : 2 * n].all() and not mask[..., 2 * n :].any()


def test_wrong_members_and_levels_are_named(calibration):
    with pytest.raises(ValueError, match="index must be"):
        frame_visibility(calibration, [0, 1], calibration.index(0), levels(2))
    twins = [self_attention_level(grid) for grid in ((12, 18), (18, 12))]
    with pytest.raises(ValueError, match="same number of tokens"):
        frame_visibility(calibration, [0], calibration.index(0)[:1], twins)


def test_to_moves_flags(calibration):
    found = frame_visibility(calibration, [0], calibration.index(0)[:1], levels(1)).to(dtype=torch.bfloat16)
    assert found.query[216].dtype == found.key[216].dtype == torch.bfloat16
