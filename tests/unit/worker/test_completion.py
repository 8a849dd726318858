from typing import Any

import pytest

from loaderd.server.worker.engine.completion import Completion, Tokenizer
from loaderd.server.worker.engine.parameters import ModelFacts, SamplingDefaults, typed_request
from loaderd.server.worker.engine.protocol import SampledToken
from loaderd.v1.generation_pb2 import Finish, FinishReason, StreamGenerateRequest

EOS = ord("$")
FACTS = ModelFacts(
    context_length=0, vocabulary_size=128, eos_token_ids=(EOS,), defaults=SamplingDefaults()
)


class Letters:
    """A tokenizer with a token for each ASCII character."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, **_: Any) -> str:
        return "".join(
            chr(token_id) for token_id in token_ids if not (skip_special_tokens and token_id == EOS)
        )


def complete(output: str, prompt: str = "ab", **fields: Any) -> tuple[str, list[int], Completion]:
    """Pushes the output's characters until the completion ends or they do."""
    request = typed_request(
        StreamGenerateRequest(model="m", text=prompt, **fields),
        key=1,
        prompt=[ord(character) for character in prompt],
        arrived=0.0,
        facts=FACTS,
    )
    completion = Completion(request, Tokenizer(Letters(), frozenset({EOS})))
    text, token_ids = "", list[int]()
    deltas = [completion.echo()]
    for character in output:
        assert completion.finish is None, "pushed after the end"
        deltas.append(completion.push(SampledToken(ord(character))))
        if completion.finish is not None:
            break
    for delta in deltas:
        if delta is not None:
            assert delta.text or delta.token_ids, "an empty delta"
            text += delta.text
            token_ids += delta.token_ids
    return text, token_ids, completion


def stopped(**by: Any) -> Finish:
    return Finish(reason=FinishReason.FINISH_REASON_STOP, **by)


def test_it_ends_at_the_end_of_sequence_token_and_does_not_show_it() -> None:
    text, token_ids, completion = complete("hi$x", return_token_ids=True)
    assert text == "hi"
    assert token_ids == [ord("h"), ord("i"), EOS]
    assert completion.finish == stopped(eos_token_id=EOS)
    assert completion.generated_tokens == 3


def test_the_end_of_sequence_token_is_shown_with_the_other_special_tokens() -> None:
    assert complete("hi$x", skip_special_tokens=False)[0] == "hi$"


def test_without_return_token_ids_there_are_none() -> None:
    assert complete("hi$")[1] == []


def test_it_goes_on_after_an_ignored_end_of_sequence() -> None:
    text, _, completion = complete("h$i$", ignore_eos=True, max_new_tokens=4)
    assert text == "hi"
    assert completion.finish == Finish(reason=FinishReason.FINISH_REASON_LENGTH)


def test_it_ends_at_the_requests_stop_tokens() -> None:
    text, _, completion = complete("hi!x", stop_token_ids=[ord("!")])
    assert (text, completion.finish) == ("hi", stopped(stop_token_id=ord("!")))


@pytest.mark.parametrize(("include", "text"), [(False, "one"), (True, "one END")])
def test_it_ends_at_a_stop_string_across_tokens(include: bool, text: str) -> None:
    seen, _, completion = complete(
        "one END two", stop=["never", " END"], include_stop_str_in_output=include
    )
    assert (seen, completion.finish) == (text, stopped(stop_string=" END"))
    assert completion.generated_tokens == len("one END")


@pytest.mark.parametrize(("output", "shown"), [("x E$", "x E"), ("x E!", "x E"), ("x EN", "x EN")])
def test_text_that_was_held_back_for_a_stop_string_comes_at_the_end(
    output: str, shown: str
) -> None:
    text, _, completion = complete(
        output, stop=["END"], stop_token_ids=[ord("!")], max_new_tokens=4
    )
    assert text == shown
    assert completion.finish is not None
    assert completion.finish.WhichOneof("stop_reason") != "stop_string"


def test_it_ends_at_max_new_tokens_and_the_stop_string_in_the_last_token_still_counts() -> None:
    assert complete("abcdef", max_new_tokens=3)[2].finish == Finish(
        reason=FinishReason.FINISH_REASON_LENGTH
    )
    text, _, completion = complete("abc", stop=["c"], max_new_tokens=3)
    assert (text, completion.finish) == ("ab", stopped(stop_string="c"))


def test_no_stop_counts_before_min_new_tokens() -> None:
    text, _, completion = complete(
        "a.b!c.d", stop=["."], stop_token_ids=[ord("!")], min_new_tokens=5
    )
    assert (text, completion.finish) == ("a.b!c", stopped(stop_string="."))


def test_closing_gives_what_was_held_back() -> None:
    _, _, completion = complete("one EN", stop=["END"])
    delta = completion.close(FinishReason.FINISH_REASON_CANCELLED)
    assert delta is not None
    assert delta.text == "EN"
    assert completion.finish == Finish(reason=FinishReason.FINISH_REASON_CANCELLED)


def test_echo_begins_with_the_prompt_in_which_no_stop_string_counts() -> None:
    text, _, completion = complete("cd$", prompt="a.$b", echo=True, stop=["."])
    assert (text, completion.finish) == ("a.bcd", stopped(eos_token_id=EOS))


def test_each_token_has_its_log_probability_if_asked_for_whatever_becomes_of_its_text() -> None:
    request = typed_request(
        StreamGenerateRequest(model="m", text="a", stop=["hi"], top_logprobs=1),
        key=1,
        prompt=[ord("a")],
        arrived=0.0,
        facts=FACTS,
    )
    completion = Completion(request, Tokenizer(Letters(), frozenset({EOS})))
    deltas = [
        completion.push(SampledToken(ord("h"), -0.5, ((ord("h"), -0.5),))),
        completion.push(SampledToken(EOS, -2.0, ((ord("x"), -0.25),))),
    ]
    told = [logprob for delta in deltas if delta for logprob in delta.logprobs]
    assert [(token.token_id, token.text, token.logprob) for token in told] == [
        (ord("h"), "h", -0.5),
        (EOS, "$", -2.0),
    ]
    assert [(top.token_id, top.text, top.logprob) for token in told for top in token.top] == [
        (ord("h"), "h", -0.5),
        (ord("x"), "x", -0.25),
    ]
    assert [delta.text for delta in deltas if delta] == ["", "h"]


def test_log_probabilities_that_were_not_asked_for_are_not_told() -> None:
    request = typed_request(
        StreamGenerateRequest(model="m", text="a", best_of=2),
        key=1,
        prompt=[ord("a")],
        arrived=0.0,
        facts=FACTS,
    )
    delta = Completion(request, Tokenizer(Letters(), frozenset())).push(SampledToken(104, -0.5))
    assert delta is not None
    assert not delta.logprobs
