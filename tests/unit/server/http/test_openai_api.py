"""The API through OpenAI's own client, on fake workers: "count 3" generates "0 1 2 "."""

from __future__ import annotations

import asyncio
import re

import openai as api
import pytest
from openai import AsyncOpenAI

from tests.unit.server.box import MAX_REQUESTS, Box
from tests.unit.server.http.browser import connect, fetch, head
from tests.waiting import until_in_loop


async def test_a_text_whole_and_as_it_comes(box: Box, openai: AsyncOpenAI) -> None:
    model = await box.load()
    name = str(box.folder)
    whole = await openai.completions.create(model=name, prompt="count 3")
    assert whole.choices[0].text == "0 1 2 "
    assert whole.choices[0].finish_reason == "length"
    assert whole.model == name
    assert whole.system_fingerprint == model.id
    stream = await openai.completions.create(
        model=name, prompt="count 3", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "0 1 2 "
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_loaded_models_are_listed_by_name(box: Box, openai: AsyncOpenAI) -> None:
    assert [model.id async for model in openai.models.list()] == []
    await box.load()
    assert [model.id async for model in openai.models.list()] == [str(box.folder)]
    found = await openai.models.retrieve(str(box.folder))
    assert (found.id, found.owned_by) == (str(box.folder), "local")
    with pytest.raises(api.NotFoundError) as caught:
        await openai.models.retrieve("org/other")
    assert caught.value.code == "model_not_loaded"


async def test_an_unknown_model_is_not_found(openai: AsyncOpenAI) -> None:
    with pytest.raises(api.NotFoundError, match="org/none") as caught:
        await openai.completions.create(model="org/none", prompt="count 1")
    assert (caught.value.code, caught.value.type) == ("model_not_loaded", "invalid_request_error")
    assert caught.value.response.headers["x-should-retry"] == "false"


async def test_a_full_queue_asks_to_come_again(box: Box, openai: AsyncOpenAI) -> None:
    await box.load()
    calls = [box.stream("hang") for _ in range(MAX_REQUESTS)]
    for call in calls:
        await anext(aiter(call))
    for stream in (False, True):
        with pytest.raises(api.RateLimitError) as caught:
            await openai.completions.create(model=str(box.folder), prompt="count 1", stream=stream)
        assert (caught.value.code, caught.value.type) == ("queue_full", "rate_limit_error")
        headers = caught.value.response.headers
        assert (headers["retry-after"], headers["x-should-retry"]) == ("1", "true")
    for call in calls:
        call.cancel()


@pytest.mark.parametrize(("prompt", "code"), [("fail", "device_memory"), ("die", "worker_died")])
async def test_what_fails_on_its_way(box: Box, openai: AsyncOpenAI, prompt: str, code: str) -> None:
    await box.load()
    with pytest.raises(api.InternalServerError) as caught:
        await openai.completions.create(model=str(box.folder), prompt=prompt)
    assert (caught.value.status_code, caught.value.code) == (503, code)


async def test_a_stream_that_fails_ends_in_an_error(box: Box, openai: AsyncOpenAI) -> None:
    await box.load()
    with pytest.raises(api.APIError, match="ended") as caught:
        # The worker may be gone before there is a stream.
        stream = await openai.completions.create(model=str(box.folder), prompt="die", stream=True)
        async for _ in stream:
            pass
    assert caught.value.code == "worker_died"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_generation(
    box: Box, openai: AsyncOpenAI, stream: bool
) -> None:
    await box.load()
    worker = box.launcher.workers[0]
    call = asyncio.create_task(_take_all(openai, str(box.folder), stream=stream))
    await until_in_loop(lambda: worker.running_requests == 1)
    assert worker.cancelled == []
    call.cancel()
    await until_in_loop(lambda: len(worker.cancelled) == 1)
    await until_in_loop(lambda: box.registry.views()[0].active_requests == 0)


async def _take_all(openai: AsyncOpenAI, model: str, *, stream: bool) -> None:
    answer = await openai.completions.create(model=model, prompt="hang", stream=stream)
    if isinstance(answer, api.AsyncStream):
        async for _ in answer:
            pass


async def test_users_of_one_client_take_turns(box: Box, openai: AsyncOpenAI) -> None:
    await box.load()
    for user in ("ann", "ben", "ann"):
        await openai.completions.create(model=str(box.folder), prompt="count 1", user=user)
    first, second, third = box.launcher.workers[0].clients
    assert first == third != second
    assert "ann" not in first


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": []}, "tools", "unsupported_option"),
        ({"temprature": 1}, "temprature", "unsupported_option"),
        ({"suffix": None}, "suffix", "unsupported_option"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_argument"),
        ({"max_tokens": True}, "max_tokens", "invalid_argument"),
        ({"max_tokens": -1}, "max_tokens", "invalid_argument"),
        ({"seed": 2**64}, "seed", "invalid_argument"),
        ({"temperature": "hot"}, "temperature", "invalid_argument"),
        ({"stop": [1]}, "stop", "invalid_argument"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_argument"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_argument"),
        (
            {"stream": True, "stream_options": {"include_all": True}},
            "stream_options.include_all",
            "unsupported_option",
        ),
        ({"prompt": ["a", "b"]}, "prompt", "unsupported_option"),
        ({"prompt": {}}, "prompt", "invalid_argument"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_argument"),
        ({"echo": True, "logprobs": 1}, "echo", "unsupported_option"),
        ({"model": None}, "model", "invalid_argument"),
        ({"model": "x" * 4097}, "model", "invalid_name"),
        ({"prompt": "x" * (2**20 + 1)}, "prompt", "invalid_argument"),
        ({"stop": ["x"] * 17}, "stop", "invalid_argument"),
    ],
)
async def test_what_is_not_honoured_is_refused_by_name(
    box: Box, fields: dict[str, object], param: str, code: str
) -> None:
    body = {"model": "m", "prompt": "count 1", **fields}
    reply = await fetch(box.url, "/v1/completions", body)
    assert reply.status == 400
    assert (reply.error["param"], reply.error["code"]) == (param, code)
    assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "hi"}] * 1025}, "messages"),
        ({"messages": [{"role": "x" * 65, "content": "hi"}]}, "messages[0].role"),
    ],
)
async def test_what_a_chat_cannot_have(box: Box, fields: dict[str, object], param: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    reply = await fetch(box.url, "/v1/chat/completions", body)
    assert (reply.status, reply.error["param"]) == (400, param)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("depth", [33, 60, 300])
async def test_an_object_that_is_nested_too_deep(box: Box, stream: bool, depth: int) -> None:
    await box.load()
    nested: object = 1
    for _ in range(depth):
        nested = {"a": nested}
    body = {
        "model": str(box.folder),
        "messages": [{"role": "user", "content": "hi"}],
        "chat_template_kwargs": nested,
        "stream": stream,
    }
    reply = await fetch(box.url, "/v1/chat/completions", body)
    assert (reply.status, reply.error["code"]) == (400, "invalid_argument")
    assert "nested too deep" in reply.error["message"]


ODD = (
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\\ud800"}',
    b'{"seed": ' + b"9" * 400 + b"}",
    b'{"prompt": "\xff"}',
)


async def test_bodies_that_are_none(box: Box) -> None:
    path = "/v1/completions"
    for body in (b"", b"{", b"[1]", b'{"temperature": NaN}', b"[" * 100_000, *ODD):
        reply = await fetch(box.url, path, body, content_type="application/json")
        assert (reply.status, reply.error["param"]) == (400, "body"), body[:20]
    # What a page in a browser may send anywhere without asking first.
    reply = await fetch(box.url, path, b"{}", content_type="text/plain")
    assert (reply.status, reply.error["code"]) == (415, "not_json")
    large = await fetch(box.url, path, b" " * ((4 << 20) + 1), content_type="application/json")
    assert (large.status, large.error["code"]) == (413, "body_too_large")


async def test_a_body_that_does_not_come_holds_nothing(box: Box) -> None:
    await box.load()
    _, writer = await connect(box.url)
    headers = {"host": "localhost", "content-type": "application/json", "content-length": "9"}
    writer.write(head("POST", "/v1/completions", headers))
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    reply = await fetch(box.url, "/v1/models")
    assert reply.status == 200


async def test_other_hosts_are_not_this_one(box: Box) -> None:
    for path in ("/", "/metrics", "/v1/models"):
        reply = await fetch(box.url, path, host="rebound.example")
        assert (reply.status, reply.error["code"]) == (421, "wrong_host")
    assert (await fetch(box.url, "/healthz", host="localhost:8080")).status == 200


async def test_paths_and_methods_that_there_are_not(box: Box) -> None:
    assert (await fetch(box.url, "/v1/embeddings", {})).error["code"] == "not_found"
    assert (await fetch(box.url, "/v1/completions")).error["code"] == "method_not_allowed"
    for path in ("/v1", "/v1/", "/v1/completions/", "/metrics/", "//"):  # nor is one led there
        reply = await fetch(box.url, path)
        assert (reply.status, reply.error["code"]) == (404, "not_found"), path


async def test_pages_of_other_sites_are_let_read_nothing(box: Box) -> None:
    for path in ("/", "/status/models", "/metrics", "/v1/models", "/v1/completions", "/none"):
        for body in (None, b"{}"):
            reply = await fetch(box.url, path, body, origin="https://elsewhere.example")
            allowed = [name for name in reply.headers if name.startswith("access-control-")]
            assert allowed == [], path


async def test_a_daemon_that_drains_is_alive_and_not_ready(box: Box, openai: AsyncOpenAI) -> None:
    await box.load()
    assert (await fetch(box.url, "/readyz")).status == 200
    await box.registry.drain(0)
    assert (await fetch(box.url, "/healthz")).status == 200
    assert (await fetch(box.url, "/readyz")).text == "draining\n"
    with pytest.raises(api.InternalServerError) as caught:
        await openai.completions.create(model=str(box.folder), prompt="count 1")
    assert (caught.value.status_code, caught.value.code) == (503, "draining")


async def test_a_defect_is_told_by_its_number(
    box: Box,
    openai: AsyncOpenAI,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(self: object) -> None:
        raise RuntimeError("a secret of the daemon's")

    monkeypatch.setattr(type(box.registry), "views", broken)
    with pytest.raises(api.InternalServerError) as caught:
        await openai.models.list()
    assert (caught.value.status_code, caught.value.code) == (500, "internal")
    incident = re.search(r"incident (\w+)", caught.value.message)
    assert incident is not None
    assert f"incident {incident[1]}" in caplog.text
    assert "secret" not in str(caught.value.body)
    monkeypatch.undo()
    metrics = (await fetch(box.url, "/metrics")).text
    assert 'loaderd_http_requests_total{code="500",route="/v1/models"} 1.0' in metrics
