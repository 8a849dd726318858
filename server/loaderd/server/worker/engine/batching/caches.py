"""Where a worker keeps what it found out about models and this box, for workers after it."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """Below the user's folder for caches; None where there is none.

    Args:
        name: Of what is kept there.
    """
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    except RuntimeError:
        return None
    return Path(caches, "loaderd", name)
