"""Private, gated, unauthorised: three errors, each saying what to do; the token shows nowhere."""

from __future__ import annotations

import pytest

from loaderd.client import errors
from tests.faults.daemon.box import MODEL, NEEDED, TOKEN, Box, contents
from tests.faults.daemon.cases import GATED, NOT_FOUND, UNAUTHORIZED, Outcome
from tests.faults.daemon.checks import fails, nothing_half_done
from tests.hub import Access, HubRepo, faults

CLOSED = {
    "private": (Access.PRIVATE, NOT_FOUND, "for a private repository the daemon's hub token"),
    "gated": (Access.GATED, GATED, "accept its terms on the hub"),
}


@pytest.mark.parametrize(("access", "outcome", "advice"), CLOSED.values(), ids=CLOSED)
def test_a_repository_that_the_token_does_not_open(
    box: Box, access: Access, outcome: Outcome, advice: str
) -> None:
    repo_id = box.publish(access=access, token="of somebody else")
    surroundings = box.disk.surroundings(repo_id)
    assert advice in str(fails(box, repo_id, outcome))

    opened = HubRepo(repo_id, access=access, token=TOKEN)
    opened.commit(MODEL)
    box.hub.add(opened)
    nothing_half_done(box, repo_id, surroundings)
    assert contents(box.client.cache.download(repo_id).path) == NEEDED


def test_a_token_that_the_hub_does_not_know(box: Box) -> None:
    repo_id = box.publish()
    surroundings = box.disk.surroundings(repo_id)
    answer = {"X-Error-Message": "Invalid credentials in Authorization header"}
    box.hub.inject(faults.status(401, answer))
    error = fails(box, repo_id, UNAUTHORIZED)
    assert "HF_TOKEN or --hub-token-file" in str(error)

    box.hub.heal()
    nothing_half_done(box, repo_id, surroundings)
    assert contents(box.client.cache.download(repo_id).path) == NEEDED


def test_the_token_is_in_no_error_and_no_log(box: Box) -> None:
    repo_id = box.publish()
    shown = []
    for fault in (faults.status(401), faults.status(500, body=TOKEN.encode())):
        box.hub.heal()
        box.hub.inject(fault)
        with pytest.raises(errors.LoaderdError) as caught:
            box.client.cache.download(repo_id)
        shown.append(f"{caught.value} {caught.value.metadata}")
    assert box.hub.requests[-1].token == TOKEN
    assert TOKEN not in "".join(shown) + box.daemon.log
