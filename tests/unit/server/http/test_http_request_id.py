"""What names a request over HTTP: in its answer, and in the log."""

from __future__ import annotations

import logging

import pytest

from tests.unit.server.box import Box
from tests.unit.server.http.browser import fetch

HEADER = "x-request-id"


async def test_every_answer_tells_its_name(box: Box) -> None:
    assert (await fetch(box.url, "/healthz", x_request_id="mine")).headers[HEADER] == "mine"
    made = [(await fetch(box.url, path)).headers[HEADER] for path in ("/metrics", "/v1/none")]
    assert len(set(made)) == 2
    assert all(made)


async def test_a_generation_has_the_requests_name_in_answer_and_log(
    box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await box.load()
    body = {"model": str(box.folder), "prompt": "count 1"}
    for asked in (body, {**body, "stream": True}):
        caplog.clear()
        reply = await fetch(box.url, "/v1/completions", asked, x_request_id="mine")
        assert (reply.status, reply.headers[HEADER]) == (200, "mine")
        assert "cmpl-mine" in reply.text
        (line,) = (vars(each) for each in caplog.records if each.name.endswith("rpc.call"))
        assert (line["code"], line["model"]) == ("OK", str(box.folder))


async def test_failures_tell_their_names(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = await fetch(
        box.url, "/v1/completions", {"model": "org/none", "prompt": "x"}, x_request_id="mine"
    )
    assert (refused.status, refused.headers[HEADER]) == (404, "mine")
    monkeypatch.delattr(type(box.registry), "views")
    broken = await fetch(box.url, "/v1/models", x_request_id="mine")
    assert (broken.status, broken.headers[HEADER]) == (500, "mine")
    monkeypatch.undo()


async def test_what_is_no_name_is_refused(box: Box) -> None:
    reply = await fetch(box.url, "/healthz", x_request_id="x" * 129)
    assert (reply.status, reply.error["param"]) == (400, HEADER)
    assert reply.headers[HEADER] != "x" * 129
