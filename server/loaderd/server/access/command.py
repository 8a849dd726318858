"""The command `loaderd token`: makes tokens for clients."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from loaderd.server.access.clients import NAME, ClientsFileError, parse_clients, read_clients
from loaderd.server.access.tokens import digest, new_token

_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def create_token(path: Path, name: str, role: str, lifetime: timedelta | None) -> str:
    """Makes a token, and adds its hash to the file of clients, which is made if there is none.

    Args:
        path: The file.
        name: The client's name.
        role: Its role.
        lifetime: How long the token is valid; None: until it is taken out of the file.

    Returns:
        The token, which is kept nowhere.

    Raises:
        ClientsFileError: The file cannot be read or written, or the name or role is wrong.
    """
    token = new_token()
    expires = None if lifetime is None else (datetime.now(UTC) + lifetime).replace(microsecond=0)
    entry = {"name": name, "role": role, "token_sha256": digest(token)}
    lines = ["", "[[clients]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
    if expires is not None:
        lines.append(f"expires = {expires.isoformat()}")
    addition = "\n".join(lines) + "\n"
    try:
        if path.exists():
            read_clients(path)
            parse_clients(path.read_text() + addition, path)
        else:
            parse_clients(addition, path)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
            file.write(addition)
    except OSError as error:
        raise ClientsFileError(f"cannot write to {path}: {error.strerror}") from error
    return token


def run(arguments: Sequence[str], setting: Callable[[], Path | None]) -> None:
    """Runs the command.

    Args:
        arguments: What follows `loaderd token`.
        setting: Tells the file of clients that the daemon's settings name.

    Raises:
        ClientsFileError: See `create_token`; or nothing names the file.
    """
    given = _parser().parse_args(arguments)
    path = given.clients or setting()
    if path is None:
        raise ClientsFileError("name the file of clients with --clients or LOADERD_CLIENTS")
    token = create_token(path, given.name, given.role, given.expires)
    print(f"the token of {given.name}, which is shown only now:", file=sys.stderr)
    print(token)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loaderd token", description="Make tokens for clients.")
    create = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "create",
        help="make a token, print it, and add its hash to the file of clients",
        description="Makes a token and prints it, this once. The file of clients gets its hash; a "
        "daemon that runs knows it from then on.",
    )
    create.add_argument(
        "name",
        type=_name,
        metavar="NAME",
        help="the client's name: 1 to 64 letters, digits, '.', '_', '@' and '-'",
    )
    create.add_argument(
        "--role", required=True, choices=("admin", "user", "monitor"), help="what it may do"
    )
    create.add_argument(
        "--expires",
        type=_lifetime,
        metavar="SPAN",
        help="how long it is valid, such as 12h, 90d or 4w; default: until it is taken out of the "
        "file",
    )
    create.add_argument(
        "--clients",
        type=lambda text: Path(text).expanduser().absolute(),
        metavar="FILE",
        help="the file of clients; default: that of LOADERD_CLIENTS, or of the file that "
        "LOADERD_CONFIG names",
    )
    return parser


def _name(text: str) -> str:
    if re.fullmatch(NAME, text) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not 1 to 64 letters, digits, '.', '_', '@' and '-'"
        )
    return text


def _lifetime(text: str) -> timedelta:
    match = re.fullmatch(r"([1-9]\d{0,4})([hdw])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no span such as 12h, 90d or 4w")
    return int(match[1]) * _UNITS[match[2]]
