"""The fake's models: a load is a list of steps, shared by all who wait for it."""
# ruff: noqa: N802 - names of the protocol

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.duration_pb2 import Duration

from loaderd.v1 import cache_pb2, generation_pb2, model_pb2, model_pb2_grpc, system_pb2
from tests.fake_daemon.cache import commit_of, verify_steps
from tests.fake_daemon.downloads import download_progress, download_steps
from tests.fake_daemon.failure import FailureError
from tests.fake_daemon.generation import SUPPORTED
from tests.fake_daemon.leases import Leases

if TYPE_CHECKING:
    from tests.fake_daemon.daemon import FakeDaemon

FREED_BYTES = 123_456_789
WEIGHT_BYTES = 38_000_000
HELD_BYTES = 52_000_000
KV_CAPACITY_TOKENS = 10_000


class Load:
    """A load under way: each waiter moves it on, the last one that leaves stops it."""

    def __init__(self, steps: list[model_pb2.LoadProgress]) -> None:
        self.steps = steps
        self.done = 0
        self.waiters = 0


def _step(
    state: model_pb2.ModelState.ValueType,
    download: cache_pb2.DownloadProgress | None = None,
    verification: cache_pb2.VerifyProgress | None = None,
) -> model_pb2.LoadProgress:
    return model_pb2.LoadProgress(
        state=state,
        download=download,
        elapsed=Duration(nanos=1_000_000),
        verification=verification,
    )


