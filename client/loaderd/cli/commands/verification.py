"""The command verify."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from loaderd.cli import options, output
from loaderd.cli.exits import ExitCode
from loaderd.cli.progress import progress_display
from loaderd.cli.session import session_of
from loaderd.cli.units import count, size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loaderd.cli.progress import ProgressDisplay
    from loaderd.client import FileProblem, VerifyReport, VerifyUpdate


def verify(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="org/name (its branch main) or org/name@revision.",
            show_default=False,
        ),
    ],
    repair: Annotated[
        bool, typer.Option("--repair", help="Fetch the files that are bad again, and those only.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Read every file of cached models and compare its content with its hash.

    The exit code is 9 when bad files remain, and 0 when there are none, or all were repaired.
    """
    session = session_of(context)
    reports = []
    with session.connect() as client:
        for model in models:
            found: list[FileProblem] = []
            try:
                with progress_display(model) as display:
                    report = client.cache.verify(
                        model,
                        repair=repair,
                        on_progress=partial(_look, display, found),
                        timeout=session.timeout,
                    )
            except Exception:
                if not json:  # what was found is worth telling although the repair failed
                    _show_problems(model, found)
                raise
            reports.append(report)
            if not json:
                _show(model, report)
    if json:
        output.json_result([{"ok": report.ok, **output.plain(report)} for report in reports])
    if not all(report.ok for report in reports):
        raise typer.Exit(ExitCode.DATA_LOSS)


def _look(display: ProgressDisplay, found: list[FileProblem], update: VerifyUpdate) -> None:
    from loaderd.client import FileProblem

    if isinstance(update, FileProblem):
        found.append(update)
    display.verify(update)


def _show_problems(model: str, problems: Iterable[FileProblem]) -> None:
    for problem in problems:
        output.result(f"{model}: {_problem(problem)}")


def _show(model: str, report: VerifyReport) -> None:
    _show_problems(model, report.problems)
    for path in report.unverifiable_files:
        output.result(f"{model}: {path} has no known hash; it was not checked")
    sound = f"{count(report.verified_files, 'file')}, {size(report.verified_bytes)}"
    bad = count(len(report.problems), "bad file")
    if not report.problems:
        output.result(f"{model} is sound: {sound}")
    elif report.repaired:
        output.result(f"{model} is sound again: {bad} repaired")
    else:
        output.result(
            f"{model} has {bad}; `loaderctl verify --repair {model}` fetches what is bad again"
        )


def _problem(problem: FileProblem) -> str:
    kind = problem.kind.name.lower()
    return f"{problem.path}: {kind}, expected {problem.expected}, found {problem.found}"
