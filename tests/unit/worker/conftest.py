"""Models for the worker's tests."""

import os
from pathlib import Path

import pytest

# As in a worker: tests share the processors with much else.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

REAL_MODEL = Path(".cache/models/SmolLM2-135M-Instruct").absolute()


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder of SmolLM2-135M-Instruct."""
    assert REAL_MODEL.is_dir(), "there is no demo model: run `make model`"
    return REAL_MODEL
