from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loaderd.server.errors import InvalidArgumentError, UnsupportedOptionError
from loaderd.server.worker import chat_template
from loaderd.server.worker.chat_template import render
from loaderd.v1.generation_pb2 import ChatMessage


@pytest.fixture(scope="module")
def real_tokenizer(real_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(real_model)


@pytest.fixture
def render_with(real_tokenizer: Any) -> Callable[..., str]:
    def run(template: str | None, *messages: tuple[str, str]) -> str:
        before, real_tokenizer.chat_template = real_tokenizer.chat_template, template
        try:
            chat = [ChatMessage(role=role, content=content) for role, content in messages]
            return render(real_tokenizer, chat, add_generation_prompt=True)
        finally:
            real_tokenizer.chat_template = before

    return run


def test_it_renders_as_transformers_does(real_tokenizer: Any) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi {{ 1 }}"}]
    messages = [ChatMessage(**message) for message in chat]
    for add in (True, False):
        expected = real_tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=add
        )
        assert render(real_tokenizer, messages, add_generation_prompt=add) == expected


def test_a_model_without_a_template_says_so(render_with: Callable[..., str]) -> None:
    with pytest.raises(UnsupportedOptionError, match="no chat template"):
        render_with(None, ("user", "Hi"))


@pytest.mark.parametrize("count", [0, 1025])
def test_the_number_of_messages_is_bounded(render_with: Callable[..., str], count: int) -> None:
    with pytest.raises(InvalidArgumentError, match="1024"):
        render_with("x", *[("user", "Hi")] * count)
    assert render_with("x", *[("user", "Hi")] * 1024) == "x"


def test_a_role_is_required(render_with: Callable[..., str]) -> None:
    with pytest.raises(InvalidArgumentError, match="role"):
        render_with("x", ("", "Hi"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('secret: ' + messages[0]['content']) }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'].absent.absent }}",
        "{% if %}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_what_a_template_raises_becomes_a_fixed_text(
    render_with: Callable[..., str], template: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        render_with(template, ("user", "my prompt"))
    assert caught.value.field == "messages"
    assert "prompt" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_template_that_runs_for_too_long_is_stopped(
    render_with: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "_MAX_SECONDS", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UnsupportedOptionError, match="seconds"):
        render_with(endless, ("user", "Hi"))
    assert render_with("x", ("user", "Hi")) == "x"


@pytest.mark.parametrize("template", ["{{ 'a' * 10**7 }}", "{{ 'a' * 10**15 }}"])
def test_a_template_that_writes_too_much_is_refused(
    render_with: Callable[..., str], template: str
) -> None:
    with pytest.raises(UnsupportedOptionError, match="characters"):
        render_with(template, ("user", "Hi"))
