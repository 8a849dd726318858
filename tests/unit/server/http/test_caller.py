from __future__ import annotations

from starlette.requests import Request

from loaderd.server.http.caller import caller


def request(host: str, port: int, *headers: tuple[bytes, bytes]) -> Request:
    return Request({"type": "http", "client": (host, port), "headers": headers})


def test_a_caller_is_a_connection_as_grpc_would_tell_it() -> None:
    assert caller(request("127.0.0.1", 4711)).peer() == "ipv4:127.0.0.1:4711"
    assert caller(request("::1", 4711)).peer() == "ipv6:[::1]:4711"


def test_the_users_of_a_client_are_told_apart_whatever_connection_they_have() -> None:
    ann = caller(request("127.0.0.1", 1), "ann").peer()
    assert ann == caller(request("127.0.0.1", 2), "ann").peer()
    assert ann != caller(request("127.0.0.1", 1), "ben").peer()
    assert ann.startswith("ipv4:127.0.0.1:")
    assert "ann" not in ann


def test_a_token_is_passed_on_as_grpc_has_it() -> None:
    shown = caller(request("127.0.0.1", 1, (b"authorization", b"Bearer secret")))
    assert shown.invocation_metadata() == (("authorization", "Bearer secret"),)
    assert shown.peer_identities() is None
    assert caller(request("127.0.0.1", 1)).invocation_metadata() == ()
