"""The file of named daemons."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loaderd.client.errors import InvalidArgumentError
from loaderd.client.tls import Tls

_TEXTS = {"address", "token", "token_file", "ca", "certificate", "key"}
_FLAGS = {"tls", "insecure"}


@dataclass(frozen=True)
class NamedDaemon:
    """A daemon of the file, a table `[daemons.NAME]`.

    Attributes:
        address: Where it listens.
        token: This client's token, or None.
        tls: How TLS is to be spoken; None for none.
        insecure: Whether the token may go over a network without TLS.
    """

    address: str
    token: str | None = field(repr=False)
    tls: Tls | None
    insecure: bool


def config_file() -> Path:
    """The client's file: `loaderd/client.toml` in `$XDG_CONFIG_HOME`, else in `~/.config`."""
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(folder).expanduser() / "loaderd" / "client.toml"


def named_daemon(name: str) -> NamedDaemon:
    """A daemon by its name.

    Raises:
        InvalidArgumentError: The file does not have it, or what it says of it is wrong.
    """
    path = config_file()
    try:
        daemons = tomllib.loads(path.read_text()).get("daemons", {})
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise _error(f"{name!r} is looked up in {path}, which cannot be read: {problem}") from None
    entry = daemons.get(name) if isinstance(daemons, dict) else None
    if not isinstance(entry, dict):
        raise _error(f"{path} has no table [daemons.{name}]")
    _check(entry, f"{path}: daemons.{name}")
    tls = None
    if entry.get("tls", False) or entry.keys() & {"ca", "certificate", "key"}:
        tls = Tls(*(_path(entry.get(part), path) for part in ("ca", "certificate", "key")))
    return NamedDaemon(entry["address"], _token(entry, path), tls, entry.get("insecure", False))


def _check(entry: dict[str, Any], where: str) -> None:
    for key, value in entry.items():
        if key not in _TEXTS | _FLAGS:
            raise _error(f"{where}.{key}: there is no such setting")
        if not isinstance(value, bool if key in _FLAGS else str):
            kind = "true or false" if key in _FLAGS else "a text"
            raise _error(f"{where}.{key}: must be {kind}")
    if "address" not in entry:
        raise _error(f"{where}: needs an address")
    if {"token", "token_file"} <= entry.keys():
        raise _error(f"{where}: give token or token_file, not both")
    if entry.get("tls") is False and entry.keys() & {"ca", "certificate", "key"}:
        raise _error(f"{where}: has files of TLS, but tls is false")


def _token(entry: dict[str, Any], file: Path) -> str | None:
    path = _path(entry.get("token_file"), file)
    if path is None:
        token: str | None = entry.get("token")
        return token
    return read_token(path)


def read_token(path: Path) -> str:
    """The token in a file.

    Raises:
        InvalidArgumentError: The file cannot be read.
    """
    try:
        return path.read_text().strip()
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidArgumentError.of("token", f"cannot read {path}: {problem}") from None


def _path(text: str | None, file: Path) -> Path | None:
    """A path of the file, which may be relative to the file's folder."""
    return None if text is None else file.parent / Path(text).expanduser()


def _error(problem: str) -> InvalidArgumentError:
    return InvalidArgumentError.of("daemon", problem)
