import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from loaderd.server.errors import InvalidArgumentError, UnsupportedOptionError
from loaderd.server.worker import chat_template
from loaderd.server.worker.chat_template import render
from loaderd.server.worker.template_variables import plain
from loaderd.v1.generation_pb2 import ChatMessage


@pytest.fixture(scope="module")
def real_tokenizer(real_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(real_model)


@pytest.fixture
def render_with(real_tokenizer: Any) -> Callable[..., str]:
    def run(
        template: str | dict[str, str] | None,
        *messages: tuple[str, str],
        variables: dict[str, Any] | Struct | None = None,
    ) -> str:
        struct = variables if isinstance(variables, Struct) else Struct()
        if isinstance(variables, dict):
            struct.update(variables)
        before, real_tokenizer.chat_template = real_tokenizer.chat_template, template
        try:
            chat = [ChatMessage(role=role, content=content) for role, content in messages]
            return render(real_tokenizer, chat, add_generation_prompt=True, variables=struct)
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
        text = render(real_tokenizer, messages, add_generation_prompt=add, variables=Struct())
        assert text == expected


def test_a_model_without_a_template_says_so(render_with: Callable[..., str]) -> None:
    with pytest.raises(UnsupportedOptionError, match="no chat template"):
        render_with(None, ("user", "Hi"))


def test_a_chat_has_messages(render_with: Callable[..., str]) -> None:
    with pytest.raises(InvalidArgumentError, match="at least one"):
        render_with("x")


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


THINKING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ bos_token }}{{ messages[0].content }}"
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "<think></think>{% endif %}{% if raise_exception is undefined %}{{ absent }}{% endif %}"
)
SHOWS = "{{ value | tojson }}"
HI = ("user", "Hi")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"maximum": 3}}}


def unread(render_with: Callable[..., str], template: Any, variables: Any) -> str:
    with pytest.raises(UnsupportedOptionError) as caught:
        render_with(template, HI, variables=variables)
    assert caught.value.field == "chat_template_kwargs"
    return caught.value.problem


def out_of_bounds(render_with: Callable[..., str], template: Any, variables: Any) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        render_with(template, HI, variables=variables)
    assert caught.value.field == "chat_template_kwargs"
    return caught.value.problem


def test_a_variable_that_the_template_reads_reaches_it(render_with: Callable[..., str]) -> None:
    plain = render_with(THINKING, HI)
    assert render_with(THINKING, HI, variables={"enable_thinking": True}) == plain
    off = render_with(THINKING, HI, variables={"enable_thinking": False})
    assert off == plain + "<think></think>"


def test_tools_reach_the_template_by_name(render_with: Callable[..., str]) -> None:
    text = render_with(THINKING, HI, variables={"tools": [TOOL]})
    assert text == json.dumps([TOOL], sort_keys=True) + render_with(THINKING, HI)
    assert render_with(THINKING, HI, variables={"tools": None}) == render_with(THINKING, HI)


def test_tools_choose_the_template_that_is_made_for_them(render_with: Callable[..., str]) -> None:
    named = {"default": "{{ tone }}", "tool_use": "{{ tools[0].type }} {{ manner }}"}
    assert render_with(named, HI, variables={"tone": "low"}) == "low"
    tools = {"tools": [TOOL]}
    assert render_with(named, HI, variables=tools | {"manner": "mild"}) == "function mild"
    assert "no 'tone'" in unread(render_with, named, tools | {"tone": "low"})


@pytest.mark.parametrize("name", ["tools", "documents"])
@pytest.mark.parametrize("value", ["add", {"a": 1}, ["add"], [[]], 1])
def test_tools_and_documents_are_lists_of_objects(
    render_with: Callable[..., str], name: str, value: Any
) -> None:
    problem = out_of_bounds(render_with, "{{ tools }}{{ documents }}", {name: value})
    assert problem == f"{name} must be a list of objects"


def test_an_unread_variable_is_refused_with_those_that_are_read(
    render_with: Callable[..., str],
) -> None:
    problem = unread(render_with, THINKING, {"enable_thinking": False, "thinking": False})
    assert "takes absent, enable_thinking, tools, and no 'thinking'" in problem
    assert "takes no 'thinking'" in unread(render_with, "x", {"thinking": False})
    assert len(unread(render_with, "x", {"y" * 60000: 1})) < 160


