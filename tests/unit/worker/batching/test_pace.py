from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaderd.server.worker.engine.batching.pace import Pace


def measured(decode_seconds: float, token_seconds: float) -> Pace:
    """After many steps that took so long: without prompts, and for each of a prompt's tokens."""
    pace = Pace()
    for _ in range(100):
        pace.note(8, 0, decode_seconds)
        pace.note(8, 50, decode_seconds + 50 * token_seconds)
    return pace


def test_prompts_alone_take_long_steps() -> None:
    assert Pace().budget(0, 1) == measured(0.1, 0.01).budget(0, 1) == 512


def test_those_who_decode_are_delayed_by_a_part_of_what_they_take_anyhow() -> None:
    pace = measured(decode_seconds=0.1, token_seconds=0.002)
    budget = pace.budget(8, 1)
    assert 1.0 < budget * 0.002 / 0.1 < 3.0
    assert measured(0.1, 0.001).budget(8, 1) == pytest.approx(2 * budget, abs=2)


def test_few_who_decode_wait_for_many_who_wait() -> None:
    pace = measured(decode_seconds=0.1, token_seconds=0.002)
    usual = pace.budget(8, 1)
    assert pace.budget(8, 8) == usual
    assert pace.budget(8, 24) == pytest.approx(3 * usual, abs=3)
    assert pace.budget(1, 31) == 512


@given(st.floats(1e-6, 100), st.floats(1e-9, 10), st.integers(0, 64), st.integers(0, 2000))
def test_every_step_takes_prompts_further_but_none_takes_for_ever(
    decode_seconds: float, token_seconds: float, decoding: int, prompts: int
) -> None:
    for pace in (Pace(), measured(decode_seconds, token_seconds)):
        assert 16 <= pace.budget(decoding, prompts) <= 2048


def test_where_a_step_costs_and_its_tokens_hardly_do_pieces_grow() -> None:
    """As on a GPU, whose decode steps are replayed while those with prompts are launched."""
    pace, sizes = Pace(), []
    for _ in range(30):
        pace.note(8, 0, 0.002)
        sizes.append(pace.budget(8, 4))
        pace.note(8, sizes[-1], 0.012 + sizes[-1] * 5e-6)
    assert sizes[-1] == 2048
    assert all(after <= max(4 * before, 128) for before, after in itertools.pairwise(sizes))
    assert pace.budget(0, 4) == 2048


def test_where_tokens_cost_pieces_stay_small_however_they_vary() -> None:
    pace = Pace()
    for tokens in [64, 20, 100, 512, 33, 80] * 10:
        pace.note(8, 0, 0.1)
        pace.note(8, tokens, 0.1 + tokens * 0.002)
    assert 1.0 < pace.budget(8, 1) * 0.002 / 0.1 < 3.0
    assert pace.budget(0, 1) == 512
