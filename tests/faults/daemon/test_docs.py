"""docs/faults.md says what the tests show: rows name tests that there are, each case has one."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

from tests.faults.daemon.cases import CASES, Case
from tests.names import names_of_tests

PAGE = Path(__file__).parents[3] / "docs" / "faults.md"


def _rows() -> list[tuple[str, list[str]]]:
    """What was observed, and the names in the last column."""
    lines = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [(cells[3], re.findall("`([^`]+)`", cells[5])) for cells in lines]
    return [row for row in rows if row[1]]


def _cases(name: str) -> dict[str, Case]:
    return {each: case for each, case in CASES.items() if fnmatchcase(each, name)}


def test_every_row_names_tests_that_there_are() -> None:
    for _, names in _rows():
        for name in names:
            assert _cases(name) or name in names_of_tests(), f"{name!r} is no test"


def test_every_row_names_one() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    headings = PAGE.read_text().count("\n## ")
    assert len(rows) - headings == len(_rows())


def test_every_case_of_the_table_has_one_row_which_says_what_it_ends_in() -> None:
    found: list[str] = []
    for observed, names in _rows():
        cases = {key: case for name in names for key, case in _cases(name).items()}
        for key, case in cases.items():
            assert observed.strip() == f"{case.outcome.code.name}, {case.outcome.reason}", key
        found += cases
    assert sorted(found) == sorted(CASES)
