"""What a search goes on with, beside a plain one that looks at everything."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from loaderd.server.worker.engine.batching.beams import BeamSearch, Candidate, placed
from loaderd.server.worker.engine.protocol import Beams, Stopping

STOPS = (3, 5)


def slow_search(
    beams: Beams, stopping: Stopping, logprobs: dict[tuple[int, ...], list[float]]
) -> list[tuple[float, tuple[int, ...]]]:
    """Beam search by its definition, with every continuation of every beam looked at."""
    running: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, stopping.max_new_tokens + 1):
        every = sorted(
            (
                (score + logprob, (*tokens, token))
                for score, tokens in running
                for token, logprob in enumerate(logprobs[tokens])
            ),
            reverse=True,
        )
        divisor = length**beams.length_penalty

        def ends(tokens: tuple[int, ...], length: int = length) -> bool:
            return length == stopping.max_new_tokens or (
                tokens[-1] in STOPS and length >= stopping.min_new_tokens
            )

        for rank, (score, tokens) in enumerate(every):
            if rank < beams.count and ends(tokens):
                ended.append((score / divisor, tokens))
        ended = sorted(ended, reverse=True)[: beams.count]
        running = [one for one in every if not ends(one[1])][: beams.count]
        if len(ended) == beams.count and (
            beams.early_stopping or (running and running[0][0] / divisor <= ended[-1][0])
        ):
            break
    return ended


class Logprobs(dict[tuple[int, ...], list[float]]):
    """Of a language of six tokens."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed

    def __missing__(self, tokens: tuple[int, ...]) -> list[float]:
        numbers = random.Random(f"{self._seed} {tokens}")
        self[tokens] = [-numbers.expovariate(0.5) for _ in range(6)]
        return self[tokens]


@given(
    seed=st.integers(0, 2**32),
    count=st.integers(2, 5),
    length_penalty=st.floats(-2, 2),
    early_stopping=st.booleans(),
    most=st.integers(1, 9),
    data=st.data(),
)
def test_the_search_is_that_of_its_definition(
    seed: int,
    count: int,
    length_penalty: float,
    early_stopping: bool,
    most: int,
    data: st.DataObject,
) -> None:
    beams = Beams(count, length_penalty, early_stopping)
    least = data.draw(st.integers(0, most))
    stopping = Stopping(
        max_new_tokens=most, min_new_tokens=least, eos_token_ids=STOPS[:1],
        stop_token_ids=STOPS[1:], stop_strings=(), include_stop_string=False, max_seconds=None,
    )  # fmt: skip
    logprobs = Logprobs(seed)
    search = BeamSearch(beams, stopping)
    while not search.is_over:
        every = [
            Candidate(parent, token, beam.score + logprob)
            for parent, beam in enumerate(search.running)
            for token, logprob in enumerate(logprobs[beam.token_ids])
        ]
        every.sort(key=lambda candidate: -candidate.score)
        before = search.running
        chosen = search.advance(every[: search.wanted])
        assert [beam.token_ids for beam in search.running] == [
            (*before[one.parent].token_ids, one.token_id) for one in chosen
        ]
    assert [(beam.score, beam.token_ids) for beam in search.ended] == slow_search(
        beams, stopping, logprobs
    )


@given(st.data())
def test_no_beam_that_is_needed_is_written_over(data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(), min_size=1, max_size=8, unique=True))
    parents = data.draw(st.lists(st.sampled_from(places), max_size=len(places)))
    own = placed(parents, places)
    assert len(set(own)) == len(own) == len(parents)
    assert set(own) <= set(places)
    assert set(parents) <= set(own), "each parent has a child that stays"
    for place, parent in zip(own, parents, strict=True):
        assert place == parent or place not in parents


def test_what_is_cut_off_is_ranked_with_what_has_ended() -> None:
    stopping = Stopping(
        max_new_tokens=9, min_new_tokens=0, eos_token_ids=STOPS, stop_token_ids=(),
        stop_strings=(), include_stop_string=False, max_seconds=None,
    )  # fmt: skip
    search = BeamSearch(Beams(2, 1.0, early_stopping=False), stopping)
    search.advance([Candidate(0, 1, -1.0), Candidate(0, 3, -2.0), Candidate(0, 2, -4.0)])
    search.advance([Candidate(0, 2, -2.2), Candidate(0, 1, -3.0), Candidate(1, 2, -9.0)])
    assert not search.is_over
    search.cut()
    assert [(beam.token_ids, beam.score) for beam in search.ended] == [
        ((1, 2), -1.1),
        ((1, 1), -1.5),
    ]
