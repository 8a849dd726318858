from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from tests.unit.server.box import Box, open_box


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    """A daemon's insides on fake workers, which also listen for HTTP."""
    async with open_box(tmp_path, http=True) as opened:
        yield opened


@pytest.fixture
async def openai(box: Box) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's own client, which tries nothing twice."""
    url = f"{box.url}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
        yield client
