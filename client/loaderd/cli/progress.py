"""Progress of loads, downloads and verifications on stderr: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from loaderd.cli import output
from loaderd.cli.meter import Meter, done_bytes
from loaderd.cli.units import size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from loaderd.cli.meter import ByteProgress
    from loaderd.client import DownloadProgress, FileProgress, LoadProgress, VerifyUpdate


class ProgressDisplay(Protocol):
    """Shows progress while its context is entered."""

    def load(self, progress: LoadProgress) -> None:
        """Shows how far a load is."""

    def download(self, progress: DownloadProgress) -> None:
        """Shows how far a download is."""

    def verify(self, update: VerifyUpdate) -> None:
        """Shows how far a verification, or its repair, is; its report tells the problems."""

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


class BarDisplay:
    """A bar for bytes, a spinner for what has none; gone when the work is done.

    The name, and each file that is being fetched, has a line of its own, which is cut where the
    terminal is too narrow for it.
    """

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._name = name
        self._activity = ""
        self._meter = Meter()
        self._bar = Progress(BarColumn(), TextColumn("{task.fields[amounts]}"))
        self._task = self._bar.add_task("", total=None, amounts="")
        self._spinner = Progress(SpinnerColumn(), TimeElapsedColumn())
        self._spinner.add_task("", total=None)
        self._live = Live(console=Console(file=sys.stderr), transient=True)

    def load(self, progress: LoadProgress) -> None:
        """Shows how far a load is."""
        if progress.download is not None:
            self.download(progress.download)
        elif progress.verification is not None:
            self.verify(progress.verification)
        else:
            self._show(progress.state.name.lower(), self._spinner)

    def download(self, progress: DownloadProgress) -> None:
        """Shows how far a download is."""
        self._show_bytes("downloading", progress, *map(_file_line, progress.files))

    def verify(self, update: VerifyUpdate) -> None:
        """Shows how far a verification, or its repair, is."""
        from loaderd.client import DownloadProgress, VerifyProgress

        match update:
            case VerifyProgress():
                self._show_bytes("verifying", update)
            case DownloadProgress():
                self._show_bytes("repairing", update, *map(_file_line, update.files))

    def _show_bytes(self, activity: str, progress: ByteProgress, *lines: Text) -> None:
        if activity != self._activity:
            self._meter = Meter()
        self._bar.update(
            self._task,
            completed=done_bytes(progress),
            total=progress.total_bytes,
            amounts=self._meter.read(progress),
        )
        self._show(activity, self._bar, *lines)

    def _show(self, activity: str, *parts: RenderableType) -> None:
        from rich.console import Group

        self._activity = activity
        self._live.update(Group(_line(f"{activity} {self._name}"), *parts), refresh=True)

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
    """A line for each new state, and for each tenth of a download or a verification."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._activity = ""
        self._meter = Meter()
        self._shown: object = None

    def load(self, progress: LoadProgress) -> None:
        """Shows how far a load is."""
        if progress.download is not None:
            self.download(progress.download)
        elif progress.verification is not None:
            self.verify(progress.verification)
        else:
            self._show(progress.state, progress.state.name.lower())

    def download(self, progress: DownloadProgress) -> None:
        """Shows how far a download is."""
        self._show_bytes("downloading", progress)

    def verify(self, update: VerifyUpdate) -> None:
        """Shows how far a verification, or its repair, is."""
        from loaderd.client import DownloadProgress, VerifyProgress

        match update:
            case VerifyProgress():
                self._show_bytes("verifying", update)
            case DownloadProgress():
                self._show_bytes("repairing", update)

    def _show_bytes(self, activity: str, progress: ByteProgress) -> None:
        if activity != self._activity:
            self._activity, self._meter = activity, Meter()
        fraction = progress.fraction
        tenth = None if fraction is None else int(fraction * 10)
        self._show((activity, tenth), f"{activity} {self._meter.read(progress)}")

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


def _file_line(file: FileProgress) -> Text:
    """How far one file is; the path comes last, where it may be cut."""
    part = file.downloaded_bytes / file.size_bytes if file.size_bytes else 1.0
    amount = f"{size(file.downloaded_bytes)} of {size(file.size_bytes)}"
    return _line(f"{part:>5.0%}  {amount}  {file.path}")


def _line(text: str) -> Text:
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ellipsis")
