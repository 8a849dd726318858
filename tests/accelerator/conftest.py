"""Tests of what only a CUDA device shows; without one they are skipped.

`pytest -m accelerator` runs them alone. They take the device's memory and look at it: nothing else
should use it meanwhile, and they are not for several processes at once.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

_FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if _FOLDER in item.path.parents]
    if not here:
        return
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    for item in here:
        item.add_marker(pytest.mark.accelerator)
        item.add_marker(skip)
