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


def test_those_who_decode_are_delayed_by_less_than_what_they_take_anyhow() -> None:
    pace = measured(decode_seconds=0.1, token_seconds=0.002)
    budget = pace.budget(8, 1)
    assert 0.5 < budget * 0.002 / 0.1 < 1.0
    assert measured(0.1, 0.001).budget(8, 1) == pytest.approx(2 * budget, abs=2)


@pytest.mark.parametrize("last", [1, 32])
def test_steps_while_some_wait_are_as_long_as_when_all_decode(last: int) -> None:
    """Whatever was measured last: a burst has no steps without prompts."""
    pace = Pace()
    times = {1: 0.015, 4: 0.020, 16: 0.035, 32: 0.055}
    for decoding in sorted(times, key=lambda decoding: decoding == last):
        for _ in range(50):
            pace.note(decoding, 0, times[decoding])
            pace.note(decoding, 50, times[decoding] + 50 * 0.001)
    for decoding in (16, 24, 28):
        seconds = 0.035 + (decoding - 16) * 0.00125
        step = seconds + pace.budget(decoding, 32 - decoding) * 0.001
        assert step == pytest.approx(1.9 * 0.055, abs=0.002)
    assert pace.budget(1, 1) * 0.001 < 0.020


def test_few_who_decode_wait_for_many_who_wait() -> None:
    pace = measured(decode_seconds=0.1, token_seconds=0.002)
    seconds = [0.002 * pace.budget(8, prompts) + 0.1 for prompts in (8, 24)]
    assert seconds[0] == pytest.approx(1.9 * (0.1 + 8 * 0.002), abs=0.002)
    assert seconds[1] > 3 * seconds[0] - 0.2
    assert pace.budget(1, 31) == 512


def test_more_rows_than_ever_decoded_cost_what_a_prompts_tokens_do() -> None:
    pace = Pace()
    for _ in range(30):
        pace.note(1, 0, 0.015)
        pace.note(1, 50, 0.015 + 50 * 0.001)
    step = 0.015 + 15 * 0.001
    assert pace.budget(16, 16) * 0.001 == pytest.approx(1.9 * (step + 0.016) - step, abs=0.002)
    pace.note(16, 50, step + 50 * 0.001)
    assert pace.budget(1, 1) * 0.001 == pytest.approx(1.9 * 0.016 - 0.015, abs=0.002)


def test_what_was_slow_once_is_forgotten() -> None:
    """As before the copies of weights were made, or while the box was busy."""
    pace = measured(decode_seconds=0.1, token_seconds=0.02)
    assert pace.budget(8, 1) == 16
    for _ in range(2):
        pace.note(8, 16, 0.1 + 16 * 0.001)
    assert pace.budget(8, 1) * 0.001 > 0.08


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
    assert 0.5 < pace.budget(8, 1) * 0.002 / 0.1 < 1.0
    assert pace.budget(0, 1) == 512
