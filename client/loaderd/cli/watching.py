"""Changes of models' states as they come: lines, objects, or a table that changes in its place."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from loaderd.cli import output
from loaderd.cli.units import age, size
from loaderd.cli.words import change, devices, name

if TYPE_CHECKING:
    from rich.console import RenderableType

    from loaderd.client import ModelEvent, ModelInfo, ModelList, WatchUpdate

_COLUMNS = ("NAME", "ID", "STATE", "SINCE", "DTYPE", "DEVICE", "WEIGHTS", "ENGINE")
_LATEST = 8
"""Changes that stand below the table."""


class WatchDisplay(Protocol):
    """Shows what a watch brings."""

    def begin(self, models: ModelList) -> None:
        """Shows the models that are there when it begins."""

    def event(self, event: ModelEvent) -> None:
        """Shows a change."""

    def entered(self) -> AbstractContextManager[object]:
        """What to be in while it shows."""


def follow(updates: Iterable[WatchUpdate], display: WatchDisplay) -> None:
    """Shows a watch until it ends."""
    from loaderd.client import ModelList

    with display.entered():
        for update in updates:
            if isinstance(update, ModelList):
                display.begin(update)
            else:
                display.event(update)


class Lines:
    """A line for each model that is there, and for each change."""

    def begin(self, models: ModelList) -> None:
        """Prints a line for each."""
        for model in models:
            output.result(f"{model.name} ({model.id}): {name(model.state)}")

    def event(self, event: ModelEvent) -> None:
        """Prints a line."""
        output.result(_line(event))

    def entered(self) -> AbstractContextManager[object]:
        """Nothing."""
        return nullcontext()


class Objects:
    """A JSON object in a line for the list, and for each change."""

    def begin(self, models: ModelList) -> None:
        """Prints a line."""
        output.json_line({"type": "list", **output.plain(models)})

    def event(self, event: ModelEvent) -> None:
        """Prints a line."""
        output.json_line({"type": "event", **output.plain(event)})

    def entered(self) -> AbstractContextManager[object]:
        """Nothing."""
        return nullcontext()


class LiveTable:
    """The models as they are, and the latest changes, on a terminal."""

    def __init__(self) -> None:
        from rich.live import Live

        self._models: dict[str, tuple[ModelInfo, datetime | None]] = {}
        self._nothing = ""
        self._latest: deque[str] = deque(maxlen=_LATEST)
        self._live = Live(
            console=output.console(), get_renderable=self._render, refresh_per_second=1
        )

    def begin(self, models: ModelList) -> None:
        """Shows them."""
        self._models = {model.id: (model, model.ready_at) for model in models}
        self._nothing = "no models are loaded"
        self._live.refresh()

    def event(self, event: ModelEvent) -> None:
        """Changes the model's row."""
        model = event.model
        # Another thread draws: it goes on with the old ones.
        self._models = self._models | {model.id: (model, event.time)}
        if name(model.state) == "unloaded":
            self._models = {key: row for key, row in self._models.items() if key != model.id}
        self._latest.append(_line(event))
        self._live.refresh()

    def entered(self) -> AbstractContextManager[object]:
        """The terminal, as long as it is drawn on."""
        return self._live

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        rows = [_row(model, since) for model, since in self._models.values()]
        lines = [Text(line, no_wrap=True, overflow="ellipsis") for line in list(self._latest)]
        table = output.grid(_COLUMNS, rows) if rows else Text(self._nothing)
        return Group(table, Text(), *lines)


def _line(event: ModelEvent) -> str:
    return f"{event.time.astimezone():%H:%M:%S} {change(event)}"


def _row(model: ModelInfo, since: datetime | None) -> tuple[str, ...]:
    details = model.details
    return (
        model.name,
        model.id,
        name(model.state),
        age(since),
        name(details.dtype) if details else "-",
        devices(model) if details else "-",
        size(details.weight_bytes) if details else "-",
        details.engine if details else "-",
    )
