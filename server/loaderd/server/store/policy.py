"""Which models the operator allows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from loaderd.server.errors import ModelNotAllowedError, ModelTooLargeError
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.names import HubName, LocalName


@dataclass(frozen=True)
class ModelPolicy:
    """The operator's rules. They are asked before the hub is.

    Attributes:
        allow: Patterns of repositories, such as `org/*`; empty: all.
        deny: Patterns of repositories, and real paths of folders with all that is below them;
            they win over `allow`. Repositories match in whatever case, for hubs take any.
        max_bytes: How large a model may be: the files that loading it needs; None: any.
    """

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    max_bytes: int | None = None

    def check(self, name: HubName | LocalName, cache_dir: Path) -> None:
        """Refuses a model by its name.

        Args:
            name: The model. Symbolic links of a path are followed.
            cache_dir: The Hugging Face cache, whose folders are those of its repositories.

        Raises:
            ModelNotAllowedError: It is not to be loaded.
        """
        if isinstance(name, HubName):
            repo_ids = [name.repo_id]
        else:
            path = Path(os.path.realpath(name.path))
            if any(path.is_relative_to(entry) for entry in self.deny if entry.startswith("/")):
                raise ModelNotAllowedError(str(name))
            repo = RepoFolder.holding(path, cache_dir)
            repo_ids = [] if repo is None else [repo.repo_id]
        if not all(map(self._allows, repo_ids)):
            raise ModelNotAllowedError(str(name))

    def check_size(self, model: str, size_bytes: int) -> None:
        """Refuses a model by its size.

        Raises:
            ModelTooLargeError: It is larger than allowed.
        """
        if self.max_bytes is not None and size_bytes > self.max_bytes:
            raise ModelTooLargeError(model, size_bytes, self.max_bytes)

    def _allows(self, repo_id: str) -> bool:
        folded = repo_id.lower()
        if any(fnmatchcase(folded, pattern.lower()) for pattern in self.deny):
            return False
        return not self.allow or any(fnmatchcase(repo_id, pattern) for pattern in self.allow)
