import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaderd.server.models.lifecycle import (
    TRANSITIONS,
    ChangeReason,
    Lifecycle,
    ModelState,
    TransitionError,
)


def test_every_state_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(ModelState)
    assert {end for ends in TRANSITIONS.values() for end in ends} <= set(ModelState)


def test_the_docs_explain_every_state_and_every_reason() -> None:
    docs = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    section = docs.partition("## States of a model\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([A-Z_]+) \|", section, re.MULTILINE)
    assert rows == [member.name for kind in (ModelState, ChangeReason) for member in kind]


def test_a_load_passes_through_every_step() -> None:
    ticks = iter(range(100))
    life = Lifecycle(lambda: float(next(ticks)))
    for state in (ModelState.DOWNLOADING, ModelState.LOADING, ModelState.READY):
        life.to(state)
    assert life.between(ModelState.RESOLVING, ModelState.DOWNLOADING) == 1
    assert life.between(ModelState.DOWNLOADING, ModelState.LOADING) == 1
    assert life.between(ModelState.RESOLVING, ModelState.READY) == 3
    assert life.between(ModelState.READY, ModelState.UNLOADING) is None


@given(st.lists(st.sampled_from(ModelState), max_size=12))
def test_only_the_table_moves_a_model_and_the_end_is_the_end(path: list[ModelState]) -> None:
    life = Lifecycle(lambda: 0.0)
    for state in path:
        before = life.state
        if state in TRANSITIONS[before]:
            assert life.to(state) is before
            assert life.state is state
        else:
            with pytest.raises(TransitionError):
                life.to(state)
            assert life.state is before
        assert (life.state is ModelState.UNLOADED) == (not TRANSITIONS[life.state])


def test_every_state_but_the_last_can_end() -> None:
    for state in set(ModelState) - {ModelState.UNLOADED}:
        reachable, frontier = {state}, {state}
        while frontier:
            frontier = {end for start in frontier for end in TRANSITIONS[start]} - reachable
            reachable |= frontier
        assert ModelState.UNLOADED in reachable
