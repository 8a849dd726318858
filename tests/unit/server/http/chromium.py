"""A headless Chromium, driven through the pipe of its DevTools protocol."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

INSTALLED = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_S = 60
_LONGEST_MESSAGE = 1 << 24
_FONTS = "<fontconfig><dir>{fonts}</dir><cachedir>{cache}</cachedir></fontconfig>"
# The protocol's pipes are descriptors 3 and 4.
_WITH_PIPES = 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null'


class NoBrowserError(Exception):
    """There is none, or it does not run here."""


class Tab:
    """A page that is shown.

    Attributes:
        problems: What its script threw, and what its policy forbade.
    """

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser = browser
        self._session = session
        self.problems = browser.problems[session] = []

    async def call(self, method: str, **parameters: Any) -> Any:
        """Calls a method of the protocol."""
        return await self._browser.call(method, self._session, **parameters)

    async def value(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        told = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def text(self, element: str) -> str:
        """The text of the element with an id; empty while it is hidden."""
        found = f"document.getElementById('{element}')"
        return str(await self.value(f"{found}?.checkVisibility() ? {found}.innerText : ''"))

    async def until(self, element: str, *parts: str) -> str:
        """Waits until an element shows all of some texts; its text then."""
        shown = ""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    shown = await self.text(element)
                    if all(part in shown for part in parts):
                        return shown
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"#{element} shows {shown!r}, not {parts}") from None

    async def type(self, text: str) -> None:
        """Types into what has the focus, and presses Enter."""
        await self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key="Enter", text="\r")


class Chromium:
    """A browser that runs."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.problems: dict[str, list[str]] = {}

    async def open(self, url: str) -> Tab:
        """Opens a page in a tab of its own."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        tab = Tab(self, attached["sessionId"])
        for domain in ("Runtime", "Log", "Page"):
            await tab.call(f"{domain}.enable")
        await tab.call("Page.navigate", url=url)
        return tab

    async def call(self, method: str, session: str = "", **parameters: Any) -> Any:
        """Calls a method of the protocol; its result."""
        number = len(self._asked)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        self._asked[number] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        self._process.stdin.write(
            json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        )
        async with asyncio.timeout(PATIENCE_S):
            answer = await self._asked[number]
        assert "error" not in answer, (method, answer)
        return answer["result"]

    async def listen(self) -> None:
        """Takes answers and events until the browser ends."""
        assert self._process.stdout is not None
        try:
            while True:
                raw = await self._process.stdout.readuntil(b"\0")
                message = json.loads(raw[:-1])
                if "id" in message:
                    self._asked[message["id"]].set_result(message)
                else:
                    self._note(message)
        except asyncio.IncompleteReadError:
            for future in self._asked.values():
                if not future.done():
                    future.set_exception(NoBrowserError("it ended"))

    def _note(self, event: dict[str, Any]) -> None:
        told = self.problems.get(event.get("sessionId", ""))
        if told is None:
            return
        if event["method"] == "Runtime.exceptionThrown":
            told.append(str(event["params"]["exceptionDetails"]))
        elif event["method"] == "Log.entryAdded":
            entry = event["params"]["entry"]
            if entry["source"] in {"javascript", "security"}:
                told.append(entry["text"])


@asynccontextmanager
async def run_chromium(folder: Path) -> AsyncIterator[Chromium]:
    """A browser: the one that `make browser` fetched, else one that is installed.

    Args:
        folder: For its profile.

    Raises:
        NoBrowserError: There is none, or it does not run here.
    """
    binary = _find()
    process = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        _WITH_PIPES,
        str(binary),
        "--headless",
        "--no-sandbox",  # root has none; it sees the test's own pages only
        "--disable-gpu",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder / 'profile'}",
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        limit=_LONGEST_MESSAGE,
        env=os.environ | _surroundings(binary, folder),
    )
    assert process.stderr is not None
    log = asyncio.create_task(process.stderr.read())
    browser = Chromium(process)
    listening = asyncio.create_task(browser.listen())
    try:
        try:
            await browser.call("Browser.getVersion")
        except (NoBrowserError, ConnectionError):
            said = (await log).decode(errors="replace").strip().splitlines()
            raise NoBrowserError(f"{binary} does not run here: {said[-1:]}") from None
        yield browser
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await asyncio.gather(listening, log)
        shutil.rmtree(folder / "profile", ignore_errors=True)


def _find() -> Path:
    """The browser's program."""
    fetched = sorted(Path(".cache").glob("chromium-*/chromium"))
    if fetched:
        return fetched[-1].absolute()
    for name in INSTALLED:
        if found := shutil.which(name):
            return Path(found)
    raise NoBrowserError(
        "there is no Chromium: `make browser` fetches one where npm is installed on Linux with an "
        f"x86-64 processor; elsewhere install one as {' or '.join(INSTALLED)}"
    )


def _surroundings(binary: Path, folder: Path) -> dict[str, str]:
    """What the one that was fetched needs: its own libraries and, as boxes may have none, fonts."""
    if not (binary.parent / "fonts.conf").exists():
        return {}
    config = folder / "fonts.conf"
    config.write_text(_FONTS.format(fonts=binary.parent / "fonts", cache=folder / "fonts"))
    return {"LD_LIBRARY_PATH": str(binary.parent / "lib"), "FONTCONFIG_FILE": str(config)}
