"""What a daemon and its workers log, and what never gets into any log."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loaderd.client import Client, errors
from loaderd.server.access.command import create_token
from tests.daemon import SpawnedDaemon

PROMPT = "xyzzy-plugh-4711"
HUB_TOKEN = "hf_" + "s" * 30


def parsed(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_all_lines_are_json_with_ids_and_none_has_a_secret(
    spawn: Callable[..., SpawnedDaemon], tiny_model: Path, tmp_path: Path
) -> None:
    audit, clients = tmp_path / "audit.log", tmp_path / "clients.toml"
    token = create_token(clients, "ann", "admin", None)
    daemon = spawn(
        *("--log-format", "json", "--log-level", "debug", "--audit-log", str(audit)),
        *("--clients", str(clients), "--allow-local", str(tiny_model.parent), "--standby", "0"),
        HF_TOKEN=HUB_TOKEN,
        LOADERD_HUB_ENDPOINT="http://127.0.0.1:1",
        LOADERD_HUB_ATTEMPTS="1",
    )
    with Client(daemon.address, token=token) as client:
        model = client.load(str(tiny_model))
        result = model.generate(PROMPT, max_new_tokens=12, request_id="mine", seed=3)
        model.generate(messages=[{"role": "user", "content": PROMPT}], stop=[PROMPT])
        with pytest.raises(errors.InvalidArgumentError) as bad:
            model.generate(PROMPT, temperature=-1.0)
        with pytest.raises(errors.LoaderdError) as refused:
            client.cache.download("org/name")
        model.unload()
    with (
        Client(daemon.address, token="wrong-" + PROMPT) as client,
        pytest.raises(errors.UnauthenticatedError),
    ):
        client.models()
    assert daemon.stop() == 0

    lines = parsed(daemon.log)
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, lines))
    mine = [line for line in lines if line.get("request_id") == "mine"]
    by_worker = [line for line in mine if "worker" in line]
    assert [line["model"] for line in by_worker] == [str(tiny_model)]
    assert "generated" in by_worker[0]["message"]
    (end,) = (line for line in mine if line["logger"] == "loaderd.server.rpc.call")
    assert (end["client"], end["code"]) == ("ann", "OK")
    assert end["method"] == "loaderd.v1.GenerationService.Generate"
    for error in (bad.value, refused.value):
        assert any(line.get("request_id") == error.request_id for line in lines)
    (by_child,) = (line for line in lines if line["logger"] == "loaderd.server.store.hub_access")
    assert (by_child["model"], by_child["request_id"]) == ("org/name", refused.value.request_id)

    actions = parsed(audit.read_text())
    assert [(line["action"], line["client"], line["code"]) for line in actions] == [
        ("LoadModel", "ann", "OK"),
        ("DownloadModel", "ann", "UNAVAILABLE"),
        ("UnloadModel", "ann", "OK"),
    ]
    assert actions[1]["request_id"] == refused.value.request_id
    assert stat.S_IMODE(audit.stat().st_mode) == 0o600

    told = daemon.log + audit.read_text()
    assert len(result.text.strip()) > 5
    for secret in (PROMPT, result.text.strip(), json.dumps(result.text)[1:-1], token, HUB_TOKEN):
        assert secret not in told
