"""The client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from grpc import StatusCode

from loaderd.client import responses
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
from loaderd.client.sync.cache import CacheClient
from loaderd.client.sync.lease import Lease
from loaderd.client.sync.model import Model
from loaderd.client.sync.operation import LoadOperation
from loaderd.client.sync.stream import ModelWatch
from loaderd.client.sync.transport import Stubs, Transport
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


class Client:
    """A client of one loaderd daemon.

    It connects when it is first used, and again when the connection was lost. It may be shared by
    threads. All calls raise subclasses of `LoaderdError`.

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
        self._transport = Transport(connection, timeout)
        self._cache = CacheClient(self._transport)

    @property
    def address(self) -> str:
        """The daemon's address, as a gRPC target."""
        return self._transport.connection.address

    @property
    def cache(self) -> CacheClient:
        """The daemon's cache of model files."""
        return self._cache

    @property
    def raw(self) -> Stubs:
        """The generated stubs."""
        return self._transport.stubs

    def load(
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
    ) -> Model:
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
            on_progress: Called with each progress. What it raises cancels the load.
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
        return operation.wait(on_progress)

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
    ) -> LoadOperation:
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
        return LoadOperation(
            self._transport,
            self._transport.stream(self.raw.models.LoadModel, request, timeout),
        )

    def lease(
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
    ) -> Lease:
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
        operation = LoadOperation(
            self._transport,
            self._transport.stream(self.raw.models.LoadModel, request, timeout),
        )
        return operation.leased()

    def plan(
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
            self._transport.call(self.raw.models.PlanModel, request, timeout)
        )

    def unload(
        self,
        name: ModelName,
        *,
        force: bool = False,
        grace: Seconds | None = None,
        timeout: float | None = None,
    ) -> UnloadResult:
        """Unloads a model by its name or id; see `Model.unload`."""
        request = unload_request(name, force=force, grace=grace)
        grace_s = request.grace.ToTimedelta().total_seconds()
        return responses.unload_result(
            self._transport.call(self.raw.models.UnloadModel, request, timeout, grace_s=grace_s)
        )

    def model(self, name: ModelName, *, timeout: float | None = None) -> Model:
        """The model of this name or id that is loaded, loading or failed.

        Raises:
            ModelNotLoadedError: There is none.
            InvalidArgumentError: There are several; use the id.
        """
        request = model_pb2.GetModelRequest(model=model_name(name))
        response = self._transport.call(self.raw.models.GetModel, request, timeout)
        return Model(self._transport, responses.model_info(response.model))

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """All models that are loaded, loading or failed, oldest first."""
        request = model_pb2.ListModelsRequest()
        response = self._transport.call(self.raw.models.ListModels, request, timeout)
        return [Model(self._transport, responses.model_info(model)) for model in response.models]

    def watch(self, *, timeout: float | None = None) -> ModelWatch:
        """Yields a `ModelList` of all models as they are now, then a `ModelEvent` per change.

        No change is left out between them. It goes on until it is closed; if the daemon shuts
        down it raises `DrainingError`.
        """
        request = model_pb2.WatchModelsRequest()
        return ModelWatch(self._transport.stream(self.raw.models.WatchModels, request, timeout))

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Version, uptime, settings and abilities of the daemon."""
        request = system_pb2.GetServerInfoRequest()
        return responses.server_info(
            self._transport.call(self.raw.system.GetServerInfo, request, timeout)
        )

    def devices(self, *, timeout: float | None = None) -> list[Device]:
        """Accelerators and the CPU of the daemon's box."""
        request = system_pb2.ListDevicesRequest()
        response = self._transport.call(self.raw.system.ListDevices, request, timeout)
        return [responses.device(device) for device in response.devices]

    def health(self, service: str = "", *, timeout: float | None = None) -> HealthStatus:
        """What grpc.health.v1 says of a service; "" is the daemon as a whole."""
        request = health_request(service)
        try:
            response = self._transport.call(self.raw.health.Check, request, timeout)
        except LoaderdError as error:
            if error.code is StatusCode.NOT_FOUND:
                return HealthStatus.SERVICE_UNKNOWN
            raise
        return responses.member(HealthStatus, response.status)

    def close(self) -> None:
        """Closes the connection; calls under way end with `CallCancelledError`."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
