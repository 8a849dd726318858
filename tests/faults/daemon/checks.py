"""What holds after every failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from loaderd.client import errors
from tests.faults.daemon.box import Box
from tests.faults.daemon.cases import Outcome


def fails(box: Box, name: str, outcome: Outcome) -> errors.LoaderdError:
    """A download that ends in this outcome, and tells nothing that it must not."""
    with pytest.raises(errors.LoaderdError) as caught:
        box.client.cache.download(name, timeout=60)
    error = caught.value
    assert (error.code, error.reason) == (outcome.code, outcome.reason), error
    assert error.metadata["model"] == name
    assert error.metadata.items() >= outcome.fields.items()
    assert type(error) is errors.BY_REASON[outcome.reason]
    if error.code is errors.HubUnreachableError.code:
        assert error.retry_after
    shown = f"{error} {error.metadata}"
    assert "evil" not in shown
    assert str(box.disk.folder) not in shown
    return error


def nothing_half_done(box: Box, repo_id: str, surroundings: set[Path]) -> None:
    """No part of a repository that never came whole can be taken for a model.

    Args:
        box: The daemon; its hub answers again.
        repo_id: The repository.
        surroundings: What `Disk.surroundings` was before.
    """
    assert box.daemon.download_children() == []
    assert not [s for s in box.client.cache.snapshots() if s.repo_id == repo_id and s.complete]
    assert not box.has(repo_id)
    assert box.disk.refs(repo_id) == {}
    box.disk.check_contents(repo_id)
    assert box.disk.surroundings(repo_id) == surroundings
