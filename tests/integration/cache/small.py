"""Repositories that download in no time and are no models."""

from __future__ import annotations

from tests.hub import HubRepo
from tests.unit.store.caches import SMALL_MODEL, safetensors

WEIGHTS_BYTES = 2_000_000


def small_repo(repo_id: str, fill: bytes) -> HubRepo:
    """A repository that downloads, of about `WEIGHTS_BYTES`."""
    repo = HubRepo(repo_id)
    repo.commit({**SMALL_MODEL, "model.safetensors": safetensors(WEIGHTS_BYTES, fill)})
    return repo
