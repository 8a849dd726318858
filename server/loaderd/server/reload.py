"""Reads the settings again while the daemon runs, and changes what can change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from loaderd.server import from_config
from loaderd.server.config import ConfigError, ServerConfig
from loaderd.server.logs.audit import AuditLog
from loaderd.server.models.loads import Loads, OnDemand
from loaderd.server.models.manifest import Manifest
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.rpc.access import Access
from loaderd.server.store.store import ModelStore
from loaderd.server.systemd import Systemd

logger = logging.getLogger(__name__)

LIVE = (
    "allow_local",
    "allow_model",
    "allow_pickle",
    "cache_max_bytes",
    "clients",
    "deny_model",
    "drain_timeout",
    "hub_attempts",
    "hub_endpoint",
    "hub_longest_wait",
    "hub_token_file",
    "keep_alive",
    "load_on_demand",
    "log_level",
    "max_model_bytes",
    "max_requests",
    "models",
    "offline",
    "preload",
    "socket_role",
    "stall_timeout",
    "user_loads",
)
"""The settings that change while the daemon runs; all others need a restart."""


@dataclass(frozen=True)
class Parts:
    """The parts of the daemon that are told of new settings."""

    access: Access
    loads: Loads
    manifest: Manifest
    registry: ModelRegistry
    store: ModelStore
    audit: AuditLog | None

    def apply(self, config: ServerConfig) -> None:
        """Gives them the settings of `LIVE`: all of them, or none if one cannot be used.

        Raises:
            ConfigError: A file that they name cannot be used, or models that are to be there are
                not allowed.
        """
        models = from_config.models_to_load(config)
        gate = from_config.access(config, self.audit).gate
        store = from_config.store_settings(config)
        self.access.gate = gate
        self.loads.on_demand = OnDemand(config.load_on_demand)
        self.loads.user_loads = OnDemand(config.user_loads)
        self.registry.keep_alive_s = from_config.keep_alive_s(config)
        self.registry.max_requests = config.max_requests
        self.store.apply(store)
        self.manifest.declare(models)
        logging.getLogger().setLevel(config.log_level.upper())


class Reloader:
    """Reads the settings again whenever it is asked to.

    Args:
        config: What the daemon was started with.
        read: Reads the settings from where those came.
        parts: What is told of new ones.
        systemd: Is told of each reading.

    Attributes:
        config: What the daemon works with now.
    """

    def __init__(
        self,
        config: ServerConfig,
        read: Callable[[], ServerConfig],
        parts: Parts,
        systemd: Systemd,
    ) -> None:
        self.config = config
        self._read = read
        self._parts = parts
        self._systemd = systemd
        self._asked = asyncio.Event()

    def _tell(self, code: str, **fields: object) -> None:
        if self._parts.audit is not None:
            self._parts.audit.write(
                {"action": "ReloadSettings", "client": "", "code": code, **fields}
            )

    def ask(self) -> None:
        """Has the settings read again soon."""
        self._asked.set()

    async def run(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._systemd.reloading()
            self._systemd.ready(self._reload())

    def _reload(self) -> str:
        """Says what came of it, in a line."""
        try:
            found = self._read()
            if problems := from_config.problems(found):
                raise ConfigError(*problems)
            config = self.config.changed_in(found, LIVE)
            self._parts.apply(config)
        except ConfigError as error:
            for problem in error.problems:
                logger.error("the settings stay as they are: %s", problem)
            self._tell("FAILED_PRECONDITION", problem=str(error))
            return f"the settings stay as they are: {error}"
        changed = self._differing(config)
        self.config = config
        done = f"read the settings again; changed: {', '.join(changed) or 'nothing'}"
        logger.info("%s", done)
        self._tell("OK", changed=changed)
        waiting = self._differing(found)
        if waiting:
            logger.warning("these settings need a restart to change: %s", ", ".join(waiting))
            done += f"; need a restart: {', '.join(waiting)}"
        return done

    def _differing(self, other: ServerConfig) -> list[str]:
        return [
            name
            for name in ServerConfig.model_fields
            if getattr(self.config, name) != getattr(other, name)
        ]
