"""What the arguments of calls become on the wire."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

from loaderd.client import (
    Client,
    Dtype,
    GenerationParameters,
    Message,
    Quantization,
    errors,
)
from loaderd.client.requests import generation_request, load_request, model_name
from loaderd.v1.generation_pb2 import GenerateRequest, StreamGenerateRequest
from tests.fake_daemon import FakeDaemon


def build(**parameters: Any) -> StreamGenerateRequest:
    return generation_request(
        StreamGenerateRequest,
        "m-1",
        text="x",
        messages=None,
        token_ids=None,
        parameters=cast("GenerationParameters", parameters),
    )


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    numbers = {
        FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1),
        FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
        FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
        FieldDescriptor.TYPE_DOUBLE: st.floats(allow_nan=False),
        FieldDescriptor.TYPE_BOOL: st.booleans(),
        FieldDescriptor.TYPE_STRING: st.text(),
    }
    return numbers[field.type]


SCALARS = {
    field.name: _scalar(field)
    for field in StreamGenerateRequest.DESCRIPTOR.fields
    if field.name in GenerationParameters.__annotations__
    and field.message_type is None
    and not field.is_repeated
}


@given(st.fixed_dictionaries({}, optional=SCALARS))
def test_scalars_arrive_as_given_and_only_those(values: dict[str, Any]) -> None:
    request = build(**values)

    for name in SCALARS:
        assert request.HasField(cast("Any", name)) == (name in values)
    assert {name: getattr(request, name) for name in values} == values


@given(st.fixed_dictionaries({}, optional=SCALARS))
def test_both_requests_are_built_alike(values: dict[str, Any]) -> None:
    stream = build(**values)
    unary = generation_request(
        GenerateRequest,
        "m-1",
        text="x",
        messages=None,
        token_ids=None,
        parameters=cast("GenerationParameters", values),
    )

    assert json_format.MessageToDict(unary) == json_format.MessageToDict(stream)


def test_none_is_not_given() -> None:
    nothing = dict.fromkeys(GenerationParameters.__annotations__)

    assert build(**nothing) == build()


def test_fields_that_are_no_scalars() -> None:
    request = build(
        stop=["a", "b"],
        bad_words="one",
        stop_token_ids=(1, 2),
        allowed_token_ids=[],
        logit_bias={7: -1.5},
        chat_template_kwargs={"enable_thinking": False, "nested": {"a": [1, "b"]}},
        keep_alive=-1,
        max_time=timedelta(milliseconds=1500),
    )

    assert list(request.stop) == ["a", "b"]
    assert list(request.bad_words) == ["one"]
    assert list(request.stop_token_ids) == [1, 2]
    assert request.HasField("allowed_token_ids")
    assert dict(request.logit_bias) == {7: -1.5}
    assert json_format.MessageToDict(request.chat_template_kwargs) == {
        "enable_thinking": False,
        "nested": {"a": [1, "b"]},
    }
    assert request.keep_alive.ToTimedelta() == timedelta(seconds=-1)
    assert request.max_time.ToTimedelta() == timedelta(seconds=1.5)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"max_time": math.inf}, "max_time"),
        ({"max_time": math.nan}, "max_time"),
        ({"keep_alive": 1e30}, "keep_alive"),
    ],
)
def test_a_time_span_that_the_wire_cannot_carry_names_its_field(
    parameters: dict[str, Any], field: str
) -> None:
    with pytest.raises(errors.InvalidArgumentError) as caught:
        build(**parameters)
    assert caught.value.field == field
    assert caught.value.problem == "is no time span that a timedelta can hold"


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"max_new_tokens": -3}, "max_new_tokens: must be from 0 to 4294967295"),
        ({"top_k": 2**32}, "top_k: must be from 0 to 4294967295"),
        ({"seed": -1}, "seed: must be from 0 to 18446744073709551615"),
        ({"priority": 2**31}, "priority: must be from -2147483648 to 2147483647"),
        ({"stop_token_ids": [-1]}, "stop_token_ids: must be from 0 to 4294967295"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids: must be from 0 to 4294967295"),
    ],
)
def test_a_number_out_of_range_is_told_its_bounds(parameters: dict[str, Any], text: str) -> None:
    with pytest.raises(errors.InvalidArgumentError) as caught:
        build(**parameters)
    assert str(caught.value) == text


def test_a_token_id_out_of_range_is_told_its_bounds(client: Client) -> None:
    model = client.load("demo/chat")

    with pytest.raises(
        errors.InvalidArgumentError, match="token_ids: must be from 0 to 4294967295"
    ):
        model.detokenize([1, -1])


def test_text_that_is_not_unicode_names_its_field(client: Client) -> None:
    bad = "bad \udcff"
    model = client.load("demo/chat")
    calls: dict[str, Callable[[], object]] = {
        "text": lambda: model.generate(bad),
        "stop": lambda: model.generate("x", stop=[bad]),
        "messages[1].content": lambda: model.generate(
            messages=[Message("user", "x"), {"role": "user", "content": bad}]
        ),
        "messages[0].role": lambda: model.apply_chat_template([Message(bad, "x")]),
        "model": lambda: client.load(bad),
        "device_map": lambda: client.load("demo/chat", device_map=bad),
        "service": lambda: client.health(bad),
    }
    for field, call in calls.items():
        with pytest.raises((errors.InvalidArgumentError, errors.InvalidNameError)) as caught:
            call()
        assert str(caught.value) == f"{field}: is not valid Unicode text"
    with pytest.raises(errors.InvalidArgumentError, match="text: is not valid"):
        model.tokenize(bad)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"max_time": "soon"}, "max_time"),
        ({"chat_template_kwargs": {"x": object()}}, "chat_template_kwargs"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_field(parameters: dict[str, Any], field: str) -> None:
    with pytest.raises((TypeError, errors.InvalidArgumentError), match=field):
        build(**parameters)


@pytest.mark.parametrize("depth", [34, 40, 5000])
def test_variables_that_nest_deeper_than_the_wire_carries_name_their_field(depth: int) -> None:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    with pytest.raises(errors.InvalidArgumentError) as caught:
        build(chat_template_kwargs=value)
    assert str(caught.value) == "chat_template_kwargs: is nested too deep"


def test_an_unknown_parameter_is_refused_at_once(daemon: FakeDaemon, client: Client) -> None:
    model = client.load("demo/chat")

    with pytest.raises(TypeError, match=r"max_token'.*'max_new_tokens'"):
        model.generate("x", max_token=1)  # type: ignore[call-arg]  # type checkers refuse it too
    with pytest.raises(TypeError, match="nonsense"):
        model.stream("x", nonsense=1)  # type: ignore[call-arg]  # as above
    assert not [call for call in daemon.calls if "Generate" in call.method]


@pytest.mark.parametrize(
    "inputs",
    [{}, {"text": "x", "token_ids": [1]}, {"messages": [], "token_ids": []}],
)
def test_exactly_one_input_is_wanted(client: Client, inputs: dict[str, Any]) -> None:
    model = client.load("demo/chat")

    with pytest.raises(errors.InvalidArgumentError) as caught:
        model.generate(**inputs)
    assert caught.value.field == "input"


def test_an_empty_chat_is_the_daemons_to_refuse(daemon: FakeDaemon, client: Client) -> None:
    model = client.load("demo/chat")

    with pytest.raises(errors.InvalidArgumentError):
        model.generate(messages=[])
    assert daemon.last("Generate").request.HasField("messages")


@pytest.mark.parametrize(
    ("messages", "error", "text"),
    [
        ([{"role": "user"}], errors.InvalidArgumentError, r'messages\[0\]: "content" is missing'),
        ([{"content": "x"}], errors.InvalidArgumentError, r'messages\[0\]: "role" is missing'),
        ([{"role": "user", "content": "x", "name": "y"}], errors.InvalidArgumentError, "'name'"),
        ([Message("user", "x"), "hello"], TypeError, r"messages\[1\].*str"),
        ("hello", TypeError, r"messages\[0\].*str"),
    ],
)
def test_what_is_no_chat_is_refused(
    client: Client, messages: Any, error: type[Exception], text: str
) -> None:
    model = client.load("demo/chat")

    with pytest.raises(error, match=text):
        model.generate(messages=messages)


def test_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.chdir(tmp_path)
    here = os.getcwd()  # noqa: PTH109 - what abspath goes by

    assert model_name("./model") == f"{here}/model"
    assert model_name("../model") == f"{Path(here).parent}/model"
    assert model_name(".") == here
    assert model_name("~/models/a") == "/home/ada/models/a"
    assert model_name("/models/../a/") == "/a"
    assert model_name(Path("models/a")) == f"{here}/models/a"
    assert model_name("org/name@main") == "org/name@main"
    assert model_name("m-1") == "m-1"
    with pytest.raises(errors.InvalidNameError):
        model_name("~no-such-user-here/model")


def test_all_calls_make_paths_absolute(
    daemon: FakeDaemon, client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()

    model = client.load("./model")
    client.model("./model")
    client.cache.resolve("./model")
    with pytest.raises(errors.InvalidNameError):
        client.cache.download("./model")
    client.unload("./model")

    assert model.name == str(tmp_path / "model")
    named = {call.method: call.request.model for call in daemon.calls}
    assert set(named.values()) == {str(tmp_path / "model")}
    assert len(named) == 5


def test_a_handle_names_its_model_by_id(daemon: FakeDaemon, client: Client) -> None:
    model = client.load("demo/chat")
    model.generate("x", max_new_tokens=1)
    list(model.stream("x", max_new_tokens=1))
    model.tokenize("x")
    model.detokenize([1])
    model.apply_chat_template([Message("user", "x")])
    model.refresh()
    model.unload()

    assert {call.request.model for call in daemon.calls[1:]} == {model.id}
    assert len(daemon.calls) == 8


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes_by_name(dtype: Any) -> None:
    by_name = load_request("a/b", dtype=dtype, device_map=None, quantization=None)

    assert by_name == load_request(
        "a/b", dtype=Dtype[dtype.upper()], device_map=None, quantization=None
    )
    assert not by_name.options.HasField("device_map")
    assert not by_name.options.HasField("quantization")


@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_quantizations_by_name(name: Any) -> None:
    by_name = load_request("a/b", dtype=None, device_map=None, quantization=name)

    member = Quantization[name.upper()]
    assert by_name == load_request("a/b", dtype=None, device_map=None, quantization=member)
    assert by_name.options.quantization == member.value


def test_a_map_of_modules_takes_the_place_of_a_device_map() -> None:
    modules = {"": "cpu", "model.layers.1": "disk"}
    options = load_request("a/b", dtype=None, device_map=modules).options
    assert dict(options.module_map) == modules
    assert not options.HasField("device_map")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"device_map": {}}, "device_map: names no module"),
        ({"device_map": {"model": "\udcff"}}, "module_map: is not valid Unicode text"),
        ({"max_memory": {"cpu": -1}}, "max_memory: must be from 0 to 18446744073709551615"),
        ({"offload": "tape"}, "offload: 'tape' is none of cpu, disk"),
    ],
)
def test_placement_that_cannot_be_sent_is_refused(
    client: Client, options: Any, problem: str
) -> None:
    for call in (client.load, client.plan):
        with pytest.raises(errors.InvalidArgumentError) as caught:
            call("demo/chat", **options)
        assert str(caught.value) == problem


def test_an_unknown_quantization_is_refused(client: Client) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="int8, int4, nf4") as caught:
        client.load("demo/chat", quantization="q4_0")  # type: ignore[arg-type]  # on purpose
    assert caught.value.field == "quantization"


def test_an_unknown_dtype_is_refused(client: Client) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="float16, bfloat16, float32"):
        client.load("demo/chat", dtype="int8")  # type: ignore[arg-type]  # on purpose
