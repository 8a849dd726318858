"""The real grpcurl, through reflection: what somebody without the SDK sees."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loaderd.client import Client
from tests.daemon import SpawnedDaemon

QUESTION = {"messages": {"messages": [{"role": "user", "content": "Say hello."}]}}


class Grpcurl:
    """Calls grpcurl on one daemon."""

    def __init__(self, address: str) -> None:
        program = shutil.which("grpcurl", path=str(Path(sys.executable).parent))
        assert program, "grpcurl is not installed: run `make setup`"
        self._program = program
        self._address = address

    def run(
        self, *arguments: str, data: object = None, expect: int = 0
    ) -> subprocess.CompletedProcess[str]:
        command = [self._program, "-plaintext", "-format-error"]
        if data is not None:
            command += ["-d", json.dumps(data)]
        result = subprocess.run(
            [*command, self._address, *arguments],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert (result.returncode == 0) == (expect == 0), result.stderr
        return result

    def call(self, method: str, data: object = None) -> list[Any]:
        """The messages of the answer."""
        text = self.run(f"loaderd.v1.{method}", data=data or {}).stdout
        decoder, messages, at = json.JSONDecoder(), [], 0
        while (at := _skip_space(text, at)) < len(text):
            message, at = decoder.raw_decode(text, at)
            messages.append(message)
        return messages

    def fail(self, method: str, data: object = None) -> Any:
        """The status of a call that fails."""
        return json.loads(self.run(f"loaderd.v1.{method}", data=data or {}, expect=1).stderr)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


@pytest.fixture
def grpcurl(daemon: SpawnedDaemon) -> Grpcurl:
    return Grpcurl(daemon.address)


@pytest.fixture(scope="module")
def loaded_model(shared_daemon: SpawnedDaemon, tiny_model: Path) -> Iterator[tuple[Grpcurl, str]]:
    """A model that stays loaded for many calls, and grpcurl to make them."""
    with Client(shared_daemon.address) as client:
        model = client.load(str(tiny_model))
        yield Grpcurl(shared_daemon.address), model.id
        model.unload(force=True)


def test_it_lists_and_describes(grpcurl: Grpcurl) -> None:
    services = set(grpcurl.run("list").stdout.split())
    assert services == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "loaderd.v1.CacheService",
        "loaderd.v1.GenerationService",
        "loaderd.v1.ModelService",
        "loaderd.v1.SystemService",
    }
    for service in services:
        assert "rpc" in grpcurl.run("describe", service).stdout
    assert "max_new_tokens" in grpcurl.run("describe", "loaderd.v1.StreamGenerateRequest").stdout


def test_it_loads_and_streams(grpcurl: Grpcurl, real_model: Path) -> None:
    *progress, last = grpcurl.call("ModelService/LoadModel", {"model": str(real_model)})
    assert progress
    assert last["model"]["state"] == "MODEL_STATE_READY"
    request = {"model": str(real_model), "max_new_tokens": 6, "do_sample": False}
    started, *deltas, finished = grpcurl.call(
        "GenerationService/StreamGenerate", request | {"text": "The capital of France is"}
    )
    assert started["started"]["prompt_tokens"] > 0
    assert "Paris" in "".join(message["delta"]["text"] for message in deltas)
    assert finished["finished"]["usage"]["generated_tokens"] == 6
    (answer,) = grpcurl.call("GenerationService/Generate", request | QUESTION)
    assert answer["completions"][0]["text"]
    (models,) = grpcurl.call("ModelService/ListModels")
    assert len(models["models"]) == 1


def test_health(grpcurl: Grpcurl) -> None:
    assert "SERVING" in grpcurl.run("grpc.health.v1.Health/Check").stdout
    unknown = grpcurl.run("grpc.health.v1.Health/Check", data={"service": "none"}, expect=1)
    assert json.loads(unknown.stderr)["code"] == 5


def test_an_error_has_its_details(grpcurl: Grpcurl) -> None:
    status = grpcurl.fail("GenerationService/Generate", {"model": "org/name", "text": "Hi"})
    assert status["code"] == 9
    details = {detail["@type"].rpartition(".")[2]: detail for detail in status["details"]}
    assert details["ErrorInfo"]["reason"] == "MODEL_NOT_LOADED"
    assert details["ErrorInfo"]["domain"] == "loaderd"
    metadata = details["ErrorInfo"]["metadata"]
    assert metadata.pop("request_id")
    assert metadata == {"model": "org/name"}
    assert details["PreconditionFailure"]["violations"][0]["subject"] == "org/name"


EMPTY_OR_HOSTILE: list[tuple[str, Any]] = [
    (f"{service}/{method}", data)
    for service, methods in {
        "ModelService": ["LoadModel", "UnloadModel", "GetModel"],
        "CacheService": ["ResolveModel", "DownloadModel"],
        "GenerationService": [
            "Generate",
            "StreamGenerate",
            "Tokenize",
            "Detokenize",
            "ApplyChatTemplate",
        ],
    }.items()
    for method in methods
    for data in (
        {},
        {"model": "../../etc/passwd"},
        {"model": "/etc"},
        {"model": "\u0000\ud83d\ude42"},
        {"model": "org/name@" + "a" * 5000},
    )
]


@pytest.mark.parametrize(("method", "data"), EMPTY_OR_HOSTILE)
def test_whatever_it_sends_the_answer_is_a_status_of_ours(
    grpcurl: Grpcurl, method: str, data: object
) -> None:
    status = grpcurl.fail(method, data)
    assert status["code"] in {3, 5, 9}
    assert "Traceback" not in json.dumps(status)
    reasons = [detail.get("reason") for detail in status["details"]]
    assert any(reasons)


@pytest.mark.parametrize(
    "request_",
    [
        {"text": "x", "temperature": "NaN"},
        {"text": "x", "temperature": "Infinity"},
        {"text": "x", "top_p": -1},
        {"text": "x", "max_new_tokens": 4294967295},
        {"text": "x", "max_time": "-1s"},
        {"text": "x", "seed": "18446744073709551615", "max_new_tokens": 1, "temperature": "inf"},
        {"text": ""},
        {"token_ids": {"ids": []}},
        {"token_ids": {"ids": [4294967295]}},
        {"messages": {"messages": []}},
        {"messages": {"messages": [{}]}},
        {"text": "x", "stop": [""]},
        {"text": "x", "bad_words": [""]},
        {"text": "x", "chat_template_kwargs": {"a": 1}},
        {"messages": {"messages": [{"role": "x" * 100000}]}},
    ],
)
def test_bad_parameters_name_their_field(
    loaded_model: tuple[Grpcurl, str], request_: dict[str, Any]
) -> None:
    grpcurl, model_id = loaded_model
    status = grpcurl.fail("GenerationService/StreamGenerate", {"model": model_id} | request_)
    assert status["code"] == 3
    (violation,) = [
        each
        for detail in status["details"]
        if detail["@type"].endswith("BadRequest")
        for each in detail["field_violations"]
    ]
    assert violation["field"].partition(".")[0].partition("[")[0] in request_
