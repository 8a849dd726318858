"""Both versions of server reflection tell of every service."""

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from loaderd.server.rpc.reflection import add_reflection


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_it_lists_the_services(version: str) -> None:
    server = grpc.aio.server()
    add_reflection(server, ["loaderd.v1.ModelService"])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = [each async for each in call(iter([asked]), timeout=20)]
    await server.stop(0)
    names = {service.name for service in answer.list_services_response.service}
    assert names == {
        "loaderd.v1.ModelService",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
