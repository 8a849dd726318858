"""Progress of loads and downloads on stderr: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from loaderd.cli import output
from loaderd.cli.units import size, span

if TYPE_CHECKING:
    from rich.progress import Progress

    from loaderd.client import DownloadProgress, LoadProgress


class ProgressDisplay(Protocol):
    """Shows progress while its context is entered."""

    def load(self, progress: LoadProgress) -> None:
        """Shows how far a load is."""

    def download(self, progress: DownloadProgress) -> None:
        """Shows how far a download is."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def progress_display(name: str) -> ProgressDisplay:
    """The display for work on the model `name` that suits stderr."""
    return BarDisplay(name) if sys.stderr.isatty() else LineDisplay(name)


class DownloadMeter:
    """A download's amounts in words: "12.0 MB of 40.0 MB, 25.0 MB/s, 1.1 s left".

    The rate of the first moment says little: the time left is told from the first second, or the
    first hundredth of the bytes, on.
    """

    def __init__(self) -> None:
        self._begun: float | None = None
        self._bytes_before = 0

    def read(self, progress: DownloadProgress) -> str:
        """The words for the latest progress."""
        if self._begun is None:
            self._begun, self._bytes_before = time.monotonic(), progress.downloaded_bytes
        parts = [size(progress.downloaded_bytes)]
        if progress.total_bytes is not None:
            parts[0] += f" of {size(progress.total_bytes)}"
        if progress.bytes_per_second:
            parts.append(f"{size(progress.bytes_per_second)}/s")
        if progress.remaining and self._is_meaningful(progress, time.monotonic() - self._begun):
            parts.append(f"{span(progress.remaining)} left")
        return ", ".join(parts)

    def _is_meaningful(self, progress: DownloadProgress, seconds: float) -> bool:
        came = progress.downloaded_bytes - self._bytes_before
        return seconds >= 1 or came * 100 >= (progress.total_bytes or 0)


class BarDisplay:
    """A bar for bytes, a spinner for what has none; gone when the work is done.

    The name has a line of its own, which is cut where the terminal is too narrow for it.
    """

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._name = name
        self._meter = DownloadMeter()
        self._bar = Progress(BarColumn(), TextColumn("{task.fields[amounts]}"))
        self._downloading = self._bar.add_task("", total=None, amounts="")
        self._spinner = Progress(SpinnerColumn(), TimeElapsedColumn())
        self._spinner.add_task("", total=None)
        self._live = Live(console=Console(file=sys.stderr), transient=True)

    def load(self, progress: LoadProgress) -> None:
        """Shows how far a load is."""
        if progress.download is not None:
            self.download(progress.download)
        else:
            self._show(progress.state.name.lower(), self._spinner)

    def download(self, progress: DownloadProgress) -> None:
        """Shows how far a download is."""
        self._bar.update(
            self._downloading,
            completed=progress.downloaded_bytes,
            total=progress.total_bytes,
            amounts=self._meter.read(progress),
        )
        self._show("downloading", self._bar)

    def _show(self, activity: str, progress: Progress) -> None:
        from rich.console import Group
        from rich.text import Text

        heading = Text(f"{activity} {self._name}", no_wrap=True, overflow="ellipsis")
        self._live.update(Group(heading, progress), refresh=True)

    def __enter__(self) -> Self:
        self._live.start()
        self._show("waiting for", self._spinner)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()


class LineDisplay:
    """A line for each new state, and for each tenth of a download."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._meter = DownloadMeter()
        self._shown: object = None

    def load(self, progress: LoadProgress) -> None:
        """Shows how far a load is."""
        if progress.download is not None:
            self.download(progress.download)
        else:
            self._show(progress.state, progress.state.name.lower())

    def download(self, progress: DownloadProgress) -> None:
        """Shows how far a download is."""
        fraction = progress.fraction
        tenth = None if fraction is None else int(fraction * 10)
        self._show(("download", tenth), f"downloading {self._meter.read(progress)}")

    def _show(self, what: object, text: str) -> None:
        if what != self._shown:
            self._shown = what
            output.message(f"{self._name}: {text}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass
