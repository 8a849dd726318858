"""The local hub as the real client library sees it."""

from __future__ import annotations

import hashlib
import random
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import Access, Hub, HubRepo
from tests.unit.hub.client import HubClient

CONFIG = b'{"model_type": "llama"}'
WEIGHTS = random.Random(7).randbytes(1 << 20)
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "sub folder/é.txt": b"text"}


@pytest.fixture
def repo() -> HubRepo:
    repo = HubRepo("org/model")
    repo.commit(FILES)
    return repo


@pytest.fixture
def hub(repo: HubRepo) -> Iterator[Hub]:
    with Hub(repo) as hub:
        yield hub


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> HubClient:
    return HubClient(hub, tmp_path)


def contents(snapshot: Path) -> dict[str, bytes]:
    files = (path for path in snapshot.rglob("*") if path.is_file())
    return {path.relative_to(snapshot).as_posix(): path.read_bytes() for path in files}


def sent(hub: Hub, name: str) -> list[tuple[str | None, int]]:
    """Range and size of the answers with a body of this file."""
    gets = (r for r in hub.requests if r.method == "GET" and r.path.endswith(name))
    return [(r.range, r.sent_bytes) for r in gets]


def test_a_cold_download_brings_every_file_and_a_warm_one_asks_for_the_revision_only(
    hub: Hub, client: HubClient
) -> None:
    snapshot = client.download("org/model").path
    assert contents(snapshot) == FILES

    cold = len(hub.requests)
    assert client.download("org/model").path == snapshot
    assert [r.path for r in hub.requests[cold:]] == ["/api/models/org/model/revision/main"]


def test_blobs_are_named_by_their_hashes(client: HubClient) -> None:
    snapshot = client.download("org/model").path
    blob = hashlib.sha1(b"blob %d\0" % len(CONFIG) + CONFIG).hexdigest()
    assert (snapshot / "config.json").resolve().name == blob
    assert (snapshot / "model.safetensors").resolve().name == hashlib.sha256(WEIGHTS).hexdigest()


def test_the_library_verifies_what_it_downloaded(client: HubClient) -> None:
    snapshot = client.download("org/model").path
    verdict = client.call("HfApi.verify_repo_checksums", repo_id="org/model")
    assert "checked_count=3, mismatches=[], missing_paths=[]" in str(verdict.value)

    (snapshot / "config.json").resolve().write_bytes(CONFIG.upper())
    verdict = client.call("HfApi.verify_repo_checksums", repo_id="org/model")
    assert "mismatches=[{'path': 'config.json'" in str(verdict.value)


def test_branch_tag_and_sha_name_commits_that_share_files(
    hub: Hub, repo: HubRepo, client: HubClient
) -> None:
    first = repo.find("main")
    assert first
    repo.point("v1", "main")
    second = repo.commit({"config.json": b"{}", "sub folder/é.txt": None})
    third = repo.commit({"notes.md": b"branch"}, branch="feature/x", parent="v1")
    assert len({first.sha, second, third}) == 3

    tagged = client.download("org/model", revision="v1").path
    assert (tagged.name, contents(tagged)) == (first.sha, FILES)
    current = client.download("org/model").path
    assert current.name == second
    assert contents(current) == {"config.json": b"{}", "model.safetensors": WEIGHTS}
    for revision in ("feature/x", third):
        branched = client.download("org/model", revision=revision).path
        assert (branched.name, contents(branched)) == (third, {**FILES, "notes.md": b"branch"})
    # The weights are in every commit and came over the wire once.
    assert sent(hub, "model.safetensors") == [(None, len(WEIGHTS))]


def test_commit_shas_depend_on_content_and_history_only() -> None:
    def history(repo_id: str, last: bytes) -> list[str]:
        repo = HubRepo(repo_id)
        return [repo.commit({"a": b"1"}), repo.commit({"b": b"2"}), repo.commit({"a": last})]

    assert history("org/one", b"3") == history("org/two", b"3")
    assert history("org/one", b"3")[:2] == history("org/one", b"4")[:2]
    assert history("org/one", b"3")[2] != history("org/one", b"4")[2]


