"""The fake's cache: names, sizes, no files."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from loaderd.v1 import cache_pb2
from tests.fake_daemon.failure import REASONS, FailureError, UnknownReasonError

if TYPE_CHECKING:
    from tests.fake_daemon.daemon import FakeDaemon

WEIGHTS = "model.safetensors"
FILES = {"config.json": 700, "tokenizer.json": 2_000_000, WEIGHTS: 38_000_000}
TOTAL = sum(FILES.values())
SKIPPED = {
    "pytorch_model.bin": (38_000_500, cache_pb2.SKIP_REASON_PICKLE),
    "README.md": (3_000, cache_pb2.SKIP_REASON_NOT_NEEDED),
}
FREE_BYTES = 50_000_000_000
EXAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the documentation shows
ON_HUB = {EXAMPLE, "demo/chat", "demo/base", "demo/remote", "demo/stuck", "demo/stalled"}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")

Key = tuple[str, str]
"""A snapshot: repository and commit."""


def commit_of(repo_id: str) -> str:
    """What a repository's main is."""
    return hashlib.sha1(repo_id.encode(), usedforsecurity=False).hexdigest()


def old_commit_of(repo_id: str) -> str:
    """What it was before, with other weights."""
    return commit_of(f"{repo_id} before")


def verify_steps() -> list[cache_pb2.VerifyProgress]:
    """How far a verification is after each file."""
    sizes = list(FILES.values())
    return [
        cache_pb2.VerifyProgress(
            verified_bytes=sum(sizes[:files]),
            total_bytes=TOTAL,
            verified_files=files,
            total_files=len(sizes),
            bytes_per_second=500_000_000,
        )
        for files in range(1, len(sizes) + 1)
    ]


class Cache:
    """Which snapshots are cached, and what is wrong with them.

    Attributes:
        cached: Repositories whose main is there.
        superseded: Those that have their old commit, to which no branch points.
        orphans: Bytes of what belongs to no snapshot: unfinished downloads by repository, the
            rest by any name.
        problems: What a verification finds in the main of a repository.
        unverifiable: Files of it that have no hash.
        unhashed: Repositories whose files a load has to hash first.
        max_bytes: The operator's limit; 0: none.
        hub_answers: Whether the hub does.
    """

    def __init__(self, daemon: FakeDaemon) -> None:
        self._daemon = daemon
        self.cached = {EXAMPLE, "demo/chat", "demo/base", "demo/stuck"}
        self.superseded: set[str] = set()
        self.orphans: dict[str, int] = {}
        self.problems: dict[str, list[cache_pb2.FileProblem]] = {}
        self.unverifiable: dict[str, list[str]] = {}
        self.unhashed: set[str] = set()
        self.max_bytes = 0
        self.hub_answers = True

    def check_name(self, name: str) -> str:
        """The repository of a name, or its path; the hub or the box has it.

        Raises:
            FailureError: As the name asks for.
        """
        repo_id, _, revision = name.partition("@")
        if repo_id.startswith("/"):
            if not Path(repo_id).is_dir():
                raise FailureError("MODEL_NOT_FOUND", model=name)
            return repo_id
        _check_form(name)
        if repo_id not in ON_HUB:
            raise FailureError("MODEL_NOT_FOUND", model=name)
        if revision not in {"", "main", commit_of(repo_id)}:
            raise FailureError("REVISION_NOT_FOUND", model=name, revision=revision)
        return repo_id

    def find(self, name: str) -> list[Key]:
        """The snapshots of a name: all of the repository's, or that of a revision.

        Raises:
            FailureError: There is none, or the name is malformed.
        """
        if name.startswith("/"):
            raise FailureError("INVALID_NAME", field="model", problem="is a local path")
        _check_form(name)
        repo_id, _, revision = name.partition("@")
        wanted = commit_of(repo_id) if revision == "main" else revision
        found = [key for key in self.held() if key[0] == repo_id and wanted in {"", key[1]}]
        if not found:
            raise FailureError("SNAPSHOT_NOT_FOUND", model=name)
        return found

    def held(self) -> list[Key]:
        """All snapshots, by repository, the newest first."""
        return [
            (repo_id, commit)
            for repo_id in sorted(self.cached | self.superseded)
            for names, commit in (
                (self.cached, commit_of(repo_id)),
                (self.superseded, old_commit_of(repo_id)),
            )
            if repo_id in names
        ]

    def remove(self, key: Key) -> None:
        """Deletes a snapshot."""
        repo_id, commit = key
        (self.cached if commit == commit_of(repo_id) else self.superseded).remove(repo_id)

    def size_of(self, keys: list[Key]) -> int:
        """What snapshots take on the disk."""
        return sum({blob: size for key in keys for blob, size in _blobs(key).items()}.values())

    def users_of(self, key: Key) -> list[str]:
        """Who uses a snapshot."""
        models = [m.id for m in self._daemon.models.all() if (m.repo_id, m.commit) == key]
        downloading = key[0] in self._daemon.downloads.repo_ids()
        return [*models, "download"] if downloading else models

    def snapshot(self, key: Key) -> cache_pb2.Snapshot:
        """A snapshot as the wire has it."""
        repo_id, commit = key
        others = [other for other in self.held() if other != key]
        snapshot = cache_pb2.Snapshot(
            repo_id=repo_id,
            commit=commit,
            refs=["main"] if commit == commit_of(repo_id) else [],
            size_bytes=TOTAL,
            file_count=len(FILES),
            complete=True,
            path=f"/cache/models--{repo_id.replace('/', '--')}/snapshots/{commit}",
            unique_bytes=self.size_of(self.held()) - self.size_of(others),
            in_use_by=self.users_of(key),
        )
        snapshot.modified_at.FromSeconds(1_700_000_000)
        snapshot.last_used_at.FromSeconds(1_700_000_100)
        return snapshot

    def plan(self, repo_id: str) -> cache_pb2.DownloadPlan:
        """What a download would fetch."""
        partial = min(self.orphans.get(repo_id, 0), FILES[WEIGHTS])
        return cache_pb2.DownloadPlan(
            repo_id=repo_id,
            revision="main",
            commit=commit_of(repo_id),
            files=[
                cache_pb2.PlannedFile(
                    path=path,
                    size_bytes=size,
                    cached=path == "config.json",
                    partial_bytes=partial if path == WEIGHTS else 0,
                )
                for path, size in FILES.items()
            ],
            total_bytes=TOTAL,
            missing_bytes=TOTAL - FILES["config.json"] - partial,
            skipped=[
                cache_pb2.SkippedFile(path=path, size_bytes=size, reason=reason)
                for path, (size, reason) in SKIPPED.items()
            ],
            skipped_count=len(SKIPPED),
            skipped_bytes=sum(size for size, _ in SKIPPED.values()),
        )


def _blobs(key: Key) -> dict[str, int]:
    """The files of a snapshot on the disk; the commits of a repository differ in the weights."""
    repo_id, commit = key
    return {
        f"{repo_id}/{path}@{commit}" if path == WEIGHTS else f"{repo_id}/{path}": size
        for path, size in FILES.items()
    }


def _check_form(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise FailureError("INVALID_NAME", field="model", problem="must be org/name")
    org, _, rest = name.partition("/")
    if org == "fail":
        reason = rest.upper().replace("-", "_")
        raise FailureError(reason) if reason in REASONS else UnknownReasonError()
