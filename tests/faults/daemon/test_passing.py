"""Faults that pass by themselves, and answers that only look odd: the download succeeds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from tests.faults.daemon.box import MODEL, NEEDED, TOKEN, WEIGHTS, WEIGHTS_BYTES, Box, contents
from tests.faults.daemon.cases import ELSEWHERE, FILE, PLACES, TREE
from tests.hub import Hub, HubRepo, Response, faults
from tests.hub.faults import Fault

HALF = WEIGHTS_BYTES // 2


@pytest.fixture
def repo_id(box: Box) -> str:
    return box.publish()


ONCE = {
    "429": faults.status(429, {"Retry-After": "0"}),
    "429 for hours": faults.status(429, {"Retry-After": "99999"}),
    "500": faults.status(500),
    "503": faults.status(503),
    "end": faults.short_body(after_bytes=0),
    "reset": faults.reset(after_bytes=0),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", ONCE.values(), ids=ONCE)
def test_a_hub_that_fails_once_is_asked_again(
    box: Box, repo_id: str, place: str, fault: Fault
) -> None:
    box.hub.inject(fault, path=PLACES[place], times=1)
    assert contents(box.client.cache.download(repo_id).path) == NEEDED


@pytest.mark.parametrize("cut", [faults.short_body, faults.reset], ids=["end", "reset"])
def test_a_body_that_breaks_off_goes_on_where_it_was(
    box: Box, repo_id: str, cut: Callable[..., Fault]
) -> None:
    # A reset loses what has not been read yet, so there is time to read.
    box.hub.inject(faults.hang(after_bytes=HALF, seconds=0.3), path=FILE, times=1)
    box.hub.inject(cut(after_bytes=HALF + 1), path=FILE, times=1)
    assert contents(box.client.cache.download(repo_id).path) == NEEDED
    first, second = box.fetches(repo_id, WEIGHTS)
    assert first.range is None
    assert second.range in {f"bytes={HALF}-", f"bytes={HALF + 1}-"}
    assert second.sent_bytes <= len(NEEDED[WEIGHTS]) - HALF


def test_a_slow_trickle_is_no_silence(impatient_box: Box) -> None:
    """It takes longer than the daemon waits for a hub without progress."""
    repo_id = impatient_box.publish()
    impatient_box.hub.inject(faults.throttle(WEIGHTS_BYTES / 3.5), path=FILE)
    assert contents(impatient_box.client.cache.download(repo_id).path) == NEEDED


def _without_length(response: Response, _stopped: threading.Event) -> Response:
    kept = {k: v for k, v in response.headers.items() if k != "Content-Length"}
    return replace(response, headers={**kept, "Connection": "close"})


# The listing says what a file is, and its content is compared with that.
ODD = {
    "no commit in the header": faults.alter_headers(x_repo_commit=None),
    "no etag": faults.alter_headers(etag=None, x_linked_etag=None),
    "etag of another kind": faults.alter_headers(etag='W/"1"', x_linked_etag=None),
    "etag that leads out": faults.alter_headers(
        etag=f'"{ELSEWHERE}"', x_linked_etag=f'"{ELSEWHERE}"'
    ),
    "no linked size": faults.alter_headers(x_linked_size=None),
    "no length": _without_length,
    "a xet hash": faults.alter_headers(x_xet_hash="ab" * 32),
}


@pytest.mark.parametrize("fault", ODD.values(), ids=ODD)
def test_headers_that_say_nothing_or_lie_do_no_harm(box: Box, repo_id: str, fault: Fault) -> None:
    surroundings = box.disk.surroundings(repo_id)
    box.hub.inject(fault, path=FILE, method="*")
    assert contents(box.client.cache.download(repo_id).path) == NEEDED
    box.disk.check_contents(repo_id)
    assert box.disk.surroundings(repo_id) == surroundings


def test_a_file_takes_one_request(box: Box, repo_id: str) -> None:
    """No HEAD that could hang, or say something else than the body's own headers."""
    asked = len(box.hub.requests)
    box.client.cache.download(repo_id)
    made = [(each.method, each.path.rpartition("/")[2]) for each in box.hub.requests[asked:]]
    files = [(method, name) for method, name in made if name in MODEL]
    assert sorted(files) == [("GET", name) for name in sorted(NEEDED)]
    assert len(made) == len(files) + 2  # info and tree


# --- other servers -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mirror:
    """Another server, which has the same repository.

    Attributes:
        commit: What the repository's branch is, on both.
    """

    hub: Hub
    commit: str


@pytest.fixture
def mirror(repo_id: str) -> Iterator[Mirror]:
    repo = HubRepo(repo_id)
    commit = repo.commit(MODEL)
    with Hub(repo) as hub:
        yield Mirror(hub, commit)


def test_a_file_may_come_from_another_server_but_the_token_does_not_go_there(
    box: Box, repo_id: str, mirror: Mirror
) -> None:
    def elsewhere(response: Response, _stopped: threading.Event) -> Response:
        kept = {k: v for k, v in response.headers.items() if k.startswith(("X-", "ETag"))}
        return Response(302, {**kept, "Location": mirror.hub.url + path, "Content-Length": "0"})

    path = f"/{repo_id}/resolve/{mirror.commit}/{WEIGHTS}"
    box.hub.inject(elsewhere, path=FILE, method="*")
    assert contents(box.client.cache.download(repo_id).path) == NEEDED
    assert {each.path for each in mirror.hub.requests} == {path}
    assert {each.token for each in mirror.hub.requests} == {None}
    assert {each.token for each in box.fetches(repo_id)} == {TOKEN}


def test_a_listing_that_goes_on_elsewhere_does_not_take_the_token_along(
    box: Box, repo_id: str, mirror: Mirror
) -> None:
    page = f"{mirror.hub.url}/api/models/{repo_id}/tree/{mirror.commit}?recursive=true"
    box.hub.inject(faults.alter_headers(link=f'<{page}>; rel="next"'), path=TREE)
    assert contents(box.client.cache.download(repo_id).path) == NEEDED
    assert {each.token for each in mirror.hub.requests} == {None}
