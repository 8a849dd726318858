"""The command `loaderd`: reads the settings, runs the daemon, says why it could not."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loaderd.server.config import ServerConfig

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_ADDRESS = 3

_SERVER_PACKAGES = (
    "accelerate",
    "grpc_reflection",
    "huggingface_hub",
    "jinja2",
    "psutil",
    "pydantic_settings",
    "safetensors",
    "torch",
    "transformers",
)

_TRACING_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc")
_HTTP_PACKAGES = ("prometheus_client", "starlette", "uvicorn")

# By setting, what each of its values is.
_REPEATABLE = {
    "allow_local": "DIR",
    "allow_model": "PATTERN",
    "allow_pickle": "NAME",
    "deny_model": "PATTERN",
    "listen": "ADDRESS",
    "preload": "MODEL",
}
_VALUES = {"http": "HOST:PORT"}
_FILE_ONLY = {"models"}

_EPILOG = """\
Each option can also be set by a variable (--drain-timeout: LOADERD_DRAIN_TIMEOUT) or in the TOML
file that --config or LOADERD_CONFIG names (drain_timeout = 10). A flag wins over a variable, a
variable over the file.

`loaderd config check` says what is wrong with the settings, `loaderd config show` where each comes
from. SIGHUP has them read again. `loaderd token create --help` tells how to make tokens for
clients.

exit codes: 0 stopped by SIGTERM or SIGINT; 1 failed; 2 bad settings or missing packages; 3 the
address is taken or cannot be bound; 128 + n ended at once by a second signal n.
"""


def main() -> None:
    """Entry point of the command `loaderd`."""
    if problem := _missing(_SERVER_PACKAGES, "the daemon", "server"):
        _fail(EXIT_USAGE, problem)
    # gRPC's core would write to standard error what the daemon tells in its own words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from loaderd.server.config import ConfigError, load_config

    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["token"]:
            sys.exit(_token(arguments[1:]))
        if arguments[:1] == ["config"]:
            from loaderd.server.config_command import run

            sys.exit(run(arguments[1:], _add_settings, _lacking))
        flags = vars(_parser().parse_args(arguments))
        config = load_config(flags)
        if problem := _lacking(config):
            _fail(EXIT_USAGE, problem)
        sys.exit(_run(config, lambda: load_config(flags)))
    except ConfigError as error:
        _fail(EXIT_USAGE, str(error))


def _token(arguments: Sequence[str]) -> int:
    from loaderd.server.access.clients import ClientsFileError
    from loaderd.server.access.command import run
    from loaderd.server.config import load_config

    try:
        run(arguments, lambda: load_config({}).clients)
    except ClientsFileError as error:
        _fail(EXIT_FAILED, str(error))
    return EXIT_OK


def _run(config: ServerConfig, reread: Callable[[], ServerConfig]) -> int:
    import asyncio

    from loaderd.server.config import ConfigError
    from loaderd.server.daemon import AddressError, Daemon
    from loaderd.server.logs.lines import log_to
    from loaderd.server.systemd import Systemd

    log_to(sys.stderr, config.log_format, config.log_level)
    try:
        asyncio.run(Daemon(config, reread, Systemd(os.environ)).run())
    except AddressError as error:
        _fail(EXIT_ADDRESS, str(error))
    except ConfigError:
        raise
    except Exception:
        logger.critical("the daemon has failed", exc_info=True)
        return EXIT_FAILED
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loaderd",
        description="The model host of this box: one daemon that owns the Hugging Face cache and "
        "the GPUs, and serves everything else over gRPC.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"loaderd {version('loaderd')}")
    _add_settings(parser)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each setting."""
    from loaderd.server.config import ServerConfig

    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    for name, field in ServerConfig.model_fields.items():
        if name in _FILE_ONLY:
            continue
        flag = "--" + name.replace("_", "-")
        text = (field.description or "").replace("%", "%%")
        if "Default:" not in text and field.default not in (None, False):
            text += f" Default: {field.default}."
        if field.annotation is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif name in _REPEATABLE:
            parser.add_argument(flag, action="append", metavar=_REPEATABLE[name], help=text)
        else:
            metavar = _VALUES.get(name, name.rpartition("_")[2].upper())
            parser.add_argument(flag, metavar=metavar, help=text)


def _lacking(config: ServerConfig) -> str:
    """Which packages settings need that are not installed, or nothing."""
    problem = "" if config.http is None else _missing(_HTTP_PACKAGES, "--http", "http")
    if config.tracing and not problem:
        problem = _missing(_TRACING_PACKAGES, "--tracing", "tracing")
    return problem


def _missing(packages: Sequence[str], whose: str, extra: str) -> str:
    """That packages are not there, or nothing."""
    missing = [name for name in packages if not _is_installed(name)]
    if not missing:
        return ""
    return (
        f"{whose} needs packages that are not installed ({', '.join(missing)}): "
        f"pip install 'loaderd[{extra}]'"
    )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even what it is a part of
        return False


def _fail(code: int, message: str) -> None:
    print(f"loaderd: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
