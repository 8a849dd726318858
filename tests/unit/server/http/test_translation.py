"""What the API's fields become for the daemon, and its messages for the API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loaderd.server.errors import BY_REASON, InvalidArgumentError, QueueFullError
from loaderd.server.http.errors import body_of, status_and_headers
from loaderd.server.http.openai.asked import EXTENSIONS, Asked
from loaderd.server.http.openai.chat import ChatAnswer, read_chat
from loaderd.server.http.openai.completions import TextAnswer, read_completion
from loaderd.server.http.openai.fields import Fields
from loaderd.v1.generation_pb2 import (
    Completion,
    Finish,
    FinishReason,
    GenerateResponse,
    GenerationDelta,
    StreamGenerateRequest,
    TokenAlternative,
    TokenLogprob,
    Usage,
)
from tests.unit.server.test_errors import example


def chat(**fields: Any) -> Asked:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return read_chat(Fields.parse(json.dumps(body).encode()))


def completion(**fields: Any) -> Asked:
    body = {"model": "m", "prompt": "hi", **fields}
    return read_completion(Fields.parse(json.dumps(body).encode()))


def test_a_chat_without_options_has_none() -> None:
    asked = chat()
    expected = StreamGenerateRequest(model="m")
    expected.messages.messages.add(role="user", content="hi")
    assert asked.request == expected
    assert (asked.stream, asked.include_usage, asked.user) == (False, False, "")


def test_every_option_of_a_chat() -> None:
    asked = chat(
        temperature=0,
        top_p=0.5,
        n=2,
        seed=3,
        presence_penalty=0.25,
        frequency_penalty=-1,
        max_completion_tokens=9,
        stop=["a", "b"],
        logit_bias={"7": -100, "8": 0.5},
        logprobs=True,
        top_logprobs=4,
        stream=True,
        stream_options={"include_usage": True},
        user="ann",
        response_format={"type": "text"},
        chat_template_kwargs={"enable_thinking": False},
    )
    request = asked.request
    assert request.HasField("temperature")
    assert (request.temperature, request.top_p, request.n, request.seed) == (0, 0.5, 2, 3)
    assert (request.presence_penalty, request.frequency_penalty) == (0.25, -1)
    assert request.max_new_tokens == 9
    assert list(request.stop) == ["a", "b"]
    assert dict(request.logit_bias) == {7: -100, 8: 0.5}
    assert (request.logprobs, request.top_logprobs) == (True, 4)
    assert dict(request.chat_template_kwargs) == {"enable_thinking": False}
    assert (asked.stream, asked.include_usage, asked.user) == (True, True, "ann")


def test_a_null_is_a_field_that_is_not_given() -> None:
    names = ("temperature", "top_p", "n", "seed", "stop", "max_tokens", "logit_bias", "user")
    assert chat(**dict.fromkeys(names)).request == chat().request


def test_messages_in_parts_and_the_developers_role() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(
        messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    )
    found = [(each.role, each.content) for each in asked.request.messages.messages]
    assert found == [("system", "be kind"), ("user", "ab")]


@pytest.mark.parametrize("name", EXTENSIONS)
def test_parameters_that_openai_does_not_have(name: str) -> None:
    field = StreamGenerateRequest.DESCRIPTOR.fields_by_name[name]
    value: Any = {field.CPPTYPE_BOOL: True, field.CPPTYPE_STRING: "x"}.get(field.cpp_type, 1)
    assert getattr(chat(**{name: value}).request, name) == value
    assert getattr(completion(**{name: value}).request, name) == value


def test_the_docs_list_them() -> None:
    text = (Path(__file__).parents[4] / "docs" / "http.md").read_text()
    assert {name for name in EXTENSIONS if f"`{name}`" not in text} == set()


def test_a_completion() -> None:
    request = completion(stop=".", stop_token_ids=[5], best_of=3, logprobs=0).request
    assert (request.text, request.max_new_tokens, request.best_of) == ("hi", 16, 3)
    assert list(request.stop) == ["."]
    assert list(request.stop_token_ids) == [5]
    assert (request.logprobs, request.top_logprobs) == (True, 0)
    assert completion(max_tokens=2).request.max_new_tokens == 2


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]]])
def test_a_prompt_of_token_ids(prompt: list[object]) -> None:
    assert list(completion(prompt=prompt).request.token_ids.ids) == [1, 2]
    assert completion(prompt=["one"]).request.text == "one"


def test_errors_name_the_fields_that_the_client_knows() -> None:
    error = InvalidArgumentError("max_new_tokens", "at least 1")

    def param(asked: Asked) -> object:
        return body_of(asked.in_its_names(error))["error"]["param"]

    assert param(chat()) == "max_completion_tokens"
    assert param(chat(max_tokens=1)) == "max_tokens"
    assert param(completion()) == "max_tokens"
    other = QueueFullError(model="m", limit=1)
    assert chat().in_its_names(other) is other


@pytest.mark.parametrize("reason", sorted(BY_REASON))
def test_every_reason_has_a_status_of_its_kind(reason: str) -> None:
    error = example(BY_REASON[reason])
    status, headers = status_and_headers(error)
    told = body_of(error)["error"]
    assert told["code"] == reason.lower()
    assert told["message"] == str(error)
    server = told["type"] == "server_error"
    assert server == (status >= 500)
    assert (headers["x-should-retry"] == "true") == ("retry-after" in headers)


LOGPROB = TokenLogprob(
    token_id=1, text="é", logprob=-0.5, top=[TokenAlternative(text="\ufffd", logprob=-1.5)]
)
STOP = Finish(reason=FinishReason.FINISH_REASON_STOP)
LENGTH = Finish(reason=FinishReason.FINISH_REASON_LENGTH)


def whole(answer: ChatAnswer | TextAnswer) -> dict[str, Any]:
    return answer.whole(
        GenerateResponse(
            model_id="m:1",
            completions=[
                Completion(index=0, text="éé", finish=STOP, logprobs=[LOGPROB, LOGPROB]),
                Completion(index=1, text="b", finish=LENGTH),
            ],
            usage=Usage(prompt_tokens=5, cached_prompt_tokens=4, generated_tokens=3),
        )
    )


def test_a_whole_chat() -> None:
    token = {"token": "é", "logprob": -0.5, "bytes": [195, 169]}
    entry = {**token, "top_logprobs": [{"token": "\ufffd", "logprob": -1.5, "bytes": None}]}
    assert whole(ChatAnswer("r", 7, "org/m")) == {
        "id": "chatcmpl-r",
        "object": "chat.completion",
        "created": 7,
        "model": "org/m",
        "system_fingerprint": "m:1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "éé", "refusal": None},
                "logprobs": {"content": [entry, entry], "refusal": None},
                "finish_reason": "stop",
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "b", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            },
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


def test_a_whole_text() -> None:
    answer = whole(TextAnswer("r", 7, "org/m"))
    assert (answer["id"], answer["object"]) == ("cmpl-r", "text_completion")
    first, second = answer["choices"]
    assert (first["text"], first["finish_reason"]) == ("éé", "stop")
    assert first["logprobs"] == {
        "tokens": ["é", "é"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"\ufffd": -1.5}, {"\ufffd": -1.5}],
        "text_offset": [0, 1],
    }
    assert second["logprobs"] is None


def test_texts_of_a_stream_go_on_where_they_were() -> None:
    answer = TextAnswer("r", 7, "m")
    for index, offset in ((0, 0), (1, 0), (0, 1)):
        told = answer.delta(GenerationDelta(index=index, text="é", logprobs=[LOGPROB]))
        assert told["logprobs"]["text_offset"] == [offset]
        assert told["finish_reason"] is None
