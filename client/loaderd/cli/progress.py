"""Progress of loads and downloads on stderr: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from loaderd.cli import output
from loaderd.cli.units import size, span

if TYPE_CHECKING:
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


def describe(progress: DownloadProgress) -> str:
    """A download's amounts in words: "12.0 MB of 40.0 MB, 25.0 MB/s, 1.1 s left"."""
    parts = [size(progress.downloaded_bytes)]
    if progress.total_bytes is not None:
        parts[0] += f" of {size(progress.total_bytes)}"
    if progress.bytes_per_second:
        parts.append(f"{size(progress.bytes_per_second)}/s")
    if progress.remaining:
        parts.append(f"{span(progress.remaining)} left")
    return ", ".join(parts)


class BarDisplay:
    """A bar for bytes, a spinner for what has none; gone when the work is done."""

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.markup import escape
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        label = TextColumn(f"{escape(name)}: {{task.description}}")
        self._bar = Progress(label, BarColumn(), TextColumn("{task.fields[amounts]}"))
        self._downloading = self._bar.add_task("downloading", total=None, amounts="")
        self._spinner = Progress(SpinnerColumn(), label, TimeElapsedColumn())
        self._working = self._spinner.add_task("waiting", total=None)
        self._live = Live(self._spinner, console=Console(file=sys.stderr), transient=True)

    def load(self, progress: LoadProgress) -> None:
        """Shows how far a load is."""
        if progress.download is not None:
            self.download(progress.download)
        else:
            self._spinner.update(self._working, description=progress.state.name.lower())
            self._live.update(self._spinner, refresh=True)

    def download(self, progress: DownloadProgress) -> None:
        """Shows how far a download is."""
        self._bar.update(
            self._downloading,
            completed=progress.downloaded_bytes,
            total=progress.total_bytes,
            amounts=describe(progress),
        )
        self._live.update(self._bar, refresh=True)

    def __enter__(self) -> Self:
        self._live.start()
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
        self._show(("download", tenth), f"downloading {describe(progress)}")

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
