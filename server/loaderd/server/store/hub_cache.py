"""What the hub library does in the cache besides the files: locks, links, a tag.

All of it is the library's own code, so that its processes and ours understand each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_POLL_SECONDS = 0.2


@contextmanager
def blob_lock(path: Path, check: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of a blob; waits while another process, or thread, holds it.

    Args:
        path: The lock file.
        check: Called now and then while waiting; what it raises ends that.
    """
    from filelock import Timeout
    from huggingface_hub.utils._fixes import WeakFileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            check()
            try:
                stack.enter_context(WeakFileLock(path, timeout=_POLL_SECONDS))
            except Timeout:
                continue
            break
        yield


def link(pointer: Path, blob: Path, *, new: bool) -> None:
    """Puts a blob into a snapshot.

    Args:
        pointer: The file in the snapshot; if there is one already it stays.
        blob: The blob.
        new: Whether nobody else can use it yet: where links are not supported it is moved, else
            copied.
    """
    from huggingface_hub.file_download import _create_symlink

    if pointer.exists():
        return
    pointer.parent.mkdir(parents=True, exist_ok=True)
    _create_symlink(str(blob), str(pointer), new_blob=new)


def tag(cache_dir: Path) -> None:
    """Tells backup programs that this is a cache."""
    from huggingface_hub._local_folder import _create_cachedir_tag

    _create_cachedir_tag(cache_dir)
