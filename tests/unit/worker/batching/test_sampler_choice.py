import random
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

from loaderd.server.worker.engine.batching.choice import KEY_BITS, best, draw, highest
from loaderd.server.worker.engine.protocol import Sampling
from tests.unit.worker.batching.sampling import VOCABULARY, asked, random_logits

DRAWS = 8000

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


def counts(logits: Tensor, chosen: Sampling, draws: int = DRAWS) -> Tensor:
    """How often each token comes."""
    keys = [random.Random(place).getrandbits(KEY_BITS) for place in range(draws)]
    return torch.bincount(
        draw(logits.repeat(draws, 1), [chosen] * draws, keys), minlength=len(logits)
    )


def check(counted: Tensor, expected: Tensor) -> None:
    """The counts are such as these probabilities make likely: within six standard deviations."""
    draws = counted.sum()
    assert (counted[expected == 0] == 0).all(), "a token that was cut off"
    deviation = (draws * expected * (1 - expected)).clamp(min=0).sqrt()
    assert ((counted - draws * expected).abs() <= 6 * deviation + 1).all()


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), fields=limits)
def test_tokens_come_as_often_as_transformers_would_draw_them(
    seed: int, fields: dict[str, Any]
) -> None:
    logits, chosen = random_logits(seed, VOCABULARY), sampling(**fields)
    expected = reference(logits, chosen)
    counted = counts(logits, chosen)
    check(counted, expected)
    assert (counted[expected > 0.004] > 0).all(), "a token that never comes"


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    fields=st.lists(limits, min_size=2, max_size=6),
    data=st.data(),
)
def test_a_rows_token_does_not_depend_on_the_other_rows(
    seed: int, fields: list[dict[str, Any]], data: st.DataObject
) -> None:
    samplings = [sampling(**each) for each in fields]
    keys = [data.draw(st.integers(0, 2**KEY_BITS - 1)) for _ in fields]
    logits = random_logits(seed, len(fields), VOCABULARY)
    together = draw(logits.clone(), samplings, keys).tolist()
    for row, token_id in enumerate(together):
        alone = draw(logits[row : row + 1].clone(), [samplings[row]], [keys[row]])
        assert alone.item() == token_id


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}, {"top_k": 30}])
def test_rounding_changes_tokens_about_as_seldom_as_it_changes_probabilities(
    fields: dict[str, Any],
) -> None:
    logits, draws = random_logits(3, 600), 4000
    rounded = logits.bfloat16().float()
    chosen = sampling(**fields)
    keys = [random.Random(place).getrandbits(KEY_BITS) for place in range(draws)]
    first = draw(logits.repeat(draws, 1), [chosen] * draws, keys)
    second = draw(rounded.repeat(draws, 1), [chosen] * draws, keys)
    changed = (reference(logits, chosen) - reference(rounded, chosen)).abs().sum() / 2
    assert (first != second).float().mean() <= 2.5 * changed + 0.01


# Flat rows of a large vocabulary, so that the most probable tokens do not suffice.
@pytest.mark.parametrize("spread", [0.01, 3.0])
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
    logits, chosen = random_logits(5, 20_000, spread=spread), sampling(**fields)
    expected, order = reference(logits, chosen).sort(descending=True)
    counted = counts(logits, chosen, draws=200)[order]
    assert (counted[expected == 0] == 0).all(), "a token that was cut off"
    # Single tokens are too rare to be counted; by rank, they come in five groups.
    groups = (expected.cumsum(-1) * 5).long().clamp(max=4)
    check(
        torch.bincount(groups, weights=counted, minlength=5),
        torch.bincount(groups, weights=expected, minlength=5),
    )


def test_tokens_that_tie_with_the_last_of_top_k_stay() -> None:
    logits = torch.zeros(600)
    logits[7] = 5.0
    assert (counts(logits, sampling(top_k=2), draws=2000) > 0).sum() > 2


def test_what_is_masked_is_never_drawn() -> None:
    logits = torch.full((700,), -torch.inf)
    logits[300:302] = torch.tensor([0.5, 1.0])
    for fields in ({}, {"top_p": 0.99}, {"top_k": 50}, {"min_p": 0.01}, {"typical_p": 0.99}):
        counted = counts(logits, sampling(**fields), draws=300)
        assert counted.nonzero().squeeze(1).tolist() == [300, 301]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 4),
    width=st.sampled_from([1, 5, 255, 256, 257, 511, 512, 1000, 2049]),
    levels=st.sampled_from([2, 50, 10**6]),
)
def test_best_is_the_first_of_the_highest(seed: int, rows: int, width: int, levels: int) -> None:
    logits = (random_logits(seed, rows, width) * levels).round() / levels
    assert best(logits).tolist() == [row.index(max(row)) for row in logits.tolist()]


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 2000])
@pytest.mark.parametrize(
    ("value", "columns"), [(-torch.inf, slice(None)), (torch.nan, slice(None)), (torch.nan, 7)]
)
def test_a_row_without_a_token_is_told_and_harms_no_other(
    value: float, columns: slice | int, vocabulary: int
) -> None:
    logits = random_logits(1, 3, vocabulary)
    logits[1, columns] = value
    assert best(logits).tolist() == [logits[0].argmax(), -1, logits[2].argmax()]
    for fields in ({}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.2}, {"typical_p": 0.2}):
        chosen = [sampling(**fields)] * 3
        first, none, last = draw(logits.clone(), chosen, [1, 2, 3]).tolist()
        assert none == -1
        assert min(first, last) >= 0


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 4),
    width=st.integers(1, 3000),
    levels=st.sampled_from([2, 50, 10**6]),
    data=st.data(),
)
def test_the_highest_are_those_of_a_sort(
    seed: int, rows: int, width: int, levels: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (rows, width), generator=generator).float()
    count = data.draw(st.integers(1, width))
    values, columns = highest(scores, count)
    assert torch.equal(values, scores.topk(count).values)
    assert torch.equal(scores.gather(1, columns), values)
    assert all(len(set(row)) == count for row in columns.tolist())
