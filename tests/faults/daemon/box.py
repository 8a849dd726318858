"""A daemon, the hub that it asks, and what both are seen to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from loaderd.client import Client, Snapshot, errors
from tests.daemon import SpawnedDaemon
from tests.faults.daemon.disk import Disk
from tests.hub import Access, Hub, HubRepo, HubRequest
from tests.hub.repo import Content
from tests.unit.store.caches import SMALL_MODEL, safetensors

WEIGHTS = "model.safetensors"
WEIGHTS_BYTES = 3_000_000

ATTEMPTS = 2
"""How often these daemons ask a hub that is busy."""

QUICK = ("--standby", "0", "--hub-attempts", str(ATTEMPTS), "--hub-longest-wait", "0.1")
TOKEN = "hf_of_the_daemon"

NEEDED: dict[str, bytes] = {**SMALL_MODEL, WEIGHTS: safetensors(WEIGHTS_BYTES, b"\x5a")}
MODEL: dict[str, bytes] = {**NEEDED, "README.md": b"not needed", "pytorch_model.bin": b"a pickle"}

_numbers = count()


@dataclass(frozen=True)
class Box:
    """One daemon with a hub, a client and a disk.

    Attributes:
        offline: A client of another daemon on the same cache that never asks the hub, if any.
    """

    hub: Hub
    daemon: SpawnedDaemon
    client: Client
    disk: Disk
    offline: Client | None = None

    @staticmethod
    @contextmanager
    def running(
        folder: Path,
        hub: Hub,
        arguments: Sequence[str] = QUICK,
        *,
        wrapper: Sequence[str] = (),
    ) -> Iterator[Box]:
        """A box whose daemon and everything that it writes are below `folder`.

        Args:
            folder: Where everything is.
            hub: The hub.
            arguments: The daemon's command line.
            wrapper: See `SpawnedDaemon`.
        """
        temporary = folder / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "TMPDIR": str(temporary)}
        with (
            SpawnedDaemon(folder, arguments, variables, wrapper) as daemon,
            Client(daemon.address) as client,
        ):
            yield Box(hub, daemon, client, Disk(folder, daemon.cache_dir))

    def has(self, repo_id: str) -> bool:
        """Whether a daemon takes what the cache has of a repository for a model."""
        not_whole = (
            errors.OfflineNotCachedError,
            errors.SnapshotIncompleteError,
            errors.SnapshotCorruptError,
        )
        try:
            # The one that is offline says so at once, the other one plans a download.
            found = (self.offline or self.client).cache.resolve(repo_id)
        except not_whole:
            return False
        return isinstance(found, Snapshot)

    def publish(
        self,
        files: Mapping[str, Content] = MODEL,
        *,
        access: Access = Access.PUBLIC,
        token: str | None = None,
    ) -> str:
        """Adds a repository to the hub that no other test has; returns its id."""
        repo = HubRepo(f"org/model-{next(_numbers)}", access=access, token=token)
        repo.commit(files)
        self.hub.add(repo)
        return repo.id

    def fetches(self, repo_id: str, file: str = "") -> list[HubRequest]:
        """The requests for the content of a repository's files, or of one of them."""
        return [
            request
            for request in self.hub.requests
            if request.method == "GET"
            and request.path.startswith(f"/{repo_id}/resolve/")
            and request.path.endswith(file)
        ]


def contents(snapshot: str) -> dict[str, bytes]:
    """The files of a snapshot's folder by their path in it."""
    folder = Path(snapshot)
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