class Models:
    """The registry."""

    def __init__(self, daemon: FakeDaemon) -> None:
        self._daemon = daemon
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._sequence = itertools.count(1)
        self._watchers: list[queue.Queue[model_pb2.ModelEvent]] = []
        self._models: dict[str, model_pb2.Model] = {}
        self._loads: dict[str, Load] = {}
        self.leases = Leases()
        self.freed_bytes = FREED_BYTES

    def all(self) -> list[model_pb2.Model]:
        with self._lock:
            return [self.copy(model) for model in self._models.values()]

    def find(self, name: str) -> model_pb2.Model:
        """The model of this name or id, itself."""
        with self._lock:
            if not name:
                raise FailureError("INVALID_NAME", field="model", problem="must not be empty")
            found = [m for m in self._models.values() if name in (m.id, m.name)]
            if not found:
                raise FailureError("MODEL_NOT_LOADED", model=name)
            if len(found) > 1:
                raise FailureError("INVALID_ARGUMENT", field="model", problem="several; use the id")
            return found[0]

    def ready(self, name: str) -> model_pb2.Model:
        model = self.find(name)
        if model.state != model_pb2.MODEL_STATE_READY:
            raise FailureError("MODEL_NOT_LOADED", model=name)
        return model

    @contextmanager
    def in_use(self, name: str) -> Iterator[model_pb2.Model]:
        """Counts a request of the model."""
        model = self.ready(name)
        with self._lock:
            model.active_requests += 1
        try:
            yield model
        finally:
            with self._lock:
                model.active_requests -= 1

    def count(self, model: model_pb2.Model, usage: generation_pb2.Usage) -> None:
        """Counts the tokens of a request that has ended; all of the last second, it seems."""
        with self._lock:
            model.statistics.prompt_tokens += usage.prompt_tokens
            model.statistics.generated_tokens += usage.generated_tokens
            model.statistics.prompt_tokens_per_second = usage.prompt_tokens
            model.statistics.generated_tokens_per_second = usage.generated_tokens

    @contextmanager
    def join(self, request: model_pb2.LoadModelRequest) -> Iterator[model_pb2.Model]:
        """Finds or starts the load of a model; leaving it last before its end stops it."""
        with self._lock:
            model = self._find_loaded(request) or self._start(request)
            load = self._loads[model.id]
            load.waiters += 1
        try:
            yield model
        finally:
            with self._lock:
                load.waiters -= 1
                if load.waiters == 0 and model.state != model_pb2.MODEL_STATE_READY:
                    self._remove(model)

    def advance(self, model: model_pb2.Model) -> model_pb2.LoadModelResponse | None:
        """Takes the load's next step; None when the model is READY."""
        with self._lock:
            load = self._loads[model.id]
            if load.done >= len(load.steps):
                self._become_ready(model)
                return None
            progress = load.steps[load.done]
            if (progress.state, model.name) != (model_pb2.MODEL_STATE_LOADING, "demo/stuck"):
                load.done += 1
            if model.state != progress.state:
                self._change(model, progress.state)
            progress.model_id = model.id
            return model_pb2.LoadModelResponse(progress=progress)

    def unload(self, name: str, *, force: bool) -> model_pb2.Model:
        with self._lock:
            model = self.find(name)
            loading = model.state != model_pb2.MODEL_STATE_READY
            leases = self.leases.of(model.id)
            if (model.active_requests or leases or loading) and not force:
                raise FailureError(
                    "MODEL_IN_USE",
                    model=name,
                    active_requests=str(model.active_requests),
                    active_leases=str(leases),
                )
            self.leases.drop(model.id)
            self._change(model, model_pb2.MODEL_STATE_UNLOADING)
            self._remove(model)
            return self.copy(model)

    def keep(self, model: model_pb2.Model, request: Any) -> None:
        """Takes over a keep-alive and a lease that a request brings."""
        with self._lock:
            if request.HasField("keep_alive"):
                model.keep_alive.CopyFrom(request.keep_alive)
            if isinstance(request, model_pb2.LoadModelRequest):
                return
            if request.HasField("lease_id"):
                self.leases.renew(request.lease_id, model.id)

    @contextmanager
    def watch(self) -> Iterator[tuple[list[model_pb2.Model], queue.Queue[model_pb2.ModelEvent]]]:
        events: queue.Queue[model_pb2.ModelEvent] = queue.Queue()
        with self._lock:
            self._watchers.append(events)
            models = self.all()
        try:
            yield models, events
        finally:
            self._watchers.remove(events)

    def holders(self) -> list[system_pb2.MemoryHolder]:
        """Who has memory of the CPU."""
        return [
            system_pb2.MemoryHolder(model_id=model.id, name=model.name, bytes=HELD_BYTES)
            for model in self.all()
        ]

    def plan(self, request: model_pb2.PlanModelRequest) -> model_pb2.PlanModelResponse:
        """The plan of a model; `demo/base` does not fit into what other models leave."""
        repo_id = self._daemon.cache.check_name(request.model)
        self._check_where(request.options)
        self.check_replicas(request)
        if not repo_id.startswith("/") and repo_id not in self._daemon.cache.cached:
            raise FailureError("SNAPSHOT_NOT_FOUND", model=request.model)
        holders, modules = self.holders(), request.options.module_map
        fits = repo_id != "demo/base" or not holders
        needed = 60_000_000 * (request.replicas or 1)
        return model_pb2.PlanModelResponse(
            fits=fits,
            devices=[model_pb2.PlannedDevice(id="cpu", bytes=needed)] if fits else [],
            needed_bytes=needed,
            free_bytes=12 << 30 if fits else 1000,
            holders=holders,
            breakdown=model_pb2.MemoryBreakdown(
                weights_bytes=WEIGHT_BYTES,
                kv_cache_bytes=2_000_000,
                activation_bytes=10_000_000,
                headroom_bytes=10_000_000,
            ),
            dtype=request.options.dtype or model_pb2.DTYPE_BFLOAT16,
            dtype_reason="asked for" if request.options.dtype else "this CPU computes it natively",
            kv_tokens=4096,
            offloaded_disk_bytes=WEIGHT_BYTES // 2 if "disk" in modules.values() else 0,
            unknown=[] if repo_id == "demo/chat" else ["activations: there is no hidden size"],
        )

    @staticmethod
    def check_replicas(request: Any) -> None:
        if request.HasField("replicas") and not 1 <= request.replicas <= 32:
            raise FailureError("INVALID_ARGUMENT", field="replicas", problem="is out of bounds")

    @staticmethod
    def _check_where(options: model_pb2.LoadOptions) -> None:
        """The box has a CPU and nothing else."""
        named = {"device_map": [options.device_map], "max_memory": options.max_memory}
        for field, devices in {**named, "module_map": options.module_map.values()}.items():
            for device in devices:
                if device.startswith("cuda:"):
                    problem = f"this box has no device {device!r}"
                    raise FailureError(
                        "UNSUPPORTED_OPTION", field=f"options.{field}", problem=problem
                    )
        if options.device_map not in {"", "auto", "balanced", "sequential", "cpu"}:
            raise FailureError("INVALID_ARGUMENT", field="options.device_map", problem="is none")
        if options.module_map and (options.max_memory or options.offload):
            raise FailureError("INVALID_ARGUMENT", field="options.module_map", problem="is enough")

    def _find_loaded(self, request: model_pb2.LoadModelRequest) -> model_pb2.Model | None:
        for model in self._models.values():
            if (model.name, model.options) == (request.model, request.options):
                return model
        return None

    def _start(self, request: model_pb2.LoadModelRequest) -> model_pb2.Model:
        repo_id = self._daemon.cache.check_name(request.model)
        self._check_where(request.options)
        local = repo_id.startswith("/")
        cached = local or repo_id in self._daemon.cache.cached
        steps = [_step(model_pb2.MODEL_STATE_RESOLVING)]
        if not cached:
            steps += [
                _step(model_pb2.MODEL_STATE_DOWNLOADING, download=download_progress(done))
                for done in download_steps()
            ]
        if repo_id in self._daemon.cache.unhashed:
            steps += [
                _step(model_pb2.MODEL_STATE_LOADING, verification=verification)
                for verification in verify_steps()
            ]
        steps += [_step(model_pb2.MODEL_STATE_LOADING)] * 2
        model = model_pb2.Model(
            id=f"m-{next(self._numbers)}",
            name=request.model,
            source=model_pb2.MODEL_SOURCE_LOCAL
            if local
            else model_pb2.MODEL_SOURCE_CACHED
            if cached
            else model_pb2.MODEL_SOURCE_HUB,
            repo_id="" if local else repo_id,
            commit="" if local else commit_of(repo_id),
            options=request.options,
            keep_alive=Duration(seconds=300),
            stale=not local and not self._daemon.cache.hub_answers,
            wanted_replicas=request.replicas or 1,
        )
        model.created_at.GetCurrentTime()
        self._models[model.id] = model
        self._loads[model.id] = Load(steps)
        return model

    def _become_ready(self, model: model_pb2.Model) -> None:
        if model.state == model_pb2.MODEL_STATE_READY:
            return
        if model.repo_id:
            self._daemon.cache.cached.add(model.repo_id)
        details = model_pb2.ModelDetails(
            architecture="FakeForCausalLM",
            dtype=model.options.dtype or model_pb2.DTYPE_BFLOAT16,
            dtype_reason="asked for" if model.options.dtype else "this CPU computes it natively",
            engine="fake",
            engine_reason="there is no other",
            context_length=100_000,
            parameter_count=19_000_000,
            weight_bytes=WEIGHT_BYTES,
            device_map=model.options.module_map or {"": "cpu"},
            offloaded_bytes=WEIGHT_BYTES // 2 if "disk" in model.options.module_map.values() else 0,
            has_chat_template=model.repo_id != "demo/base",
            supported_parameters=sorted(SUPPORTED),
            worker_pid=4242,
            quantization=model.options.quantization,
            quantization_reason="by the fake" if model.options.quantization else "",
            planned_bytes=60_000_000,
            memory_bytes=52_000_000,
        )
        model.details.CopyFrom(details)
        self._add_replicas(model)
        model.ready_at.GetCurrentTime()
        model.timings.resolve.FromMilliseconds(5)
        model.timings.weights.FromMilliseconds(15)
        model.timings.total.FromMilliseconds(25)
        model.statistics.kv_capacity_tokens = KV_CAPACITY_TOKENS
        self._change(model, model_pb2.MODEL_STATE_READY)
        self._set_health(model, serving=True)

    def scale(self, model: model_pb2.Model, request: model_pb2.LoadModelRequest) -> None:
        """Gives a READY model the replicas that a load asks for."""
        with self._lock:
            if request.HasField("replicas"):
                model.wanted_replicas = request.replicas
            self._add_replicas(model)
            del model.replicas[model.wanted_replicas :]

    @staticmethod
    def _add_replicas(model: model_pb2.Model) -> None:
        while len(model.replicas) < model.wanted_replicas:
            replica = model.replicas.add(
                number=len(model.replicas) + 1,
                worker_pid=4242 + len(model.replicas),
                devices=["cpu"],
                memory_bytes=HELD_BYTES,
            )
            replica.ready_at.GetCurrentTime()

    def _remove(self, model: model_pb2.Model) -> None:
        if self._models.pop(model.id, None) is not None:
            del self._loads[model.id]
            self._change(model, model_pb2.MODEL_STATE_UNLOADED)
            self._set_health(model, serving=False)

    def _set_health(self, model: model_pb2.Model, *, serving: bool) -> None:
        for service in (model.name, model.id):
            self._daemon.set_health(service, serving=serving)

    def _change(self, model: model_pb2.Model, state: int) -> None:
        leaving = {model_pb2.MODEL_STATE_UNLOADING, model_pb2.MODEL_STATE_UNLOADED}
        event = model_pb2.ModelEvent(
            sequence=next(self._sequence),
            previous_state=model.state,
            reason=model_pb2.CHANGE_REASON_UNLOAD
            if state in leaving
            else model_pb2.CHANGE_REASON_LOAD,
        )
        event.time.GetCurrentTime()
        if model.state:
            event.previous_duration.FromMilliseconds(20)
        model.state = model_pb2.ModelState.ValueType(state)
        event.model.CopyFrom(model)
        for watcher in self._watchers:
            watcher.put(event)

    def copy(self, model: model_pb2.Model) -> model_pb2.Model:
        copy = model_pb2.Model()
        copy.CopyFrom(model)
        copy.active_leases = self.leases.of(model.id)
        if copy.state == model_pb2.MODEL_STATE_READY:
            copy.statistics.running_requests = copy.active_requests
        else:
            copy.ClearField("statistics")
        if copy.ready_at.seconds:
            copy.last_used_at.CopyFrom(copy.ready_at)
            if copy.keep_alive.seconds >= 0 and not copy.active_leases:
                copy.expires_at.FromSeconds(copy.ready_at.seconds + copy.keep_alive.seconds)
        return copy


