"""Attention of one token in each of some rows, however it is computed."""

from __future__ import annotations

import pytest
import torch

from loaderd.server.worker.engine.batching.attention_kernels import Rule, attend_rows, seen_mask

KEYS, KEY_HEADS, GROUP, DIMENSIONS = 24, 2, 3, 8


def exact(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """By the definition, head by head, in float64."""
    keys = keys.double().repeat_interleave(GROUP, 1)
    values = values.double().repeat_interleave(GROUP, 1)
    scores = torch.einsum("rhd,rhkd->rhk", query.double(), keys) * scale
    return torch.einsum("rhk,rhkd->rhd", (scores + mask.double()[:, 0]).softmax(-1), values)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 33])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows_is_what_the_definition_says(
    rows: int, window: int | None, scaling: float | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(rows)
    query = torch.randn(rows, KEY_HEADS * GROUP, DIMENSIONS).to(dtype)
    # Parts of longer slots, as in the cache.
    keys, values = torch.randn(2, rows, KEY_HEADS, 2 * KEYS, DIMENSIONS).to(dtype)[..., :KEYS, :]
    positions = (torch.arange(rows) * 7 % KEYS).view(-1, 1, 1, 1)
    mask = seen_mask(positions, 0, KEYS, window, dtype)
    found = attend_rows(query, keys, values, mask, Rule(scaling=scaling, window=window))
    expected = exact(query, keys, values, mask, scaling or DIMENSIONS**-0.5)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, tolerance, tolerance)
