"""The daemon and the hub library share one cache: what one wrote the other one reads."""

from __future__ import annotations

import json

import pytest

from loaderd.client import Snapshot
from tests.faults.daemon.box import MODEL, NEEDED, Box, contents
from tests.faults.daemon.library import plain_download, plain_script

_SCAN = """
import json
from huggingface_hub import scan_cache_dir
info = scan_cache_dir()
print(json.dumps({
    "warnings": [str(warning) for warning in info.warnings],
    "commits": {repo.repo_id: [each.commit_hash for each in repo.revisions] for repo in info.repos},
}))
"""


@pytest.mark.parametrize("patterns", [(), ("*.json", "*.safetensors")], ids=["all", "some"])
def test_what_the_library_wrote_is_served_without_a_request_for_a_file(
    box: Box, patterns: tuple[str, ...]
) -> None:
    repo_id = box.publish()
    done = plain_download(box.hub.url, box.disk.cache, repo_id, *patterns)
    assert done.returncode == 0, done.stderr
    fetched = len(box.fetches(repo_id))

    resolved = box.client.cache.resolve(repo_id)
    assert isinstance(resolved, Snapshot)
    assert resolved.path == done.stdout.strip()
    snapshot = box.client.cache.download(repo_id)
    assert (snapshot.commit, snapshot.complete) == (resolved.commit, True)
    assert contents(snapshot.path).items() >= NEEDED.items()
    assert len(box.fetches(repo_id)) == fetched


def test_what_the_daemon_wrote_is_read_by_the_library_offline(box: Box) -> None:
    repo_id = box.publish()
    snapshot = box.client.cache.download(repo_id)
    patterns = ("*.json", "*.safetensors")
    done = plain_download(box.hub.url, box.disk.cache, repo_id, *patterns, offline=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == snapshot.path


def test_what_the_daemon_wrote_is_completed_by_the_library(box: Box) -> None:
    repo_id = box.publish()
    snapshot = box.client.cache.download(repo_id)
    fetched = len(box.fetches(repo_id))
    done = plain_download(box.hub.url, box.disk.cache, repo_id)
    assert done.returncode == 0, done.stderr
    assert contents(snapshot.path) == MODEL
    assert len(box.fetches(repo_id)) == fetched + len(MODEL.keys() - NEEDED.keys())
    assert box.client.cache.download(repo_id).complete


def test_the_librarys_scan_finds_nothing_to_warn_of(box: Box) -> None:
    repo_id = box.publish()
    snapshot = box.client.cache.download(repo_id)
    done = plain_script(_SCAN, box.hub.url, box.disk.cache)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["warnings"] == []
    assert found["commits"][repo_id] == [snapshot.commit]
