"""The asyncio client."""
# ruff: noqa: ASYNC109 - `timeout` is the call's deadline, which travels to the daemon

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from grpc import StatusCode

from loaderd.client import responses
from loaderd.client.aio.cache import AsyncCacheClient
from loaderd.client.aio.lease import AsyncLease
from loaderd.client.aio.model import AsyncModel
from loaderd.client.aio.operation import AsyncLoadOperation
from loaderd.client.aio.stream import AsyncModelWatch
from loaderd.client.aio.transport import AsyncStubs, AsyncTransport
from loaderd.client.channel import DEFAULT_TIMEOUT
from loaderd.client.connection import resolve_connection
from loaderd.client.errors import LoaderdError
from loaderd.client.parameters import Seconds
from loaderd.client.requests import (
    DeviceMap,
    ModelName,
    health_request,
    load_request,
    model_name,
    plan_request,
    unload_request,
)
from loaderd.client.tls import Tls
from loaderd.client.types import (
    Device,
    Dtype,
    DtypeName,
    HealthStatus,
    LoadPlan,
    LoadProgress,
    Offload,
    OffloadName,
    Quantization,
    QuantizationName,
    ServerInfo,
    UnloadResult,
)
from loaderd.v1 import model_pb2, system_pb2


class AsyncClient:
    """A client of one loaderd daemon.

    It connects when it is first used, and again when the connection was lost. It belongs to the
    event loop that first uses it. All calls raise subclasses of `LoaderdError`.

    Args:
        address: `host:port`, `unix:/path` or the path of a unix socket. None: `$LOADERD_ADDRESS`,
            else the daemon of `$LOADERD_DAEMON`, else `localhost:50051`.
        daemon: In place of an address, the name of a daemon of `~/.config/loaderd/client.toml`.
        token: Tells the daemon who calls. None: that of the named daemon, or `$LOADERD_TOKEN`.
        tls: How to speak TLS; True trusts the public authorities. None: as the named daemon has
            it, else none.
        insecure: Whether the token may go over a network without TLS.
        timeout: Seconds that a call may take unless it says otherwise; None: no limit. Loads,
            downloads, generations and watches have no limit unless one is given.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        daemon: str | None = None,
        token: str | None = None,
        tls: Tls | bool | None = None,
        insecure: bool = False,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> None:
        connection = resolve_connection(address, daemon, token, tls, insecure=insecure)
        self._transport = AsyncTransport(connection, timeout)
        self._cache = AsyncCacheClient(self._transport)

    @property
    def address(self) -> str:
        """The daemon's address, as a gRPC target."""
        return self._transport.connection.address

    @property
    def cache(self) -> AsyncCacheClient:
        """The daemon's cache of model files."""
        return self._cache

    @property
    def raw(self) -> AsyncStubs:
        """The generated stubs."""
        return self._transport.stubs

    async def load(
        self,
        name: ModelName,
        *,
        dtype: Dtype | DtypeName | None = None,
        device_map: DeviceMap | None = None,
        keep_alive: Seconds | None = None,
        quantization: Quantization | QuantizationName | None = None,
        max_memory: Mapping[str, int] | None = None,
        offload: Offload | OffloadName | None = None,
        replicas: int | None = None,
        on_progress: Callable[[LoadProgress], object] | None = None,
        timeout: float | None = None,
    ) -> AsyncModel:
        """Resolves a name, downloads what the cache lacks, loads the model and returns it.

        A model that is loaded already with the same options comes back at once.

        Args:
            name: `org/name`, `org/name@revision`, or the path of a local folder.
            dtype: Number type of weights and computation. None: the daemon's choice.
            device_map: "auto", "balanced" or "sequential" (accelerators; the CPU where there are
                none), "cpu", an accelerator such as "cuda:0", or the device, or "disk", of each
                module. None: "auto".
            keep_alive: How long the model stays loaded while nobody uses it; 0: until its first
                use has ended; negative: until somebody unloads it. None: the daemon's setting, or
                what the model has.
            quantization: Keeps weights in 8 or 4 bits. None: as the files have them.
            max_memory: Most bytes of devices, by their ids. None: no bounds.
            offload: Where layers may go that do not fit. None: nowhere.
            replicas: How many processes are to serve the model from now on, all under its name: one
                that is loaded already gets more, or loses those that are too many when their
                requests are over. None: as many as it has, 1 if it is new.
            on_progress: Called with each progress, and awaited if it returns an awaitable. What it
                raises cancels the load.
            timeout: Seconds; None: as long as it takes.
        """
        operation = self.start_load(
            name,
            dtype=dtype,
            device_map=device_map,
            quantization=quantization,
            max_memory=max_memory,
            offload=offload,
            keep_alive=keep_alive,
            replicas=replicas,
            timeout=timeout,
        )
        return await operation.wait(on_progress)

    def start_load(
        self,
        name: ModelName,
        *,
        dtype: Dtype | DtypeName | None = None,
        device_map: DeviceMap | None = None,
        quantization: Quantization | QuantizationName | None = None,
        max_memory: Mapping[str, int] | None = None,
        offload: Offload | OffloadName | None = None,
        keep_alive: Seconds | None = None,
        replicas: int | None = None,
        timeout: float | None = None,
    ) -> AsyncLoadOperation:
        """Starts what `load` does and returns its handle."""
        request = load_request(
            name,
            dtype=dtype,
            device_map=device_map,
            quantization=quantization,
            max_memory=max_memory,
            offload=offload,
            keep_alive=keep_alive,
            replicas=replicas,
        )
        return AsyncLoadOperation(
            self._transport,
            self._transport.stream(self.raw.models.LoadModel, request, timeout),
        )

    async def lease(
        self,
        name: ModelName,
        ttl: Seconds,
        *,
        dtype: Dtype | DtypeName | None = None,
        device_map: DeviceMap | None = None,
        quantization: Quantization | QuantizationName | None = None,
        max_memory: Mapping[str, int] | None = None,
        offload: Offload | OffloadName | None = None,
        keep_alive: Seconds | None = None,
        replicas: int | None = None,
        timeout: float | None = None,
    ) -> AsyncLease:
        """Loads a model as `load` does, and holds it from the moment when it is READY.

        Args:
            name: See `load`, as all options.
            ttl: How long the lease lives after its last renewal, from a second to a day.
            dtype: See above.
            device_map: See above.
            quantization: See above.
            max_memory: See above.
            offload: See above.
            keep_alive: See above.
            replicas: See above.
            timeout: Seconds; None: as long as the load takes.
        """
        request = load_request(
            name,
            dtype=dtype,
            device_map=device_map,
            quantization=quantization,
            max_memory=max_memory,
            offload=offload,
            keep_alive=keep_alive,
            replicas=replicas,
            lease_ttl=ttl,
        )
        operation = AsyncLoadOperation(
            self._transport,
            self._transport.stream(self.raw.models.LoadModel, request, timeout),
        )
        return await operation.leased()

    async def plan(
        self,
        name: ModelName,
        *,
        dtype: Dtype | DtypeName | None = None,
        device_map: DeviceMap | None = None,
        quantization: Quantization | QuantizationName | None = None,
        max_memory: Mapping[str, int] | None = None,
        offload: Offload | OffloadName | None = None,
        replicas: int | None = None,
        timeout: float | None = None,
    ) -> LoadPlan:
        """Says what a load of a model in the cache would take, and whether it would fit now.

        Loads and reserves nothing. The arguments are those of `load`; None of `replicas` is 1.

        Raises:
            SnapshotNotFoundError: The cache does not have the model.
        """
        request = plan_request(
            name,
            dtype=dtype,
            device_map=device_map,
            quantization=quantization,
            max_memory=max_memory,
            offload=offload,
            replicas=replicas,
        )
        return responses.load_plan(
            await self._transport.call(self.raw.models.PlanModel, request, timeout)
        )

    async def unload(
        self,
        name: ModelName,
        *,
        force: bool = False,
        grace: Seconds | None = None,
        timeout: float | None = None,
    ) -> UnloadResult:
        """Unloads a model by its name or id; see `AsyncModel.unload`."""
        request = unload_request(name, force=force, grace=grace)
        grace_s = request.grace.ToTimedelta().total_seconds()
        return responses.unload_result(
            await self._transport.call(
                self.raw.models.UnloadModel, request, timeout, grace_s=grace_s
            )
        )

    async def model(self, name: ModelName, *, timeout: float | None = None) -> AsyncModel:
        """The model of this name or id that is loaded, loading or failed.

        Raises:
            ModelNotLoadedError: There is none.
            InvalidArgumentError: There are several; use the id.
        """
        request = model_pb2.GetModelRequest(model=model_name(name))
        response = await self._transport.call(self.raw.models.GetModel, request, timeout)
        return AsyncModel(self._transport, responses.model_info(response.model))

    async def models(self, *, timeout: float | None = None) -> list[AsyncModel]:
        """All models that are loaded, loading or failed, oldest first."""
        request = model_pb2.ListModelsRequest()
        response = await self._transport.call(self.raw.models.ListModels, request, timeout)
        return [
            AsyncModel(self._transport, responses.model_info(model)) for model in response.models
        ]

    def watch(self, *, timeout: float | None = None) -> AsyncModelWatch:
        """Yields a `ModelList` of all models as they are now, then a `ModelEvent` per change.

        No change is left out between them. It goes on until it is closed; if the daemon shuts
        down it raises `DrainingError`.
        """
        request = model_pb2.WatchModelsRequest()
        return AsyncModelWatch(
            self._transport.stream(self.raw.models.WatchModels, request, timeout)
        )

    async def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Version, uptime, settings and abilities of the daemon."""
        request = system_pb2.GetServerInfoRequest()
        return responses.server_info(
            await self._transport.call(self.raw.system.GetServerInfo, request, timeout)
        )

    async def devices(self, *, timeout: float | None = None) -> list[Device]:
        """Accelerators and the CPU of the daemon's box."""
        request = system_pb2.ListDevicesRequest()
        response = await self._transport.call(self.raw.system.ListDevices, request, timeout)
        return [responses.device(device) for device in response.devices]

    async def health(self, service: str = "", *, timeout: float | None = None) -> HealthStatus:
        """What grpc.health.v1 says of a service; "" is the daemon as a whole."""
        request = health_request(service)
        try:
            response = await self._transport.call(self.raw.health.Check, request, timeout)
        except LoaderdError as error:
            if error.code is StatusCode.NOT_FOUND:
                return HealthStatus.SERVICE_UNKNOWN
            raise
        return responses.member(HealthStatus, response.status)

    async def close(self) -> None:
        """Closes the connection; calls under way end with `CallCancelledError`."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
