"""The fake's box."""
# ruff: noqa: N802 - names of the protocol

from __future__ import annotations

from typing import Any

from loaderd.v1 import system_pb2, system_pb2_grpc
from tests.fake_daemon.models import Models


class SystemService(system_pb2_grpc.SystemServiceServicer):
    def __init__(self, models: Models) -> None:
        self._models = models

    def GetServerInfo(
        self, request: system_pb2.GetServerInfoRequest, context: Any
    ) -> system_pb2.GetServerInfoResponse:
        response = system_pb2.GetServerInfoResponse(
            version="0.1.0",
            pid=4242,
            cache_dir="/cache",
            local_roots=["/models"],
            hub_endpoint="https://hub.example",
            standby_workers=1,
            versions={"python": "3.12.0", "torch": "2.9.0"},
            capabilities=["generation.stream"],
            active_requests=sum(model.active_requests for model in self._models.all()),
            clients=1,
        )
        response.started_at.FromSeconds(1_700_000_000)
        response.uptime.FromMilliseconds(61_500)
        return response

    def ListDevices(
        self, request: system_pb2.ListDevicesRequest, context: Any
    ) -> system_pb2.ListDevicesResponse:
        holders = self._models.holders()
        reserved = sum(holder.bytes for holder in holders)
        return system_pb2.ListDevicesResponse(
            devices=[
                system_pb2.Device(
                    id="cuda:0",
                    type=system_pb2.DEVICE_TYPE_CUDA,
                    name="Fake GPU",
                    total_bytes=80 << 30,
                    free_bytes=70 << 30,
                    available_bytes=70 << 30,
                ),
                system_pb2.Device(
                    id="cpu",
                    type=system_pb2.DEVICE_TYPE_CPU,
                    name="Fake CPU",
                    total_bytes=16 << 30,
                    free_bytes=12 << 30,
                    cores=8,
                    reserved_bytes=reserved,
                    taken_bytes=reserved,
                    holders=holders,
                    available_bytes=(12 << 30) - reserved,
                ),
            ]
        )
