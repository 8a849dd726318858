"""What engines tell of what they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from loaderd.worker.v1 import worker_pb2
from tests.unit.worker.engine_client import PROMPT, Client, build
from tests.waiting import until

LONG_PROMPT = [5 + i % 60 for i in range(40)]


@pytest.fixture(params=["batching", "sequential"])
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    client = Client(build("llama"), request.param)
    yield client
    client.engine.close()


def reported(client: Client, holds: Callable[[worker_pb2.EngineReport], bool]) -> None:
    """Waits for a last report of which `holds` is true."""
    until(lambda: bool(client.reports) and holds(client.reports[-1]))


def test_an_engine_reports_when_it_is_there(client: Client) -> None:
    reported(client, lambda report: report.running_requests == 0)

    bounded = client.engine.name == "batching"
    assert (client.reports[-1].kv_capacity_tokens > 0) is bounded
    assert client.reports[-1].generated_tokens == 0


def test_reports_count_what_was_taken_and_made(client: Client) -> None:
    for _ in range(2):
        client.generate(PROMPT, max_new_tokens=7, ignore_eos=True, n=2)

    expected = (0, 2 * len(PROMPT), 2 * 2 * 7, 0)
    reported(
        client,
        lambda last: (
            (
                last.running_requests,
                last.prompt_tokens,
                last.generated_tokens,
                last.kv_tokens,
            )
            == expected
        ),
    )


def test_a_report_comes_when_work_begins(client: Client) -> None:
    key = client.start(PROMPT, max_new_tokens=200, ignore_eos=True)
    reported(client, lambda report: report.running_requests == 1)

    if client.engine.name == "batching":
        assert client.reports[-1].kv_tokens == len(PROMPT) + 200
    client.engine.cancel(key)
    reported(client, lambda report: (report.running_requests, report.kv_tokens) == (0, 0))


def test_reports_count_what_the_prefix_cache_had() -> None:
    client = Client(build("llama"), "batching")
    client.generate(LONG_PROMPT, max_new_tokens=2, ignore_eos=True)
    client.generate(LONG_PROMPT, max_new_tokens=2, ignore_eos=True)

    reported(client, lambda report: report.cached_prompt_tokens == 32)
    assert client.reports[-1].prompt_tokens == 2 * len(LONG_PROMPT)
    client.engine.close()
