"""`loaderctl`: options, commands, errors."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperGroup

from loaderd.cli import output
from loaderd.cli.commands import cache, deletion, models, run, show, system, top, verification
from loaderd.cli.exits import MEANINGS, ExitCode, exit_code
from loaderd.cli.session import Session
from loaderd.cli.usage import UsageError


class Program(TyperGroup):
    """The group of all commands; it turns every failure into a line and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Runs a command and exits."""
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except Exception as error:
            sys.exit(_report(error))
        if status == ExitCode.INTERRUPTED:
            output.message("interrupted")
        sys.exit(status or ExitCode.OK)


def _report(error: Exception) -> ExitCode:
    """Tells an error in one line.

    Raises:
        Exception: The error itself, if it is a defect of this program.
    """
    from loaderd.client.errors import LoaderdError

    if isinstance(error, LoaderdError):
        output.message(str(error))
        return exit_code(error)
    if isinstance(error, UsageError):
        error = cast("typer.BadParameter", error)
        command = error.ctx.command_path if error.ctx else "loaderctl"
        problem = error.format_message().rstrip(".").replace(": Value error, ", ": ")  # Pydantic's
        output.message(f"{problem} (see `{command} --help`)")
        return ExitCode.USAGE
    raise error


app = typer.Typer(
    name="loaderctl",
    cls=Program,
    help="Ask a loaderd daemon to load models and to generate text.",
    epilog="Exit codes: " + ", ".join(f"{code} {text}" for code, text in MEANINGS.items()) + ".",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (
    models.load,
    models.plan,
    models.unload,
    models.ps,
    show.show,
    models.watch,
    top.top,
    run.run,
    cache.pull,
    cache.ls,
    cache.resolve,
    deletion.rm,
    deletion.prune,
    verification.verify,
    system.info,
    system.health,
    system.devices,
):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        output.result(f"loaderctl {version('loaderd')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def program(
    context: typer.Context,
    *,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            "-a",
            help="The daemon: host:port, or unix:/path of its socket. Default: $LOADERD_ADDRESS, "
            "else the daemon of $LOADERD_DAEMON, else localhost:50051.",
            show_default=False,
        ),
    ] = None,
    daemon: Annotated[
        str | None,
        typer.Option(
            "--daemon",
            "-d",
            metavar="NAME",
            help="A daemon of ~/.config/loaderd/client.toml, in place of an address.",
            show_default=False,
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the token that tells the daemon who calls. Default: $LOADERD_TOKEN, or "
            "as the file has it for the daemon.",
            show_default=False,
        ),
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Speak TLS; needless with one of the next three.")
    ] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What the daemon's certificate must be signed by. Default: the public "
            "authorities.",
            show_default=False,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A certificate of your own, for a daemon that asks for one.",
            show_default=False,
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The private key of --tls-cert.", show_default=False),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Let the token go over a network without TLS."),
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds that each call may take. Default: no limit for load, pull, run, "
            "verify, watch and ps --watch, 60 for the others.",
            show_default=False,
        ),
    ] = None,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Ask a loaderd daemon to load models and to generate text."""
    if context.invoked_subcommand is None:
        output.result(context.get_help())
    context.obj = Session(
        address=address,
        daemon=daemon,
        timeout=timeout,
        token_file=token_file,
        tls=tls,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        insecure=insecure,
    )


def main() -> None:
    """Entry point of the command `loaderctl`."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its core would write lines of its own
    app()