def test_a_long_listing_comes_in_pages(repo: HubRepo, tmp_path: Path) -> None:
    repo.commit({f"many/{number:02}.txt": b"%d" % number for number in range(20)})
    with Hub(repo, page_size=6) as hub:
        snapshot = HubClient(hub, tmp_path).download("org/model").path
        assert len(contents(snapshot)) == 23
        pages = [r.query.get("cursor") for r in hub.requests if "/tree/" in r.path]
    # 23 files and their two folders.
    assert pages == [None, "6", "12", "18", "24"]


def test_folders_on_the_disk_are_served(tmp_path: Path) -> None:
    (tmp_path / "source" / "deep").mkdir(parents=True)
    (tmp_path / "source" / "deep" / "file.txt").write_bytes(b"content")
    with Hub(HubRepo.from_folder("solo", tmp_path / "source")) as hub:
        snapshot = HubClient(hub, tmp_path / "home").download("solo").path
        assert contents(snapshot) == {"deep/file.txt": b"content"}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"repo_id": "org/other"}, "RepositoryNotFoundError"),
        ({"repo_id": "org/model", "revision": "v9"}, "RevisionNotFoundError"),
        ({"repo_id": "org/model", "revision": "0" * 40}, "RevisionNotFoundError"),
    ],
)
def test_what_is_missing_is_told_apart(
    client: HubClient, arguments: dict[str, str], error: str
) -> None:
    assert client.call("snapshot_download", **arguments).error == error


def test_a_missing_file_is_told_apart(client: HubClient) -> None:
    answer = client.call("hf_hub_download", repo_id="org/model", filename="other.json")
    assert answer.error == "RemoteEntryNotFoundError"


@pytest.mark.parametrize("token", [None, "hf_wrong"])
@pytest.mark.parametrize(
    ("access", "error"),
    [(Access.GATED, "GatedRepoError"), (Access.PRIVATE, "RepositoryNotFoundError")],
)
def test_gated_and_private_repositories_need_their_token(
    hub: Hub, client: HubClient, access: Access, error: str, token: str | None
) -> None:
    closed = HubRepo("org/closed", access=access, token="hf_right")
    closed.commit({"config.json": CONFIG})
    hub.add(closed)
    assert client.download("org/closed", token=token).error == error
    assert contents(client.download("org/closed", token="hf_right").path) == {"config.json": CONFIG}


def test_a_public_repository_has_no_token() -> None:
    with pytest.raises(ValueError, match="token"):
        HubRepo("org/model", token="hf_right")


@pytest.mark.parametrize(
    ("asked", "status", "expected"),
    [
        ("bytes=0-3", 206, WEIGHTS[:4]),
        ("bytes=1048566-", 206, WEIGHTS[-10:]),
        ("bytes=1048566-99999999", 206, WEIGHTS[-10:]),
        ("bytes=1048576-", 416, b""),
        ("bytes=-5", 416, b""),
    ],
)
def test_ranges(hub: Hub, asked: str, status: int, expected: bytes) -> None:
    url = f"{hub.url}/org/model/resolve/main/model.safetensors"
    request = urllib.request.Request(url, headers={"Range": asked})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            answer = (response.status, response.read())
    except urllib.error.HTTPError as error:
        with error:
            answer = (error.code, error.read())
    assert answer == (status, expected)


def test_a_stopped_hub_refuses_and_comes_back_at_the_same_address(
    hub: Hub, client: HubClient
) -> None:
    address = hub.url
    hub.stop()
    assert client.download("org/model").cause == "ConnectError"
    hub.start()
    assert hub.url == address
    assert contents(client.download("org/model").path) == FILES


def test_stopping_cuts_idle_connections(hub: Hub) -> None:
    with socket.create_connection(("127.0.0.1", int(hub.url.rsplit(":", 1)[1])), 10) as connection:
        connection.sendall(b"HEAD /org/model/resolve/main/config.json HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
        hub.stop()
        assert connection.recv(1) == b""


def test_it_runs_as_a_program(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    command = [sys.executable, "-m", "tests.hub", "--repo", f"org/model={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            with urllib.request.urlopen(f"{url}/org/model/resolve/main/config.json") as response:
                assert response.read() == CONFIG
        finally:
            process.terminate()
            assert process.wait(timeout=10) == 0


@pytest.mark.parametrize("repo", ["org/model", "org/model=/nowhere/at/all"])
def test_the_program_refuses_a_repository_without_files(repo: str) -> None:
    command = [sys.executable, "-m", "tests.hub", "--repo", repo]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 2
    assert "is not ID=PATH" in done.stderr or "no files below" in done.stderr
