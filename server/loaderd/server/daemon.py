"""The daemon: wires the parts, serves until a signal, shuts down in order."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from loaderd.server.config import ConfigError, ServerConfig
from loaderd.server.errors import InvalidArgumentError
from loaderd.server.models.idle import IdleModels, IdleUnloader
from loaderd.server.models.keep_alive import PINNED
from loaderd.server.models.loads import Loads, OnDemand
from loaderd.server.models.manifest import Declared, Manifest
from loaderd.server.models.planner import Planner
from loaderd.server.models.record import LoadOptions
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.models.replicas import check_replicas
from loaderd.server.models.restarts import Restarts
from loaderd.server.rpc.server import RpcServer
from loaderd.server.store.cache import default_cache_dir
from loaderd.server.store.hub_access import RetryPolicy
from loaderd.server.store.store import ModelStore, StoreSettings
from loaderd.server.supervisor.launcher import LocalLauncher
from loaderd.server.supervisor.runtime_folder import RuntimeFolder
from loaderd.server.supervisor.supervisor import Supervisor
from loaderd.server.supervisor.worker import WorkerLimits
from loaderd.v1 import model_pb2

logger = logging.getLogger(__name__)

_LAST_MESSAGES_S = 1.0
# A terminal or a wrapper may send one request to stop to the process and to its group.
_ONE_REQUEST_S = 0.5


class AddressError(Exception):
    """The address cannot be listened on. Its text says which and what to do."""


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
            ConfigError: The hub token cannot be read.
        """
        config = self._config
        with RuntimeFolder() as runtime, _socket_lock(config.socket):
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
                    cache_dir=config.cache_dir or default_cache_dir(),
                    local_roots=config.allow_local,
                    hub_endpoint=config.hub_endpoint,
                    hub_token=config.hub_token(),
                    offline=config.offline,
                    max_bytes=config.cache_max_bytes,
                    allow_pickle=frozenset(config.allow_pickle),
                    stall_timeout=config.stall_timeout,
                    retry=RetryPolicy(config.hub_attempts, longest_wait=config.hub_longest_wait),
                )
            )
            keep_alive = config.keep_alive if config.keep_alive >= 0 else PINNED
            registry = ModelRegistry(config.max_requests, keep_alive)
            planner = Planner(store, supervisor, IdleModels(registry))
            on_demand = OnDemand(config.load_on_demand)
            loads = Loads(registry, store, supervisor, planner, on_demand)
            restarts = Restarts(loads)
            registry.on_death = restarts.begin
            manifest = Manifest(_declared(config), registry, loads)
            server = RpcServer(registry, loads, planner, store, supervisor)
            addresses = self._bind(server)
            self._catch_signals(supervisor)
            health = asyncio.create_task(server.health.follow())
            await store.start()
            await supervisor.start()
            await server.start()
            background = [
                asyncio.create_task(work.run()) for work in (IdleUnloader(registry), manifest)
            ]
            try:
                listening = " and ".join(addresses)
                print(f"loaderd {version('loaderd')} listening on {listening}", flush=True)
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
                await server.stop(_LAST_MESSAGES_S)
                await supervisor.close()

    def _bind(self, server: RpcServer) -> list[str]:
        config, addresses = self._config, []
        if config.tcp_port is not None:
            host = f"[{config.host}]" if ":" in config.host else config.host
            try:
                port = server.bind(f"{host}:{config.tcp_port}")
            except RuntimeError as error:
                raise AddressError(
                    f"cannot listen on {host}:{config.tcp_port}: the port is taken, perhaps by "
                    "another daemon, or the host is not this box; choose another --port (0: a "
                    "free one) or --host"
                ) from error
            addresses.append(f"{host}:{port}")
        if config.socket is not None:
            before = os.umask(0o177)
            try:
                server.bind(f"unix:{config.socket}")
            except RuntimeError as error:
                raise AddressError(f"cannot listen on the socket {config.socket}") from error
            finally:
                os.umask(before)
            addresses.append(f"unix:{config.socket}")
        return addresses

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


def _declared(config: ServerConfig) -> list[Declared]:
    """The manifest, and what the command line adds.

    Raises:
        ConfigError: A model's options are out of bounds.
    """
    models = []
    for model in config.models:
        dtype = model_pb2.Dtype.Value(f"DTYPE_{(model.dtype or 'unspecified').upper()}")
        quantization = (model.quantization or "unspecified").upper()
        try:
            options = LoadOptions(
                dtype=dtype,
                device_map=model.device_map,
                quantization=model_pb2.Quantization.Value(f"QUANTIZATION_{quantization}"),
            )
            replicas = None if model.replicas is None else check_replicas(model.replicas)
        except InvalidArgumentError as error:
            raise ConfigError(f"models: {model.name}: {error}") from error
        keep_alive_s = model.keep_alive if model.keep_alive >= 0 else PINNED
        models.append(Declared(model.name, options, keep_alive_s, replicas))
    return models + [Declared(name) for name in config.preload]


@contextmanager
def _socket_lock(socket: Path | None) -> Iterator[None]:
    """Holds the socket's path: a second server would take it from the first without a word.

    Raises:
        AddressError: Another daemon holds it, or its folder cannot be written to.
    """
    if socket is None:
        yield
        return
    lock = socket.with_name(socket.name + ".lock")
    try:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise AddressError(f"cannot use the socket {socket}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AddressError(f"another daemon listens on the socket {socket}") from error
        if socket.exists() and not socket.is_socket():
            raise AddressError(f"{socket} exists and is not a socket")
        socket.unlink(missing_ok=True)  # left by a daemon that was killed
        yield
        socket.unlink(missing_ok=True)
    finally:
        os.close(handle)
