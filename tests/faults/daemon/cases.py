"""The faults of a hub, and what a daemon makes of each: one table, a row a fault.

A fault lasts until the hub is healed. Those that pass by themselves are in `test_passing.py`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from grpc import StatusCode

from tests.faults.daemon.box import ATTEMPTS, WEIGHTS, WEIGHTS_BYTES
from tests.hub import Response, faults
from tests.hub.faults import Fault

INFO = "/api/models/*/revision/*"
TREE = "/api/models/*/tree/*"
FILE = f"*/resolve/*/{WEIGHTS}"
PLACES = {"info": INFO, "tree": TREE, "file": FILE}

ELSEWHERE = "../../../../evil"


@dataclass(frozen=True)
class Outcome:
    """What a call ends in: its status, and the fields that its reason has beside `model`."""

    code: StatusCode
    reason: str
    fields: Mapping[str, str] = field(default_factory=dict)


NOT_FOUND = Outcome(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
NO_REVISION = Outcome(StatusCode.NOT_FOUND, "REVISION_NOT_FOUND", {"revision": "main"})
GATED = Outcome(StatusCode.PERMISSION_DENIED, "MODEL_GATED")
UNAUTHORIZED = Outcome(StatusCode.PERMISSION_DENIED, "HUB_UNAUTHORIZED")
UNREACHABLE = Outcome(StatusCode.UNAVAILABLE, "HUB_UNREACHABLE")
RATE_LIMITED = Outcome(StatusCode.UNAVAILABLE, "HUB_RATE_LIMITED")
MISSING = Outcome(StatusCode.DATA_LOSS, "SNAPSHOT_INCOMPLETE", {"file": WEIGHTS})
CORRUPT = Outcome(StatusCode.DATA_LOSS, "SNAPSHOT_CORRUPT")
CORRUPT_WEIGHTS = replace(CORRUPT, fields={"file": WEIGHTS})


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        where: Glob over the paths of the requests that meet the fault.
        fault: The fault.
        outcome: What a download ends in.
        asked: How often the daemon asks before it gives up; None: as often as redirects may lead.
        keeps: Whether bytes came that the retry goes on from.
        impatient: Whether it takes a daemon that gives up soon without progress.
    """

    where: str
    fault: Fault
    outcome: Outcome
    asked: int | None = 1
    keeps: bool = False
    impatient: bool = False


# --- refused: every status with every code that the hub gives, at every place --------------------

_BY_CODE = {
    "RepoNotFound": NOT_FOUND,
    "GatedRepo": GATED,
    "RevisionNotFound": NO_REVISION,
}


def _refused(status: int, code: str, place: str) -> Outcome:
    if code in _BY_CODE:
        return _BY_CODE[code]
    if place == "file" and (status == 404 or code == "EntryNotFound"):
        return MISSING
    return NOT_FOUND if status == 404 else UNAUTHORIZED


def _refusals() -> dict[str, Case]:
    codes = ("", *_BY_CODE, "EntryNotFound")
    rows = {}
    for status, code, place in itertools.product((401, 403, 404), codes, PLACES):
        headers = {"X-Error-Code": code} if code else {}
        rows[f"{code or 'bare'} {status} on {place}"] = Case(
            PLACES[place], faults.status(status, headers), _refused(status, code, place)
        )
    return rows


# --- busy ----------------------------------------------------------------------------------------


def _busy() -> dict[str, Case]:
    answers = {
        "429": (faults.status(429), RATE_LIMITED),
        "429 for hours": (faults.status(429, {"Retry-After": "99999"}), RATE_LIMITED),
        "500": (faults.status(500), UNREACHABLE),
        "503 for hours": (faults.status(503, {"Retry-After": "99999"}), UNREACHABLE),
    }
    return {
        f"{name} on {place}": Case(path, fault, outcome, asked=ATTEMPTS)
        for (name, (fault, outcome)), (place, path) in itertools.product(
            answers.items(), PLACES.items()
        )
    }


# --- silent, or cut off --------------------------------------------------------------------------

