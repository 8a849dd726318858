"""The status page as a browser shows it, and what happens to it while it is open."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loaderd.server.access.roles import Role
from loaderd.server.models.record import LoadOptions
from tests.unit.server.box import make_model, open_box
from tests.unit.server.http.chromium import Chromium, NoBrowserError, run_chromium
from tests.unit.server.http.gate import open_gate

MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[Chromium]:
    """A browser, where there is one."""
    try:
        async with run_chromium(tmp_path) as chromium:
            yield chromium
    except NoBrowserError as error:
        pytest.skip(str(error))


async def test_an_open_page_follows_what_the_daemon_does(browser: Chromium, tmp_path: Path) -> None:
    async with open_box(tmp_path, http=True) as box:
        page = await browser.open(f"{box.url}/")
        await page.until("server", "0 requests")
        await page.until("devices", "cpu")
        await page.until("disk", "free on the disk")
        assert str(box.folder) not in await page.until("models", "Name", "Streams")
        await page.value("window.neverReloaded = true")

        marked = make_model(tmp_path / MARKUP)
        await box.load()
        await box.load(marked)
        row = f"{box.folder}\tready\t"
        await page.until("models", f"{row}0\t", str(marked))
        stream = box.stream("hang")
        await page.until("models", f"{row}1\t")
        stream.cancel()
        await page.until("models", f"{row}0\t")
        box.launcher.workers[0].kill()
        await page.until("models", f"{box.folder}\tfailed\t")

        # What models are called is text; else it would be an image, whose policy is told.
        assert await page.value("document.images.length") == 0
        assert await page.value("window.neverReloaded")
        assert page.problems == []
    await page.until("problem", "The daemon does not answer")


async def test_a_page_asks_for_a_token_and_shows_what_it_opens(
    browser: Chromium, tmp_path: Path
) -> None:
    async with open_gate(tmp_path) as gate:
        page = await browser.open(f"{gate.box.url}/")
        await page.until("access", "Token")
        assert await page.text("models") == await page.text("devices") == ""

        await page.value("document.getElementById('token').focus()")
        await page.type("loaderd_wrong")
        await page.until("problem", "the token is not one that it knows")
        await page.until("access", "Token")

        await page.value("document.getElementById('token').focus()")
        await page.type(gate.tokens[Role.MONITOR])
        await page.until("devices", "cpu")
        await page.until("models", "Name")
        async for _ in gate.box.loads.load(str(gate.box.folder), LoadOptions()):
            pass
        await page.until("models", f"{gate.box.folder}\tready")
        assert await page.text("access") == await page.text("problem") == ""
        # It is kept nowhere, so a page that is reloaded asks again.
        assert await page.value("document.cookie + localStorage.length") == "0"
        await page.call("Page.reload")
        await page.until("access", "Token")
        assert page.problems == []
