"""What the hub says of a name: its commit, the files there, which of them hold the weights.

Every name, size and hash in the answers is checked before anything is made of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from loaderd.server.errors import HubUnreachableError, ModelUnsupportedError, SnapshotCorruptError
from loaderd.server.store.cache import TreeEntry
from loaderd.server.store.digests import digest_of_bytes, is_digest
from loaderd.server.store.hub_access import HubAccess
from loaderd.server.store.hub_guard import MAX_ANSWER_BYTES, HubBusyError
from loaderd.server.store.names import HubName, is_commit

if TYPE_CHECKING:
    import httpx2

MAX_FILES = 100_000

# Backslashes, control characters and halves of characters.
_NO_PATH = re.compile(r"[\\\x00-\x1f\x7f\ud800-\udfff]")
_LONGEST_PART = 255  # bytes, as file systems have it
_LONGEST_PATH = 1024
_MOST_BYTES = 1 << 63

_log = logging.getLogger(__name__)


def list_files(name: HubName, access: HubAccess) -> tuple[str, dict[str, TreeEntry]]:
    """The commit that a name is now, and its files by their path.

    Raises:
        SnapshotCorruptError: The answer holds names, sizes or hashes that no hub gives.
        ModelUnsupportedError: The repository has too many files.
        HubUnreachableError: The answer is no hub's.
        HubBusyError, httpx2.HTTPError: What the library raises.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        commit = name.commit or _ask_commit(name, access)
        files = islice(_ask_tree(name.repo_id, commit, access), MAX_FILES + 1)
        tree = dict(_checked(file, name.repo_id) for file in files)
    except HfHubHTTPError:  # some of them are ValueErrors too
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _log.warning("%s answers what no hub answers: %r", access.endpoint, error)
        raise HubUnreachableError(str(name)) from error
    if len(tree) > MAX_FILES:
        raise ModelUnsupportedError(name.repo_id, f"it has more than {MAX_FILES} files")
    if sum(entry.size for entry in tree.values()) >= _MOST_BYTES:
        raise SnapshotCorruptError(name.repo_id, "(listing)", "sizes of files", "larger ones")
    return commit, tree


def fetch_file(repo_id: str, commit: str, path: str, entry: TreeEntry, access: HubAccess) -> bytes:
    """A small file's content, which is not kept.

    Raises:
        SnapshotCorruptError: It is not what the listing says.
        HubBusyError, httpx2.HTTPError: What the library raises.
    """
    import httpx2
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    if entry.size > MAX_ANSWER_BYTES:
        raise SnapshotCorruptError(
            repo_id, path, f"at most {MAX_ANSWER_BYTES} bytes", f"{entry.size} bytes"
        )
    url = hf_hub_url(repo_id, path, revision=commit, endpoint=access.endpoint)
    headers = build_hf_headers(token=access.library_token)

    def fetch() -> bytes:
        data = bytearray()
        with get_session().stream("GET", url, headers=headers) as response:
            hf_raise_for_status(response)
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > entry.size:
                    break
        return bytes(data)

    data = access.retry.call(fetch, on=(HubBusyError, httpx2.TransportError))
    if digest_of_bytes(data, entry.digest) != entry.digest:
        raise SnapshotCorruptError(repo_id, path, entry.digest, "another content")
    return data


def _ask_commit(name: HubName, access: HubAccess) -> str:
    revision = quote(name.revision, safe="")
    answer = _get(f"{access.endpoint}/api/models/{name.repo_id}/revision/{revision}", access)
    commit = answer.json().get("sha")
    if not (isinstance(commit, str) and is_commit(commit)):
        raise SnapshotCorruptError(
            name.repo_id, f"refs/{name.revision}", "a commit of 40 hex digits", "something else"
        )
    return commit


def _ask_tree(repo_id: str, commit: str, access: HubAccess) -> Iterator[dict[str, Any]]:
    """A commit's files, page by page."""
    tree = f"{access.endpoint}/api/models/{repo_id}/tree/{commit}"
    url: str | None = f"{tree}?recursive=true&expand=false"
    while url is not None:
        page = _get(url, access)
        yield from (entry for entry in page.json() if entry["type"] == "file")
        url = page.links.get("next", {}).get("url")


def _get(url: str, access: HubAccess) -> httpx2.Response:
    """An answer of the hub's API. The library's own functions ask as often as they like."""
    import httpx2
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    headers = build_hf_headers(token=access.library_token)
    ask = partial(get_session().get, url, headers=headers)
    answer = access.retry.call(ask, on=(HubBusyError, httpx2.TransportError))
    hf_raise_for_status(answer)
    return answer


def _checked(file: Mapping[str, Any], model: str) -> tuple[str, TreeEntry]:
    """Checks what the hub says of a file before anything is named after it."""
    path, blob_id, lfs = file["path"], file["oid"], file.get("lfs")
    size, sha256 = (file["size"], None) if lfs is None else (lfs["size"], lfs["oid"])
    if not _is_inside(path):
        raise SnapshotCorruptError(
            model, "(listing)", "paths inside the repository", "another path"
        )
    if not isinstance(size, int) or size < 0:
        raise SnapshotCorruptError(model, path, "a size in the listing", "none")
    if not is_digest(blob_id) or not (sha256 is None or is_digest(sha256)):
        raise SnapshotCorruptError(model, path, "a hash in the listing", "none")
    return path, TreeEntry(size, blob_id, sha256)


def _is_inside(path: str) -> bool:
    """Whether a path is one of a repository's, and short enough for a disk."""
    if _NO_PATH.search(path) or len(path.encode()) > _LONGEST_PATH:
        return False
    parts = path.split("/")
    return all(
        0 < len(part.encode()) <= _LONGEST_PART and part not in {".", ".."} for part in parts
    )
