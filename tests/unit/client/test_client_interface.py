"""The interface: what is exported, and that both clients have the same."""

from __future__ import annotations

import importlib.resources
import inspect
import subprocess
import sys

import pytest

import loaderd.client
from loaderd.client import errors
from loaderd.client.parameters import GenerationParameters
from loaderd.v1.generation_pb2 import GenerateRequest, StreamGenerateRequest
from tests.contract.blocking import PAIRS

EXPORTS = {
    # clients and handles
    "AsyncCacheClient",
    "AsyncClient",
    "AsyncDeletionPlan",
    "AsyncDownloadOperation",
    "AsyncGenerationStream",
    "AsyncLease",
    "AsyncLoadOperation",
    "AsyncModel",
    "AsyncModelWatch",
    "AsyncVerifyOperation",
    "CacheClient",
    "Client",
    "DeletionPlan",
    "DownloadOperation",
    "GenerationStream",
    "Lease",
    "LoadOperation",
    "Model",
    "ModelWatch",
    "VerifyOperation",
    # connections
    "Tls",
    # models
    "ChangeReason",
    "LeaseInfo",
    "LoadOptions",
    "LoadPlan",
    "MemoryBreakdown",
    "MemoryHolder",
    "PlannedDevice",
    "LoadProgress",
    "LoadTimings",
    "ModelDetails",
    "ModelEvent",
    "ModelFailure",
    "ModelInfo",
    "ModelList",
    "Replica",
    "UnloadResult",
    "WatchUpdate",
    # generation
    "Completion",
    "Delta",
    "Finish",
    "GenerationParameters",
    "GenerationResult",
    "GenerationStarted",
    "GenerationTimings",
    "Message",
    "RenderedPrompt",
    "TokenAlternative",
    "TokenLogprob",
    "Tokenization",
    "Usage",
    # cache
    "CancelledDownload",
    "Deletion",
    "Download",
    "DownloadPlan",
    "DownloadProgress",
    "FileProblem",
    "FileProgress",
    "LocalFolder",
    "PlannedFile",
    "Resolution",
    "SkippedFile",
    "Snapshot",
    "SnapshotList",
    "VerifyProgress",
    "VerifyReport",
    "VerifyUpdate",
    # system
    "Device",
    "ServerInfo",
    # enumerations
    "DeviceType",
    "Dtype",
    "DtypeName",
    "FinishReason",
    "HealthStatus",
    "ModelSource",
    "ModelState",
    "ModelStatistics",
    "Offload",
    "OffloadName",
    "ProblemKind",
    "Quantization",
    "QuantizationName",
    "SkipReason",
    # errors
    "LoaderdError",
    "errors",
}


def public_names(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_the_exports_are_pinned() -> None:
    assert set(loaderd.client.__all__) == EXPORTS
    assert all(hasattr(loaderd.client, name) for name in EXPORTS)


@pytest.mark.parametrize("kind", errors.BY_REASON.values())
def test_every_error_can_be_reached_by_its_name(kind: type) -> None:
    assert getattr(errors, kind.__name__) is kind


@pytest.mark.parametrize(("blocking", "asyncio"), PAIRS.items())
def test_both_clients_have_the_same_names(blocking: type, asyncio: type) -> None:
    assert public_names(blocking) == public_names(asyncio)


@pytest.mark.parametrize(
    ("blocking", "asyncio", "name"),
    [
        (blocking, asyncio, name)
        for blocking, asyncio in PAIRS.items()
        for name in sorted({"__init__", *public_names(blocking)})
    ],
)
def test_both_clients_have_the_same_signatures(blocking: type, asyncio: type, name: str) -> None:
    one, other = getattr(blocking, name), getattr(asyncio, name)
    assert isinstance(one, property) == isinstance(other, property)
    if isinstance(one, property) or (name == "__init__" and blocking.__name__ != "Client"):
        return  # other constructors are not for users
    parameters = [inspect.signature(method).parameters.values() for method in (one, other)]
    assert len(set(parameters[0]) ^ set(parameters[1])) == 0


@pytest.mark.parametrize("kind", [*PAIRS, *PAIRS.values()])
def test_options_are_keyword_only(kind: type) -> None:
    for name in public_names(kind):
        method = inspect.getattr_static(kind, name)
        if not inspect.isfunction(method):
            continue
        for parameter in inspect.signature(method).parameters.values():
            if parameter.default is not parameter.empty:
                assert parameter.kind is parameter.KEYWORD_ONLY or parameter.name in {
                    "text",
                    "service",
                }


@pytest.mark.parametrize("request_type", [GenerateRequest, StreamGenerateRequest])
def test_all_fields_of_a_request_are_parameters(
    request_type: type[GenerateRequest | StreamGenerateRequest],
) -> None:
    inputs = {"model", "text", "token_ids", "messages"}
    fields = {field.name for field in request_type.DESCRIPTOR.fields}

    assert set(GenerationParameters.__annotations__) == fields - inputs


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("loaderd.client", {"torch", "transformers", "typer", "rich", "numpy", "huggingface_hub"}),
        ("loaderd.cli.main", {"torch", "transformers", "grpc", "rich", "google.protobuf"}),
    ],
)
def test_imports_stay_light(module: str, heavy: set[str]) -> None:
    program = f"import sys, {module}; print('\\n'.join(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True, timeout=60
    )

    loaded = set(run.stdout.split())
    assert module in loaded
    assert not loaded & (heavy | {"loaderd.server"})


@pytest.mark.parametrize("package", ["loaderd.client", "loaderd.cli"])
def test_the_packages_are_typed(package: str) -> None:
    assert importlib.resources.files(package).joinpath("py.typed").is_file()
