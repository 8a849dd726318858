from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from tests.unit.server.box import Box, make_model
from tests.unit.server.http.browser import fetch

MARKUP = "<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.links += [given[name] for name in ("src", "href", "action") if name in given]
        self.ids |= {given["id"]} if "id" in given else set()
        self.inline += [name for name in given if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in given):
            self.inline.append(tag)


async def test_the_page_needs_nothing_but_its_own_files(box: Box) -> None:
    reply = await fetch(box.url, "/")
    assert reply.headers["content-type"].startswith("text/html")
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    page = Page(reply.text)
    assert sorted(page.links) == ["/status.css", "/status.js"]
    assert page.inline == []  # the policy would not have it
    for link in page.links:
        assert (await fetch(box.url, link)).status == 200


async def test_the_script_fits_the_page_and_what_it_asks_for(box: Box) -> None:
    await box.load()
    page = Page((await fetch(box.url, "/")).text)
    script = (await fetch(box.url, "/status.js")).text
    assert set(re.findall(r'\$\("(\w+)"\)', script)) <= page.ids
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", script)
    views = re.findall(r'^  \["(\w+)", \d+, ', script, re.MULTILINE)
    assert views == ["server", "models", "devices", "cache"]
    told = {view: json.loads((await fetch(box.url, f"/status/{view}")).body) for view in views}
    assert told["server"]["version"]
    assert told["server"]["clients"] >= 2  # the test over gRPC, and its connections over HTTP
    assert told["models"]["models"][0]["name"] == str(box.folder)
    assert told["devices"]["devices"][0]["id"] == "cpu"
    assert int(told["cache"]["free_bytes"]) > 0


async def test_what_is_told_is_never_taken_for_markup(box: Box, tmp_path: Path) -> None:
    await box.load(make_model(tmp_path / MARKUP))
    reply = await fetch(box.url, "/status/models")
    assert MARKUP in json.loads(reply.body)["models"][0]["name"]
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-content-type-options"] == "nosniff"
