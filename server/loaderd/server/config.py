"""The daemon's settings: flag over LOADERD_* variable over TOML file over default."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from loaderd.server.addresses import Address, TcpAddress, UnixAddress
from loaderd.server.setting_sources import PREFIX, Origin, Sources
from loaderd.server.setting_types import (
    Addresses,
    AuditFile,
    CollectorEndpoint,
    Endpoint,
    FilePath,
    FolderPath,
    Folders,
    Group,
    HostPort,
    Mode,
    ModelName,
    ModelNames,
    Patterns,
    PatternsOrFolders,
    RepositoriesOrFolders,
    Seconds,
)

DEFAULT_PORT = 50051


class ConfigError(Exception):
    """The settings do not make a daemon.

    Attributes:
        problems: One or more texts; each names the setting and says what to do.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def _default_local_roots() -> tuple[Path, ...]:
    """The folder that the daemon is started in, unless that is everything."""
    folder = Path.cwd()
    return () if folder == Path(folder.root) else (folder,)


def _hub_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def default_collector() -> str:
    """Where traces go unless a setting says it, as OpenTelemetry's SDK has it."""
    variables = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    given = (os.environ.get(name) for name in variables)
    return next(filter(None, given), "http://localhost:4317")


class DeclaredModel(BaseModel):
    """A model that is to be there always: a table `[[models]]` of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: ModelName
    """`org/name`, `org/name@revision`, or a local folder."""

    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Number type of the weights. Default: the daemon's choice."""

    device_map: str | dict[str, str] = "auto"
    """Where to put its layers: as a whole, or a device for each module."""

    max_memory: dict[str, ByteSize] = Field(default_factory=dict)
    """Most memory of a device that it may take, such as {"cuda:0" = "10GiB"}. Default: no bound."""

    offload: Literal["cpu", "disk"] | None = None
    """Where what does not fit may go. Default: nowhere."""

    quantization: Literal["int8", "int4", "nf4"] | None = None
    """Keep weights in 8 or 4 bits. Default: as the files have them."""

    replicas: int | None = None
    """How many processes serve it. Default: 1."""

    keep_alive: Seconds = Field(default=-1, le=366 * 24 * 3600)
    """As the daemon's setting of this name. Default: it stays until somebody unloads it."""