SILENT = {
    **{
        f"silence on {place}": Case(path, faults.hang(), UNREACHABLE, impatient=True)
        for place, path in PLACES.items()
    },
    "silence in the body": Case(
        FILE, faults.hang(after_bytes=WEIGHTS_BYTES // 2), UNREACHABLE, keeps=True, impatient=True
    ),
}


def _cut() -> dict[str, Case]:
    kinds: dict[str, Callable[..., Fault]] = {"end": faults.short_body, "reset": faults.reset}
    return {
        f"{name} of {place}": Case(path, cut(after_bytes=0), UNREACHABLE, asked=ATTEMPTS)
        for (name, cut), (place, path) in itertools.product(kinds.items(), PLACES.items())
    }


# --- answers that are not what they should be ----------------------------------------------------


def _chunks(*chunks: bytes) -> Fault:
    """A body of its own, whole in itself."""

    def fault(response: Response, _stopped: threading.Event) -> Response:
        length = str(sum(map(len, chunks)))
        return replace(
            response, headers={**response.headers, "Content-Length": length}, body=chunks
        )

    return fault


def _endless(response: Response, _stopped: threading.Event) -> Response:
    kept = {k: v for k, v in response.headers.items() if k != "Content-Length"}
    body = itertools.repeat(b"x" * 65536)
    return replace(response, headers={**kept, "Connection": "close"}, body=body)


_PAGE = faults.status(200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")

WRONG = {
    "too few bytes": Case(FILE, _chunks(b"x" * 100), CORRUPT_WEIGHTS),
    "too many bytes": Case(FILE, _chunks(b"x" * (WEIGHTS_BYTES * 2)), CORRUPT_WEIGHTS),
    "bytes without end": Case(FILE, _endless, CORRUPT_WEIGHTS),
    "wrong bytes": Case(FILE, faults.wrong_bytes(offset=2_000_000), CORRUPT_WEIGHTS),
    "a web page for info": Case(INFO, _PAGE, UNREACHABLE),
    "a web page for the tree": Case(TREE, _PAGE, UNREACHABLE),
    "an answer without end": Case(INFO, _endless, UNREACHABLE),
    "400": Case(INFO, faults.status(400), UNREACHABLE),
}

# --- hostile -------------------------------------------------------------------------------------


def _entry(**changes: Any) -> Fault:
    """One more file in the listing."""
    return faults.rewrite(lambda tree: [*tree, {**tree[0], **changes}])


def weights_listed_with(**changes: Any) -> Fault:
    """Another size or hash of the weights in the listing."""
    return faults.rewrite(
        lambda tree: [{**e, "lfs": {**e["lfs"], **changes}} if "lfs" in e else e for e in tree]
    )


def _redirect(location: str) -> Fault:
    return faults.status(302, {"Location": location})


HOSTILE = {
    "no commit": Case(INFO, faults.rewrite(lambda info: {**info, "sha": None}), CORRUPT),
    "commit that leads out": Case(
        INFO, faults.rewrite(lambda info: {**info, "sha": ELSEWHERE}), CORRUPT
    ),
    "name that leads out": Case(TREE, _entry(path=f"{ELSEWHERE}.json"), CORRUPT),
    "inner name that leads out": Case(TREE, _entry(path="a/../../evil.json"), CORRUPT),
    "absolute name": Case(TREE, _entry(path="/tmp/evil.json"), CORRUPT),
    "backslashes in a name": Case(TREE, _entry(path="..\\evil.json"), CORRUPT),
    "control character in a name": Case(TREE, _entry(path="a\nb.json"), CORRUPT),
    "name too long": Case(TREE, _entry(path="a" * 300 + ".json"), CORRUPT),
    "hash that leads out": Case(TREE, _entry(oid=ELSEWHERE), CORRUPT),
    "sha256 that leads out": Case(TREE, weights_listed_with(oid=ELSEWHERE), CORRUPT),
    "negative size": Case(TREE, _entry(size=-1), CORRUPT),
    "listing that is no list": Case(TREE, faults.rewrite(lambda tree: {"error": "x"}), UNREACHABLE),
    "redirect to http elsewhere": Case(FILE, _redirect("http://192.0.2.1/model"), UNREACHABLE),
    "redirect to a file of the box": Case(
        FILE, _redirect("file:///etc/passwd"), UNREACHABLE, asked=ATTEMPTS
    ),
    "redirect to itself": Case(FILE, _redirect(WEIGHTS), UNREACHABLE, asked=None),
    "file of another commit": Case(
        FILE, faults.alter_headers(x_repo_commit="0" * 40), CORRUPT_WEIGHTS
    ),
    "file with another hash": Case(
        FILE, faults.alter_headers(x_linked_etag=f'"{"0" * 64}"'), CORRUPT_WEIGHTS
    ),
    "file with another size": Case(FILE, faults.alter_headers(x_linked_size="7"), CORRUPT_WEIGHTS),
}

CASES = {**_refusals(), **_busy(), **SILENT, **_cut(), **WRONG, **HOSTILE}
