from pathlib import Path
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct
from transformers import AutoTokenizer

from loaderd.server.errors import InvalidArgumentError
from loaderd.server.worker.tokenization import Tokenization, special_ids
from loaderd.v1 import generation_pb2
from loaderd.v1.generation_pb2 import (
    ApplyChatTemplateRequest,
    ChatMessage,
    ChatMessages,
    DetokenizeRequest,
    StreamGenerateRequest,
    TokenIds,
    TokenizeRequest,
)
from loaderd.worker.v1.worker_pb2 import Call, Reply

SIZE = 49152
CHAT = ChatMessages(messages=[ChatMessage(role="user", content="Hi")])


@pytest.fixture(scope="module")
def tokenizer(real_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(real_model)


@pytest.fixture(scope="module")
def tokenization(tokenizer: Any) -> Tokenization:
    return Tokenization(tokenizer, SIZE)


class Greeting:
    """A tokenizer that begins every text with a special token, unless it is told not to."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [0] * add_special_tokens + [len(text)]


def test_text_gets_special_tokens_unless_not_wanted() -> None:
    tokenization = Tokenization(Greeting(), SIZE)
    assert tokenization.prompt(StreamGenerateRequest(text="abc")) == [0, 3]
    request = StreamGenerateRequest(text="abc", add_special_tokens=False)
    assert tokenization.prompt(request) == [3]
    request.add_special_tokens = True
    assert tokenization.prompt(request) == [0, 3]


def test_token_ids_are_used_as_they_are(tokenization: Tokenization) -> None:
    request = StreamGenerateRequest(token_ids=TokenIds(ids=[7, 10**9]))
    assert tokenization.prompt(request) == [7, 10**9]


def test_bad_words_are_those_that_begin_a_text_and_those_that_follow_a_space(
    tokenization: Tokenization, tokenizer: Any
) -> None:
    request = StreamGenerateRequest(text="x", bad_words=["sky", " sky", "\n"])
    runs = tokenization.bad_words(request)
    begins = tokenizer("sky").input_ids
    follows = tokenizer("the sky").input_ids[1:]
    assert begins in runs
    assert follows in runs
    assert begins != follows
    assert len({tuple(run) for run in runs}) == len(runs)


def test_messages_are_rendered_once_and_tokenized_as_transformers_does(
    tokenization: Tokenization, tokenizer: Any
) -> None:
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert tokenization.prompt(StreamGenerateRequest(messages=CHAT)) == expected


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (StreamGenerateRequest(), "input"),
        (StreamGenerateRequest(messages=ChatMessages()), "messages"),
        (StreamGenerateRequest(messages=CHAT, add_special_tokens=True), "add_special_tokens"),
        (
            StreamGenerateRequest(token_ids=TokenIds(ids=[1]), add_special_tokens=False),
            "add_special_tokens",
        ),
        (StreamGenerateRequest(text="x", chat_template_kwargs=Struct()), "chat_template_kwargs"),
        (
            StreamGenerateRequest(token_ids=TokenIds(ids=[1]), chat_template_kwargs=Struct()),
            "chat_template_kwargs",
        ),
    ],
)
def test_malformed_input_is_refused_by_name(
    tokenization: Tokenization, request_: StreamGenerateRequest, field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        tokenization.prompt(request_)
    assert caught.value.field == field


def test_tokenize(tokenization: Tokenization, tokenizer: Any) -> None:
    reply = tokenization.answer(Call(tokenize=TokenizeRequest(text="Hi there"))).tokenize
    assert list(reply.token_ids) == tokenizer.encode("Hi there")
    assert list(reply.tokens) == ["Hi", "Ġthere"]
    reply = tokenization.answer(Call(tokenize=TokenizeRequest(messages=CHAT))).tokenize
    assert reply.tokens[0] == "<|im_start|>"


def test_detokenize(tokenization: Tokenization) -> None:
    ids = tokenization.answer(Call(tokenize=TokenizeRequest(text="Hi , you<|im_end|>"))).tokenize

    def text(**options: Any) -> str:
        request = DetokenizeRequest(token_ids=ids.token_ids, **options)
        return tokenization.answer(Call(detokenize=request)).detokenize.text

    assert text() == text(skip_special_tokens=False) == "Hi , you<|im_end|>"
    assert text(skip_special_tokens=True) == "Hi , you"


def test_detokenize_refuses_what_is_no_token(tokenization: Tokenization) -> None:
    request = DetokenizeRequest(token_ids=[5, SIZE])
    with pytest.raises(InvalidArgumentError, match=f"{SIZE} is not below"):
        tokenization.answer(Call(detokenize=request))


def test_apply_chat_template(tokenization: Tokenization, tokenizer: Any) -> None:
    def answer(**options: Any) -> generation_pb2.ApplyChatTemplateResponse:
        request = ApplyChatTemplateRequest(messages=CHAT.messages, **options)
        return tokenization.answer(Call(apply_chat_template=request)).apply_chat_template

    assert answer().text.endswith("<|im_start|>assistant\n")
    assert answer() == answer(add_generation_prompt=True)
    assert answer(add_generation_prompt=False).text.endswith("<|im_end|>\n")
    assert tokenizer.decode(list(answer().token_ids)) == answer().text


def test_an_unknown_call_is_refused(tokenization: Tokenization) -> None:
    with pytest.raises(InvalidArgumentError):
        tokenization.answer(Call(key=1))
    assert Reply().WhichOneof("response") is None


def test_special_tokens_are_those_that_decoding_leaves_out(tokenizer: Any) -> None:
    special = special_ids(tokenizer)
    assert tokenizer.eos_token_id in special
    assert all(tokenizer.decode([token], skip_special_tokens=True) == "" for token in special)
    assert tokenizer.encode("Hi")[0] not in special
