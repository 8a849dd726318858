"""What an operator sets for the store."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from loaderd.server.store.hub_access import RetryPolicy
from loaderd.server.store.policy import ModelPolicy


@dataclass(frozen=True)
class StoreSettings:
    """What the store works with.

    Attributes:
        cache_dir: The Hugging Face cache; made when something is downloaded.
        local_roots: The folders below which local models may be.
        hub_endpoint: The hub.
        hub_token: The hub token; None asks without one.
        offline: Never ask the hub.
        stall_timeout: Seconds that a download may make no progress.
        retry: How often to ask a hub that is busy.
        max_bytes: How large downloads may make the cache; None: as large as its disk allows.
        allow_pickle: Repository ids, and real paths of local folders, whose weights may be pickles.
        policy: Which models may be used.
    """

    cache_dir: Path
    local_roots: tuple[Path, ...] = ()
    hub_endpoint: str = "https://huggingface.co"
    hub_token: str | None = field(default=None, repr=False)
    offline: bool = False
    stall_timeout: float = 60.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    max_bytes: int | None = None
    allow_pickle: frozenset[str] = frozenset()
    policy: ModelPolicy = field(default_factory=ModelPolicy)