@pytest.mark.parametrize(
    "name",
    [
        "messages",
        "add_generation_prompt",
        "bos_token",
        "sep_token",  # of which this tokenizer has none
        "raise_exception",
        "strftime_now",
        "namespace",
        "chat_template",
        "conversation",
        "conversations",
        "tokenize",
        "self",
    ],
)
def test_what_is_not_the_callers_to_set_is_refused_though_it_is_read(
    render_with: Callable[..., str], name: str
) -> None:
    template = "{{ " + name + " }}{{ tone }}"
    problem = unread(render_with, template, {name: "{{ 7 * 6 }}"})
    assert problem.endswith(f"takes tone, and no {name!r}")


def test_what_a_template_sets_itself_it_does_not_read(render_with: Callable[..., str]) -> None:
    template = "{% set a = 1 %}{{ a }}{% for b in [1] %}{{ b }}{{ loop.index }}{% endfor %}"
    for name in ("a", "b", "loop"):
        assert "takes no" in unread(render_with, template, {name: 5})
    default = "{% if not tone is defined %}{% set tone = 'high' %}{% endif %}{{ tone }}"
    assert render_with(default, HI) == "high"
    assert render_with(default, HI, variables={"tone": "low"}) == "low"


def test_no_variables_are_no_change_whatever_the_template_reads(
    render_with: Callable[..., str],
) -> None:
    assert render_with("x", HI, variables={}) == "x"


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_values_are_what_was_sent(value: Any) -> None:
    struct = Struct()
    struct.update({"value": value})
    assert json.dumps(plain(struct)) == json.dumps({"value": value}, sort_keys=True)


def test_numbers_are_as_written(render_with: Callable[..., str]) -> None:
    assert render_with(SHOWS, HI, variables={"value": [3, 3.0, -0.5, 0]}) == "[3, 3, -0.5, 0]"


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({str(number): 1 for number in range(17)}, "at most 16 variables"),
        ({"value": float("nan")}, "numbers must be finite"),
        ({"value": [float("-inf")]}, "numbers must be finite"),
        (Struct(fields={"value": Value()}), "a value is missing; null is a value"),
        (
            Struct(fields={"value": Value(list_value=ListValue(values=[Value()]))}),
            "a value is missing; null is a value",
        ),
    ],
)
def test_variables_out_of_bounds_are_refused(
    render_with: Callable[..., str], variables: Any, problem: str
) -> None:
    assert out_of_bounds(render_with, SHOWS, variables) == problem


@pytest.mark.parametrize("wrap", [lambda inner: {"a": inner}, lambda inner: [inner]])
def test_values_nest_only_so_deep(
    render_with: Callable[..., str], wrap: Callable[[Any], Any]
) -> None:
    value: Any = "end"
    for _ in range(15):  # the variables themselves are the first object
        value = wrap(value)
    assert "end" in render_with(SHOWS, HI, variables={"value": value})
    problem = out_of_bounds(render_with, SHOWS, {"value": wrap(value)})
    assert problem == "objects and lists nest at most 16 deep"


def test_the_largest_variables_are_taken(render_with: Callable[..., str]) -> None:
    names = [f"v{number}" for number in range(16)]
    template = "{{ " + " + ".join(names) + " }}"
    assert len(render_with(template, HI, variables=dict.fromkeys(names, "x" * 4000))) == 64000


def test_a_template_that_takes_long_to_parse_is_stopped(
    render_with: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "_MAX_SECONDS", 0.1)
    endless = "{{ tone }}" * 200_000
    with pytest.raises(UnsupportedOptionError, match="seconds"):
        render_with(endless, HI, variables={"tone": "low"})
    assert render_with("{{ tone }}", HI, variables={"tone": "low"}) == "low"


def test_a_template_that_cannot_be_parsed_refuses_the_messages(
    render_with: Callable[..., str],
) -> None:
    with pytest.raises(InvalidArgumentError, match=r"order, and chat_template_kwargs") as caught:
        render_with("{% if %}", HI, variables={"tone": "low"})
    assert caught.value.field == "messages"
