"""The daemon: wires the parts, serves until a signal, shuts down in order."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING

from loaderd.server import from_config
from loaderd.server.config import ServerConfig
from loaderd.server.models.idle import IdleModels, IdleUnloader
from loaderd.server.models.loads import Loads, OnDemand
from loaderd.server.models.manifest import Manifest
from loaderd.server.models.planner import Planner
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.models.restarts import Restarts
from loaderd.server.reload import Parts, Reloader
from loaderd.server.rpc.listeners import AddressError, SocketAccess, listening
from loaderd.server.rpc.server import RpcServer
from loaderd.server.store.store import ModelStore
from loaderd.server.supervisor.launcher import LocalLauncher
from loaderd.server.supervisor.offload_folders import OffloadFolders, default_offload_dir
from loaderd.server.supervisor.runtime_folder import RuntimeFolder
from loaderd.server.supervisor.supervisor import Supervisor
from loaderd.server.supervisor.worker import WorkerLimits
from loaderd.server.systemd import Systemd
from loaderd.server.tracing.spans import Tracer

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
        reread: Reads them again.
        systemd: Is told how the daemon is.
    """

    def __init__(
        self, config: ServerConfig, reread: Callable[[], ServerConfig], systemd: Systemd
    ) -> None:
        self._config = config
        self._reread = reread
        self._systemd = systemd
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT, then drains; SIGHUP has the settings read again.

        Raises:
            AddressError: An address cannot be listened on.
            ConfigError: The hub token, the files of TLS or that of clients, or variables for
                tracing cannot be used; or models that are to be there are not allowed.
        """
        config = self._config
        models = from_config.models_to_load(config)
        with ExitStack() as stack:
            tracer = stack.enter_context(from_config.tracer(config))
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
            store = ModelStore(from_config.store_settings(config))
            registry = ModelRegistry(config.max_requests, from_config.keep_alive_s(config))
            planner = Planner(store, supervisor, IdleModels(registry), disk)
            loads = Loads(
                registry,
                store,
                supervisor,
                planner,
                OnDemand(config.load_on_demand),
                user_loads=OnDemand(config.user_loads),
            )
            restarts = Restarts(loads, tracer=tracer)
            registry.on_death = restarts.begin
            manifest = Manifest(models, registry, loads, tracer=tracer)
            audit = stack.enter_context(from_config.audit_log(config))
            access = from_config.access(config, audit)
            http = self._http(registry, planner, store, supervisor, tracer)
            server = RpcServer(
                registry,
                loads,
                planner,
                store,
                supervisor,
                access=access,
                observer=None if http is None else http.metrics,
                audit=audit,
                tracer=tracer,
            )
            addresses = stack.enter_context(
                listening(
                    server,
                    config.addresses,
                    from_config.tls(config),
                    SocketAccess(config.socket_mode, config.socket_group),
                )
            )
            if http is not None:
                addresses = [http.url, *addresses]
            reloader = Reloader(
                config,
                self._reread,
                Parts(access, loads, manifest, registry, store, audit),
                self._systemd,
            )
            self._catch_signals(supervisor, reloader)
            health = asyncio.create_task(server.health.follow())
            await store.start()
            await supervisor.start()
            await server.start()
            if http is not None:
                http.start(server.local)
            background = [
                asyncio.create_task(work)
                for work in (
                    IdleUnloader(registry).run(),
                    manifest.run(),
                    reloader.run(),
                    self._systemd.watch(),
                )
            ]
            try:
                where = " and ".join(addresses)
                print(f"loaderd {version('loaderd')} listening on {where}", flush=True)
                self._systemd.ready(f"listening on {where}")
                await self._stop.wait()
                logger.info("draining")
                self._systemd.stopping()
                await asyncio.gather(registry.drain(reloader.config.drain_timeout), store.close())
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
        self,
        registry: ModelRegistry,
        planner: Planner,
        store: ModelStore,
        supervisor: Supervisor,
        tracer: Tracer | None,
    ) -> HttpService | None:
        address = self._config.http
        if address is None:
            return None
        from loaderd.server.http.listener import HttpListener
        from loaderd.server.http.service import HttpService
        from loaderd.server.http.tls import server_context

        tls = from_config.tls(self._config)
        try:
            listener = HttpListener(address, None if tls is None else server_context(tls))
        except OSError as error:
            raise AddressError(
                f"cannot listen on {address} for HTTP: {error.strerror}; choose another --http "
                "(port 0: a free one)"
            ) from error
        return HttpService(listener, registry, planner, store, supervisor, tracer=tracer)

    def _catch_signals(self, supervisor: Supervisor, reloader: Reloader) -> None:
        loop = asyncio.get_running_loop()
        first = math.inf
        has_terminal = os.isatty(0)

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

        def on_hangup() -> None:
            if has_terminal and not os.isatty(0):  # it was closed, which ends what runs in it
                on_signal(signal.SIGHUP)
            else:
                reloader.ask()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
