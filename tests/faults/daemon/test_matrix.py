"""Every fault of a hub ends in its own error, leaves nothing half done, and can be tried again."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from tests.faults.daemon.box import NEEDED, Box, contents
from tests.faults.daemon.cases import CASES, Case
from tests.faults.daemon.checks import fails, nothing_half_done


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_lasting_fault(box: Box, impatient_box: Box, case: Case) -> None:
    box = impatient_box if case.impatient else box
    repo_id = box.publish()
    surroundings = box.disk.surroundings(repo_id)
    asked = len(box.hub.requests)
    box.hub.inject(case.fault, path=case.where)

    fails(box, repo_id, case.outcome)
    met = [each for each in box.hub.requests[asked:] if fnmatchcase(each.path, case.where)]
    assert case.asked in (len(met), None)

    box.hub.heal()
    nothing_half_done(box, repo_id, surroundings)
    kept = box.disk.unfinished(repo_id)
    assert bool(kept) == case.keeps

    asked = len(box.hub.requests)
    snapshot = box.client.cache.download(repo_id)
    assert snapshot.complete
    assert contents(snapshot.path) == NEEDED
    assert box.disk.unfinished(repo_id) == {}
    resumed = [each.range for each in box.hub.requests[asked:] if each.range]
    assert resumed == [f"bytes={size}-" for size in kept.values()]
