"""loaderd.v1.ModelService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from loaderd.server.errors import InvalidArgumentError
from loaderd.server.models.leases import Lease, check_ttl
from loaderd.server.models.loads import LoadProgress, Loads
from loaderd.server.models.planner import Planner
from loaderd.server.models.record import ModelRecord
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.rpc import convert
from loaderd.server.rpc.access import current_caller
from loaderd.v1 import model_pb2, model_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """Models in memory: load, unload, list, watch, plan."""

    def __init__(self, registry: ModelRegistry, loads: Loads, planner: Planner) -> None:
        self._registry = registry
        self._loads = loads
        self._planner = planner

    async def LoadModel(
        self, request: model_pb2.LoadModelRequest, context: Context
    ) -> AsyncIterator[model_pb2.LoadModelResponse]:
        """Streams progress, then the model."""
        options, replicas = convert.load_options(request.options), convert.replicas(request)
        keep_alive, ttl = convert.keep_alive(request), convert.span(request, "lease_ttl")
        if ttl is not None:
            check_ttl(ttl, "lease_ttl")
        loading = self._loads.load(request.model, options, current_caller(), replicas)
        async with aclosing(loading) as updates:
            async for update in updates:
                if isinstance(update, LoadProgress):
                    yield model_pb2.LoadModelResponse(progress=convert.load_progress(update))
                else:
                    yield self._loaded(update, keep_alive, ttl)

    def _loaded(
        self, record: ModelRecord, keep_alive: float | None, ttl: float | None
    ) -> model_pb2.LoadModelResponse:
        lease = None if ttl is None else self._acquire(record, ttl)
        if keep_alive is not None:
            self._registry.keep(record, keep_alive)
        return model_pb2.LoadModelResponse(
            model=convert.model(self._registry.view(record)),
            lease=None if lease is None else convert.lease(lease),
        )

    async def UnloadModel(
        self, request: model_pb2.UnloadModelRequest, context: Context
    ) -> model_pb2.UnloadModelResponse:
        """Ends a model's process."""
        grace = convert.span(request, "grace")
        if grace is not None and not request.force:
            raise InvalidArgumentError("grace", "goes with force; without it nothing is ended")
        if grace is not None and grace < 0:
            raise InvalidArgumentError("grace", "must not be negative")
        view, freed = await self._registry.unload(request.model, request.force, grace or 0.0)
        return model_pb2.UnloadModelResponse(model=convert.model(view), freed_bytes=freed)

    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: Context
    ) -> model_pb2.GetModelResponse:
        """One model."""
        view = self._registry.view(self._registry.find(request.model))
        return model_pb2.GetModelResponse(model=convert.model(view))

    async def ListModels(
        self, request: model_pb2.ListModelsRequest, context: Context
    ) -> model_pb2.ListModelsResponse:
        """All models."""
        return model_pb2.ListModelsResponse(models=map(convert.model, self._registry.views()))

    async def WatchModels(
        self, request: model_pb2.WatchModelsRequest, context: Context
    ) -> AsyncIterator[model_pb2.WatchModelsResponse]:
        """All models, then every change."""
        self._registry.check_open()
        with self._registry.events.subscribe() as events:
            models = model_pb2.ModelList(models=map(convert.model, self._registry.views()))
            yield model_pb2.WatchModelsResponse(snapshot=models)
            async for event in events:
                yield model_pb2.WatchModelsResponse(event=convert.model_event(event))

    async def PlanModel(
        self, request: model_pb2.PlanModelRequest, context: Context
    ) -> model_pb2.PlanModelResponse:
        """What a load would take."""
        options = convert.load_options(request.options)
        replicas = convert.replicas(request) or 1
        return convert.load_plan(await self._planner.plan(request.model, options, replicas))

    async def AcquireLease(
        self, request: model_pb2.AcquireLeaseRequest, context: Context
    ) -> model_pb2.AcquireLeaseResponse:
        """Holds a model between calls."""
        ttl = convert.span(request, "ttl")
        if ttl is None:
            raise InvalidArgumentError("ttl", "is required")
        lease = self._acquire(self._registry.find(request.model), ttl)
        return model_pb2.AcquireLeaseResponse(lease=convert.lease(lease))

    async def RenewLease(
        self, request: model_pb2.RenewLeaseRequest, context: Context
    ) -> model_pb2.RenewLeaseResponse:
        """Starts a lease's time anew."""
        lease = self._registry.leases.renew(request.lease_id)
        return model_pb2.RenewLeaseResponse(lease=convert.lease(lease))

    async def ReleaseLease(
        self, request: model_pb2.ReleaseLeaseRequest, context: Context
    ) -> model_pb2.ReleaseLeaseResponse:
        """Ends a lease."""
        self._registry.leases.release(request.lease_id)
        return model_pb2.ReleaseLeaseResponse()

    def _acquire(self, record: ModelRecord, ttl: float) -> Lease:
        self._registry.check_serves(record)
        return self._registry.leases.acquire(record.id, ttl)
