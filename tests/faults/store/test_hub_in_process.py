"""The hub functions in a process that also uses the hub library for itself."""

from __future__ import annotations

import errno
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import default_client_factory, set_client_factory

from loaderd.server.errors import (
    CacheNotWritableError,
    DiskFullError,
    HubRateLimitedError,
    HubUnreachableError,
)
from loaderd.server.store import hub as hub_functions
from loaderd.server.store import hub_download, rate
from loaderd.server.store.blobs import SnapshotFiles
from loaderd.server.store.hub_access import HubAccess
from loaderd.server.store.plan import DownloadProgress, PlannedFile
from tests.faults.store.support import (
    INFO,
    MODEL,
    NAME,
    NEEDED,
    QUICK,
    WEIGHTS,
    contents,
    found,
    partial_files,
)
from tests.hub import Hub, faults


def access(hub: Hub) -> HubAccess:
    return HubAccess(hub.url, retry=QUICK)


def test_a_download_in_process_shows_no_bars(
    hub: Hub, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = hub_functions.plan(NAME, cache, access(hub))
    snapshot = hub_functions.download(plan, cache, access(hub)).path
    assert contents(snapshot) == {name: MODEL[name] for name in NEEDED}
    assert capfd.readouterr() == ("", "")


def test_files_come_by_http_even_where_the_library_would_use_xet(hub: Hub, cache: Path) -> None:
    xet = faults.alter_headers(x_xet_hash="ab" * 32, x_xet_refresh_route=f"{hub.url}/nowhere")
    hub.inject(xet, path=WEIGHTS, method="*")
    plan = hub_functions.plan(NAME, cache, access(hub))
    hub_functions.download(plan, cache, access(hub))
    assert found(cache, "blobs/*") == []
    assert not any("nowhere" in request.path for request in hub.requests)


def test_other_calls_of_the_library_are_left_alone(hub: Hub, cache: Path) -> None:
    made: list[httpx2.Client] = []

    def factory() -> httpx2.Client:
        made.append(default_client_factory())
        return made[-1]

    set_client_factory(factory)  # as an application with a proxy of its own does
    try:
        plan = hub_functions.plan(NAME, cache, access(hub))
        assert made
        hub.inject(faults.status(500), path=WEIGHTS)
        with pytest.raises(HfHubHTTPError):
            hf_hub_download(
                NAME.repo_id,
                "model.safetensors",
                revision=plan.commit,
                cache_dir=cache,
                endpoint=hub.url,
                token=False,
            )
        with pytest.raises(HubUnreachableError):
            hub_functions.download(plan, cache, access(hub))
    finally:
        set_client_factory(default_client_factory)


def test_without_a_token_none_is_sent_whatever_the_environment_holds(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    plan = hub_functions.plan(NAME, cache, access(hub))
    hub_functions.download(plan, cache, access(hub))
    assert {request.token for request in hub.requests} == {None}


def test_the_rate_falls_to_nothing_while_nothing_comes(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate, "WINDOW_SECONDS", 0.4)
    hub.inject(faults.hang(after_bytes=1_000_000, seconds=3), path=WEIGHTS)
    plan = hub_functions.plan(NAME, cache, access(hub))
    seen: list[DownloadProgress] = []
    hub_functions.download(plan, cache, access(hub), seen.append)
    rates = [p.bytes_per_second for p in seen]
    first = next(index for index, rate_then in enumerate(rates) if rate_then > 0)
    assert 0 in rates[first:]  # while it hung; bytes came again before it ended


def test_a_plan_is_good_for_a_later_download_too(hub: Hub, cache: Path) -> None:
    plan = hub_functions.plan(NAME, cache, access(hub))
    hub.inject(faults.status(429), path=INFO)
    with pytest.raises(HubRateLimitedError):
        hub_functions.plan(NAME, cache, access(hub))
    assert hub_functions.download(plan, cache, access(hub)).path.name == plan.commit


def test_a_full_disk_is_refused_wherever_it_is(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = hub_functions.plan(NAME, cache, access(hub))
    monkeypatch.setattr(hub_download, "DISK_MARGIN_BYTES", 1 << 60)
    with pytest.raises(DiskFullError) as caught:
        hub_functions.download(plan, cache, access(hub))
    assert caught.value.needed_bytes == plan.missing_bytes + (1 << 60)
    assert partial_files(cache) == found(cache, "*") == []


def test_a_plan_names_the_largest_of_the_files_that_are_left_out_and_counts_all(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_functions, "MAX_SKIPPED", 1)
    plan = hub_functions.plan(NAME, cache, access(hub))
    sizes = {name: len(MODEL[name]) for name in MODEL.keys() - NEEDED}
    assert [file.path for file in plan.skipped] == [max(sizes, key=lambda name: sizes[name])]
    assert (plan.skipped_count, plan.skipped_bytes) == (len(sizes), sum(sizes.values()))


def test_a_cache_that_a_plan_may_not_read_is_said(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(files: SnapshotFiles, file: PlannedFile) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(SnapshotFiles, "partial_bytes", refuse)  # the tests may run as root
    with pytest.raises(CacheNotWritableError):
        hub_functions.plan(NAME, cache, access(hub))
