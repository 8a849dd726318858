"""The file that says who the clients are."""

from __future__ import annotations

import hmac
import logging
import stat
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from loaderd.server.access.caller import Caller, Limits
from loaderd.server.access.roles import Role
from loaderd.server.access.tokens import digest
from loaderd.server.errors import UnauthenticatedError

logger = logging.getLogger(__name__)

_Positive = Annotated[int, Field(ge=1)]

NAME = r"[0-9A-Za-z][0-9A-Za-z._@-]{0,63}"
"""What a client's name matches. No colon: the address of a connection, which stands for who has no
name, has one."""


class ClientsFileError(Exception):
    """The file does not say who the clients are. Its text says what is wrong with it."""


class LimitsEntry(BaseModel):
    """A table of limits; see `Limits`."""

    model_config = ConfigDict(extra="forbid")

    streams: _Positive | None = None
    requests: _Positive | None = None
    tokens_per_minute: _Positive | None = None
    models: _Positive | None = None


class ClientEntry(BaseModel):
    """One way in which a client may show who it is: a table `[[clients]]`.

    A client may have several, such as an old token and a new one.
    """

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=rf"^{NAME}$")]
    role: Literal["admin", "user", "monitor"]
    token_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    certificate: Annotated[str, Field(min_length=1)] | None = None
    expires: AwareDatetime | None = None
    limits: LimitsEntry = LimitsEntry()

    @model_validator(mode="after")
    def _one_credential(self) -> ClientEntry:
        if (self.token_sha256 is None) == (self.certificate is None):
            raise ValueError("give either token_sha256 or certificate")
        return self


class Clients(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid")

    limits: LimitsEntry = LimitsEntry()
    clients: tuple[ClientEntry, ...] = ()

    def caller(self, entry: ClientEntry) -> Caller:
        """The client of an entry; its limits are its own, and where it has none those of all."""
        own = entry.limits.model_dump(exclude_none=True)
        limits = Limits(**{**asdict(Limits()), **self.limits.model_dump(), **own})
        return Caller(entry.name, Role(entry.role), limits)


class ClientsFile:
    """Knows clients by their tokens and certificates.

    The file is read again when it has changed, so that what is taken out of it ends with the next
    call. One that cannot be read then changes nothing: the log says so.

    Args:
        path: The file.
        clock: Tells the time, for what expires.

    Attributes:
        on_reload: Told when the file was read again: how that went, and who is in it.

    Raises:
        ClientsFileError: It cannot be read now.
    """

    def __init__(
        self, path: Path, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._path = path
        self._clock = clock
        self.on_reload: Callable[[Mapping[str, object]], None] = lambda _: None
        self._stamp = self._stamped()
        self._clients = read_clients(path)

    def of_token(self, token: str) -> Caller:
        """The client of a token.

        Raises:
            UnauthenticatedError: There is none, or the token has expired.
        """
        clients, shown = self._current(), digest(token)
        # All are compared, each in the same time: how long it takes tells nothing of any.
        found = [
            entry
            for entry in clients.clients
            if hmac.compare_digest(entry.token_sha256 or "", shown)
        ]
        if not found:
            raise UnauthenticatedError("the token is not one that it knows")
        return self._caller(clients, found, "the token has expired")

    def of_certificate(self, names: Collection[str]) -> Caller | None:
        """The client of a certificate, which TLS has verified; None if there is none.

        Args:
            names: Its alternative names, or its common name where it has none of those.

        Raises:
            UnauthenticatedError: Its entry has expired.
        """
        clients = self._current()
        found = [entry for entry in clients.clients if entry.certificate in names]
        if not found:
            return None
        return self._caller(clients, found, "the time of the certificate's client is over")

    def _caller(self, clients: Clients, found: list[ClientEntry], problem: str) -> Caller:
        now = self._clock()
        for entry in found:
            if entry.expires is None or now < entry.expires:
                return clients.caller(entry)
        raise UnauthenticatedError(problem)

    def _current(self) -> Clients:
        try:
            stamp = self._stamped()
            if stamp != self._stamp:
                self._stamp = stamp  # a file that is wrong is told of once
                self._clients = read_clients(self._path)
                logger.info("read %s again: %d clients", self._path, len(self._clients.clients))
                self._tell("OK", clients=sorted({each.name for each in self._clients.clients}))
        except ClientsFileError as error:
            logger.error("%s; those stay clients who were", error)
            self._tell("FAILED_PRECONDITION", problem=str(error))
        return self._clients

    def _tell(self, code: str, **fields: object) -> None:
        entry = {"action": "ReloadClients", "client": "", "file": str(self._path), "code": code}
        self.on_reload(entry | fields)

    def _stamped(self) -> tuple[int, int, int] | None:
        """What changes when the file does; None if there is none."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


def read_clients(path: Path) -> Clients:
    """Reads the file.

    Raises:
        ClientsFileError: It cannot be read, is wrong, or others may write to it.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ClientsFileError(
            f"cannot read {path}: {problem}; `loaderd token create` makes such a file"
        ) from error
    if mode & stat.S_IWOTH:
        raise ClientsFileError(f"everybody may write to {path}: chmod o-w it")
    return parse_clients(text, path)


def parse_clients(text: str, path: Path) -> Clients:
    """What the file's text says.

    Raises:
        ClientsFileError: It is wrong.
    """
    try:
        return Clients.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ClientsFileError(f"{path}: {error}") from error
    except ValidationError as error:
        # Without the values: a secret may have come into the wrong field.
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_input=False)
        )
        raise ClientsFileError(f"{path}: {problems}") from None
