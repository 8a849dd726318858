"""The log's lines, for people and for programs, and those of children."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from loaderd.server.logs.call import bind
from loaderd.server.logs.children import ChildLog
from loaderd.server.logs.lines import log_to
from tests.waiting import until_in_loop

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


class Log:
    """All that is logged meanwhile."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    def to(self, line_format: Literal["text", "json"], level: str = "info") -> None:
        log_to(self.stream, line_format, level)

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def log() -> Iterator[Log]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers.clear()  # log_to would close them
    yield Log()
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(capture=False)


async def test_a_line_for_programs_has_all_that_is_known(log: Log) -> None:
    log.to("json")
    bind(request_id="r-1", client="ann")
    logging.getLogger("loaderd.x").warning("it is\n%s", "so", extra={"model": "org/name"})

    (line,) = log.lines
    time = line.pop("time")
    assert re.fullmatch(TIME, time)
    assert line == {
        "level": "warning",
        "logger": "loaderd.x",
        "message": "it is\nso",
        "request_id": "r-1",
        "client": "ann",
        "model": "org/name",
    }


async def test_a_line_for_people_quotes_what_could_pass_for_something_else(log: Log) -> None:
    log.to("text")
    bind(request_id="x client=root", client="")
    logging.getLogger("loaderd.x").info("hello", extra={"model": "a\x1b[31m\nb", "duration": 0.5})

    _, _, rest = log.text.partition("Z ")
    assert rest == (
        'INFO loaderd.x: hello [request_id="x client=root" model="a\\u001b[31m\\nb" duration=0.5]\n'
    )


@pytest.mark.parametrize("line_format", ["text", "json"])
def test_a_traceback_is_told(log: Log, line_format: Literal["text", "json"]) -> None:
    log.to(line_format)
    try:
        raise ZeroDivisionError("why")
    except ZeroDivisionError:
        logging.getLogger("loaderd.x").exception("failed")

    told = log.lines[0]["exception"] if line_format == "json" else log.text
    assert "Traceback" in told
    assert "ZeroDivisionError: why" in told


def test_less_than_the_level_is_not_told(log: Log) -> None:
    log.to("json", "error")
    logging.getLogger("loaderd.x").warning("no")
    logging.getLogger("loaderd.x").error("yes")
    assert [line["message"] for line in log.lines] == ["yes"]


CHILD = """
import logging, sys
from loaderd.server.logs.children import log_to_daemon
log_to_daemon()
logging.getLogger("loaderd.x").warning("told\\nwell", extra={"request_id": "r-1"})
logging.getLogger("loaderd.x").debug("too much")
sys.stderr.buffer.write(b"a library's \\xff line\\n\\n[]\\n{\\"logger\\": 3}\\n")
sys.stderr.buffer.write(b"x" * 200_000 + b"\\nunfinished")
"""


async def test_what_a_child_writes_comes_out_of_the_daemons_log(log: Log) -> None:
    log.to("json")
    bind(request_id="of the call that starts it")
    child_log = ChildLog(worker=7)
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CHILD), stderr=child_log.stderr
    )
    child_log.begun()
    child_log.fields["model"] = "org/name"
    assert await child.wait() == 0
    await until_in_loop(lambda: '"unfinished"' in log.text)

    first, *others = log.lines
    assert (first["logger"], first["level"], first["message"]) == (
        "loaderd.x",
        "warning",
        "told\nwell",
    )
    assert first["request_id"] == "r-1"
    assert all((line["worker"], line["model"]) == (7, "org/name") for line in log.lines)
    assert all("request_id" not in line for line in others)
    texts = [line["message"] for line in others]
    assert texts[:3] == ["a library's \\xff line", "[]", '{"logger": 3}']
    assert "".join(texts[3:-1]) == "x" * 200_000
    assert texts[-1] == "unfinished"
