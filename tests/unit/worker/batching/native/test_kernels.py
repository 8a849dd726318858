"""Each kernel computes what torch's operators do."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from loaderd.server.worker.engine.batching.native.kernels import Kernels, Rows

TYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ROWS = [1, 3, 40]


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """But for rounding to the type, and where two sums nearly cancel out."""
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).abs()
    scale = expected.double().abs() + expected.double().std()
    assert (error <= 2 * ROUNDING[dtype or found.dtype] * scale).all()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Several on any box, so that work is divided."""
    torch.manual_seed(3)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TYPES[1:])
def test_all_numbers_of_16_bits(kernels: Kernels, dtype: torch.dtype) -> None:
    def converted(numbers: torch.Tensor, to: torch.dtype) -> torch.Tensor:
        rows, half = len(numbers) // 64, torch.ones(len(numbers) // 64, 32)
        projected = torch.zeros(rows, 3, 64, dtype=numbers.dtype)
        projected[:, 2] = numbers.view(rows, 64)
        turned = torch.empty(rows, 3, 64, dtype=to)
        kernels.turn(
            projected.flatten(1), half, half, turned, heads=1, head_norms=None, epsilon=0.0
        )
        return turned[:, 2].flatten()

    def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
        return bool(((found == expected) | (found.isnan() & expected.isnan())).all())

    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    assert equal(converted(every, torch.float32), every.float())
    # Below, at and above the middles between them, and anything.
    bits = every.float().view(torch.int32)
    middle = 2**15 if dtype == torch.bfloat16 else 2**12
    anything = torch.randint(-(2**31), 2**31, (2**18,)).to(torch.int32)
    wide = torch.cat([*(bits + middle + step for step in (-1, 0, 1)), anything]).view(torch.float32)
    assert equal(converted(wide, dtype), wide.to(dtype))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [8, 576, 1025, 2500])
@pytest.mark.parametrize("dtype", TYPES)
def test_norms(kernels: Kernels, rows: int, size: int, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(rows, size), torch.randn(size)
    delta, before = torch.randn(rows, size).to(dtype), hidden.clone()
    normed = torch.empty(rows, size, dtype=dtype)
    kernels.add_and_norm(hidden, delta, weight, 1e-5, normed)
    assert torch.equal(hidden, before + delta)
    close(normed, rms_norm(before + delta, (size,), weight, 1e-5))
    kernels.add_and_norm(hidden, None, weight, 1e-5, normed)
    assert torch.equal(hidden, before + delta)
    close(normed, rms_norm(hidden, (size,), weight, 1e-5))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [8, 513, 1536])
@pytest.mark.parametrize("dtype", TYPES)
def test_gates(kernels: Kernels, rows: int, size: int, dtype: torch.dtype) -> None:
    both = (5 * torch.randn(rows, 2 * size)).to(dtype)
    product = torch.empty(rows, size, dtype=dtype)
    kernels.silu_and_multiply(both, product)
    gate, up = both.double().chunk(2, -1)
    close(product, silu(gate) * up)


def test_gates_at_their_ends(kernels: Kernels) -> None:
    gates = torch.tensor([[-1e30, -100.0, -88.0, 0.0, 88.0, 1e30, math.inf, math.nan]])
    product = torch.empty(1, 8)
    kernels.silu_and_multiply(torch.cat([gates, torch.ones(1, 8)], -1), product)
    assert product[0, :6].tolist() == pytest.approx([0, 0, 0, 0, 88.0, 1e30], rel=1e-6)
    assert product[0, 6] == math.inf
    assert product[0, 7].isnan()


@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dimensions", [4, 64, 96])
@pytest.mark.parametrize("dtype", TYPES)
def test_turns(
    kernels: Kernels, rows: int, dimensions: int, dtype: torch.dtype, has_norms: bool
) -> None:
    heads, key_heads, half = 6, 2, dimensions // 2
    projected = torch.randn(rows, (heads + 2 * key_heads) * dimensions).to(dtype)
    angles = torch.randn(rows, half)
    norms = (torch.randn(dimensions), torch.randn(dimensions)) if has_norms else None
    turned = torch.empty(rows, heads + 2 * key_heads, dimensions, dtype=dtype)
    kernels.turn(
        projected, angles.cos(), angles.sin(), turned, heads=heads, head_norms=norms, epsilon=1e-6
    )
    parts = projected.view_as(turned).double()
    every = parts[:, : heads + key_heads]
    if norms is not None:
        weights = torch.stack([norms[0]] * heads + [norms[1]] * key_heads).double()
        every = rms_norm(every, (dimensions,), None, 1e-6) * weights
    cosines, sines = (x.double().unsqueeze(1) for x in (angles.cos(), angles.sin()))
    first, second = every[..., :half], every[..., half:]
    expected = torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)
    close(turned[:, : heads + key_heads], expected)
    assert torch.equal(turned[:, heads + key_heads :], parts[:, heads + key_heads :].to(dtype))


