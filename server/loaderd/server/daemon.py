"""The daemon: wires the parts, serves until a signal, shuts down in order."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from loaderd.server.access.clients import ClientsFile, ClientsFileError
from loaderd.server.access.quotas import Quotas
from loaderd.server.access.roles import Role
from loaderd.server.config import ConfigError, ServerConfig
from loaderd.server.errors import ModelNotAllowedError
from loaderd.server.models.idle import IdleModels, IdleUnloader
from loaderd.server.models.keep_alive import PINNED
from loaderd.server.models.loads import Loads, OnDemand
from loaderd.server.models.manifest import Manifest, declared
from loaderd.server.models.planner import Planner
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.models.restarts import Restarts
from loaderd.server.rpc.access import Access
from loaderd.server.rpc.listeners import AddressError, SocketAccess, listening
from loaderd.server.rpc.server import RpcServer
from loaderd.server.rpc.tls import ServerTls
from loaderd.server.store.cache import default_cache_dir
from loaderd.server.store.hub_access import RetryPolicy
from loaderd.server.store.names import parse_name
from loaderd.server.store.policy import ModelPolicy
from loaderd.server.store.store import ModelStore, StoreSettings
from loaderd.server.supervisor.launcher import LocalLauncher
from loaderd.server.supervisor.offload_folders import OffloadFolders, default_offload_dir
from loaderd.server.supervisor.runtime_folder import RuntimeFolder
from loaderd.server.supervisor.supervisor import Supervisor
from loaderd.server.supervisor.worker import WorkerLimits

if TYPE_CHECKING:
    from loaderd.server.http.service import HttpService

__all__ = ["AddressError", "Daemon"]

logger = logging.getLogger(__name__)

_LAST_MESSAGES_S = 1.0
# A terminal or a wrapper may send one request to stop to the process and to its group.
_ONE_REQUEST_S = 0.5


class Daemon:
    """One loaderd, from start to exit.

    Args:
        config: The operator's settings.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT, then drains.

        Raises:
            AddressError: An address cannot be listened on.
            ConfigError: The hub token, the files of TLS or that of clients cannot be used; or
                models that are to be there are not allowed.
        """
        config = self._config
        cache_dir = config.cache_dir or default_cache_dir()
        policy = ModelPolicy(config.allow_model, config.deny_model, config.max_model_bytes)
        models = declared(config)
        for model in models:
            _check_allowed(model.name, policy, cache_dir)
        with ExitStack() as stack:
            runtime = stack.enter_context(RuntimeFolder())
            disk = stack.enter_context(OffloadFolders(config.offload_dir or default_offload_dir()))
            supervisor = Supervisor(
                runtime.path,
                LocalLauncher(),
                WorkerLimits(
                    standby=config.standby,
                    load_timeout=config.load_timeout,
                    heartbeat_timeout=config.heartbeat_timeout,
                    max_stream_bytes=config.max_stream_buffer,
                ),
            )
            store = ModelStore(
                StoreSettings(
                    cache_dir=cache_dir,
                    local_roots=config.allow_local,
                    hub_endpoint=config.hub_endpoint,
                    hub_token=config.hub_token(),
                    offline=config.offline,
                    max_bytes=config.cache_max_bytes,
                    allow_pickle=frozenset(config.allow_pickle),
                    policy=policy,
                    stall_timeout=config.stall_timeout,
                    retry=RetryPolicy(config.hub_attempts, longest_wait=config.hub_longest_wait),
                )
            )
            keep_alive = config.keep_alive if config.keep_alive >= 0 else PINNED
            registry = ModelRegistry(config.max_requests, keep_alive)
            planner = Planner(store, supervisor, IdleModels(registry), disk)
            on_demand, user_loads = OnDemand(config.load_on_demand), OnDemand(config.user_loads)
            loads = Loads(registry, store, supervisor, planner, on_demand, user_loads=user_loads)
            restarts = Restarts(loads)
            registry.on_death = restarts.begin
            manifest = Manifest(models, registry, loads)
            http = self._http(registry, planner, store, supervisor)
            server = RpcServer(
                registry,
                loads,
                planner,
                store,
                supervisor,
                access=_access(config),
                observer=None if http is None else http.metrics,
            )
            addresses = stack.enter_context(
                listening(
                    server,
                    config.addresses,
                    _tls(config),
                    SocketAccess(config.socket_mode, config.socket_group),
                )
            )
            if http is not None:
                addresses = [http.url, *addresses]
            self._catch_signals(supervisor)
            health = asyncio.create_task(server.health.follow())
            await store.start()
            await supervisor.start()
            await server.start()
            if http is not None:
                http.start(server.local)
            background = [
                asyncio.create_task(work.run()) for work in (IdleUnloader(registry), manifest)
            ]
            try:
                where = " and ".join(addresses)
                print(f"loaderd {version('loaderd')} listening on {where}", flush=True)
                await self._stop.wait()
                logger.info("draining")
                await asyncio.gather(registry.drain(config.drain_timeout), store.close())
                await asyncio.wait([health], timeout=_LAST_MESSAGES_S)
            finally:
                for task in (health, *background):
                    task.cancel()
                await restarts.close()
                await store.close()
                await registry.close()
                if http is not None:
                    await http.stop(_LAST_MESSAGES_S)
                await server.stop(_LAST_MESSAGES_S)
                await supervisor.close()

    def _http(
        self, registry: ModelRegistry, planner: Planner, store: ModelStore, supervisor: Supervisor
    ) -> HttpService | None:
        address = self._config.http
        if address is None:
            return None
        from loaderd.server.http.listener import HttpListener
        from loaderd.server.http.service import HttpService
        from loaderd.server.http.tls import server_context

        tls = _tls(self._config)
        try:
            listener = HttpListener(address, None if tls is None else server_context(tls))
        except OSError as error:
            raise AddressError(
                f"cannot listen on {address} for HTTP: {error.strerror}; choose another --http "
                "(port 0: a free one)"
            ) from error
        return HttpService(listener, registry, planner, store, supervisor)

    def _catch_signals(self, supervisor: Supervisor) -> None:
        loop = asyncio.get_running_loop()
        first = math.inf

        def on_signal(number: int) -> None:
            nonlocal first
            if not self._stop.is_set():
                first = loop.time()
                self._stop.set()
            if loop.time() < first + _ONE_REQUEST_S:
                return
            logger.warning("second signal: ending at once")
            supervisor.kill()
            os._exit(128 + number)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)


def _access(config: ServerConfig) -> Access:
    """Who may do what.

    Raises:
        ConfigError: The file of clients cannot be used.
    """
    try:
        clients = None if config.clients is None else ClientsFile(config.clients)
    except ClientsFileError as error:
        raise ConfigError(f"clients: {error}") from error
    return Access(clients, Quotas(time.monotonic), Role(config.socket_role))


def _tls(config: ServerConfig) -> ServerTls | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    return ServerTls(config.tls_cert, config.tls_key, config.tls_client_ca)


def _check_allowed(model: str, policy: ModelPolicy, cache_dir: Path) -> None:
    """Refuses to start with a model that the daemon is to load and must not.

    Raises:
        ConfigError: The policy does not allow it.
    """
    try:
        policy.check(parse_name(model), cache_dir)
    except ModelNotAllowedError as error:
        raise ConfigError(
            f"{model} is to be loaded at the start, but --allow-model or --deny-model is against it"
        ) from error
