"""The hub: what a name is there, and how its files come into the cache.

With the `hub_*` modules that it uses the only code that talks to the hub. It blocks; the daemon
runs it in a child process (`hub_child.py`) that it can kill. Nothing is written before the hub's
listing has been checked, all requests run under `hub_guard`, each file is hashed as it comes, and
the revision's ref moves only when the whole snapshot is there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import count
from pathlib import Path

from loaderd.server.errors import HubUnreachableError, ModelUnsupportedError
from loaderd.server.store.blobs import SnapshotFiles
from loaderd.server.store.cache import RepoFolder, TreeEntry
from loaderd.server.store.digests import digest_of_file
from loaderd.server.store.hub_access import HubAccess, domain_errors
from loaderd.server.store.hub_download import Download, OnProgress
from loaderd.server.store.hub_guard import Exchange, guard
from loaderd.server.store.hub_listing import fetch_file, list_files
from loaderd.server.store.names import HubName
from loaderd.server.store.plan import Downloaded, DownloadPlan, PlannedFile
from loaderd.server.store.selection import CONFIG, find_weights, is_gguf, is_index, left_out, select
from loaderd.server.store.weights import read_shards

# A listing has 1000 files a page; the largest repositories have some ten thousands.
MAX_ANSWERS = 200

MAX_SKIPPED = 1000
"""How many of the files that are left out a plan names."""


def plan(
    name: HubName,
    cache_dir: Path,
    access: HubAccess,
    on_response: Callable[[], None] = lambda: None,
    *,
    allow_pickle: bool = False,
    also: Collection[str] = (),
) -> DownloadPlan:
    """Asks the hub what a download would fetch. Writes nothing.

    Args:
        name: The repository and revision.
        cache_dir: The Hugging Face cache.
        access: The hub.
        on_response: Called whenever the hub has answered.
        allow_pickle: The operator allows weights in pickles for this repository.
        also: Files to fetch too, as far as the repository has them, although loading needs none.

    Raises:
        ModelNotFoundError, RevisionNotFoundError, ModelGatedError: The hub says so.
        HubUnauthorizedError: The hub does not say why it denies.
        ModelUnsupportedError: The repository has no weights that can be loaded.
        HubUnreachableError, HubRateLimitedError: The hub does not answer.
        SnapshotCorruptError: The hub's answer names things that no hub names.
        CacheNotWritableError: The cache cannot even be read.
    """
    model = name.repo_id
    repo = RepoFolder(cache_dir, model)
    exchange = Exchange(access.endpoint, model, on_response=_bounded(on_response, model))
    with domain_errors(name), guard(exchange):
        commit, tree = list_files(name, access)
        if CONFIG not in tree and not any(map(is_gguf, tree)):  # those have it inside
            raise ModelUnsupportedError(model, f"its repository has no {CONFIG}")
        weights = find_weights(tree, model, allow_pickle=allow_pickle)
        shards: Collection[str] = ()
        if is_index(weights):
            shards = read_shards(
                _index(repo, commit, weights, tree[weights], access), weights, model
            )
        needed = select(tree, {weights, *shards})
        if not tree.keys() >= set(needed):
            problem = f"its {weights} names a file that its repository lacks"
            raise ModelUnsupportedError(model, problem)
        files = SnapshotFiles(repo, commit)
        wanted = sorted({*needed, *tree.keys() & set(also)})
        planned = tuple(_planned(path, tree[path], files) for path in wanted)
    skipped = left_out(tree, set(wanted))
    return DownloadPlan(
        model,
        name.revision,
        commit,
        planned,
        skipped[:MAX_SKIPPED],
        skipped_count=len(skipped),
        skipped_bytes=sum(file.size_bytes for file in skipped),
        tree=tree,
    )


def download(
    plan: DownloadPlan,
    cache_dir: Path,
    access: HubAccess,
    on_progress: OnProgress = lambda _: None,
    *,
    on_moved: Callable[[], None] = lambda: None,
    distrusted: Collection[str] = (),
) -> Downloaded:
    """Brings a plan's files into the cache.

    What the cache has already stays if its size and header are right; what is damaged is
    fetched again. After a failure what came stays too, and the next download goes on from it.

    Args:
        plan: From `plan`, for the same cache.
        cache_dir: The Hugging Face cache.
        access: The hub.
        on_progress: Called in this thread when a figure changed, about ten times a second.
        on_moved: The same, when something moved: the hub answered, bytes came or were hashed,
            a wait began.
        distrusted: Paths whose content is bad although size and header are right.

    Raises:
        DiskFullError: The disk cannot hold it, or could not in the end; then what came is gone.
        CacheNotWritableError: The cache cannot be written to.
        SnapshotCorruptError: A file came with other content than the hub's listing says.
        SnapshotIncompleteError: The hub listed a file and does not have it.
        ModelGatedError, HubUnauthorizedError, HubUnreachableError, HubRateLimitedError: As for
            `plan`.
    """
    with domain_errors(HubName(plan.repo_id, plan.revision)):
        return Download(plan, cache_dir, access, distrusted).run(on_progress, on_moved)


def _bounded(on_response: Callable[[], None], model: str) -> Callable[[], None]:
    """Ends a listing whose every page leads to another."""
    answers = count(1)

    def bounded() -> None:
        if next(answers) > MAX_ANSWERS:
            raise HubUnreachableError(model)
        on_response()

    return bounded


def _index(repo: RepoFolder, commit: str, path: str, entry: TreeEntry, access: HubAccess) -> bytes:
    blob = repo.blobs / entry.digest
    if blob.is_file() and digest_of_file(blob, entry.digest) == entry.digest:
        return blob.read_bytes()
    return fetch_file(repo.repo_id, commit, path, entry, access)


def _planned(path: str, entry: TreeEntry, files: SnapshotFiles) -> PlannedFile:
    file = PlannedFile(path, entry.size, entry.digest, cached=False)
    if files.is_whole(file):
        return replace(file, cached=True)
    return replace(file, partial_bytes=files.partial_bytes(file))
