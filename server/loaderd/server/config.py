"""The daemon's settings: flag over LOADERD_* variable over TOML file over default."""

from __future__ import annotations

import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from loaderd.server.errors import InvalidNameError
from loaderd.server.store.names import LocalName, parse_name

DEFAULT_PORT = 50051


class ConfigError(Exception):
    """The settings do not make a daemon. Its text names the setting and says what to do."""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _split(value: object) -> object:
    return value.split(os.pathsep) if isinstance(value, str) else value


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


def _default_local_roots() -> tuple[Path, ...]:
    """The folder that the daemon is started in, unless that is everything."""
    folder = Path.cwd()
    return () if folder == Path(folder.root) else (folder,)


def _hub_endpoint(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be an https:// address")
    if parts.username or parts.password:
        raise ValueError("must have no user or password; the token has a setting of its own")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise ValueError("must be https:// unless it is on this box")
    return url.rstrip("/")


def _hub_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


Seconds = Annotated[float, Field(allow_inf_nan=False)]
RepositoryOrFolder = Annotated[str, AfterValidator(_repository_or_folder)]
FilePath = Annotated[Path, AfterValidator(_absolute)]
Folder = Annotated[Path, AfterValidator(_absolute), AfterValidator(_existing_folder)]


def _model_name(text: str) -> str:
    """A name that clients could use; a local folder's path made absolute."""
    text = str(_absolute(Path(text))) if text.startswith((".", "~")) else text
    try:
        parse_name(text)
    except InvalidNameError as error:
        raise ValueError(f"{text!r}: {error.problem}") from None
    return text


ModelName = Annotated[str, AfterValidator(_model_name)]


class DeclaredModel(BaseModel):
    """A model that is to be there always: a table `[[models]]` of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: ModelName
    """`org/name`, `org/name@revision`, or a local folder."""

    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Number type of the weights. Default: the daemon's choice."""

    device_map: str = "auto"
    """Where to put its layers."""

    quantization: Literal["int8", "int4", "nf4"] | None = None
    """Keep weights in 8 or 4 bits. Default: as the files have them."""

    replicas: int | None = None
    """How many processes serve it. Default: 1."""

    keep_alive: Seconds = Field(default=-1, le=366 * 24 * 3600)
    """As the daemon's setting of this name. Default: it stays until somebody unloads it."""


class ServerConfig(BaseSettings):
    """Everything that an operator can set. Immutable; made by `load_config`."""

    model_config = SettingsConfigDict(
        env_prefix="LOADERD_", frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    host: str = "127.0.0.1"
    """Address to listen on. Others than loopback need --insecure."""

    port: int | None = Field(default=None, ge=0, le=65535)
    """TCP port; 0 picks a free one. Default: 50051, or no TCP when --socket is given."""

    socket: FilePath | None = None
    """Unix socket to listen on, for this user only."""

    insecure: bool = False
    """Allow a --host that other machines reach: whoever reaches it may use and unload models."""

    cache_dir: Annotated[FilePath, AfterValidator(_no_file)] | None = None
    """Hugging Face cache. Default: as the hub library: HF_HUB_CACHE, else HF_HOME/hub, else
    ~/.cache/huggingface/hub."""

    cache_max_bytes: ByteSize | None = Field(default=None, gt=0)
    """How large downloads may make the cache, such as 500GB or 2TiB. Before one that does not fit,
    snapshots that were not used for longest and are not in use are deleted. Default: no limit, and
    nothing is deleted unasked."""

    allow_local: Annotated[tuple[Folder, ...], NoDecode, BeforeValidator(_split)] = Field(
        default_factory=_default_local_roots
    )
    """Folder below which local models may be loaded; give it again for more (LOADERD_ALLOW_LOCAL:
    separated by colons). Default: the folder that the daemon is started in, none if that is /."""

    allow_pickle: Annotated[tuple[RepositoryOrFolder, ...], NoDecode, BeforeValidator(_split)] = ()
    """Model whose weights may be pickles when it has no safetensors: org/name, or the absolute path
    of a local folder; give it again for more (LOADERD_ALLOW_PICKLE: separated by colons). A pickle
    can run code when it is not read with care: loaderd takes only tensors from it and refuses the
    rest, but allow only whom you trust. Default: none."""

    hub_endpoint: Annotated[str, AfterValidator(_hub_endpoint)] = Field(
        default_factory=lambda: os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
        validate_default=True,
    )
    """Hub to download from. Default: HF_ENDPOINT, else the public one."""

    hub_token_file: FilePath | None = None
    """File with the hub token. Default: the variable HF_TOKEN, else the file that the hub library's
    login wrote."""

    offline: bool = Field(default_factory=_hub_offline)
    """Never ask the hub. Default: HF_HUB_OFFLINE."""

    standby: int = Field(default=1, ge=0, le=8)
    """Spare worker processes that have imported everything and wait for a load. With 0 each load
    starts its own, which takes seconds."""

    keep_alive: Seconds = Field(default=300, le=366 * 24 * 3600)
    """Seconds that a model stays loaded while nobody uses it, unless a client says otherwise; 0:
    until its first use has ended; negative: until somebody unloads it."""

    preload: Annotated[tuple[ModelName, ...], NoDecode, BeforeValidator(_split)] = ()
    """Model to load at the start and to keep; give it again for more (LOADERD_PRELOAD: separated by
    colons). One that does not load is tried again. Default: none."""

    models: tuple[DeclaredModel, ...] = ()
    """Models to load at the start, before those of --preload; in the file, a table [[models]] each
    with name, dtype, device_map, quantization, replicas and keep_alive. Default: none."""

    load_on_demand: Literal["off", "cached", "any"] = "cached"
    """Which models a request for text loads when they are not: none, those whose files are there,
    or also those that must be downloaded first."""

    max_requests: int = Field(default=256, ge=1, le=100_000)
    """Most generation requests that one replica of a model takes, running and waiting; more are
    refused."""

    max_stream_buffer: int = Field(default=1 << 20, ge=1 << 12)
    """Most bytes that wait for a client that does not read its stream; past that it is cut off."""

    load_timeout: Seconds = Field(default=900, gt=0)
    """Seconds that a worker may take to start and load a model."""

    stall_timeout: Seconds = Field(default=60, gt=0)
    """Seconds that a download may make no progress."""

    hub_attempts: int = Field(default=4, ge=1, le=20)
    """How often to ask the hub in all when it is busy or breaks off."""

    hub_longest_wait: Seconds = Field(default=10, ge=0)
    """Bound in seconds of each wait between them, also of what the hub asks for."""

    heartbeat_timeout: Seconds = Field(default=20, gt=2)
    """Seconds without a sign of life after which a worker is ended."""

    drain_timeout: Seconds = Field(default=30, ge=0)
    """Seconds that running streams get to finish at SIGTERM or SIGINT."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much to log, to standard error."""

    @model_validator(mode="after")
    def _refuse_exposure(self) -> ServerConfig:
        if self.tcp_port is not None and not (self.insecure or _is_loopback(self.host)):
            raise ValueError(
                f"host {self.host} can be reached from other machines, and this daemon has no "
                "access control; listen on 127.0.0.1 or a --socket, or add --insecure"
            )
        return self

    @property
    def tcp_port(self) -> int | None:
        """The port to listen on; None for no TCP."""
        if self.port is None and self.socket is None:
            return DEFAULT_PORT
        return self.port

    def hub_token(self) -> str | None:
        """The operator's hub token, read now.

        Raises:
            ConfigError: The file that the operator named cannot be read.
        """
        if self.hub_token_file is not None:
            try:
                return self.hub_token_file.read_text().strip() or None
            except OSError as error:
                raise ConfigError(f"hub_token_file: {error.strerror}") from error
        if token := os.environ.get("HF_TOKEN", "").strip():
            return token
        home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
        try:
            return Path(os.environ.get("HF_TOKEN_PATH", home / "token")).read_text().strip() or None
        except OSError:
            return None  # nobody logged in: the hub's public part is enough


def load_config(flags: Mapping[str, object]) -> ServerConfig:
    """The settings that the command line, the environment and the file make together.

    Args:
        flags: The settings given on the command line by name; `config` names the TOML file.

    Raises:
        ConfigError: A setting is unknown or invalid, or the file cannot be read.
    """
    given: dict[str, Any] = dict(flags)
    file: str | None = given.pop("config", None) or os.environ.get("LOADERD_CONFIG")

    class Sources(ServerConfig):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the base's signature
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            if file is None:
                return init_settings, env_settings
            path = Path(file)
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, path)

    for name in os.environ:
        setting = name.removeprefix("LOADERD_").lower()
        if name.startswith("LOADERD_") and setting not in _known_variables():
            raise ConfigError(f"{name}: there is no such setting; loaderd --help lists them")
    if file is not None and not Path(file).is_file():
        raise ConfigError(f"config: there is no file {file}")
    try:
        return Sources(**given)
    except ValidationError as error:
        problems = (_describe(item["loc"], item["type"], item["msg"]) for item in error.errors())
        raise ConfigError("; ".join(problems)) from error
    except (SettingsError, tomllib.TOMLDecodeError, OSError) as error:
        raise ConfigError(f"config: {error}") from error


def _known_variables() -> set[str]:
    """The daemon's, and those of its clients, which may be set for the whole box."""
    return {*ServerConfig.model_fields, "config", "address"}


def _describe(location: tuple[int | str, ...], kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        message = "there is no such setting; loaderd --help lists them"
    message = message.removeprefix("Value error, ")
    return f"{'.'.join(map(str, location))}: {message}" if location else message
