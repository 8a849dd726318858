"""How often a busy hub is asked, and how long is waited between."""

from __future__ import annotations

import pytest

from loaderd.server.store.hub_access import HubAccess, RetryPolicy
from loaderd.server.store.hub_guard import HubBusyError

POLICY = RetryPolicy(attempts=5, first_wait=1.0, longest_wait=3.0)


class Hub:
    """Is busy, and tells how long to wait."""

    def __init__(self, *asked: float | None) -> None:
        self.asked = list(asked)
        self.waits: list[float] = []

    def call(self) -> str:
        if self.asked:
            raise HubBusyError(429, self.asked.pop(0))
        return "answer"

    def ask(self) -> str:
        return POLICY.call(self.call, on=(HubBusyError,), wait=self.waits.append)


def test_waits_double_up_to_their_bound() -> None:
    hub = Hub(None, None, None, None)
    assert hub.ask() == "answer"
    assert hub.waits == [1.0, 2.0, 3.0, 3.0]


def test_what_the_hub_asks_for_is_kept_to_up_to_the_bound() -> None:
    hub = Hub(2.5, 0.0, 9999.0)
    assert hub.ask() == "answer"
    assert hub.waits == [2.5, 2.0, 3.0]


def test_the_last_error_is_raised() -> None:
    hub = Hub(*[None] * 9)
    with pytest.raises(HubBusyError):
        hub.ask()
    assert len(hub.waits) == 4


def test_attempts_count_afresh_when_more_came_than_ever() -> None:
    positions = [0, 10, 10, 20, 20, 15, 20, 20, 20]
    waits: list[float] = []

    def break_off() -> str:
        positions.pop(0)
        raise HubBusyError(500, None)

    with pytest.raises(HubBusyError):
        POLICY.call(break_off, on=(HubBusyError,), wait=waits.append, reached=lambda: positions[0])
    assert waits == [1.0, 2.0, 1.0, 2.0, 3.0, 3.0]


def test_other_errors_are_not_tried_again() -> None:
    waits: list[float] = []
    with pytest.raises(ZeroDivisionError):
        POLICY.call(lambda: 1 // 0, on=(HubBusyError,), wait=waits.append)
    assert waits == []


def test_the_token_is_not_shown() -> None:
    access = HubAccess("https://hub", "hf_secret")
    assert "hf_secret" not in repr(access)
    assert access.library_token == "hf_secret"
    assert HubAccess("https://hub").library_token is False
