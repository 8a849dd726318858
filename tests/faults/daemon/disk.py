"""What a daemon left on the disk, looked at from outside."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tests.folders import paths_below

_UNFINISHED = re.compile(r"([0-9a-f]{40}|[0-9a-f]{64})\.incomplete")


@dataclass(frozen=True)
class Disk:
    """A daemon's cache, and what is around it.

    Attributes:
        folder: Everything that the daemon could be talked into writing is below it.
        cache: The cache.
    """

    folder: Path
    cache: Path

    def repo(self, repo_id: str) -> Path:
        """A repository's folder in the cache."""
        return self.cache / ("models--" + repo_id.replace("/", "--"))

    def surroundings(self, repo_id: str) -> set[Path]:
        """Everything but what a download of this repository may write."""
        own = self.repo(repo_id)
        allowed = [own, self.cache / ".locks" / own.name]
        shared = {self.cache, *self.cache.parents, self.cache / ".locks"}
        shared.add(self.cache / "CACHEDIR.TAG")
        return {
            path
            for path in paths_below(self.folder)
            if path not in shared and not any(path.is_relative_to(each) for each in allowed)
        }

    def unfinished(self, repo_id: str) -> dict[str, int]:
        """The sizes of the files that a next download goes on with, by their digest."""
        blobs = self.repo(repo_id).glob("blobs/*.incomplete")
        sizes = {path.name.removesuffix(".incomplete"): path.stat().st_size for path in blobs}
        return {digest: size for digest, size in sizes.items() if size}

    def refs(self, repo_id: str) -> dict[str, str]:
        """The commits of branches and tags by their name."""
        root = self.repo(repo_id) / "refs"
        files = (path for path in root.rglob("*") if path.is_file())
        return {path.relative_to(root).as_posix(): path.read_text() for path in files}

    def check_contents(self, repo_id: str) -> None:
        """Every blob is what its name says, and nothing is there that nobody will look at."""
        repo = self.repo(repo_id)
        for blob in repo.glob("blobs/*"):
            if not _UNFINISHED.fullmatch(blob.name):
                assert _digest(blob) == blob.name, f"{blob} has another content"
        strays = [p for p in paths_below(repo) if p.name.endswith((".tmp", ".part"))]
        assert not strays, f"left behind: {strays}"
        unfinished = [p for p in paths_below(repo) if p.name.endswith(".incomplete")]
        assert all(p.parent == repo / "blobs" for p in unfinished), unfinished
        for link in repo.glob("snapshots/**/*"):
            if link.is_symlink():
                target = os.path.normpath(link.parent / link.readlink())
                assert link.exists(), link
                assert Path(target).parent == repo / "blobs", link


def _digest(blob: Path) -> str:
    data = blob.read_bytes()
    if len(blob.name) == 64:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
