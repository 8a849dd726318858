from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from loaderd.server.worker.engine.batching.choice import best, draw
from loaderd.server.worker.engine.protocol import Sampling
from tests.unit.worker.batching.sampling import VOCABULARY, asked, random_logits

POINTS = 4001

limits = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.1, 0.7, 1.0, 1.5, 20.0]),
        "top_k": st.sampled_from([0, 1, 2, 7, VOCABULARY - 1, VOCABULARY, 10**6]),
        "top_p": st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.99, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        "typical_p": st.sampled_from([0.05, 0.5, 0.95, 1.0]),
    },
)


def sampling(**fields: Any) -> Sampling:
    return asked(do_sample=True, **fields).sampling


def reference(logits: Tensor, chosen: Sampling) -> Tensor:
    """The probabilities that transformers draws from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(chosen.temperature)])
    if chosen.top_k:
        warpers.append(TopKLogitsWarper(chosen.top_k))
    if chosen.top_p < 1:
        warpers.append(TopPLogitsWarper(chosen.top_p))
    if chosen.min_p:
        warpers.append(MinPLogitsWarper(chosen.min_p))
    if chosen.typical_p < 1:
        warpers.append(TypicalLogitsWarper(chosen.typical_p))
    scores: Tensor = warpers(torch.empty(1, 0, dtype=torch.int64), logits[None])
    return scores.softmax(-1)[0]


def shares(logits: Tensor, chosen: Sampling) -> Tensor:
    """How often each token comes when the random numbers are spread evenly."""
    numbers = [(point + 0.5) / POINTS for point in range(POINTS)]
    tokens = draw(logits.repeat(POINTS, 1), [chosen] * POINTS, numbers)
    return torch.bincount(tokens, minlength=len(logits)) / POINTS


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), fields=limits)
def test_tokens_come_as_often_as_transformers_would_draw_them(
    seed: int, fields: dict[str, Any]
) -> None:
    logits, chosen = random_logits(seed, VOCABULARY), sampling(**fields)
    torch.testing.assert_close(
        shares(logits, chosen), reference(logits, chosen), atol=1.5 / POINTS, rtol=0
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    fields=st.lists(limits, min_size=2, max_size=6),
    data=st.data(),
)
def test_a_rows_token_does_not_depend_on_the_other_rows(
    seed: int, fields: list[dict[str, Any]], data: st.DataObject
) -> None:
    samplings = [sampling(**each) for each in fields]
    numbers = [data.draw(st.floats(0, 1, exclude_max=True)) for _ in fields]
    logits = random_logits(seed, len(fields), VOCABULARY)
    together = draw(logits.clone(), samplings, numbers).tolist()
    for row, token_id in enumerate(together):
        alone = draw(logits[row : row + 1].clone(), [samplings[row]], [numbers[row]])
        assert alone.item() == token_id


# Flat rows of a large vocabulary, so that the most probable tokens do not suffice.
@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 10.0])
@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"top_k": 300},
        {"top_k": 5000, "top_p": 0.5},
        {"top_k": 20, "top_p": 0.95},
        {"top_k": 5000, "min_p": 0.9},
        {"min_p": 0.001},
        {"typical_p": 0.9},
        {"top_p": 0.9, "typical_p": 0.8},
        {},
    ],
)
def test_limits_hold_in_a_large_vocabulary(fields: dict[str, Any], spread: float) -> None:
    logits, chosen = random_logits(5, 6000, spread=spread), sampling(**fields)
    expected = reference(logits, chosen)
    numbers = [0.0, 0.2, 0.5, 0.9, 0.99]
    tokens = draw(logits.repeat(len(numbers), 1), [chosen] * len(numbers), numbers)
    assert (expected[tokens] > 0).all(), "a token that was cut off"
    if fields:  # from the most probable token on
        order = expected.sort(descending=True, stable=True)
        sums = order.values.double().cumsum(-1)
        for number, token in zip(numbers, tokens.tolist(), strict=True):
            place = (order.indices == token).nonzero().item()
            before = sums[place] - order.values[place]
            assert before - 1e-4 <= number <= sums[place] + 1e-4


def test_tokens_that_tie_with_the_last_of_top_k_stay() -> None:
    logits = torch.zeros(600)
    logits[7] = 5.0
    tokens = draw(logits.repeat(200, 1), [sampling(top_k=2)] * 200, [i / 200 for i in range(200)])
    assert len(set(tokens.tolist())) > 2


def test_what_is_masked_is_never_drawn() -> None:
    logits = torch.full((3, 700), -torch.inf)
    logits[:, 300:302] = torch.tensor([0.5, 1.0])
    numbers = [0.0, 0.7, 1 - 2**-53]
    for fields in ({}, {"top_p": 0.99}, {"top_k": 50}, {"min_p": 0.01}, {"typical_p": 0.9}):
        tokens = draw(logits.clone(), [sampling(**fields)] * 3, numbers)
        assert {300, 301} >= set(tokens.tolist())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 4),
    width=st.sampled_from([1, 5, 255, 256, 257, 511, 512, 1000, 2049]),
    levels=st.sampled_from([2, 50, 10**6]),
)
def test_best_is_the_first_of_the_highest(seed: int, rows: int, width: int, levels: int) -> None:
    logits = (random_logits(seed, rows, width) * levels).round() / levels
    assert best(logits).tolist() == [row.index(max(row)) for row in logits.tolist()]


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_a_row_without_a_token_is_told_and_harms_no_other(value: float) -> None:
    logits = random_logits(1, 3, VOCABULARY)
    logits[1] = value
    assert best(logits).tolist() == [logits[0].argmax(), -1, logits[2].argmax()]
    for fields in ({}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.2}, {"typical_p": 0.2}):
        chosen = [sampling(**fields)] * 3
        first, none, last = draw(logits.clone(), chosen, [0.5] * 3).tolist()
        assert none == -1
        assert min(first, last) >= 0
