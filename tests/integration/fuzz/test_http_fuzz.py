"""Whatever clients send over HTTP: a documented answer, and a daemon that is none the worse."""

from __future__ import annotations

import json
import re
import socket
from collections import Counter
from http.client import BadStatusLine, HTTPException, HTTPResponse
from pathlib import Path
from select import select
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, seed, settings
from hypothesis.strategies import SearchStrategy

from loaderd.client import HealthStatus
from loaderd.server.http.errors import REFUSALS
from loaderd.v1.errors_pb2 import ErrorReason
from tests.integration.fuzz.http_requests import (
    CHAT,
    COMPLETIONS,
    HttpRequest,
    nonsense,
    requests,
)
from tests.integration.fuzz.target import DRAWN, Target, check_growth

PATHS = [
    *(COMPLETIONS, CHAT, "/v1/models", "/v1/models/org/name", "/metrics", "/healthz", "/readyz"),
    *("/", "/status.js", "/status/server", "/status/models", "/status/devices", "/status/cache"),
    "/v1/embeddings",
]
ANSWER_S = 120
PATIENCE_S = 0.1
OTHER_KINDS = {
    *("text/plain", "text/html", "text/css", "text/javascript", "application/openmetrics-text"),
}
REASONS = {name.removeprefix("ERROR_REASON_").lower() for name, _ in ErrorReason.items()}


def documented_types() -> dict[int, str]:
    """The error's type of each status, as the documentation has them."""
    page = Path("docs/http.md").read_text().partition("### Errors")[2].partition("\n## ")[0]
    found: dict[int, str] = {}
    for row in re.findall(r"^\| (\d+.*?) \| (.+?) \|", page, re.MULTILINE):
        statuses = [int(each) for each in row[0].split(", ")]
        types = re.findall(r"`(\w+)`", row[1])
        found.update(zip(statuses, types * (len(statuses) // len(types)), strict=True))
    return found


TYPES = documented_types()


def test_whatever_clients_send_over_http_has_a_documented_answer(
    target: Target, pytestconfig: pytest.Config
) -> None:
    examples = pytestconfig.getoption("--fuzz-examples")
    models = [target.model.id] * 6 + [target.model.name] * 3 + ["org/name", str(target.other), ""]
    worker_pid = target.worker_pid()
    memory, statuses = [], Counter[str]()
    for round_ in range(3):
        for path in PATHS:
            sent = send(target, requests(path, models), round_, examples)
            statuses += Counter(f"{path} {status}" for status in sent)
            assert target.worker_pid() == worker_pid, path
            target.unload_others()
        send(target, nonsense(), round_, examples)
        memory.append(target.memory_mib())
    assert target.client.health() is HealthStatus.SERVING
    # They were not all turned away at the door.
    assert [path for path in PATHS[:3] if not statuses[f"{path} 200"]] == [], statuses
    _, defect, traceback = target.daemon.log.partition("Traceback")
    assert not defect, traceback[:4000]
    check_growth(memory[1], memory[2])


def send(
    target: Target, made: SearchStrategy[HttpRequest], number: int, examples: int
) -> list[int]:
    """Sends requests that hypothesis makes up; the statuses of their answers."""
    address = urlsplit(target.daemon.http_url)
    statuses = []

    @seed(number)
    @settings(DRAWN, max_examples=examples)
    @given(made)
    def once(request: HttpRequest) -> None:
        assert address.port is not None
        with socket.create_connection(("127.0.0.1", address.port), timeout=ANSWER_S) as connection:
            status = exchange(connection, request)
        if status is not None:
            statuses.append(status)

    once()
    return statuses


def exchange(connection: socket.socket, request: HttpRequest) -> int | None:
    """Sends a request and checks its answer; its status, None if there was none."""
    try:
        connection.sendall(request.content)
        if not request.is_whole and not select([connection], [], [], PATIENCE_S)[0]:
            connection.shutdown(socket.SHUT_WR)  # or the daemon waits for the rest
    except OSError:
        pass  # it was refused before it was whole; the answer says why, if it still comes
    answer = HTTPResponse(connection, method=request.content.split(b" ")[0].decode("latin-1"))
    try:
        answer.begin()
        body = answer.read()
    except (BadStatusLine, ConnectionError):
        assert not request.is_whole, request.content[:300]
        return None
    shown = f"{request.content[:300]!r}: {answer.status}: {body[:300]!r}"
    try:
        check(answer, body)
    except (AssertionError, ValueError, LookupError, HTTPException) as error:
        raise AssertionError(shown) from error
    return answer.status


def check(answer: HTTPResponse, body: bytes) -> None:
    """Fails unless an answer is one that is documented."""
    kind = (answer.headers["content-type"] or "").partition(";")[0]
    if answer.status != 200:
        told = strict(body) if body else None  # the answer to a HEAD has none
        check_error(answer.status, told)
        assert answer.headers["x-request-id"] or answer.status == 400  # what is no request has none
    elif kind == "application/json":
        assert not body or strict(body)
    elif kind == "text/event-stream":
        check_events(body)
    else:
        assert kind in OTHER_KINDS


def check_error(status: int, told: Any) -> None:
    """Fails unless an error is told as it ought to be. One without a body answers a HEAD."""
    assert status in TYPES
    if told is None:
        return
    error = told["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == TYPES[status]
    assert error["code"] in (REASONS - {"internal"}) | set(REFUSALS.values())
    assert error["message"]


def check_events(body: bytes) -> None:
    """Fails unless a stream ends as one ought to."""
    events = [line for line in body.decode().split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in events)
    told = [strict(line[6:].encode()) for line in events if line != "data: [DONE]"]
    if events[-1] != "data: [DONE]":
        check_error(503, told[-1])


def strict(text: bytes) -> Any:
    """What a text of JSON says, with nothing in it that JSON does not have."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)
