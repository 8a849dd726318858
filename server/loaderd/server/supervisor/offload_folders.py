"""Where weights go that a model has on the disk and that cannot be read from its own files."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from loaderd.server.errors import CacheNotWritableError
from loaderd.server.supervisor.runtime_folder import OwnedFolder, sweep


class OffloadFolders:
    """A folder for each model that needs one, removed with the model, or with the daemon.

    Args:
        base: Where they are. It is made when the first model needs one.
    """

    def __init__(self, base: Path) -> None:
        self._base = base
        self._stack = ExitStack()
        self._owned: OwnedFolder | None = None

    def make(self, model_id: str) -> Path:
        """An empty folder for a model.

        Raises:
            CacheNotWritableError: It cannot be made.
        """
        folder = self._of(model_id)
        try:
            folder.mkdir()
        except OSError as error:
            raise CacheNotWritableError(problem=f"offload_dir: {error.strerror}") from error
        return folder

    def remove(self, model_id: str) -> None:
        """Removes a model's folder; nothing happens when it has none."""
        if self._owned is not None:
            shutil.rmtree(self._of(model_id), ignore_errors=True)

    def _of(self, model_id: str) -> Path:
        if self._owned is None:
            try:
                self._base.mkdir(parents=True, exist_ok=True)
                self._owned = self._stack.enter_context(OwnedFolder(self._base))
            except OSError as error:
                raise CacheNotWritableError(problem=f"offload_dir: {error.strerror}") from error
        return self._owned.path / model_id.replace(":", "-")

    def __enter__(self) -> Self:
        sweep(self._base)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


def default_offload_dir() -> Path:
    """Below the user's folder for caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(caches, "loaderd", "offload")
