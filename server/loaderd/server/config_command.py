"""The command `loaderd config`: tells what the settings are, and what is wrong with them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from loaderd.server import from_config
from loaderd.server.config import (
    DEFAULT_PORT,
    ConfigError,
    ServerConfig,
    config_from,
    default_collector,
)
from loaderd.server.setting_sources import Origin, Sources
from loaderd.server.store.cache import default_cache_dir
from loaderd.server.supervisor.offload_folders import default_offload_dir

EXIT_OK = 0
EXIT_BAD = 2

_MASK = "********"

Row = tuple[str, Any, Origin]


def run(
    arguments: Sequence[str],
    add_settings: Callable[[argparse.ArgumentParser], None],
    missing: Callable[[ServerConfig], str],
) -> int:
    """Runs the command.

    Args:
        arguments: What follows `loaderd config`.
        add_settings: Adds the options of the daemon to a parser.
        missing: Says which packages settings need that are not installed; empty: none.

    Returns:
        The exit code.
    """
    given = vars(_parser(add_settings).parse_args(arguments))
    command, as_json = given.pop("command"), given.pop("json", False)
    sources = Sources(given)
    try:
        config = config_from(sources)
        problems = from_config.problems(config) if command == "check" else []
        if command == "check" and (problem := missing(config)):
            problems.append(problem)
        rows = _rows(config, sources) if command == "show" else []
    except ConfigError as error:
        problems = list(error.problems)
    if problems:
        for problem in problems:
            print(f"loaderd: {problem}", file=sys.stderr)
        return EXIT_BAD
    if command == "check":
        print(f"the settings are in order (file: {sources.file or 'none'})")
    elif as_json:
        print(json.dumps({name: _entry(value, origin) for name, value, origin in rows}, indent=2))
    else:
        print("\n".join(_line(*row) for row in rows))
    return EXIT_OK


def _rows(config: ServerConfig, sources: Sources) -> list[Row]:
    """The settings in effect: what is left open stands as what it comes to."""
    values = config.model_dump(mode="json")
    values["listen"] = [str(address) for address in config.listen]
    values["http"] = None if config.http is None else str(config.http)
    values["socket_mode"] = f"{config.socket_mode:04o}"
    values["cache_dir"] = str(config.cache_dir or default_cache_dir())
    values["offload_dir"] = str(config.offload_dir or default_offload_dir())
    values["tracing_endpoint"] = config.tracing_endpoint or default_collector()
    if config.port is None and config.socket is None and not config.listen:
        values["port"] = DEFAULT_PORT
    rows = [(name, value, sources.origin(name)) for name, value in values.items()]
    token, origin = config.hub_token_and_origin()
    return [*rows, ("hub_token", None if token is None else _MASK, origin)]


def _entry(value: object, origin: Origin) -> dict[str, object]:
    return {"value": value, "source": origin.source, "name": origin.name}


def _line(name: str, value: object, origin: Origin) -> str:
    """A line of TOML; a comment where it need not stand in a file, or cannot."""
    if value is None:
        return f"# {name} is not set"
    mark = "# " if origin.source == "default" or name == "hub_token" else ""
    return f"{mark}{name} = {_toml(value)}  # {origin}"


def _toml(value: object) -> str:
    if isinstance(value, dict):
        items = [
            f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items() if each is not None
        ]
        return f"{{ {', '.join(items)} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _parser(add_settings: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loaderd config", description="Tell what the settings are, without starting."
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="say what is wrong with the settings",
        description="Says each problem of the settings, and of the files that they name. Nothing "
        "is started. Exit code 0: none; 2: some.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    show = commands.add_parser(
        "show",
        help="print all settings and where each comes from",
        description="Prints all settings in effect and where each comes from, as a TOML file. "
        "Secrets are masked. Exit code 0; 2: the settings are bad.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    show.add_argument("--json", action="store_true", help="print JSON")
    for command in (check, show):
        add_settings(command)
    return parser
