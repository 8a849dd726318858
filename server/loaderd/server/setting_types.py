"""Kinds of values that settings have, beyond those of Pydantic."""

from __future__ import annotations

import grp
import os
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode

from loaderd.server.addresses import Address, TcpAddress, is_loopback, parse_address
from loaderd.server.errors import InvalidNameError
from loaderd.server.store.names import LocalName, parse_name


def _split_at_colons(value: object) -> object:
    return value.split(os.pathsep) if isinstance(value, str) else value


def _split_at_commas(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


def _address(value: object) -> object:
    return parse_address(value) if isinstance(value, str) else value


def _host_port(value: object) -> object:
    try:
        address = _address(value)
    except ValueError:
        address = None
    if not isinstance(address, TcpAddress):
        raise ValueError(f"{value!r} is no address: use host:port or [ipv6]:port")
    return address


def _mode(value: object) -> object:
    """A file's mode as chmod takes it."""
    if not isinstance(value, str):
        return value
    if re.fullmatch("0?[0-7]{3}", value) is None:
        raise ValueError(f"{value!r} is no mode such as 0660")
    return int(value, 8)


def _group(name: str) -> str:
    if not name.isdecimal():
        try:
            grp.getgrnam(name)
        except KeyError:
            raise ValueError(f"there is no group {name!r}") from None
    return name


def _pattern(text: str) -> str:
    if re.fullmatch(r"[\w.*?/-]+", text, re.ASCII) is None or text.startswith((".", "/")):
        raise ValueError(
            f"{text!r} is no pattern of repositories such as org/name or org/*; local folders are "
            "allowed with --allow-local"
        )
    return text


def _pattern_or_folder(text: str) -> str:
    """A pattern of repositories as it is, a folder's path as its real one."""
    if text.startswith(("/", "~", ".")):
        return os.path.realpath(Path(text).expanduser())
    return _pattern(text)


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _repository_or_folder(text: str) -> str:
    """A repository's id as it is, a folder's path as its real one."""
    try:
        name = parse_name(text)
    except InvalidNameError as error:
        raise ValueError(f"{text!r}: {error.problem}") from None
    if isinstance(name, LocalName):
        return os.path.realpath(name.path)
    if "@" in text:
        raise ValueError(f"{text!r} holds a revision; allow the repository, {name.repo_id}")
    return name.repo_id


def _existing_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    return path.resolve()


def _no_file(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    return path


def _hub_endpoint(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be an https:// address")
    if parts.username or parts.password:
        raise ValueError("must have no user or password; the token has a setting of its own")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ValueError("must be https:// unless it is on this box")
    return url.rstrip("/")


def _collector_endpoint(url: str) -> str:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    is_whole = parts.scheme in {"http", "https"} and parts.hostname and port
    if not is_whole or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError("must be http:// or https://, a host and a port, and nothing else")
    if parts.username or parts.password:
        raise ValueError("must have no user or password; OTEL_EXPORTER_OTLP_HEADERS has secrets")
    return url.rstrip("/")


def _model_name(text: str) -> str:
    """A name that clients could use; a local folder's path made absolute."""
    text = str(_absolute(Path(text))) if text.startswith((".", "~")) else text
    try:
        parse_name(text)
    except InvalidNameError as error:
        raise ValueError(f"{text!r}: {error.problem}") from None
    return text


def _file_or_output(path: Path) -> Path:
    """A path made absolute; `-`, which is standard output, as it is."""
    return path if path == Path("-") else _absolute(path)


Seconds = Annotated[float, Field(allow_inf_nan=False)]
ModelName = Annotated[str, AfterValidator(_model_name)]
Mode = Annotated[int, BeforeValidator(_mode), Field(ge=0, le=0o777)]
Group = Annotated[str, AfterValidator(_group)]
Endpoint = Annotated[str, AfterValidator(_hub_endpoint)]
CollectorEndpoint = Annotated[str, AfterValidator(_collector_endpoint)]
HostPort = Annotated[TcpAddress, BeforeValidator(_host_port)]
FilePath = Annotated[Path, AfterValidator(_absolute)]
AuditFile = Annotated[Path, AfterValidator(_file_or_output)]
FolderPath = Annotated[FilePath, AfterValidator(_no_file)]

_Folder = Annotated[FilePath, AfterValidator(_existing_folder)]
_RepositoryOrFolder = Annotated[str, AfterValidator(_repository_or_folder)]
_Pattern = Annotated[str, AfterValidator(_pattern)]
_PatternOrFolder = Annotated[str, AfterValidator(_pattern_or_folder)]
_Address = Annotated[Address, BeforeValidator(_address)]

# Several of a kind. In a variable they are separated by colons, as paths are; addresses by commas.
ModelNames = Annotated[tuple[ModelName, ...], NoDecode, BeforeValidator(_split_at_colons)]
Folders = Annotated[tuple[_Folder, ...], NoDecode, BeforeValidator(_split_at_colons)]
RepositoriesOrFolders = Annotated[
    tuple[_RepositoryOrFolder, ...], NoDecode, BeforeValidator(_split_at_colons)
]
Patterns = Annotated[tuple[_Pattern, ...], NoDecode, BeforeValidator(_split_at_colons)]
PatternsOrFolders = Annotated[
    tuple[_PatternOrFolder, ...], NoDecode, BeforeValidator(_split_at_colons)
]
Addresses = Annotated[tuple[_Address, ...], NoDecode, BeforeValidator(_split_at_commas)]
