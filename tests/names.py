"""The names of all tests, for pages of the documentation that name some."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

_TESTS = Path(__file__).parent


@cache
def names_of_tests() -> frozenset[str]:
    """The functions that are tests, of all files."""
    return frozenset(
        node.name
        for path in _TESTS.rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if node.name.startswith("test_")
    )