class ModelService(model_pb2_grpc.ModelServiceServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self._daemon = daemon
        self._models = daemon.models

    def LoadModel(
        self, request: model_pb2.LoadModelRequest, context: grpc.ServicerContext
    ) -> Iterator[model_pb2.LoadModelResponse]:
        call = self._daemon.seen("LoadModel", request, context)
        with call.follow(context), self._models.join(request) as model:
            self._models.check_replicas(request)
            while (progress := self._models.advance(model)) is not None:
                yield progress
                if not self._daemon.pause(context, self._daemon.step_s):
                    return
            if request.replicas > len(model.replicas):
                growing = _step(model_pb2.MODEL_STATE_LOADING)
                yield model_pb2.LoadModelResponse(progress=growing)
            self._models.scale(model, request)
            self._models.keep(model, request)
            response = model_pb2.LoadModelResponse()
            if request.HasField("lease_ttl"):
                response.lease.CopyFrom(self._models.leases.acquire(model.id, request.lease_ttl))
            response.model.CopyFrom(self._models.copy(model))
            yield response

    def UnloadModel(
        self, request: model_pb2.UnloadModelRequest, context: Any
    ) -> model_pb2.UnloadModelResponse:
        response = model_pb2.UnloadModelResponse(freed_bytes=self._models.freed_bytes)
        with self._daemon.seen("UnloadModel", request, context).follow(context):
            if request.HasField("grace") and not request.force:
                raise FailureError("INVALID_ARGUMENT", field="grace", problem="goes with force")
            response.model.CopyFrom(self._models.unload(request.model, force=request.force))
        return response

    def GetModel(
        self, request: model_pb2.GetModelRequest, context: Any
    ) -> model_pb2.GetModelResponse:
        response = model_pb2.GetModelResponse()
        with self._daemon.seen("GetModel", request, context).follow(context):
            response.model.CopyFrom(self._models.copy(self._models.find(request.model)))
        return response

    def ListModels(
        self, request: model_pb2.ListModelsRequest, context: Any
    ) -> model_pb2.ListModelsResponse:
        with self._daemon.seen("ListModels", request, context).follow(context):
            return model_pb2.ListModelsResponse(models=self._models.all())

    def PlanModel(
        self, request: model_pb2.PlanModelRequest, context: Any
    ) -> model_pb2.PlanModelResponse:
        response = model_pb2.PlanModelResponse()
        with self._daemon.seen("PlanModel", request, context).follow(context):
            response.CopyFrom(self._models.plan(request))
        return response

    def WatchModels(
        self, request: model_pb2.WatchModelsRequest, context: grpc.ServicerContext
    ) -> Iterator[model_pb2.WatchModelsResponse]:
        call = self._daemon.seen("WatchModels", request, context)
        with call.follow(context), self._models.watch() as (models, events):
            snapshot = model_pb2.ModelList(models=models)
            yield model_pb2.WatchModelsResponse(snapshot=snapshot)
            while context.is_active():
                if self._daemon.stopping.is_set():
                    raise FailureError("DRAINING")
                try:
                    event = events.get(timeout=0.02)
                except queue.Empty:
                    continue
                yield model_pb2.WatchModelsResponse(event=event)

    def AcquireLease(
        self, request: model_pb2.AcquireLeaseRequest, context: Any
    ) -> model_pb2.AcquireLeaseResponse:
        with self._daemon.seen("AcquireLease", request, context).follow(context):
            model = self._models.ready(request.model)
            lease = self._models.leases.acquire(model.id, request.ttl)
            return model_pb2.AcquireLeaseResponse(lease=lease)

    def RenewLease(
        self, request: model_pb2.RenewLeaseRequest, context: Any
    ) -> model_pb2.RenewLeaseResponse:
        with self._daemon.seen("RenewLease", request, context).follow(context):
            return model_pb2.RenewLeaseResponse(lease=self._models.leases.renew(request.lease_id))

    def ReleaseLease(
        self, request: model_pb2.ReleaseLeaseRequest, context: Any
    ) -> model_pb2.ReleaseLeaseResponse:
        with self._daemon.seen("ReleaseLease", request, context).follow(context):
            self._models.leases.release(request.lease_id)
            return model_pb2.ReleaseLeaseResponse()
