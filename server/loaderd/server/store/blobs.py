"""The contents of a repository's files in the cache: whole, partial, left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from loaderd.server.errors import ModelUnsupportedError, SnapshotCorruptError
from loaderd.server.store.cache import RepoFolder, digest_of_blob
from loaderd.server.store.digests import digest_of_file, stamp_of
from loaderd.server.store.locks import try_lock
from loaderd.server.store.plan import PlannedFile
from loaderd.server.store.weights import check_file


class SnapshotFiles:
    """The files of one commit, as they are in the cache.

    Args:
        repo: The repository.
        commit: The commit.
    """

    def __init__(self, repo: RepoFolder, commit: str) -> None:
        self.repo = repo
        self._folder = repo.snapshot(commit)

    def is_whole(self, file: PlannedFile) -> bool:
        """Whether the cache has the file, as far as its size and its header tell."""
        pointer, blob = self._paths(file)
        path = pointer if pointer.exists() else blob
        if not path.is_file() or path.stat().st_size != file.size_bytes:
            return False
        if pointer.is_symlink() and pointer.readlink().name != file.digest:
            return False
        return self.repo.holds(Path(os.path.realpath(path))) and self._is_sound(path, file)

    def has_any(self, file: PlannedFile) -> bool:
        """Whether the cache has anything in the file's places, be it wrong."""
        return any(map(os.path.lexists, self._paths(file)))

    def discard(self, file: PlannedFile, on_bytes: Callable[[int], None]) -> str | None:
        """Takes away what is wrong with the file, so that it is fetched or linked again.

        A blob whose content is what its name says stays. So does one in the store that
        repositories share; only the way to it goes. The caller holds the blob's lock.

        Args:
            file: The file.
            on_bytes: Told of every piece that was read.

        Returns:
            The blob's stamp if it stays.
        """
        pointer, blob = self._paths(file)
        pointer.unlink(missing_ok=True)
        stamp = self.prove(file, on_bytes)
        if stamp is None:
            blob.unlink(missing_ok=True)
        return stamp

    def prove(self, file: PlannedFile, on_bytes: Callable[[int], None]) -> str | None:
        """The stamp of the file's blob if its content is right; hashes it."""
        blob = self.blob(file)
        if not blob.is_file():
            return None
        stamp = stamp_of(blob)
        return stamp if digest_of_file(blob, file.digest, on_bytes) == file.digest else None

    def pointer(self, file: PlannedFile) -> Path:
        """Where the snapshot has the file: a link to its blob, where links are supported."""
        return self._folder / file.path

    def blob(self, file: PlannedFile) -> Path:
        """Where the file's content is once it is whole."""
        return self.repo.blobs / file.digest

    def partial(self, file: PlannedFile) -> Path:
        """Where what came of the file is until then."""
        return self.repo.blobs / f"{file.digest}.incomplete"

    def partial_bytes(self, file: PlannedFile) -> int:
        """How much of the file the next download need not fetch; at most its size."""
        return min(_stat(self.partial(file))[1], file.size_bytes)

    def bytes_present(self, file: PlannedFile, *, of_others: bool = False) -> int:
        """How much of the file is on disk.

        Args:
            file: The file.
            of_others: Also look at what downloads of the hub library's have of it now.
        """
        paths = [self.partial(file), *reversed(self._paths(file))]
        if of_others:
            unfinished = self.repo.blobs.glob(f"{file.digest}.*.incomplete")
            paths.extend(sorted(unfinished, key=lambda path: _stat(path)[0], reverse=True))
        for path in paths:
            try:
                return min(path.stat().st_size, file.size_bytes)
            except (FileNotFoundError, NotADirectoryError):
                continue
        return 0

    def _paths(self, file: PlannedFile) -> tuple[Path, Path]:
        return self.pointer(file), self.blob(file)

    def _is_sound(self, path: Path, file: PlannedFile) -> bool:
        try:
            check_file(path, file.path, self.repo.repo_id)
        except SnapshotCorruptError:
            return False
        except ModelUnsupportedError:  # whole or not is for its hash to say
            return True
        return True


def sweep(repo: RepoFolder, *, min_age: float = 0.0) -> int:
    """Deletes unfinished files that no download can go on from; returns their bytes.

    Args:
        repo: The repository.
        min_age: Leave files alone that were written to less than so many seconds ago.
    """
    freed = 0
    # Ours is `<digest>.incomplete`, and a download goes on from it. The hub library puts 8 hex
    # digits in between, new ones each time, so that nobody can.
    for path in sorted(repo.blobs.glob("*.*.incomplete")):
        modified, size = _stat(path)
        digest = digest_of_blob(path.name)
        if digest is None or time.time() - modified < min_age:
            continue
        with try_lock(repo.lock(digest)) as held:
            if held:
                path.unlink(missing_ok=True)
                freed += size
    return freed


def _stat(path: Path) -> tuple[float, int]:
    """When a file was last written to, and its size; of one that is gone, zeros."""
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return 0.0, 0
    return stat.st_mtime, stat.st_size
