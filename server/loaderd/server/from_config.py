"""What the parts of the daemon are given, made of its settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from loaderd.server.access.clients import ClientsFile, ClientsFileError
from loaderd.server.access.quotas import Quotas
from loaderd.server.access.roles import Role
from loaderd.server.config import ConfigError, ServerConfig
from loaderd.server.errors import ModelNotAllowedError
from loaderd.server.logs.audit import AuditLog
from loaderd.server.models.keep_alive import PINNED
from loaderd.server.models.manifest import Declared, declared
from loaderd.server.rpc.access import Access
from loaderd.server.rpc.tls import ServerTls
from loaderd.server.store.cache import default_cache_dir
from loaderd.server.store.hub_access import RetryPolicy
from loaderd.server.store.names import parse_name
from loaderd.server.store.policy import ModelPolicy
from loaderd.server.store.settings import StoreSettings
from loaderd.server.tracing.spans import Tracer


def store_settings(config: ServerConfig) -> StoreSettings:
    """What the store works with; the hub token is read now.

    Raises:
        ConfigError: The hub token cannot be read.
    """
    return StoreSettings(
        cache_dir=config.cache_dir or default_cache_dir(),
        local_roots=config.allow_local,
        hub_endpoint=config.hub_endpoint,
        hub_token=config.hub_token(),
        offline=config.offline,
        max_bytes=config.cache_max_bytes,
        allow_pickle=frozenset(config.allow_pickle),
        policy=_policy(config),
        stall_timeout=config.stall_timeout,
        retry=RetryPolicy(config.hub_attempts, longest_wait=config.hub_longest_wait),
    )


def keep_alive_s(config: ServerConfig) -> float:
    """Seconds that models stay that nobody uses, `PINNED` for ever."""
    return config.keep_alive if config.keep_alive >= 0 else PINNED


@contextmanager
def audit_log(config: ServerConfig) -> Iterator[AuditLog | None]:
    """Where actions of administrators are told; None: nowhere. Closed on leaving.

    Raises:
        ConfigError: The file cannot be opened.
    """
    if config.audit_log is None:
        yield None
        return
    try:
        audit = AuditLog(None if config.audit_log == Path("-") else config.audit_log)
    except OSError as error:
        raise ConfigError(f"audit_log: {config.audit_log}: {error.strerror}") from error
    with closing(audit):
        yield audit


@contextmanager
def tracer(config: ServerConfig) -> Iterator[Tracer | None]:
    """What gets traces; None: nobody asked. What waits on leaving is sent, within a bound.

    Raises:
        ConfigError: A variable of OpenTelemetry's cannot be used.
        ImportError: The extra `tracing` is not installed.
    """
    if not config.tracing:
        yield None
        return
    from loaderd.server.tracing.sdk import SdkTracer

    try:
        found = SdkTracer.to_collector(
            config.tracing_endpoint, config.tracing_ratio, config.tracing_service_name
        )
    except ValueError as error:
        raise ConfigError(f"tracing: a variable OTEL_* cannot be used: {error}") from error
    with closing(found):
        yield found


def access(config: ServerConfig, audit: AuditLog | None = None) -> Access:
    """Who may do what.

    Args:
        config: The settings.
        audit: Told when the file of clients was read again.

    Raises:
        ConfigError: The file of clients cannot be used.
    """
    try:
        clients = None if config.clients is None else ClientsFile(config.clients)
    except ClientsFileError as error:
        raise ConfigError(f"clients: {error}") from error
    if clients is not None and audit is not None:
        clients.on_reload = audit.write
    return Access(clients, Quotas(time.monotonic), Role(config.socket_role))


def tls(config: ServerConfig) -> ServerTls | None:
    """The files of TLS, unread; None for no TLS."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    return ServerTls(config.tls_cert, config.tls_key, config.tls_client_ca)


def models_to_load(config: ServerConfig) -> list[Declared]:
    """The models that are to be there always.

    Raises:
        ConfigError: The options of one are out of bounds, or it is not allowed.
    """
    policy, cache_dir = _policy(config), config.cache_dir or default_cache_dir()
    models = declared(config)
    for model in models:
        try:
            policy.check(parse_name(model.name), cache_dir)
        except ModelNotAllowedError as error:
            setting = "preload" if model.name in config.preload else "models"
            raise ConfigError(
                f"{setting}: {model.name} is to be loaded at the start, but --allow-model or "
                "--deny-model is "
                "against it"
            ) from error
    return models


def problems(config: ServerConfig) -> list[str]:
    """What would keep a daemon with these settings from starting: files that it names, models.

    Addresses are not tried: a daemon that runs may have them.
    """

    def read_tls() -> None:
        if (files := tls(config)) is not None:
            files.credentials()

    def begin_tracing() -> None:
        with suppress(ImportError), tracer(config):  # what is not installed is told elsewhere
            pass

    checks: tuple[Callable[[], object], ...] = (
        config.hub_token,
        lambda: access(config),
        lambda: models_to_load(config),
        read_tls,
        begin_tracing,
    )
    found: list[str] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            found += error.problems
    return found


def _policy(config: ServerConfig) -> ModelPolicy:
    return ModelPolicy(config.allow_model, config.deny_model, config.max_model_bytes)