class ServerConfig(BaseSettings):
    """Everything that an operator can set. Immutable; made by `load_config`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    host: str = "127.0.0.1"
    """Host of --port. Others than loopback need TLS and clients that are known, or --insecure."""

    port: int | None = Field(default=None, ge=0, le=65535)
    """TCP port; 0 picks a free one. Default: 50051, or no TCP when --socket or --listen is
    given."""

    socket: FilePath | None = None
    """Unix socket to listen on; who may open it is a matter of --socket-mode."""

    listen: Addresses = ()
    """Address to listen on, beside those of --port and --socket: host:port or unix:/path; give it
    again for more (LOADERD_LISTEN: separated by commas). Default: none."""

    socket_mode: Mode = 0o600
    """Who may open the unix sockets, such as 0660 for their group as well. Default: 0600, this user
    only."""

    socket_group: Group | None = None
    """Group of the unix sockets. Default: this user's."""

    socket_role: Literal["admin", "user", "monitor"] = "admin"
    """What those may do who come over a unix socket and show no token."""

    tls_cert: FilePath | None = None
    """Certificate of the daemon, with its chain, as PEM; every TCP address then speaks TLS. It and
    the other two files are read again when they change. Default: none, no TLS."""

    tls_key: FilePath | None = None
    """Private key of --tls-cert, as PEM, without a password."""

    tls_client_ca: FilePath | None = None
    """Certificates that sign those of clients, as PEM: TLS then takes no client without one.
    Default: none."""

    clients: FilePath | None = None
    """File that says who the clients are: their tokens and certificates, roles and limits; see
    `loaderd token create --help`. It is read again when it changes. Default: none, and whoever can
    connect may do everything."""

    insecure: bool = False
    """Allow addresses that other machines reach without TLS, or without clients that are known:
    whoever reaches them may read along, or use and unload models."""

    http: HostPort | None = None
    """Address for HTTP, such as 127.0.0.1:8080 (port 0: a free one): metrics, probes, a status
    page, and an API like OpenAI's. It speaks TLS where --tls-cert is given, and knows clients by
    their tokens. Needs the extra `http`. Default: none, no HTTP."""

    user_loads: Literal["off", "cached", "any"] = "cached"
    """Which models clients with the role user may load: none, those whose files are there, or also
    those that must be downloaded first."""

    allow_model: Patterns = ()
    """Pattern of repositories that may be used, such as org/name or org/*; give it again for more
    (LOADERD_ALLOW_MODEL: separated by colons). Default: all."""

    deny_model: PatternsOrFolders = ()
    """Pattern of repositories, or a local folder, that must not be used, whatever --allow-model and
    --allow-local say; give it again for more (LOADERD_DENY_MODEL: separated by colons). Default:
    none."""

    max_model_bytes: ByteSize | None = Field(default=None, gt=0)
    """How large a model may be, such as 20GB: one that is larger is neither downloaded nor loaded.
    Default: no limit."""

    cache_dir: FolderPath | None = None
    """Hugging Face cache. Default: as the hub library: HF_HUB_CACHE, else HF_HOME/hub, else
    ~/.cache/huggingface/hub."""

    cache_max_bytes: ByteSize | None = Field(default=None, gt=0)
    """How large downloads may make the cache, such as 500GB or 2TiB. Before one that does not fit,
    snapshots that were not used for longest and are not in use are deleted. Default: no limit, and
    nothing is deleted unasked."""

    allow_local: Folders = Field(default_factory=_default_local_roots)
    """Folder below which local models may be loaded; give it again for more (LOADERD_ALLOW_LOCAL:
    separated by colons). Default: the folder that the daemon is started in, none if that is /."""

    allow_pickle: RepositoriesOrFolders = ()
    """Model whose weights may be pickles when it has no safetensors: org/name, or the absolute path
    of a local folder; give it again for more (LOADERD_ALLOW_PICKLE: separated by colons). A pickle
    can run code when it is not read with care: loaderd takes only tensors from it and refuses the
    rest, but allow only whom you trust. Default: none."""

    hub_endpoint: Endpoint = Field(
        default_factory=lambda: os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
        validate_default=True,
    )
    """Hub to download from. Default: HF_ENDPOINT, else the public one."""

    hub_token_file: FilePath | None = None
    """File with the hub token. Default: the variable HF_TOKEN, else the file that the hub library's
    login wrote."""

    offline: bool = Field(default_factory=_hub_offline)
    """Never ask the hub. Default: HF_HUB_OFFLINE."""

    offload_dir: FolderPath | None = None
    """Folder for weights that are offloaded to the disk and cannot be read from the model's files.
    Default: loaderd/offload below XDG_CACHE_HOME, else below ~/.cache."""

    standby: int = Field(default=1, ge=0, le=8)
    """Spare worker processes that have imported everything and wait for a load. With 0 each load
    starts its own, which takes seconds."""

    keep_alive: Seconds = Field(default=300, le=366 * 24 * 3600)
    """Seconds that a model stays loaded while nobody uses it, unless a client says otherwise; 0:
    until its first use has ended; negative: until somebody unloads it."""

    preload: ModelNames = ()
    """Model to load at the start and to keep; give it again for more (LOADERD_PRELOAD: separated by
    colons). One that does not load is tried again. Default: none."""

    models: tuple[DeclaredModel, ...] = ()
    """Models to load at the start, before those of --preload; in the file, a table [[models]] each
    with name, and the options of a load. Default: none."""

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

    log_format: Literal["text", "json"] = "text"
    """What the lines of the log are: text for people, or one JSON object each."""

    audit_log: AuditFile | None = None
    """File to which a JSON line is added for each action of administrators, and each load that a
    client asks for; -: standard output. Default: none."""

    tracing: bool = False
    """Send traces to an OpenTelemetry collector. Needs the extra `tracing`. In the file, the table
    [tracing] with endpoint, ratio and service_name does, unless it has enabled = false."""

    tracing_endpoint: CollectorEndpoint | None = None
    """Where the collector takes OTLP over gRPC, such as http://127.0.0.1:4317. Default:
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT, else
    http://localhost:4317."""

    tracing_ratio: float | None = Field(default=None, ge=0, le=1)
    """Of the traces that begin here, how many are kept, from 0 to 1; those that callers have begun
    are kept as they say. Default: OTEL_TRACES_SAMPLER, else all."""

    tracing_service_name: str | None = Field(default=None, min_length=1, max_length=256)
    """What traces call this daemon. Default: OTEL_SERVICE_NAME, else loaderd."""

    @model_validator(mode="after")
    def _refuse_what_has_no_effect(self) -> ServerConfig:
        given = self.model_fields_set
        if "host" in given and self.port is None and (self.socket is not None or self.listen):
            raise ValueError("host goes with port; give the port too, or host:port as --listen")
        for address in self.addresses:
            is_any = isinstance(address, TcpAddress) and address.port == 0
            if self.addresses.count(address) > 1 and not is_any:
                raise ValueError(f"{address} is given twice")
        sockets = sorted(given & {"socket_mode", "socket_group", "socket_role"})
        if sockets and not any(isinstance(each, UnixAddress) for each in self.addresses):
            raise ValueError(f"{sockets[0]} is about unix sockets, and there is none; add --socket")
        about_tracing = sorted(name for name in given if name.startswith("tracing_"))
        if about_tracing and "tracing" not in given:
            raise ValueError(
                f"{about_tracing[0]} is about traces, and there are none; add --tracing"
            )
        return self

    @model_validator(mode="after")
    def _refuse_exposure(self) -> ServerConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together; give both")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs TLS; give tls_cert and tls_key too")
        if self.http is not None and self.clients is None:
            self._refuse_http_without_clients(self.http)
        asks_who_calls = self.clients is not None or self.tls_client_ca is not None
        if self.insecure or (self.tls_cert is not None and asks_who_calls):
            return self
        for address in (*self.addresses, self.http):
            if isinstance(address, TcpAddress) and address.is_exposed:
                raise ValueError(
                    f"{address} can be reached from other machines; give it TLS (--tls-cert, "
                    "--tls-key) and clients that are known (--clients or --tls-client-ca), listen "
                    "on 127.0.0.1 or a --socket, or add --insecure"
                )
        return self

    def _refuse_http_without_clients(self, address: TcpAddress) -> None:
        if self.insecure or not (self.tls_client_ca is not None or address.is_exposed):
            return
        raise ValueError(
            f"http {address}: over HTTP clients are known by their tokens only, and without "
            "--clients whoever reaches it may do everything; give --clients, or add --insecure"
        )

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where to listen; at least one."""
        addresses: list[Address] = []
        if self.port is not None:
            addresses.append(TcpAddress(self.host, self.port))
        elif self.socket is None and not self.listen:
            addresses.append(TcpAddress(self.host, DEFAULT_PORT))
        if self.socket is not None:
            addresses.append(UnixAddress(self.socket))
        return (*addresses, *self.listen)

    def hub_token(self) -> str | None:
        """The operator's hub token, read now.

        Raises:
            ConfigError: The file that the operator named, or the login, cannot be read.
        """
        return self.hub_token_and_origin()[0]

    def hub_token_and_origin(self) -> tuple[str | None, Origin]:
        """The operator's hub token, read now, and where it is from.

        Raises:
            ConfigError: The file that the operator named, or the login, cannot be read.
        """
        if self.hub_token_file is not None:
            try:
                token = self.hub_token_file.read_text().strip() or None
            except (OSError, UnicodeDecodeError) as error:
                problem = error.strerror if isinstance(error, OSError) else "it is not text"
                raise ConfigError(
                    f"hub_token_file: cannot read {self.hub_token_file}: {problem}; name a file "
                    "that the daemon may read"
                ) from error
            return token, Origin("file", str(self.hub_token_file))
        if token := os.environ.get("HF_TOKEN", "").strip():
            return token, Origin("variable", "HF_TOKEN")
        home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
        login = Path(os.environ.get("HF_TOKEN_PATH", home / "token"))
        try:
            return login.read_text().strip() or None, Origin("file", str(login))
        except OSError:
            return None, Origin("default")  # nobody logged in: the hub's public part is enough
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"hub_token_file: the hub library's login, {login}, is not text; log in again, or "
                "name another file"
            ) from error

    def changed_in(self, other: ServerConfig, settings: Collection[str]) -> ServerConfig:
        """These settings, with some as another has them.

        Args:
            other: The other.
            settings: The names of those to take from it.

        Raises:
            ConfigError: The two together would let in whoever comes.
        """
        config = self.model_copy(update={name: getattr(other, name) for name in settings})
        try:
            config._refuse_exposure()  # type: ignore[operator]  # Pydantic leaves it a method
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return config


def load_config(flags: Mapping[str, object]) -> ServerConfig:
    """The settings that the command line, the environment and the file make together.

    Args:
        flags: The settings given on the command line by name; `config` names the TOML file.

    Raises:
        ConfigError: A setting is unknown or invalid, or the file cannot be read.
    """
    return config_from(Sources(flags))


def config_from(sources: Sources) -> ServerConfig:
    """The settings that all sources make together.

    Raises:
        ConfigError: A setting is unknown or invalid, or the file cannot be read.
    """

    class Settings(ServerConfig):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the base's signature
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, sources.table)

    problems = [sources.problem] if sources.problem else []
    for name in os.environ:
        setting = name.removeprefix(PREFIX).lower()
        if name.startswith(PREFIX) and setting not in _known_variables():
            problems.append(f"{name}: {_unknown(setting)}")
    try:
        config = Settings(**sources.flags)
    except ValidationError as error:
        problems += (_describe(sources, item) for item in error.errors())
        raise ConfigError(*problems) from error
    except SettingsError as error:
        raise ConfigError(*problems, f"{error}: as a variable it must be JSON") from error
    except OSError as error:
        raise ConfigError(*problems, f"config: {error}") from error
    if problems:
        raise ConfigError(*problems)
    return config


def _known_variables() -> set[str]:
    """The daemon's, and those of its clients, which may be set for the whole box."""
    return {*ServerConfig.model_fields, "config", "address", "daemon", "token"}


def _unknown(setting: str) -> str:
    similar = difflib.get_close_matches(setting, ServerConfig.model_fields, 1)
    hint = f"perhaps {similar[0]} is meant; " if similar else ""
    return f"there is no such setting; {hint}loaderd --help lists them"


def _describe(sources: Sources, item: ErrorDetails) -> str:
    location, message = item["loc"], item["msg"].removeprefix("Value error, ")
    if not location:
        return message
    setting = str(location[0])
    match item["type"]:
        case "extra_forbidden":
            message = _unknown(setting) if len(location) == 1 else "there is no such setting"
        case "byte_size" | "byte_size_unit":
            message = f"{item['input']!r} is no size; write one as 20GB or 512MiB"
    return f"{'.'.join(map(str, location))}: {message} (set by {sources.origin(setting)})"