@pytest.mark.parametrize("window", [None, 7, 300])
@pytest.mark.parametrize("lengths", [[1], [900], [5, 1, 130, 40], [2000, 3], [64] * 40])
@pytest.mark.parametrize(
    ("heads", "key_heads", "dimensions"), [(9, 3, 64), (4, 4, 12), (8, 1, 128)]
)
@pytest.mark.parametrize("dtype", TYPES)
def test_attention(
    kernels: Kernels,
    lengths: list[int],
    window: int | None,
    heads: int,
    key_heads: int,
    dimensions: int,
    dtype: torch.dtype,
) -> None:
    rows, slots = len(lengths), torch.randperm(len(lengths) + 3)[: len(lengths)]
    keys, values = torch.randn(2, rows + 3, key_heads, max(lengths), dimensions).to(dtype)
    before = keys.clone()
    # As a model brings them along: queries, keys and values of a token side by side.
    every = torch.randn(rows, heads + 2 * key_heads, dimensions).to(dtype)
    query, key, value = every.split([heads, key_heads, key_heads], 1)
    assert kernels.can_attend(query, key, value)
    places = Rows(slots, torch.tensor(lengths) - 1)
    attended = kernels.attend(query, key, value, (keys, values), places, window=window, scaling=0.2)
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths, strict=True)):
        assert torch.equal(keys[slot, :, length - 1], key[row])
        assert torch.equal(values[slot, :, length - 1], value[row])
        assert torch.equal(keys[slot, :, : length - 1], before[slot, :, : length - 1])
        seen = slice(max(length - (window or length), 0), length)
        expected = scaled_dot_product_attention(
            query[row, :, None].double(),
            keys[slot, :, seen].double(),
            values[slot, :, seen].double(),
            scale=0.2,
            enable_gqa=True,
        )
        close(attended[row], expected[:, 0])


def test_attention_of_heads_that_do_not_stand_side_by_side(kernels: Kernels) -> None:
    """As transformers' modules bring them along."""
    keys, values = torch.zeros(2, 2, 2, 4, 8)
    query, key, value = (torch.randn(heads, 2, 8).transpose(0, 1) for heads in (4, 2, 2))
    places = Rows(torch.tensor([1, 0]), torch.tensor([0, 0]))
    attended = kernels.attend(query, key, value, (keys, values), places, window=None, scaling=1.0)
    close(attended, value.repeat_interleave(2, 1))


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        (torch.zeros(1, 4, 8), torch.zeros(1, 2, 8), torch.zeros(1, 2, 16)),
        (torch.zeros(1, 4, 8), torch.zeros(1, 2, 8).half(), torch.zeros(1, 2, 8)),
        (
            torch.zeros(1, 4, 8).double(),
            torch.zeros(1, 2, 8).double(),
            torch.zeros(1, 2, 8).double(),
        ),
        (torch.zeros(1, 4, 16)[..., ::2], torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)),
        (torch.zeros(1, 128, 256), torch.zeros(1, 1, 256), torch.zeros(1, 1, 256)),
        (torch.zeros(1, 4096, 2), torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)),
    ],
)
def test_what_the_kernel_is_not_for_is_left_to_torch(
    kernels: Kernels, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    assert not kernels.can_attend(query, key, value)


def test_what_is_no_number_stays_none(kernels: Kernels) -> None:
    keys, values = torch.zeros(2, 1, 1, 4, 8)
    values[0, 0, 1, 3] = math.nan
    one = torch.ones(1, 1, 8)
    places = Rows(torch.tensor([0]), torch.tensor([3]))
    attended = kernels.attend(one, one, one, (keys, values), places, window=None, scaling=1.0)
    assert attended.isnan().flatten().tolist() == [False] * 3 + [True] + [False] * 4
    keys[0, 0, 1, 3] = math.nan
    attended = kernels.attend(one, one, one, (keys, values), places, window=None, scaling=1.0)
    assert attended.isnan().all()


@pytest.mark.parametrize(
    ("slot", "position", "heads"), [(-1, 0, 2), (3, 0, 2), (0, -1, 2), (0, 4, 2), (0, 0, 1)]
)
def test_nothing_beside_the_cache_is_touched(
    kernels: Kernels, slot: int, position: int, heads: int
) -> None:
    keys, values = torch.zeros(2, 3, heads, 4, 8)
    query, key, value = torch.ones(2, 4, 8), torch.ones(2, 2, 8), torch.ones(2, 2, 8)
    places = Rows(torch.tensor([1, slot]), torch.tensor([1, position]))
    with pytest.raises(IndexError):
        kernels.attend(query, key, value, (keys, values), places, window=None, scaling=1.0)
    assert not keys.any()
    assert not values.any()
