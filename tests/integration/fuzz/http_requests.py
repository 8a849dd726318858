"""Requests over HTTP, as bytes: valid, nearly valid, and far from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from loaderd.server.http.openai.asked import EXTENSIONS

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

_COMMON = [
    *("model", "stream", "stream_options", "temperature", "top_p", "n", "seed", "stop", "user"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "stop_token_ids", *EXTENSIONS),
]
_OWN = {
    COMPLETIONS: ["prompt", "max_tokens", "logprobs", "echo", "best_of", "add_special_tokens"],
    CHAT: [
        *("messages", "max_completion_tokens", "max_tokens", "logprobs", "top_logprobs"),
        *("chat_template_kwargs", "response_format"),
    ],
}
_UNKNOWN = ["tools", "functions", "suffix", "", "model ", "__class__", "\0", "x" * 5000]
_MOST_FIELDS = 4

_TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "\0", "..", "{{ 7*7 }}", "\N{SNOWMAN}" * 300, "x" * 65, "a b" * 2000]),
    st.sampled_from(["x" * (2**20 + 1), "\ud800", "\udfff", "\ud83d\ude00", "\ufeff"]),
)
_NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63) - 1, 10**299, 10**4000]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 5e-324, 1e308]),
)
_SCALARS = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS)
_ANY: SearchStrategy[Any] = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(_TEXTS, inner, max_size=3)
    ),
    max_leaves=8,
)
_LISTS = st.builds(
    lambda one, count: [one] * count,
    st.sampled_from([None, True, 0, 1, -1, 0.5, "", "a", "x" * 65, [], {}]),
    st.sampled_from([17, 1025, 10_001]),
)
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "developer", "assistant"])},
        optional={"content": st.one_of(st.just("Why?"), _ANY), "name": _TEXTS},
    ),
    max_size=3,
)
# What is mostly right.
_LIKELY: dict[str, SearchStrategy[Any]] = {
    "prompt": st.sampled_from(["The sky is", [1, 2, 40], ["one"], [[1, 2]]]),
    "messages": st.one_of(st.just([{"role": "user", "content": "Why?"}]), _MESSAGES),
    "stream": st.booleans(),
    "stream_options": st.just({"include_usage": True}),
    "stop": st.sampled_from(["a", ["b", "c"]]),
    "logit_bias": st.sampled_from([{"7": 5}, {"8": -100, "9": 0.5}]),
    "logprobs": st.one_of(st.integers(0, 3), st.just(True)),
    "response_format": st.just({"type": "text"}),
    "user": st.just("ann"),
    "chat_template_kwargs": st.just({"a": {"b": [1, None]}}),
    "cache_salt": st.just("salt"),
    "stop_token_ids": st.just([1, 2]),
    **dict.fromkeys(
        ("n", "best_of", "top_k", "max_tokens", "max_completion_tokens", "priority"),
        st.integers(1, 3),
    ),
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p"), st.sampled_from([0.5, 1])),
}


@dataclass(frozen=True)
class HttpRequest:
    """A request, and how much of it is sent.

    Attributes:
        content: All that is sent.
        is_whole: Whether that is what its head says, so that there must be an answer.
    """

    content: bytes
    is_whole: bool


@st.composite
def requests(draw: DrawFn, path: str, models: Sequence[str]) -> HttpRequest:
    """A request to a path. Every second one has nothing odd but its body or its query.

    Args:
        draw: Of hypothesis.
        path: The path.
        models: Names that mean something.
    """
    body = draw(_bodies(path, models)) if path in _OWN else b""
    target = path + draw(st.sampled_from(["", "", "?", "?model=x", "?%00&&==", "?" + "q" * 9000]))
    headers = {b"host": b"localhost", b"connection": b"close"}
    headers |= {b"content-type": b"application/json"} if body else {}
    method = b"POST" if path in _OWN else b"GET"
    sent = len(body)
    is_framed = True
    if draw(st.booleans()):
        method = draw(st.sampled_from(_METHODS))
        target = draw(st.one_of(st.just(target), st.sampled_from(_TARGETS)))
        for name, value in draw(st.lists(st.sampled_from(_HEADERS), max_size=2)):
            headers[name] = value
        is_framed = not headers.keys() & _FRAMING
        if draw(st.integers(0, 3)) == 0:
            sent = draw(st.integers(0, len(body)))
    head = [b"%s %s HTTP/1.1" % (method, target.encode("utf-8", "surrogatepass"))]
    if body and is_framed:
        headers[b"content-length"] = str(len(body)).encode()
    head += [name + b": " + value for name, value in headers.items()]
    content = b"\r\n".join([*head, b"", body[:sent]])
    return HttpRequest(content, is_whole=is_framed and sent == len(body))


@st.composite
def nonsense(draw: DrawFn) -> HttpRequest:
    """Bytes that are no request at all, or the beginning of one."""
    content = draw(st.one_of(st.binary(min_size=1, max_size=200), st.sampled_from(_NONSENSE)))
    return HttpRequest(content, is_whole=False)


_METHODS = [
    *(b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE", b"CONNECT"),
    *(b"get", b"X" * 500, b"PRI"),
]
_FRAMING = {b"content-length", b"transfer-encoding"}
_TARGETS = [
    *("/", "//", "/v1", "/v1/", "/v1/models/", "/v1/models//", "/v1/completions/", "/metrics/"),
    *(
        "/v1/models/%00",
        "/v1/models/%ff%fe",
        "/v1/models/..%2f..%2fetc",
        "/v1/models/" + "m" * 9000,
    ),
    *("/status/../../etc/passwd", "/status/%2e%2e", "/status.js/", "/healthz%0d%0aX: y", "/%"),
    *("http://localhost/v1/models", "http://elsewhere.example/", "*", "localhost:80", "?"),
    "/" + "a/" * 20_000,
]
_HEADERS = [
    (b"host", b""),
    (b"host", b"elsewhere.example"),
    (b"host", b"[::1"),
    (b"host", b"localhost\xff"),
    (b"content-type", b"text/plain"),
    (b"content-type", b""),
    (b"content-type", b"application/json; charset=utf-16"),
    (b"content-type", b"\xff\xfe"),
    (b"content-length", b"-1"),
    (b"content-length", b"5, 5"),
    (b"content-length", b"99999999999999999999"),
    (b"content-length", b"0"),
    (b"transfer-encoding", b"chunked"),
    (b"transfer-encoding", b"gzip"),
    (b"content-encoding", b"gzip"),
    (b"expect", b"100-continue"),
    (b"upgrade", b"websocket"),
    (b"connection", b"upgrade"),
    (b"authorization", b"Bearer \xff\xff"),
    (b"authorization", b"Bearer " + b"t" * 9000),
    (b"accept", b"application/openmetrics-text; version=1.0.0"),
    (b"accept", b";;q=\xff,"),
    (b"accept-encoding", b"gzip, br"),
    (b"range", b"bytes=0-1"),
    (b"origin", b"https://elsewhere.example"),
    (b"x-request-id", b""),
    (b"x-request-id", b"\xe2\x98\x83"),
    (b"x-request-id", b"x" * 129),
    (b"x-forwarded-for", b"10.0.0.1"),
    (b"cookie", b"a=b; " * 2000),
    (b"x-long", b"x" * 70_000),
    (b"bad name", b"x"),
    (b"x-bell", b"\x07"),
]
_NONSENSE = [
    b"\r\n" * 100,
    b"GET",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",  # names no host
    b"GET / HTTP/1.0\r\n\r\n",
    b"GET / HTTP/1.1\nhost: localhost\n\n",
    b"GET  /  HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: localhost\r\n folded: yes\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 20_000,
    b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n" * 20,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 30,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n{\r\n" * 2000,
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"content-length: 2\r\n\r\n{}{}{}{}",
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n"
    b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5000000\r\n\r\n" + b"x" * 9000,
]


def _bodies(path: str, models: Sequence[str]) -> SearchStrategy[bytes]:
    objects = st.one_of(_objects(path, models, mild=True), _objects(path, models, mild=False))
    return st.one_of(
        *[objects.map(lambda value: json.dumps(value).encode())] * 5,
        _ANY.map(lambda value: json.dumps(value).encode()),
        _damaged(objects),
        st.sampled_from(_TEXT_BODIES),
    )


@st.composite
def _objects(draw: DrawFn, path: str, models: Sequence[str], *, mild: bool) -> dict[str, Any]:
    need = "prompt" if path == COMPLETIONS else "messages"
    values = {"model": draw(st.sampled_from(models)), need: draw(_LIKELY[need])}
    names = [*_COMMON[1:], *_OWN[path]] + ([] if mild else ["model", *_UNKNOWN])
    for name in draw(st.lists(st.sampled_from(names), max_size=_MOST_FIELDS, unique=True)):
        likely = _LIKELY.get(name, st.booleans())
        values[name] = draw(likely if mild else st.one_of(likely, _ANY, _LISTS))
    if not mild and draw(st.integers(0, 4)) == 0:
        values.pop(draw(st.sampled_from(sorted(values))))
    return values


_DAMAGE = [b"\xff", b"\xed\xa0\x80", b"\0", b"\xef\xbb\xbf", b"NaN", b'"', b"}"]


@st.composite
def _damaged(draw: DrawFn, objects: SearchStrategy[dict[str, Any]]) -> bytes:
    """JSON into which something was put that it cannot have there."""
    body = json.dumps(draw(objects), ensure_ascii=False).encode("utf-8", "surrogatepass")
    at = draw(st.integers(0, len(body)))
    thing = draw(
        st.sampled_from([b"\xff", b"\xed\xa0\x80", b"\0", b"\xef\xbb\xbf", b"NaN", b'"', b"}"])
    )
    return draw(st.sampled_from([body[:at] + thing + body[at:], body[:at] or b"{"]))


def _nested(opening: bytes, closing: bytes, depth: int) -> bytes:
    return b'{"model": "m", "chat_template_kwargs": %s1%s}' % (opening * depth, closing * depth)


_TEXT_BODIES = [
    *(_nested(b'{"a":', b"}", depth) for depth in (10, 60, 500, 50_000)),
    *(_nested(b"[", b"]", depth) for depth in (60, 500, 100_000)),
    b"[" * 200_000,
    b'{"a":' * 50_000,
    b"{}",
    b"null",
    b"1",
    b'"text"',
    b'{"temperature": NaN, "model": "m", "prompt": "x"}',
    b'{"temperature": -Infinity}',
    b'{"temperature": 1e999, "model": "m", "prompt": "x"}',
    b'{"seed": ' + b"9" * 100_000 + b"}",
    b'{"model": "a", "model": "b", "prompt": "x", "prompt": 1}',
    b'{"model": "\\ud800", "prompt": "\\udc00"}',
    b"\xef\xbb\xbf{}",
    '{"model": "m"}'.encode("utf-16"),
    b"\x1f\x8b\x08\x00",
    b" " * ((4 << 20) + 1),
    b'{"prompt": "' + b"x" * (4 << 20) + b'"}',
]
