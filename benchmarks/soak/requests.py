"""Requests drawn at random: prompts, parameters, and how their clients leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import TypedDict

from loaderd.client import Message
from loaderd.client.parameters import GenerationParameters

_WORDS = ("a", "river", "and", "the", "old", "Bäume", "over", "夜空", "🙂", "seven", "times\n", "1")
_TOKEN_IDS = range(8, 248)
"""In the vocabulary of every model that one would take for this."""
_MOST_WORDS = 24
_MOST_TOKENS = 180
_MOST_NEW_TOKENS = 24
_SHARED_PROMPTS = 32
_LEAVE = 0.3
_BAD = 0.06

_BAD_PARAMETERS: Sequence[GenerationParameters] = (
    {"temperature": -1.0},
    {"top_p": 0.0},
    {"max_new_tokens": 0},
    {"max_new_tokens": 10_000_000},
    {"do_sample": False, "temperature": 0.7},
    {"stop": [""]},
    {"logit_bias": {1: 200.0}},
    {"n": 33},
    {"best_of": 0},
    {"cache_salt": "x" * 257},
    {"request_id": "bad\nid"},
    {"logprobs": False, "top_logprobs": 2},
    {"allowed_token_ids": [2**31]},
)


class Leaving(Enum):
    """What a client does before it has everything."""

    NOTHING = "stays"
    CANCEL_TASK = "cancels its task"
    CANCEL_STREAM = "cancels the stream"
    DROP_STREAM = "drops the stream"
    RUN_OUT_OF_TIME = "runs out of time"
    LOSE_CONNECTION = "loses its connection"


class Prompt(TypedDict, total=False):
    """One of the three inputs of a generation."""

    text: str
    messages: list[Message]
    token_ids: list[int]


@dataclass(frozen=True)
class SoakRequest:
    """One request.

    Attributes:
        prompt: Its input.
        parameters: Of the generation.
        streams: Whether the answer is streamed.
        is_bad: Whether the daemon must refuse it.
        leaving: How the client leaves.
        after_s: Seconds after which it does, where it leaves by time.
        after_pieces: Pieces of text after which it does, where it leaves by what has come.
    """

    prompt: Prompt
    parameters: GenerationParameters = field(default_factory=GenerationParameters)
    streams: bool = True
    is_bad: bool = False
    leaving: Leaving = Leaving.NOTHING
    after_s: float = 0.0
    after_pieces: int = 0

    @property
    def completions(self) -> int:
        """How many the answer has."""
        return self.parameters.get("n") or 1

    @property
    def tokens(self) -> int | None:
        """How many the answer has in all if the client stays; None if that is not known."""
        if not self.parameters.get("ignore_eos") or self.parameters.keys() & {"stop", "max_time"}:
            return None
        rows = self.parameters.get("best_of") or self.completions
        return rows * (self.parameters.get("max_new_tokens") or 0)


def draw(random: Random) -> SoakRequest:
    """A request; the same `random` draws the same ones."""
    if random.random() < _BAD:
        return _bad(random)
    shares = random.random() < 0.25
    parameters = _shared_parameters() if shares else _parameters(random)
    streams = random.random() < 0.6
    leaving = _leaving(random, streams) if random.random() < _LEAVE else Leaving.NOTHING
    if leaving is not Leaving.NOTHING and not shares:
        parameters["max_new_tokens"] = random.randint(1, 3 * _MOST_NEW_TOKENS)
        parameters.pop("min_new_tokens", None)
    return SoakRequest(
        prompt=_shared_prompt(random) if shares else _prompt(random),
        parameters=parameters,
        streams=streams,
        leaving=leaving,
        after_s=random.choice((0.0, random.uniform(0, 0.05), random.uniform(0, 1))),
        after_pieces=random.randint(1, _MOST_NEW_TOKENS // 2),
    )


def _leaving(random: Random, streams: bool) -> Leaving:
    ways = [Leaving.CANCEL_TASK, Leaving.RUN_OUT_OF_TIME]
    if streams:
        ways += [Leaving.CANCEL_STREAM, Leaving.DROP_STREAM]
    weights = [4, 2, 3, 3][: len(ways)]
    return random.choices([*ways, Leaving.LOSE_CONNECTION], [*weights, 1])[0]


def _bad(random: Random) -> SoakRequest:
    streams = random.random() < 0.5
    if random.random() < 0.2:
        too_long = [random.choice(_TOKEN_IDS)] * random.randint(20_000, 30_000)
        return SoakRequest({"token_ids": too_long}, streams=streams, is_bad=True)
    if random.random() < 0.2:
        return SoakRequest({"token_ids": [2**31 - 1]}, streams=streams, is_bad=True)
    return SoakRequest(
        _prompt(random), random.choice(_BAD_PARAMETERS).copy(), streams=streams, is_bad=True
    )


def _prompt(random: Random) -> Prompt:
    kind = random.randrange(3)
    if kind == 0:
        return {"text": _text(random, _MOST_WORDS)}
    if kind == 1:
        return {"messages": [Message("user", _text(random, _MOST_WORDS // 2))]}
    length = random.randint(1, _MOST_TOKENS)
    return {"token_ids": [random.choice(_TOKEN_IDS) for _ in range(length)]}


def _text(random: Random, most_words: int) -> str:
    return " ".join(random.choices(_WORDS, k=random.randint(1, most_words)))


def _shared_prompt(random: Random) -> Prompt:
    """One of a few that share beginnings."""
    number = random.randrange(_SHARED_PROMPTS)
    return {"token_ids": [*_TOKEN_IDS[: 16 * (number % 8)], _TOKEN_IDS[-1 - number]]}


def _shared_parameters() -> GenerationParameters:
    """Those whose outputs are few, so that the prefix cache comes to an end of its growth."""
    return GenerationParameters(do_sample=False, max_new_tokens=8, ignore_eos=True)


def _parameters(random: Random) -> GenerationParameters:
    new_tokens = random.randint(1, _MOST_NEW_TOKENS)
    parameters = GenerationParameters(max_new_tokens=new_tokens, bypass_prefix_cache=True)
    if random.random() < 0.6:
        parameters["ignore_eos"] = True
    parameters.update(_sampling(random))
    for optional in (
        _several,
        _penalties,
        _masks,
        _stops,
        _logprobs,
        lambda _: GenerationParameters(min_new_tokens=random.randint(0, new_tokens)),
        lambda _: GenerationParameters(max_time=random.uniform(0.01, 2)),
        lambda _: GenerationParameters(echo=True),
        lambda _: GenerationParameters(return_token_ids=True, skip_special_tokens=False),
        lambda _: GenerationParameters(priority=random.randint(-2, 2)),
    ):
        if random.random() < 0.15:
            parameters.update(optional(random))
    return parameters


def _sampling(random: Random) -> GenerationParameters:
    if random.random() < 0.4:
        return GenerationParameters(do_sample=False)
    sampling = GenerationParameters(temperature=random.uniform(0.1, 2), seed=random.getrandbits(64))
    if random.random() < 0.3:
        sampling["top_k"] = random.randint(0, 50)
    if random.random() < 0.3:
        sampling["top_p"] = random.uniform(0.1, 1)
    if random.random() < 0.2:
        sampling["min_p"] = random.uniform(0, 0.5)
    if random.random() < 0.2:
        sampling["typical_p"] = random.uniform(0.2, 1)
    return sampling


def _several(random: Random) -> GenerationParameters:
    n = random.randint(1, 4)
    return GenerationParameters(n=n, best_of=n + random.choice((0, 0, 1, 2)))


def _penalties(random: Random) -> GenerationParameters:
    return GenerationParameters(
        repetition_penalty=random.uniform(0.8, 1.5),
        presence_penalty=random.uniform(-2, 2),
        frequency_penalty=random.uniform(-2, 2),
        no_repeat_ngram_size=random.randint(0, 4),
    )


def _masks(random: Random) -> GenerationParameters:
    kind = random.randrange(3)
    if kind == 0:
        ids = random.sample(_TOKEN_IDS, 20)
        return GenerationParameters(logit_bias={one: random.uniform(-100, 100) for one in ids})
    if kind == 1:
        return GenerationParameters(allowed_token_ids=random.sample(_TOKEN_IDS, 60))
    return GenerationParameters(bad_words=random.sample(_WORDS, 3))


def _stops(random: Random) -> GenerationParameters:
    return GenerationParameters(
        stop=random.sample("aeinrst \n", 2), include_stop_str_in_output=random.random() < 0.5
    )


def _logprobs(random: Random) -> GenerationParameters:
    return GenerationParameters(
        top_logprobs=random.randint(0, 5), prompt_logprobs=random.randint(0, 3)
    )
