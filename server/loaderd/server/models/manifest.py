"""Models that the operator wants to be there always."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from loaderd.server.config import ConfigError, DeclaredModel, ServerConfig
from loaderd.server.errors import (
    DrainingError,
    InvalidArgumentError,
    LoaderdError,
    UnsupportedOptionError,
)
from loaderd.server.models.keep_alive import PINNED
from loaderd.server.models.loads import Loads, outcome
from loaderd.server.models.record import LoadOptions
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.models.replicas import check_replicas
from loaderd.server.models.where import AUTO, Where
from loaderd.server.tracing import names
from loaderd.server.tracing.spans import Tracer, annotate, running
from loaderd.v1 import model_pb2

logger = logging.getLogger(__name__)

_FIRST_WAIT_S = 5.0
_LONGEST_WAIT_S = 300.0


@dataclass(frozen=True)
class Declared:
    """A model of the manifest.

    Attributes:
        name: As a client would name it.
        options: How to load it.
        keep_alive_s: How long it stays when nobody uses it.
        replicas: How many of it there are to be.
    """

    name: str
    options: LoadOptions = field(default_factory=LoadOptions)
    keep_alive_s: float = PINNED
    replicas: int | None = None


class Manifest:
    """Loads what is declared, one after the other, and tries again what does not load.

    A model that was loaded is not looked after any more: a client may unload it, and one whose
    worker dies comes back as all others do.

    Args:
        declared: The models, the most wanted one first.
        registry: Has the models.
        loads: Loads them.
        first_wait_s: Seconds before a model is tried again; doubled each time, up to some minutes.
        tracer: Gets a trace of each load; None: nobody asked.
    """

    def __init__(
        self,
        declared: Sequence[Declared],
        registry: ModelRegistry,
        loads: Loads,
        first_wait_s: float = _FIRST_WAIT_S,
        tracer: Tracer | None = None,
    ) -> None:
        self._tracer = tracer
        self._declared = declared
        self._waiting = list(declared)
        self._changed = asyncio.Event()
        self._registry = registry
        self._loads = loads
        self._first_wait_s = first_wait_s

    def declare(self, declared: Sequence[Declared]) -> None:
        """Wants these from now on: the new ones are loaded, and no other is tried again.

        What is loaded stays, and what a client has unloaded does not come back.
        """
        waiting = [model for model in self._waiting if model in declared]
        self._waiting = waiting + [model for model in declared if model not in self._declared]
        self._declared = declared
        self._changed.set()

    async def run(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await self.loaded()
            await self._changed.wait()

    async def loaded(self) -> None:
        """Returns when all are loaded, or the daemon drains."""
        wait_s = self._first_wait_s
        while True:
            self._changed.clear()
            for model in list(self._waiting):
                if await self._load(model) and model in self._waiting:
                    self._waiting.remove(model)
            if not self._waiting:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    async def _load(self, model: Declared) -> bool:
        """Whether it need not be tried again."""
        try:
            with running(self._tracer.begin("preload") if self._tracer is not None else None):
                annotate({names.MODEL: model.name})
                loading = self._loads.load(model.name, model.options, replicas=model.replicas)
                record = await outcome(loading)
            self._registry.keep(record, model.keep_alive_s)
        except DrainingError:
            return True  # nobody wants it any more
        except LoaderdError as error:
            logger.error("%s, which is to be there always: %s", model.name, error)
            return False
        return True


def declared(config: ServerConfig) -> list[Declared]:
    """The models of the file, and those that the command line adds.

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
                quantization=model_pb2.Quantization.Value(f"QUANTIZATION_{quantization}"),
                where=_where(model),
            )
            replicas = None if model.replicas is None else check_replicas(model.replicas)
        except (InvalidArgumentError, UnsupportedOptionError) as error:
            raise ConfigError(f"models: {model.name}: {error}") from error
        keep_alive_s = model.keep_alive if model.keep_alive >= 0 else PINNED
        models.append(Declared(model.name, options, keep_alive_s, replicas))
    return models + [Declared(name) for name in config.preload]


def _where(model: DeclaredModel) -> Where:
    offload = model_pb2.Offload.Value(f"OFFLOAD_{(model.offload or 'unspecified').upper()}")
    if model.device_map == {}:
        raise InvalidArgumentError("options.module_map", "names no module")
    modules = model.device_map if isinstance(model.device_map, dict) else {}
    return Where(
        device_map=AUTO if isinstance(model.device_map, dict) else model.device_map,
        module_map=tuple(sorted(modules.items())),
        max_memory=tuple(sorted(model.max_memory.items())),
        offload=offload,
    )
