from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.server.box import Box, open_box


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    """Models stay until they are unloaded, and are loaded only when that is asked for."""
    async with open_box(tmp_path) as opened:
        yield opened
