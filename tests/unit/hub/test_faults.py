"""Each fault of the local hub does to the real client library what it says."""

from __future__ import annotations

import random
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import Hub, HubRepo, Response, faults
from tests.unit.hub.client import HubClient

STEP = 10 << 20  # the library writes and resumes in steps of this size
WEIGHTS = random.Random(7).randbytes(2 * STEP + 12345)
NAME = "*/model.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    repo = HubRepo("org/model")
    repo.commit({"model.safetensors": WEIGHTS})
    with Hub(repo) as hub:
        yield hub


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> HubClient:
    return HubClient(hub, tmp_path)


def fetch(hub: Hub) -> bytes:
    url = f"{hub.url}/org/model/resolve/main/model.safetensors"
    with urllib.request.urlopen(url, timeout=10) as response:
        content: bytes = response.read()
    return content


def ranges(hub: Hub) -> list[str | None]:
    return [r.range for r in hub.requests if r.method == "GET" and "/resolve/" in r.path]


def test_a_status_with_headers_answers_instead(hub: Hub, client: HubClient) -> None:
    gated = faults.status(403, {"X-Error-Code": "GatedRepo"}, b"no")
    hub.inject(gated, path="/api/*", times=1)
    assert client.download("org/model").error == "GatedRepoError"
    assert client.download("org/model").path.is_dir()


def test_a_rate_limit_is_waited_for(hub: Hub, client: HubClient) -> None:
    limited = faults.status(429, {"Retry-After": "1"})
    hub.inject(limited, path=NAME, method="HEAD", times=1)
    assert client.download("org/model").path.is_dir()
    heads = [r.status for r in hub.requests if r.method == "HEAD"]
    assert heads == [429, 200]


def test_a_short_body_is_resumed_with_a_range(hub: Hub, client: HubClient) -> None:
    hub.inject(faults.short_body(after_bytes=STEP + 5), path=NAME, times=1)
    snapshot = client.download("org/model").path
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS
    assert ranges(hub) == [None, f"bytes={STEP}-"]
    gets = [(r.status, r.sent_bytes) for r in hub.requests if r.path.endswith("model.safetensors")]
    assert gets[1:] == [(200, STEP + 5), (206, len(WEIGHTS) - STEP)]


def test_a_reset_is_not_a_close(hub: Hub, client: HubClient) -> None:
    hub.inject(faults.reset(after_bytes=STEP + 5), path=NAME, times=1)
    assert client.download("org/model").error == "ReadError"
    assert ranges(hub) == [None]


def test_wrong_bytes_have_the_right_size(hub: Hub, client: HubClient) -> None:
    hub.inject(faults.wrong_bytes(offset=3_000_000), path=NAME, times=1)
    content = (client.download("org/model").path / "model.safetensors").read_bytes()
    flipped = bytes([WEIGHTS[3_000_000] ^ 0xFF])
    assert content == WEIGHTS[:3_000_000] + flipped + WEIGHTS[3_000_001:]
    assert fetch(hub) == WEIGHTS


def test_headers_can_be_altered_and_taken_away(hub: Hub, client: HubClient) -> None:
    missing = faults.alter_headers(etag=None, x_linked_etag=None)
    hub.inject(missing, path=NAME, method="HEAD")
    answer = client.download("org/model")
    assert (answer.error, answer.cause) == ("LocalEntryNotFoundError", "FileMetadataError")

    hub.heal()
    hub.inject(faults.alter_headers(x_linked_size="7"), path=NAME, method="HEAD")
    assert client.download("org/model").error == "OSError"


@pytest.mark.parametrize("after_bytes", [None, 3_000_000])
def test_a_hang_lasts_until_the_hub_stops(hub: Hub, after_bytes: int | None) -> None:
    hub.inject(faults.hang(after_bytes=after_bytes), path=NAME)
    outcome: list[str] = []

    def download() -> None:
        try:
            fetch(hub)
        except Exception as error:
            outcome.append(type(error).__name__)

    thread = threading.Thread(target=download)
    thread.start()
    deadline = time.monotonic() + 10
    while not (hub.requests and hub.requests[0].sent_bytes == (after_bytes or 0)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert outcome == []
    assert hub.requests[0].status == (None if after_bytes is None else 200)
    hub.stop()
    thread.join(10)
    assert outcome in (["RemoteDisconnected"], ["IncompleteRead"], ["ConnectionResetError"])


@pytest.mark.parametrize("after_bytes", [None, 0, 3_000_000])
def test_a_hang_with_an_end_goes_on(hub: Hub, after_bytes: int | None) -> None:
    hub.inject(faults.hang(after_bytes=after_bytes, seconds=0.05), path=NAME)
    assert fetch(hub) == WEIGHTS


class _Waits(threading.Event):
    """Notes how long it was to be waited for, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[int] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.seconds.append(round(timeout))
        return self.is_set()


def test_a_throttle_limits_all_connections_together() -> None:
    fault = faults.throttle(0.01)
    waits = _Waits()
    for part in (b"ab", b"cd"):
        response = fault(Response(200, {}, [part]), waits)
        assert b"".join(response.body) == part
    # 100 seconds a byte, each after the one before, whichever connection it is on.
    assert waits.seconds == [100, 200, 300, 400]


def test_a_throttled_answer_arrives_whole(hub: Hub) -> None:
    hub.inject(faults.throttle(1e9))
    assert fetch(hub) == WEIGHTS


def test_faults_meet_what_they_name_and_no_more(hub: Hub) -> None:
    hub.inject(faults.wrong_bytes(), path="/api/*")
    hub.inject(faults.wrong_bytes(), method="HEAD")
    assert fetch(hub) == WEIGHTS
    hub.inject(faults.wrong_bytes(), times=2)
    hub.inject(faults.wrong_bytes(offset=1), times=1)
    assert [fetch(hub)[:2] == WEIGHTS[:2] for _ in range(3)] == [False, False, True]


def test_two_faults_apply_one_after_the_other(hub: Hub) -> None:
    hub.inject(faults.wrong_bytes())
    hub.inject(faults.wrong_bytes())
    assert fetch(hub) == WEIGHTS
